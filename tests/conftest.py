"""Shared fixtures. Everything runs offline on a CPU; real data is optional and its absence is a skip with a reason."""
import os

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false",
                  MPLBACKEND="agg")

from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared():
    """Folder with real corpora, evaluation rows and parity fixtures, beside the project."""
    folder = PROJECT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder.name}/ beside the project: real data and parity fixtures are not here")
    return folder


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory):
    """One tiny, untrained Pangu model folder for the whole test run."""
    import rlhfkit as rk
    path = tmp_path_factory.mktemp("tiny") / "pangu"
    rk.tiny(path)
    return str(path)
