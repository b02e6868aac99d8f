"""Shared fixtures. Everything runs offline on a CPU; real data is optional and its absence is a skip with a reason."""
import json
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


SUPPORT = PROJECT / "runs/support.json"         # {family: {column: passed, or the parity figure}}, for tests/benchmarks/support.py
_found = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    marker = item.get_closest_marker("supports")
    if marker and report.when == "call" and hasattr(item, "callspec"):
        columns = _found.setdefault(item.callspec.params["name"], {})
        figures = dict(item.user_properties)
        for column in marker.args:
            columns[column] = max(figures[column], columns.get(column, 0)) if column in figures else report.passed and columns.get(column, True)
    return report


def pytest_sessionfinish():
    if _found:
        known = json.loads(SUPPORT.read_text(encoding="utf-8")) if SUPPORT.is_file() else {}
        SUPPORT.parent.mkdir(exist_ok=True)
        SUPPORT.write_text(json.dumps(known | {name: known.get(name, {}) | found for name, found in _found.items()}, indent=1), encoding="utf-8")


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory):
    """One tiny, untrained Pangu model folder for the whole test run."""
    import rlhfkit as rk
    path = tmp_path_factory.mktemp("tiny") / "pangu"
    rk.tiny(path)
    return str(path)
