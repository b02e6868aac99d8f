"""What holds for every family, on tiny random models with their own tokenizers: caches, padding, packing, leaks, adapters, folders.

The names of the tests marked `supports` are the columns of the README's table; tests/benchmarks/support.py writes it from what ran.
"""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

import rlhfkit as rk
from rlhfkit.engine import set_dropout
from rlhfkit.models import layouts
from rlhfkit.models.value import RewardModel, load_reward_model, score
from rlhfkit.rows import collate, pack, pad, text_rows

NAMES = [*rk.FAMILIES, "baichuan_13b", "llama"]
NATIVE = ["chatglm2", "chatglm3", "baichuan", "internlm", "llama"]              # transformers' own classes
CLASSES = dict(zip(NAMES, ("PanguForCausalLM", "GlmV1ForCausalLM", "ChatGLMForCausalLM", "GlmForCausalLM", "GlmForCausalLM", "LlamaForCausalLM",
                           "LlamaForCausalLM", "QwenForCausalLM", "BaichuanForCausalLM", "LlamaForCausalLM")))
RECORDS = [rk.Record(f"上联：{a}", (rk.Answer(b, 1), rk.Answer(c, 0)), "下联：") for a, b, c in (
    ("晚风", "晨露", "绿水白"), ("春风迎细雨", "明月照青山", "明月青山"), ("小溪", "高岭", "山"), ("悠悠白云", "淡淡秋月", "秋"))]
supports = pytest.mark.supports


@pytest.fixture(scope="session")
def family_paths(tmp_path_factory):
    made = {}

    def path(name):
        if name not in made:
            made[name] = rk.tiny(tmp_path_factory.mktemp(name) / name, family=name.removesuffix("_13b"), hidden_size=32, num_layers=3)
        if name == "baichuan_13b":              # the same weights with ALiBi
            config = json.loads(Path(made[name], "config.json").read_text(encoding="utf-8")) | {"model_type": "baichuan"}
            Path(made[name], "config.json").write_text(json.dumps(config), encoding="utf-8")
        return made[name]
    return path


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def path(name, family_paths):
    return family_paths(name)


@pytest.fixture
def loaded(path):
    return rk.load_model(path), rk.load_tokenizer(path), rk.family_of(path)


def prompts(tokenizer, family):
    return [family.encode(tokenizer, record)[0] for record in RECORDS]


def whole(tokenizer, family):
    """(ids, number of prompt ids) of each record with its answer."""
    rows = [family.encode(tokenizer, record, record.answers[0].text) for record in RECORDS]
    return [(prompt + answer, len(prompt)) for prompt, answer in rows]


@torch.no_grad()
def logits(model, ids, mask=None, **kwargs):
    return model(torch.tensor(ids), attention_mask=None if mask is None else torch.tensor(mask), use_cache=False, **kwargs).logits


@supports("load")
def test_a_folder_is_loaded_with_its_family_and_its_ids_are_within_the_model(name, loaded):
    model, tokenizer, family = loaded
    assert family.name == ("native" if name == "llama" else name.removesuffix("_13b"))
    assert type(model).__name__ == CLASSES[name]
    assert max(max(ids) for ids, _ in whole(tokenizer, family)) < model.get_input_embeddings().num_embeddings
    assert torch.isfinite(logits(model, [whole(tokenizer, family)[0][0]])).all()


@supports("tokenizer")
def test_an_answer_is_read_back_from_its_ids_and_ends_with_the_end_token(loaded):
    _, tokenizer, family = loaded
    for record in RECORDS:
        prompt, answer = family.encode(tokenizer, record, record.answers[0].text)
        assert answer[-1] in family.end_ids(tokenizer) and tokenizer.decode(answer[:-1]).strip() == record.answers[0].text
        assert family.encode(tokenizer, record) == (prompt, [])


def test_a_prompt_too_long_is_cut_and_template_prefix_and_answer_stay(loaded):
    _, tokenizer, family = loaded
    record = rk.Record("春风迎细雨，明月照青山，" * 4, (rk.Answer("晨露", 1),), "下联：", system="答得短些", history=(("早", "好"),))
    prompt, answer = family.encode(tokenizer, record, "晨露")
    short, same = family.encode(tokenizer, record, "晨露", max_length=len(prompt + answer) - 7)
    assert same == answer and len(prompt) - 20 < len(short) <= len(prompt) - 7
    text = tokenizer.decode(short)
    assert "下联：" in text and "答得短些" in text and "早" in text
    with pytest.raises(ValueError, match="set max_length to"):
        family.encode(tokenizer, record, "晨露", max_length=len(answer) + 1)


