"""Timed steps, of T5 too, which no stage takes."""
import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

import rlhfkit as rk


@pytest.fixture(scope="module")
def t5_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2,
                                        decoder_start_token_id=0)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("dtype", ["float32", "mixed", "bfloat16"])
def test_steps_of_t5_and_of_pangu_are_timed(t5_path, tiny_path, dtype):
    for path in (t5_path, tiny_path):
        found = rk.time_steps(path, batch_size=2, length=16, steps=3, dtype=dtype)
        assert found["tokens_per_second"] == pytest.approx(32 / found["seconds_per_step"]) and found["memory_gib"] > 0
    with pytest.raises(ValueError, match="steps is 1; the first one warms up"):
        rk.time_steps(tiny_path, steps=1)


def test_no_stage_takes_an_encoder_and_a_decoder(t5_path, tmp_path):
    rk.write_records([rk.Record("春", (rk.Answer("秋", 1),))], tmp_path / "data.jsonl")
    with pytest.raises(ValueError, match="holds a t5 model, an encoder and a decoder.*rk.time_steps measures this one"):
        rk.launch(rk.SFT(t5_path, tmp_path / "data.jsonl", tmp_path / "run", samples=0, report_to="none"))
