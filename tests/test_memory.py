"""memory.py against published parameter counts, the 2023 kit's measured rows, and properties."""
import json
from types import SimpleNamespace

import pytest

from rlhfkit import memory
from rlhfkit.memory import will_it_fit

SIZES = {"tiny": (2, 4, 64, 300), "350M": (24, 16, 1024, 40000), "2.6B": (32, 32, 2560, 40000),
         "13B": (40, 40, 5120, 40064)}                  # layers, heads, hidden size, vocabulary


@pytest.fixture
def config(tmp_path):
    """Makes an SFT config (other fields by keyword) for a Pangu folder that holds nothing but a config.json."""
    def folder(size, attention="sdpa"):
        layers, heads, hidden, vocab = SIZES[size]
        path = tmp_path / f"pangu-{size}-{attention}"
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps(dict(
            model_type="pangu", num_layers=layers, num_heads=heads, hidden_size=hidden, vocab_size=vocab,
            max_position_embeddings=1024, attn_implementation=attention)))
        return str(path)

    def make(size, attention="sdpa", stage="sft", **fields):
        values = dict(stage=stage, model_path=folder(size, attention), max_length=512, batch_size=1, dtype="mixed",
                      gradient_accumulation_steps=1, lora_rank=0, lora_targets="", gradient_checkpointing=False,
                      zero_stage=0, offload="none", bucket_size=200_000_000, max_live_parameters=10 ** 9,
                      overlap_comm=False)
        if stage == "ppo":
            values |= dict(reward_path=folder("350M"), critic="reward", answers_per_prompt=1, mini_batch_size=0, max_new_tokens=256,
                           frozen_on="device", ema_decay=0.0)
        return SimpleNamespace(**values | fields)
    return make


@pytest.mark.parametrize("size, parameters", [("350M", 345_368_576), ("2.6B", 2_625_295_360), ("13B", 12_801_198_080)])
def test_the_published_sizes_are_counted_exactly_without_loading_anything(config, size, parameters):
    assert memory.shape_of(config(size).model_path).parameters == parameters


def test_parts_worked_by_hand(config):
    # float32, 2 layers, hidden 64, vocabulary 300, one row of 512: weights 4, gradients 4, Adam 8 bytes a parameter;
    # activations 68 * 2 * 512 * 64 and logits 12 * 512 * 300 bytes
    estimate = will_it_fit(config("tiny", dtype="float32"), 1, 1)
    parameters = memory.shape_of(config("tiny").model_path).parameters
    expected = {"weights": 4 * parameters, "gradients": 4 * parameters, "optimizer": 8 * parameters,
                "activations": 4_456_448, "logits": 1_843_200}
    for name, size in expected.items():
        assert estimate.parts[name] * 2 ** 30 == pytest.approx(size)
    assert estimate.gpu_gib == sum(estimate.parts.values())


# what the 2023 kit measured (peers.md 3.2: the checkable rows, and two in float32), in MiB; eager attention, 512 tokens
@pytest.mark.parametrize("size, batch_size, dtype, measured", [
    ("350M", 48, "mixed", 78 * 1024), ("2.6B", 8, "mixed", 79421), ("2.6B", 1, "mixed", 52783),
    ("350M", 1, "mixed", 9010), ("350M", 1, "float32", 8750), ("2.6B", 1, "float32", 49347)])
def test_the_2023_rows_on_one_gpu_are_met_within_a_tenth(config, size, batch_size, dtype, measured):
    estimate = will_it_fit(config(size, "eager", batch_size=batch_size, dtype=dtype), 80, 1)
    assert estimate.gpu_gib == pytest.approx(measured / 1024, rel=0.1)


@pytest.mark.parametrize("size, gpus, fields, measured", [
    ("350M", 3, dict(zero_stage=0), 9406), ("350M", 3, dict(zero_stage=1), 5674),
    ("350M", 3, dict(zero_stage=2, bucket_size=500_000_000), 6262),
    ("350M", 3, dict(zero_stage=2, offload="optimizer"), 3668),
    ("350M", 3, dict(zero_stage=2, offload="optimizer", bucket_size=10 ** 9), 5194),
    ("2.6B", 3, dict(zero_stage=2, offload="optimizer"), 10796),
    ("2.6B", 1, dict(zero_stage=2, offload="optimizer"), 12537),
    ("2.6B", 1, dict(zero_stage=2, offload="optimizer", bucket_size=500_000_000, overlap_comm=True), 14887)])
def test_the_2023_rows_of_zero_0_to_2_are_met_within_15_percent(config, size, gpus, fields, measured):
    estimate = will_it_fit(config(size, "eager", dtype="float16", **fields), 80, gpus)
    assert estimate.gpu_gib == pytest.approx(measured / 1024, rel=0.15)


@pytest.mark.parametrize("gpus, fields", [
    (1, dict(dtype="float32")), (1, dict(dtype="mixed")), (3, dict(dtype="float16")),
    (3, dict(dtype="float16", zero_stage=1)),
    (3, dict(dtype="float16", zero_stage=2, bucket_size=500_000_000)), (3, dict(dtype="float16", zero_stage=3))])
def test_what_ran_out_of_16_gib_in_2023_is_not_said_to_fit(config, gpus, fields):
    assert not will_it_fit(config("2.6B", "eager", **fields), 16, gpus).fits


