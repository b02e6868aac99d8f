"""Run configs: what is refused and how it is said, the trip through JSON, foreign parameters, the Result on disk."""
import dataclasses
import errno
import json
from pathlib import Path

import pytest

import rlhfkit as rk
from rlhfkit.configs import STAGES, config_from

PATHS = dict(model_path="model", data_path="data", output_dir="out")
MADE = {"pretrain": rk.Pretrain(**PATHS), "sft": rk.SFT(**PATHS), "reward": rk.Reward(**PATHS), "dpo": rk.DPO(**PATHS),
        "ppo": rk.PPO(**PATHS, reward_path="reward")}


def ppo(**fields):
    return rk.PPO(**PATHS, **{"reward_path": "reward", **fields})


def test_yaml_s_1e_5_is_a_string_and_the_message_says_what_to_write():
    with pytest.raises(TypeError) as error:
        rk.SFT(**PATHS, learning_rate="1e-5")
    for part in ("learning_rate", "string '1e-5'", "must be of type float", "in a YAML parameter file write 1.0e-5"):
        assert part in str(error.value)


@pytest.mark.parametrize("fields, rule", [
    (dict(batch_size=8.0), "batch_size is the float 8.0; it must be of type int"),
    (dict(batch_size=True), "batch_size is the bool True; it must be of type int"),
    (dict(num_epochs="3"), "num_epochs is the string '3'; it must be of type int"),
    (dict(resume=1), "resume is the int 1; it must be of type bool"),
    (dict(dropout=None), "dropout is the NoneType None; it must be of type float"),
    (dict(data_path=["a", "b"]), "data_path is the list .*; it must be of type str")])
def test_another_type_is_refused_and_both_types_are_named(fields, rule):
    with pytest.raises(TypeError, match=rule):
        rk.SFT(**(PATHS | fields))


def test_a_whole_number_is_a_float_and_a_path_is_a_string():
    config = rk.SFT(Path("model"), "data", "out", weight_decay=1)
    assert (config.model_path, config.weight_decay) == ("model", 1.0)
    assert type(config.weight_decay) is float and type(config.model_path) is str


@pytest.mark.parametrize("make, name, value, rule", [
    (rk.SFT, "learning_rate", -1.0, "> 0"), (rk.SFT, "learning_rate", 0.0, "> 0"), (rk.SFT, "batch_size", 0, "> 0"),
    (rk.Pretrain, "max_length", -5, "> 0"), (rk.Pretrain, "max_steps", -1, ">= 0"), (rk.Reward, "seed", -1, ">= 0"),
    (rk.Reward, "dropout", 1.0, "in [0, 1)"), (rk.DPO, "warmup_ratio", 1.5, "in [0, 1)"), (rk.DPO, "beta", 0.0, "> 0"),
    (rk.DPO, "pairs_per_prompt", 0, "> 0"), (rk.SFT, "samples", -1, ">= 0"), (ppo, "clip", 0.0, "> 0"),
    (ppo, "kl_coefficient", -0.1, ">= 0"), (ppo, "temperature", 0.0, "> 0"), (ppo, "answers_per_prompt", 0, "> 0")])
def test_a_number_out_of_range_is_named_with_its_rule(make, name, value, rule):
    with pytest.raises(ValueError) as error:
        make(**({} if make is ppo else PATHS) | {name: value})
    assert f"{name} is {value}; it must be {rule}" in str(error.value)


def test_a_number_out_of_range_comes_with_a_way_out():
    with pytest.raises(ValueError, match="learning_rate is -1.0; it must be > 0; try 1e-0?5"):
        rk.SFT(**PATHS, learning_rate=-1)


@pytest.mark.parametrize("fields", [dict(top_p=1.5), dict(lam=2.0), dict(gamma=1.5)])
def test_shares_and_discounts_above_1_are_refused(fields):
    with pytest.raises(ValueError, match="must be"):
        ppo(**fields)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_refused(value):
    with pytest.raises(ValueError, match=f"weight_decay is {value}; it must be a finite number"):
        rk.SFT(**PATHS, weight_decay=value)


@pytest.mark.parametrize("name, value, others", [
    ("dtype", "fp16", "float32, mixed, bfloat16, float16"), ("zero_stage", 4, "0, 1, 2, 3"),
    ("offload", "cpu", "none, optimizer, all"),
    ("lr_scheduler_type", "cosinus", "cosine, linear, constant")])
def test_a_choice_that_there_is_not_names_those_that_there_are(name, value, others):
    with pytest.raises(ValueError) as error:
        rk.Pretrain(**PATHS, **{name: value})
    assert f"{name} is {value!r}; it must be one of {others}" in str(error.value)


@pytest.mark.parametrize("fields",
                         [dict(offload="optimizer"), dict(offload="optimizer", zero_stage=1),
                          dict(offload="all", zero_stage=2)])
def test_offload_asks_for_the_stage_that_has_it(fields):
    with pytest.raises(ValueError, match="optimizer needs stage 2 or 3, all needs 3"):
        rk.SFT(**PATHS, **fields)
    assert rk.SFT(**PATHS, offload=fields["offload"], zero_stage=3).zero_stage == 3


