"""What the stages on HF's trainers share: rows set aside, held-out loss, LoRA, models that are too short, the save."""
import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rlhfkit as rk
from rlhfkit.models.pangu import PanguForCausalLM
from rlhfkit.rows import collate, sft_rows
from rlhfkit.stages import run
from rlhfkit.trainer import adapt, arguments, check_length, loss_judge, merged, prepare, rows_for

LINES = (("晚风吹桥", "明月照寺", "白云"), ("红楼送秋月", "明窗迎春风", "明窗"), ("悠悠白云", "点点红日", "红日"), ("白云照岭", "明月送桥", "春"))


def record(first, *answers):
    return rk.Record("上联：" + first, tuple(rk.Answer(a, -i) for i, a in enumerate(answers)), prefix="下联：",
                     source="couplets")


@pytest.fixture
def paths(tiny_path, tmp_path):
    """model_path, data_path and output_dir of a run on four couplets, two of them held out."""
    rk.write_records([record(*line) for line in LINES], tmp_path / "data" / "train.jsonl")
    rk.write_records([record(*line) for line in LINES[:2]], tmp_path / "data" / "dev.jsonl")
    (tmp_path / "out").mkdir()
    return dict(model_path=tiny_path, data_path=str(tmp_path / "data"), output_dir=str(tmp_path / "out"))


@pytest.fixture
def short(tmp_path_factory):
    """The fields of a run of a few quick steps in a fresh folder."""
    return dict(output_dir=str(tmp_path_factory.mktemp("run") / "out"), max_length=64, batch_size=2, max_steps=3,
                learning_rate=1e-2,
                logging_steps=1, report_to="none")


def build(config):
    family, tokenizer = rk.family_of(config.model_path), rk.load_tokenizer(config.model_path)
    return partial(sft_rows, family=family, tokenizer=tokenizer, max_length=config.max_length, packing=config.packing)


def test_every_row_set_aside_is_counted_said_and_kept_with_its_reason(paths, capsys):
    config = rk.SFT(**paths, max_length=64, samples=0)
    with open(Path(paths["data_path"]) / "train.jsonl", "ab") as file:
        file.write(b'not json\n{"prompt": "x"}\n\xff\n')
    rk.write_records([record("晚风吹桥", "明月照寺"), record("晚风吹桥", "明月照寺" * 40)], Path(paths["data_path"]) / "dev.jsonl")
    rows, dev, dev_records = rows_for(config, build(config))
    assert (len(rows), len(dev), len(dev_records)) == (4, 1, 2)
    kept = [json.loads(line) for line in (Path(paths["output_dir"]) / "rejected.jsonl").read_text("utf-8").splitlines()]
    assert [r.get("line") for r in kept][:3] == [5, 6, 7] and len(kept) == 4
    for row, reason in zip(kept, ("not JSON", "no field 'answers'", "not UTF-8", "do not fit into max_length 64")):
        assert reason in row["reason"]
    said = capsys.readouterr().out
    assert said == (Path(paths["output_dir"]) / "log.txt").read_text("utf-8") and "1 × not JSON" in said


def test_the_count_of_rows_set_aside_is_out_of_all_rows(paths, capsys):
    """Rows that could not be read were left out of the total: "5 of 3 rows set aside"."""
    config = rk.SFT(**paths, max_length=64, samples=0)
    with open(Path(paths["data_path"]) / "train.jsonl", "ab") as file:
        file.write(b"not json\n" * 9)
    rows_for(config, build(config))
    said = capsys.readouterr().out                                                  # 4 train, 2 dev, 9 bad
    assert said.startswith("9 of 15 rows set aside (rejected.jsonl): 9 × not JSON")


def test_a_row_set_aside_in_the_held_out_file_can_be_told_from_one_in_train(paths):
    config = rk.SFT(**paths, max_length=64, samples=0)
    long = record("晚风吹桥", "明月照寺" * 40)
    for name in ("train", "dev"):
        rk.write_records([long, record(*LINES[0])], Path(paths["data_path"]) / f"{name}.jsonl")
    rows_for(config, build(config))
    kept = [json.loads(line) for line in (Path(paths["output_dir"]) / "rejected.jsonl").read_text("utf-8").splitlines()]
    assert len(kept) == 2 and kept[0] != kept[1]