def test_zero_shares_out_one_part_a_stage(config):
    parts = [will_it_fit(config("2.6B", dtype="bfloat16", zero_stage=stage), 80, 8).parts for stage in range(4)]
    assert [p["optimizer"] / parts[0]["optimizer"] for p in parts] == [1, 1 / 8, 1 / 8, 1 / 8]
    assert [p["gradients"] / parts[0]["gradients"] for p in parts] == [1, 1, 1 / 8, 1 / 8]
    assert [p["weights"] / parts[0]["weights"] for p in parts] == [1, 1, 1, 1 / 8]


def test_offload_moves_states_to_the_host(config):
    plain, offloaded = (will_it_fit(config("2.6B", dtype="bfloat16", zero_stage=3, offload=offload), 80, 1)
                        for offload in ("none", "all"))
    assert not {"weights", "gradients", "optimizer"} & set(offloaded.parts)
    assert offloaded.host_gib > plain.host_gib + 2.6e9 * 16 / 2 ** 30
    assert will_it_fit(config("2.6B", dtype="bfloat16", zero_stage=3, offload="all"), 80, 1, host_gib=32).fits is False


def test_checkpointing_sdpa_and_lora_each_save_what_they_should(config):
    def parts(**fields):
        return will_it_fit(config("2.6B", batch_size=8, **fields), 80, 1).parts
    plain, lora = parts(), parts(lora_rank=16)
    assert parts(gradient_checkpointing=True)["activations"] < plain["activations"] / 5
    assert parts(attention="eager")["activations"] > 2 * plain["activations"]
    assert lora["optimizer"] < plain["optimizer"] / 50 and lora["weights"] == pytest.approx(plain["weights"], rel=0.02)


def test_ppo_s_average_and_what_waits_on_the_host_by_hand(config):
    weights = 2_625_295_360 / 2 ** 30
    assert will_it_fit(config("2.6B", "sdpa", "ppo", ema_decay=0.99), 80, 1).parts["average"] == pytest.approx(4 * weights)
    waiting = will_it_fit(config("2.6B", "sdpa", "ppo", frozen_on="host"), 80, 1).parts
    assert "reference" not in waiting and "reward model" not in waiting
    cache = will_it_fit(config("2.6B", "sdpa", "ppo", dtype="bfloat16"), 80, 1).parts["cache"]
    assert cache == pytest.approx(512 * 327_680 / 2 ** 30)            # peers.md: 327,680 bytes a token


def test_ppo_counts_critic_reference_and_reward_model_and_none_that_is_not_there(config):
    full = will_it_fit(config("2.6B", "sdpa", "ppo"), 80, 1).parts
    assert full["reference"] == pytest.approx(2_625_295_360 * 4 / 2 ** 30)
    assert full["reward model"] == pytest.approx(345_368_576 * 4 / 2 ** 30)
    no_critic = will_it_fit(config("2.6B", "sdpa", "ppo", critic="none"), 80, 1).parts
    assert full["optimizer"] - no_critic["optimizer"] == pytest.approx(345_368_576 * 8 / 2 ** 30)
    by_function = will_it_fit(config("2.6B", "sdpa", "ppo", critic="none", reward_path="", lora_rank=8), 80, 1).parts
    assert not {"reference", "reward model"} & set(by_function)


def test_a_dpo_row_is_two_answers_and_a_reward_row_has_no_logits(config):
    sft, dpo, reward = (will_it_fit(config("350M", stage=stage), 80, 1).parts for stage in ("sft", "dpo", "reward"))
    assert dpo["logits"] == 2 * sft["logits"] and dpo["activations"] == 2 * sft["activations"]
    assert "logits" not in reward and reward["activations"] == dpo["activations"]


@pytest.mark.parametrize("size, stage, gpu_gib, gpus, fields", [
    ("350M", "sft", 24, 1, dict(batch_size=48)), ("2.6B", "sft", 80, 1, dict(batch_size=32)),
    ("350M", "sft", 10, 1, dict(batch_size=7)), ("2.6B", "dpo", 24, 4, {}), ("2.6B", "ppo", 80, 1, dict(batch_size=32)),
    ("13B", "sft", 80, 8, dict(batch_size=8)), ("13B", "sft", 80, 1, {})])
def test_the_suggested_settings_do_fit_and_keep_the_global_batch(config, size, stage, gpu_gib, gpus, fields):
    plain = config(size, stage=stage, **fields)
    estimate = will_it_fit(plain, gpu_gib, gpus, host_gib=1024)
    changes = eval(f"dict({estimate.suggestion})")
    assert not estimate.fits and changes
    better = config(size, stage=stage, **fields | changes)
    assert will_it_fit(better, gpu_gib, gpus, host_gib=1024).fits
    assert better.batch_size * better.gradient_accumulation_steps == plain.batch_size


def test_where_nothing_helps_the_suggestion_says_so(config):
    assert "larger GPUs" in will_it_fit(config("13B"), 4, 1, host_gib=16).suggestion


def test_an_estimate_reads_as_a_table_with_its_verdict(config):
    text = str(will_it_fit(config("350M", batch_size=48), 24, 1))
    assert "activations" in text and "of 24" in text and text.endswith("gradient_accumulation_steps=2")
    assert str(will_it_fit(config("350M"), 40, 1)).endswith("it fits")
