"""A PPO run that is killed with SIGKILL and started again by the same command ends as one that was let alone, bit by bit; under
another number of processes it ends close. `tests/benchmarks/kills.py` does a hundred."""
import sys

import pytest
import torch
from conftest import PROJECT
from safetensors.torch import load_file

sys.path.insert(0, str(PROJECT / "tests/benchmarks"))
import kills  # noqa: E402

several = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="one GPU: two workers need two, or none")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return kills.prepared(tmp_path_factory.mktemp("kills"))


def test_a_run_killed_in_an_update_and_in_a_save_ends_as_one_that_was_let_alone(folder):
    alone = kills.Start(kills.command(folder, "alone", 0), folder / "alone.log")
    hits, ended = kills.killed_run(folder, "killed", 0, [("update", 4, 0.02, False), ("save", 1, 0.005, False)])
    assert ended and alone.end() and len(hits) == 2
    ours, theirs = kills.outcome(folder / "killed"), kills.outcome(folder / "alone")
    assert kills.differences(ours, theirs) == []
    assert len(theirs["rollouts"]) == kills.STEPS * kills.ROWS and theirs["weights"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, pytest.param(2, marks=several)])
def test_ten_kills_at_random_moments_leave_every_run_equal(processes, folder):
    found = kills.campaign(folder, processes, 5)
    assert found["wrong"] == [] and found["equal"] == found["ended"] == found["runs"] >= 2


@several
@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 1])
def test_a_run_that_goes_on_under_another_number_of_processes_ends_close(processes, folder):
    """Two workers until after the first checkpoint, then one with twice the rows: sums are taken in another order."""
    alone = kills.Start(kills.command(folder, f"two-{processes}", 2), folder / f"two-{processes}.log")
    assert alone.end()
    start = kills.Start(kills.command(folder, f"changed-{processes}", 2), folder / f"changed-{processes}.log")
    assert start.wait_for("update", 3) and start.kill(kills.tree(start.process.pid))
    assert kills.Start(kills.command(folder, f"changed-{processes}", processes), folder / f"changed-{processes}.last.log").end()
    ours, theirs = (kills.outcome(folder / f"{name}-{processes}") for name in ("changed", "two"))
    assert [row["prompt_ids"] for row in ours["rollouts"]] == [row["prompt_ids"] for row in theirs["rollouts"]]
    for a, b in zip(ours["figures"], theirs["figures"], strict=True):
        assert a == pytest.approx(b, abs=1e-4), a.get("step")
    for name in theirs["weights"]:
        a, b = (load_file(folder / f"{run}-{processes}" / name) for run in ("changed", "two"))
        assert max((a[key] - b[key]).abs().max().item() for key in b) < 2e-4