def test_good_data_sets_nothing_aside_and_writes_no_list(paths, capsys):
    rows, dev, _ = rows_for(rk.SFT(**paths), build(rk.SFT(**paths)))
    assert (len(rows), len(dev)) == (4, 2) and re.fullmatch(r"rows: 4 tokenised in \d+\.\d s\n", capsys.readouterr().out)
    assert [p.name for p in Path(paths["output_dir"]).iterdir()] == ["log.txt"]


def test_the_second_start_says_the_same_of_what_is_set_aside_and_packs_rows_of_the_cache(paths, capsys):
    config = rk.SFT(**paths, max_length=64, packing=True, max_new_tokens=8)
    with open(Path(paths["data_path"]) / "train.jsonl", "ab") as file:
        file.write(b"not json\n")
    first, _, _ = rows_for(config, build(config))
    said, kept = capsys.readouterr().out, (Path(paths["output_dir"]) / "rejected.jsonl").read_bytes()
    (Path(paths["output_dir"]) / "rejected.jsonl").unlink()
    second, dev, dev_records = rows_for(config, build(config))
    assert list(second) == list(first) and list(dev_records) == [record(*line) for line in LINES[:2]]
    assert re.sub(r"tokenised in \d+\.\d s", "from the cache", said) == capsys.readouterr().out
    assert (Path(paths["output_dir"]) / "rejected.jsonl").read_bytes() == kept
    # 13, 14, 13 and 13 tokens: four rows fit into one of 64, the two held out into another
    assert "packed: 4 rows into 1 of 64 tokens" in said and (len(second), len(dev)) == (1, 1)


def test_data_without_a_good_row_stops_the_run(paths):
    config = rk.SFT(**paths)
    (Path(paths["data_path"]) / "train.jsonl").write_text("not json\nnot json\n")
    with pytest.raises(ValueError, match="data_path .* holds no usable record; 2 rows were set aside"):
        rows_for(config, build(config))


def test_the_held_out_loss_is_over_tokens_whatever_the_batch_size(paths, tiny_path):
    model, tokenizer = rk.load_model(tiny_path), rk.load_tokenizer(tiny_path)
    _, dev, _ = rows_for(rk.SFT(**paths), build(rk.SFT(**paths)))
    losses = [loss_judge(rk.SFT(**paths, batch_size=size), dev, 6)(model)["loss"] for size in (1, 2, 8)]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)
    with torch.no_grad():
        alone = [(float(model(**collate([row], tokenizer.pad_token_id)).loss),
                  sum(label != -100 for label in row["labels"])) for row in dev]
    assert losses[0] == pytest.approx(sum(x * n for x, n in alone) / sum(n for _, n in alone), abs=1e-5)
    assert loss_judge(rk.SFT(**paths), [], 6) is None


def test_a_max_length_beyond_the_model_is_refused(tiny_path, paths):
    model = rk.load_model(tiny_path)
    assert check_length(model, 1024) is None
    with pytest.raises(ValueError,
                       match="max_length is 1025; the model has 1024 positions; set max_length to 1024 or less"):
        check_length(model, 1025)
    with pytest.raises(ValueError, match="max_length is 2000; the model has 1024 positions"):
        prepare(rk.SFT(**paths, max_length=2000))


def test_prepare_seeds_sets_dropout_and_train_mode(paths):
    draws = []
    for _ in range(2):
        model, tokenizer, family = prepare(rk.SFT(**paths, dropout=0.25, seed=3))
        draws.append(float(torch.rand(1)))
    assert draws[0] == draws[1] and model.training and family.name == "pangu"
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.25}


def lora(paths, **fields):
    """A model with adapters that do something (PEFT starts them at zero)."""
    model, _, _ = prepare(rk.SFT(**paths, lora_rank=4, **fields))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def test_a_merged_adapter_gives_the_logits_of_the_adapter_and_not_those_of_the_base(paths, tiny_path):
    model, ids = lora(paths).eval(), torch.arange(8, 40)[None]
    with torch.no_grad():
        adapter = model(input_ids=ids).logits
        base = rk.load_model(tiny_path)(input_ids=ids).logits
        plain = merged(model, torch.arange(8, 24)[None])
        torch.testing.assert_close(plain(input_ids=ids).logits, adapter, rtol=0, atol=1e-5)
    assert (adapter - base).abs().max() > 0.01
    assert not any("lora" in name for name,
                   _ in plain.named_parameters()) and type(plain).__name__ == "PanguForCausalLM"