@supports("static cache")
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache_equals_generation_without_and_left_padding_changes_nothing(loaded, cache):
    model, tokenizer, family = loaded
    rows, options = prompts(tokenizer, family), dict(max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.pad_token_id, eos_token_id=-1)
    ids, mask = pad(rows, tokenizer.pad_token_id, side="left"), pad([[1] * len(row) for row in rows], 0, side="left")
    kind = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    cached = model.generate(ids, attention_mask=mask, use_cache=True, **options, **kind)[:, ids.shape[1]:]
    plain = model.generate(ids, attention_mask=mask, use_cache=False, **options)[:, ids.shape[1]:]
    assert torch.equal(cached, plain)
    for row, answer in zip(rows, plain):
        one = torch.tensor([row])
        assert torch.equal(model.generate(one, attention_mask=torch.ones_like(one), use_cache=True, **options)[0, len(row):], answer)


def test_logits_do_not_depend_on_the_side_of_the_padding_the_batch_or_its_order(loaded):
    model, tokenizer, family = loaded
    rows = [ids for ids, _ in whole(tokenizer, family)]
    alone = [logits(model, [row])[0] for row in rows]
    for side in ("left", "right"):
        for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
            batch = [rows[i] for i in order]
            mask = pad([[1] * len(row) for row in batch], 0, side=side)
            out = logits(model, pad(batch, tokenizer.pad_token_id, side=side).tolist(), mask.tolist())
            for i, line, kept in zip(order, out, mask.bool()):
                torch.testing.assert_close(line[kept], alone[i], atol=2e-5, rtol=0)


@supports("packing")
def test_packed_documents_have_the_logits_that_they_have_alone_and_cannot_see_each_other(loaded):
    model, tokenizer, family = loaded
    rows = [dict(input_ids=ids, labels=ids) for ids, _ in whole(tokenizer, family)]
    batch = collate(pack([dict(row) for row in rows], 4 * 64), tokenizer.pad_token_id)
    packed = logits(model, batch["input_ids"].tolist(), position_ids=batch["position_ids"])[0]
    start = 0
    for row in rows:
        end = start + len(row["input_ids"])
        torch.testing.assert_close(packed[start:end], logits(model, [row["input_ids"]])[0], atol=2e-5, rtol=0)
        start = end
    changed = batch["input_ids"].clone()
    changed[0, 1:len(rows[0]["input_ids"]) - 1] = changed[0, 1:len(rows[0]["input_ids"]) - 1].flip(0)
    again = logits(model, changed.tolist(), position_ids=batch["position_ids"])[0]
    first = len(rows[0]["input_ids"])
    assert not torch.equal(again[:first], packed[:first]) and torch.equal(again[first:], packed[first:])


def test_the_future_does_not_leak_but_for_the_prefix_of_a_family_that_reads_both_ways(name, loaded):
    model, tokenizer, family = loaded
    ids, prompt = whole(tokenizer, family)[1]
    other = [*ids[:-2], ids[-3], ids[-1]]
    assert torch.equal(logits(model, [ids])[0, :-2], logits(model, [other])[0, :-2])
    assert not torch.equal(logits(model, [ids])[0, -2:], logits(model, [other])[0, -2:])
    swapped = ids[:prompt - 5] + [ids[0]] + ids[prompt - 4:]
    same = torch.equal(logits(model, [ids])[0, :prompt - 5], logits(model, [swapped])[0, :prompt - 5])
    assert same is (name not in ("glm", "chatglm"))


def test_gradient_checkpointing_changes_no_gradient(loaded):
    model, tokenizer, family = loaded
    rows = [ids for ids, _ in whole(tokenizer, family)]
    ids, mask, grads = pad(rows, tokenizer.pad_token_id), pad([[1] * len(row) for row in rows], 0), []
    set_dropout(model, 0.0)
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=False).loss.backward()
        grads.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and model.get_input_embeddings().weight.grad is not None
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, atol=1e-6, rtol=1e-4, msg=key)


@supports("LoRA")
def test_merged_adapters_equal_the_adapters_and_the_family_s_targets_exist(loaded):
    model, tokenizer, family = loaded
    torch.manual_seed(0)
    ids = [whole(tokenizer, family)[0][0]]
    base = logits(model, ids)
    found = get_peft_model(model, LoraConfig(r=4, target_modules=list(family.lora_targets) or "all-linear")).eval()
    for key, p in found.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(p, std=0.05)
    targets = {key.split(".lora_A")[0].rsplit(".", 1)[1] for key, _ in found.named_parameters() if "lora_A" in key}
    assert targets >= set(family.lora_targets)
    before = logits(found, ids)
    torch.testing.assert_close(logits(found.merge_and_unload(), ids), before, atol=1e-4, rtol=0)
    assert float((before - base).abs().max()) > 1e-2


