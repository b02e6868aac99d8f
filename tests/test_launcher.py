"""From the cell to the workers: streaming, failure, interruption, and the same numbers for 0 and 2 processes."""
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import PROJECT

import rlhfkit as rk
from rlhfkit.launcher import WorkerError
from rlhfkit.samples.couplets import held_out


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    records = [rk.Record(prompt=f"上联：{a}", prefix="下联：", answers=(rk.Answer(b, 1), rk.Answer(a, 0))) for a, b in held_out(40)]
    rk.write_records(records[:32], folder / "train.jsonl")
    rk.write_records(records[32:], folder / "dev.jsonl")
    return folder


several = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="one GPU: two workers need two, or none")


def losses(result):
    return [row["loss"] for row in result.history if "loss" in row]


def sft(tiny_path, data, output_dir, **more):
    return rk.SFT(tiny_path, data, output_dir, max_length=64, max_new_tokens=8, samples=2, learning_rate=1e-3, max_steps=4, logging_steps=1,
                  report_to="none", **more)


@several
def test_two_processes_give_the_numbers_of_one_and_their_lines_stream_into_the_cell(tiny_path, data, tmp_path, capfd):
    one = rk.launch(sft(tiny_path, data, tmp_path / "one", batch_size=8))
    capfd.readouterr()
    two = rk.launch(sft(tiny_path, data, tmp_path / "two", batch_size=4), num_processes=2)
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert two.metrics["eval_loss"] == pytest.approx(one.metrics["eval_loss"], abs=1e-5)
    assert "step 4  loss" in capfd.readouterr().out
    assert [s["answer"] for s in two.samples] == [s["answer"] for s in one.samples]


@several
def test_a_worker_that_fails_raises_in_the_cell_with_its_own_last_lines(tiny_path, data, tmp_path):
    config = rk.PPO(tiny_path, data, tmp_path / "ppo", max_length=64, max_new_tokens=4, batch_size=4, max_steps=1, critic="actor",
                    reward_function="no_such_module:score", report_to="none")
    with pytest.raises(WorkerError, match="No module named 'no_such_module'"):
        rk.launch(config, num_processes=2)
    assert not (tmp_path / "ppo" / "run.pid").exists()


def test_interrupting_the_cell_ends_the_workers(tiny_path, data, tmp_path):
    code = ("import rlhfkit as rk\nrk.launch(rk.SFT(%r, %r, %r, max_length=64, max_new_tokens=8, max_steps=100000, logging_steps=1, "
            "report_to='none'), num_processes=1)" % (tiny_path, str(data), str(tmp_path / "run")))
    cell = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))     # a shell's background job ignores it
    assert any("step 2  loss" in line for line in cell.stdout)              # the workers are at work
    cell.send_signal(signal.SIGINT)
    cell.communicate(timeout=60)
    assert cell.returncode != 0
    assert not running(tmp_path)


def test_a_detached_run_is_attached_to_and_stopped(tiny_path, data, tmp_path, capfd):
    folder = rk.launch(sft(tiny_path, data, tmp_path / "run", batch_size=8), num_processes=1, detach=True)
    result = rk.attach(folder)
    assert result.metrics["steps"] == 4 and "step 4  loss" in capfd.readouterr().out
    long = rk.SFT(tiny_path, data, tmp_path / "long", max_length=64, max_new_tokens=8, max_steps=100_000, logging_steps=1, report_to="none")
    folder = rk.launch(long, num_processes=1, detach=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "long" / "log.txt").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    rk.stop(folder)
    assert not running(tmp_path)


def test_the_same_run_again_returns_its_result_and_another_run_in_its_folder_is_refused(tiny_path, data, tmp_path):
    first = rk.launch(sft(tiny_path, data, tmp_path / "run", batch_size=8))
    again = rk.launch(sft(tiny_path, data, tmp_path / "run", batch_size=8))
    assert again.history == first.history and again.metrics == first.metrics
    with pytest.raises(FileExistsError, match="already holds another run .*batch_size: 8 there, 4 here.*choose another folder"):
        rk.launch(sft(tiny_path, data, tmp_path / "run", batch_size=4))


def test_zero_needs_workers_and_detaching_too(tiny_path, data, tmp_path):
    with pytest.raises(ValueError, match="zero_stage is 2 with num_processes 0.*set num_processes"):
        rk.launch(sft(tiny_path, data, tmp_path / "run", zero_stage=2))
    with pytest.raises(ValueError, match="detach is True with num_processes 0"):
        rk.launch(sft(tiny_path, data, tmp_path / "run"), detach=True)
    with pytest.raises(FileNotFoundError, match="hostfile .* is no file"):
        rk.launch(sft(tiny_path, data, tmp_path / "run"), num_processes=1, hostfile=tmp_path / "hosts")
    with pytest.raises(FileNotFoundError, match="no launched run"):
        rk.attach(tmp_path)


@several
@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "dpo"])
def test_every_zero_stage_equals_one_process(stage, zero_stage, tiny_path, data, tmp_path):
    cls = rk.configs.STAGES[stage] if hasattr(rk, "configs") else {"pretrain": rk.Pretrain, "sft": rk.SFT, "reward": rk.Reward, "dpo": rk.DPO}[stage]
    more = {} if stage in ("pretrain", "reward") else {"samples": 0}
    common = dict(max_length=64, learning_rate=1e-3, max_steps=4, logging_steps=1, report_to="none", **more)
    one = rk.launch(cls(tiny_path, data, tmp_path / "one", batch_size=8, **common))
    two = rk.launch(cls(tiny_path, data, tmp_path / "two", batch_size=4, zero_stage=zero_stage, **common), num_processes=2)
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    assert two.metrics["eval_loss"] == pytest.approx(one.metrics["eval_loss"], abs=1e-4)


def running(folder):
    """Command lines of live processes that name the folder."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            line = open(f"/proc/{pid}/cmdline", "rb").read().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(folder) in line and "rlhfkit.launcher" in line:
            found.append(line)
    return found


@several
@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_ppo_on_two_processes_samples_and_learns_what_one_does(zero_stage, tiny_path, data, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(PROJECT / "tests")
    monkeypatch.setenv("PYTHONPATH", str(PROJECT / "tests"))
    common = dict(max_length=64, max_new_tokens=6, learning_rate=1e-4, max_steps=3, logging_steps=1, report_to="none", critic="actor",
                  reward_function="test_launcher:length_of_answers", samples=0)
    one = rk.launch(rk.PPO(tiny_path, data, tmp_path / "one", batch_size=8, mini_batch_size=4, **common))
    two = rk.launch(rk.PPO(tiny_path, data, tmp_path / "two", batch_size=4, mini_batch_size=2, zero_stage=zero_stage, **common), num_processes=2)
    for ours, theirs in zip(two.history, one.history):
        for name in ("score", "kl", "policy_loss", "value_loss", "eval_score", "grad_norm"):
            assert ours.get(name) == pytest.approx(theirs.get(name), abs=1e-3), name


def length_of_answers(prompts, answers):
    return [float(len(answer)) for answer in answers]