def test_lora_trains_adapters_only_in_the_families_layers_or_those_asked_for(paths):
    model = lora(paths)
    trained = {name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "k_proj", "v_proj", "c_proj", "c_fc"}
    chosen = lora(paths, lora_targets=" q_proj, v_proj ")
    assert {name.split(".")[-4] for name, p in chosen.named_parameters() if p.requires_grad} == {"q_proj", "v_proj"}
    assert merged(rk.load_model(paths["model_path"]),
                  torch.arange(8, 24)[None]).training is False      # nothing to merge


def test_lora_under_zero_3_is_refused(paths):
    model = rk.load_model(paths["model_path"])
    with pytest.raises(ValueError, match="lora_rank with zero_stage 3 is not supported.*use zero_stage 2"):
        adapt(model, rk.SFT(**paths, lora_rank=2, zero_stage=3), rk.family_of(paths["model_path"]))


def test_a_run_with_lora_saves_merged_weights_that_load_as_a_plain_model_unlike_the_base(paths, short, tiny_path):
    result = run(rk.SFT(**paths | short, lora_rank=4, samples=0))
    saved = load_file(Path(result.output_dir) / "model.safetensors")
    base = load_file(Path(tiny_path) / "model.safetensors")
    assert saved.keys() == base.keys()
    changed = {name for name in base if not torch.equal(saved[name], base[name])}
    targets = tuple(f"{layer}.weight" for layer in rk.FAMILIES["pangu"].lora_targets)
    assert changed == {name for name in base if name.endswith(targets)}
    _, dev, _ = rows_for(rk.SFT(**paths), build(rk.SFT(**paths)))
    assert loss_judge(rk.SFT(**paths), dev,
                      6)(rk.load_model(result.output_dir))["loss"] == pytest.approx(result.metrics["eval_loss"],
                                                                                    abs=1e-4)


def test_a_reward_model_with_lora_is_trained_and_saved_merged(paths, short, tiny_path):
    result = run(rk.Reward(**paths | short, lora_rank=4))
    saved, base = (load_file(Path(folder) / "model.safetensors") for folder in (result.output_dir, tiny_path))
    assert "v_head.weight" in saved and not any("lora" in name for name in saved)
    assert not torch.equal(saved["transformer.h.0.attn.q_proj.weight"], base["transformer.h.0.attn.q_proj.weight"])
    assert len(rk.score(result.output_dir, [record(*LINES[0])])[0]) == 2


def test_a_vocabulary_larger_than_the_model_stops_the_run_before_it_starts(paths, tmp_path):
    small = rk.load_model(paths["model_path"])
    small.resize_token_embeddings(1000)
    small.save_pretrained(tmp_path / "small")
    rk.load_tokenizer(paths["model_path"]).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="vocabulary"):
        prepare(rk.SFT(**paths | {"model_path": str(tmp_path / "small")}))


def test_the_arguments_of_hf_s_trainer_are_those_of_the_run(paths):
    given = arguments(rk.SFT(**paths, batch_size=3, gradient_accumulation_steps=2, learning_rate=2e-4, save_steps=7,
                             dtype="mixed",
                             lr_scheduler_type="constant", report_to="none"), [])
    wanted = dict(per_device_train_batch_size=3, gradient_accumulation_steps=2, learning_rate=2e-4,
                  save_strategy="steps", save_steps=7,
                  max_steps=-1, bf16=True, lr_scheduler_type="constant_with_warmup", report_to="none", deepspeed=None)
    assert {name: given[name] for name in wanted} == wanted
    assert arguments(rk.SFT(**paths, zero_stage=2), [])["deepspeed"]["zero_optimization"]["stage"] == 2


def test_a_disk_full_at_the_final_save_keeps_what_the_folder_had(paths, short, monkeypatch):
    """The run fails, its folder has no half-written weights, and the same run can be started again."""
    config = rk.SFT(**paths | short, samples=0)
    model_class = PanguForCausalLM

    def full(model, folder, *args, **kwargs):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(model_class, "save_pretrained", full)
        with pytest.raises(OSError, match="No space left"):
            run(config)
    assert not {"model.safetensors", "result.json", ".partial"} & {p.name for p in Path(config.output_dir).iterdir()}
    assert run(config).metrics["steps"] == 3
