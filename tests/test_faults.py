"""Faults planted in the real loop are found while it runs, and healthy runs are quiet: three on an untrained model here, all of
tests/benchmarks/faults.py on a trained one where slow tests run."""
import pytest
from benchmarks.faults import FAULTS, GROUP, HEALTHY, Fault, made, run, said

import rlhfkit as rk
from rlhfkit import health
from rlhfkit.samples.couplets import held_out

NAMED = {fault.name: fault for fault in FAULTS}


@pytest.fixture(scope="module")
def untrained(tiny_path, tmp_path_factory):
    """An untrained policy and couplets, made up as what `made` gives."""
    from types import SimpleNamespace
    folder = tmp_path_factory.mktemp("faults")
    records = [rk.Record(f"上联：{a}", (rk.Answer(b, 1.0),), "下联：") for a, b in held_out(40)]
    rk.write_records(records[:32], folder / "train.jsonl")
    rk.write_records(records[32:], folder / "dev.jsonl")
    return SimpleNamespace(policy=tiny_path, data=str(folder), reward={})


def found(fault, models, folder, **more):
    """Names of the checks that spoke in four steps on an untrained model."""
    result = run(fault, models, folder / "run", steps=4, **dict(
        batch_size=8, max_new_tokens=6, critic="actor", reward_path="", reward_function="longer", unfinished_score=0.0) | more)
    return {name for name, _ in result["said"]}


def test_of_a_healthy_run_of_an_untrained_model_only_the_end_token_is_said_which_it_never_gives(untrained, tmp_path):
    for config in {}, GROUP | dict(advantage="grpo", kl_in="loss", batch_size=4):
        assert found(Fault("healthy", (), config), untrained, tmp_path) == {"end token"}


@pytest.mark.parametrize("name", ["dropout switched on after the checks", "sampler at temperature 1.5",
                                  "scoring shifted by a token", "the same reward for all", "critic with a dead head"])
def test_a_fault_is_found_within_four_steps_and_named(name, untrained, tmp_path):
    assert set(NAMED[name].checks) <= found(NAMED[name], untrained, tmp_path)


def test_the_log_of_a_run_says_at_which_step_a_check_spoke_first():
    lines = ["step 0  eval_score 1.0", "step 2  score 1.0", "warn: entropy: low; cause; try: that", "step 3  score 1.0",
             "warn: entropy: low; cause; try: that", "fail: KL bounded: KL 30 nats; cause; try: that", "rows: 5 from the cache"]
    assert said("\n".join(lines)) == {("entropy", "warn"): 2, ("KL bounded", "fail"): 3}


def test_every_check_of_ppo_has_a_fault_planted_in_the_loop():
    assert {name for fault in FAULTS for name in fault.checks} == {check.name for check in health.CHECKS if "ppo" in check.stages}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return made(tmp_path_factory.mktemp("models"))


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_each_planted_fault_is_found_by_its_checks(fault, trained, tmp_path):
    assert set(fault.checks) <= {name for name, _ in run(fault, trained, tmp_path / "run")["said"]}


@pytest.mark.slow
@pytest.mark.parametrize("fault", HEALTHY, ids=lambda fault: fault.name)
def test_a_healthy_run_of_every_kind_is_quiet(fault, trained, tmp_path):
    assert run(fault, trained, tmp_path / "run")["said"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_healthy_runs_of_ten_seeds_are_quiet(seed, trained, tmp_path):
    result = run(Fault("healthy", (), {}), trained, tmp_path / "run", seed)
    assert result["said"] == {} and not result["error"] and result["history"][-1]["eval_gold"] > 0