def test_a_saved_folder_loads_to_the_same_model_family_and_ids(loaded, tmp_path):
    model, tokenizer, family = loaded
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, theirs = rk.load_model(tmp_path), rk.load_tokenizer(tmp_path)
    assert rk.family_of(tmp_path) is family and theirs.get_vocab() == tokenizer.get_vocab()
    ids = [whole(tokenizer, family)[1][0]]
    assert [whole(theirs, family)[1][0]] == ids and torch.equal(logits(again, ids), logits(model, ids))


@pytest.mark.parametrize("native", NATIVE)
def test_transformers_alone_gives_the_same_logits_for_the_native_classes(native, family_paths, tmp_path):
    model, tokenizer = rk.load_model(family_paths(native)), rk.load_tokenizer(family_paths(native))
    model.save_pretrained(tmp_path / "model")
    ids = [whole(tokenizer, rk.family_of(family_paths(native)))[1][0]]
    code = (f"import sys, torch\nfrom transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'model')!r})\n"
            f"torch.save(model.eval()(torch.tensor({ids!r})).logits.detach(), {str(tmp_path / 'logits.pt')!r})\nassert 'rlhfkit' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(model, ids), atol=1e-6, rtol=0)


def test_the_original_layout_comes_back_bit_by_bit(loaded, tmp_path):
    model, _, family = loaded
    state = model.state_dict()
    original = layouts.to_original(state, family.table)
    assert not family.table or set(original) != set(state)
    again = layouts.to_ours(original, family.table, model.config)
    assert set(again) == set(state) and all(torch.equal(again[key], state[key]) for key in state)
    assert {key: t.shape for key, t in layouts.to_original(again, family.table).items()} == {key: t.shape for key, t in original.items()}


def test_bfloat16_is_close_to_float32(path, loaded):
    model, tokenizer, family = loaded
    ids = [whole(tokenizer, family)[1][0]]
    exact, half = logits(model, ids), logits(rk.load_model(path, dtype="bfloat16"), ids)
    assert half.dtype == torch.bfloat16
    assert float((half.float() - exact).abs().max()) < 0.1 * float(exact.abs().max())


def test_one_compiled_block_equals_itself(loaded):
    model, tokenizer, family = loaded
    ids = [whole(tokenizer, family)[1][0]]
    before = logits(model, ids)
    blocks = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    blocks[1].forward = torch.compile(blocks[1].forward, backend="aot_eager")      # a CPU without a compiler has no other
    torch.testing.assert_close(logits(model, ids), before, atol=1e-5, rtol=0)


def test_a_reward_model_of_the_family_scores_alone_as_in_a_batch_and_loads_again(loaded, tmp_path):
    model, tokenizer, family = loaded
    reward = RewardModel.from_causal(model).eval()
    rows = [ids for ids, _ in whole(tokenizer, family)]
    ids, mask = pad(rows, tokenizer.pad_token_id), pad([[1] * len(row) for row in rows], 0)
    with torch.no_grad():
        together = score(reward, ids, mask)
        alone = torch.cat([score(reward, torch.tensor([row]), torch.ones(1, len(row))) for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    reward.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(score(load_reward_model(tmp_path), ids, mask), together)
    assert rk.family_of(tmp_path) is family


def test_texts_for_pre_training_lose_no_token_and_pack(loaded):
    _, tokenizer, family = loaded
    texts = [rk.Record("春风迎细雨，明月照青山。" * n) for n in (1, 9)]
    packed, aside = text_rows(texts, family, tokenizer, 48)
    rows, _ = text_rows(texts, family, tokenizer, 48, packing=False)
    assert not aside and all(len(row["input_ids"]) <= 48 for row in packed) and 1 < len(packed) < len(rows)
    assert sorted(t for row in packed for t in row["input_ids"]) == sorted(t for row in rows for t in row["input_ids"])
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    seen = [t for row in rows for t in row["input_ids"] if t not in special]
    ids = [i for text in texts for i in family.encode_text(tokenizer, text.prompt)[1] if i not in special]
    assert seen == ids or family.blank and sorted(seen) == sorted(ids)          # a blank's text stands behind its document
    assert any(label in family.end_ids(tokenizer) or label == tokenizer.pad_token_id for row in rows for label in row["labels"])