@pytest.mark.parametrize("fields, message", [
    (dict(reward_path=""), "neither reward_path nor reward_function"),
    (dict(reward_path="", reward_function="a:b"),
     "critic is 'reward' without a reward_path; set reward_path, or critic to 'actor'"),
    (dict(critic="none"), "advantage 'gae' does not go with critic 'none'"),
    (dict(advantage="rloo", answers_per_prompt=2), "advantage 'rloo' does not go with critic 'reward'"),
    (dict(advantage="grpo", critic="none"), "answers_per_prompt is 1; grpo compares answers of one prompt: 2 or more"),
    (dict(max_new_tokens=64, max_length=64),
     "max_new_tokens is 64; it must leave room for the prompt in max_length 64")])
def test_ppo_settings_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ppo(**fields)


@pytest.mark.parametrize("fields", [
    dict(reward_path="", reward_function="a:b", critic="actor"),
    dict(critic="none", advantage="rloo", answers_per_prompt=2),
    dict(critic="frozen"), dict(reward_path="a,b")])
def test_ppo_settings_that_go_together_are_taken(fields):
    assert ppo(**fields).stage == "ppo"


@pytest.mark.parametrize("make", [rk.SFT, rk.DPO])
def test_samples_that_leave_no_room_for_a_prompt_are_refused_before_the_run(make):
    """A max_length of 32 with the default of 64 new tokens ended in an error about a max_length of -32."""
    with pytest.raises(ValueError, match="max_new_tokens is 64; it must leave room for the prompt in max_length 32"):
        make(**PATHS, max_length=32)
    assert make(**PATHS, max_length=32, samples=0).max_length == 32


@pytest.mark.parametrize("stage", STAGES)
def test_a_config_comes_back_from_json_as_it_was(stage):
    config = dataclasses.replace(MADE[stage], learning_rate=3.0e-4, lora_targets="q_proj", seed=7)
    again = config_from(json.loads(json.dumps(config.to_dict())))
    assert again == config and type(again) is type(config) and config.to_dict()["stage"] == stage


@pytest.mark.parametrize("stage", STAGES)
def test_every_number_has_a_rule_but_the_one_that_may_be_anything(stage):
    rules = {name for c in type(MADE[stage]).__mro__ for name in vars(c).get("rules", {})}
    numbers = {f.name for f in dataclasses.fields(MADE[stage]) if f.type in (int, float)} - {"unfinished_score"}
    assert numbers <= rules <= {f.name for f in dataclasses.fields(MADE[stage])}


OWN = "model_path: str = ''  # a folder\nlearning_rate: float = 1.0e-5\nbatch_size: int = 8"


def test_a_parameter_that_the_notebook_does_not_have_stops_it():
    """papermill only warns, and the run goes on with the default."""
    with pytest.raises(ValueError) as error:
        rk.check_parameters({"In": ["", OWN, "# Parameters\nlearning_rte = 0.1\nbatch_size = 4\n",
                                    "rk.check_parameters(globals())"]})
    for part in ("no parameter 'learning_rte'", "did you mean 'learning_rate'?",
                 "batch_size, learning_rate, model_path"):
        assert part in str(error.value)


@pytest.mark.parametrize("cells", [
    ["", OWN, "# Parameters\nlearning_rate = 0.1\n", "rk.check_parameters(globals())"],
    ["", OWN, "rk.check_parameters(globals()); other = 1"], ["", OWN], [],
    ["", OWN, "other = 1", "# Parameters\nother = 2"]])
def test_known_parameters_and_other_cells_do_not_stop_it(cells):
    assert rk.check_parameters({"In": cells}) is None
    assert rk.check_parameters({}) is None


def result_in(folder, loss=0.5):
    return rk.Result("sft", {"seed": 0}, {"loss": loss}, str(folder), [{"step": 1, "loss": loss}],
                     [{"step": 0, "prompt": "问", "answer": "答"}])


def test_a_result_comes_back_from_its_folder_also_a_moved_one(tmp_path):
    result_in(tmp_path).save()
    assert rk.Result.load(tmp_path) == result_in(tmp_path)
    assert "问" in (tmp_path / "result.json").read_text("utf-8")
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert rk.Result.load(moved) == result_in(moved)


def test_a_folder_without_a_finished_run_says_so(tmp_path):
    with pytest.raises(FileNotFoundError,
                       match="holds no finished run .no result.json.; run its stage to the end first"):
        rk.Result.load(tmp_path)


def test_a_disk_full_while_a_result_is_saved_keeps_the_one_before(tmp_path, monkeypatch):
    result_in(tmp_path).save()
    written = Path.write_text

    def half(path, text, *args, **kwargs):
        written(path, text[:len(text) // 2], *args, **kwargs)
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space left"):
        result_in(tmp_path, loss=0.25).save()
    assert rk.Result.load(tmp_path).metrics == {"loss": 0.5}
