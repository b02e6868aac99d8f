"""Captured decoding: its answers are plain decoding's for every family, its log-probs a scoring pass's, and it leaves the model as it was.

Without a GPU the same steps run uncaptured, attention in plain torch; the tests at the end need one, and Triton.
"""
import copy
import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (AutoModelForCausalLM, BartConfig, BloomConfig, Gemma2Config, GPTNeoXConfig, LlamaConfig, MambaConfig, MistralConfig,
                          Qwen2Config)

import rlhfkit as rk
from rlhfkit import decode
from rlhfkit.decode import Decoder, supported
from rlhfkit.rollout import rollout

END = list(range(0, 2400, 12))                  # many ends, so that an untrained model finishes some answers
TEXTS = ["上联：晚风吹桥", "上联：红楼", "春风", "上联：悠悠白云秋月", "秋", "上联：白云照岩", "上联：明月", "上联：春风中映明月"]
NAMES = ["pangu", "glm", "chatglm", "chatglm2", "qwen", "llama"]
OPTIONS = [(0.0,), (1.0,), (0.7, 50, 0.9)]      # temperature, top_k, top_p
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="captured graphs need a GPU")


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """name -> a tiny model of three layers, its pad id, 24 prompts of different lengths; made once."""
    made = {}

    def get(name):
        if name not in made:
            path = rk.tiny(tmp_path_factory.mktemp(name), family=name, hidden_size=32, num_layers=3)
            tokenizer, kind = rk.load_tokenizer(path), rk.family_of(path)
            prompts = [kind.encode(tokenizer, rk.Record(text, prefix="下联："))[0] for text in TEXTS * 3]
            made[name] = rk.load_model(path), tokenizer.pad_token_id, prompts
        return made[name]
    return get


@pytest.fixture
def pangu(family):
    return family("pangu")


def plain(model, **options):
    return Decoder(model, compiled=False, capture=False, **options)


def close(one, other, tolerance):
    for a, b in zip(one, other):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), atol=tolerance, rtol=0)


@torch.no_grad()
def scored(model, prompts, answers, temperature=1.0):
    """The log-probs of a scoring pass, a row at a time."""
    found = []
    for prompt, answer in zip(prompts, answers):
        ids = torch.tensor([prompt + answer], device=model.device)
        logits = model(ids).logits[0, len(prompt) - 1:-1].float() / temperature
        found.append(logits.log_softmax(-1).gather(1, ids[0, len(prompt):, None])[:, 0].tolist())
    return found


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_of_plain_decoding_and_log_probs_those_of_a_scoring_pass(name, family):
    """Rows of different lengths, left-padded; 24 rows end one by one and are compacted to 16 and 8; one decoder for all calls."""
    model, pad_id, prompts = family(name)
    decoder = plain(model)
    for rows, options in [(24, OPTIONS[0]), (24, OPTIONS[2]), (1, OPTIONS[0]), (5, OPTIONS[1])]:
        given = prompts[:rows], 24, END, pad_id, list(range(rows)), *options
        answers, logps = decoder(*given)
        assert answers == rollout(model, *given)[0]
        close(logps, scored(model, prompts[:rows], answers, options[0] or 1.0), 1e-5)
    assert 1 < len({len(answer) for answer in answers})


@pytest.mark.parametrize("name", ["pangu", "glm", "qwen"])
def test_rows_that_have_ended_leave_and_nothing_else_changes(name, family, monkeypatch):
    model, pad_id, prompts = family(name)
    given = prompts, 24, END, pad_id, list(range(24)), 1.0
    monkeypatch.setattr(decode, "EVERY", 3)
    buckets, step = [], Decoder._step
    monkeypatch.setattr(Decoder, "_step", lambda self, bucket, options: buckets.append(bucket) or step(self, bucket, options))
    often = plain(model)(*given)
    assert buckets == sorted(buckets, reverse=True) and set(buckets) == {32, 16, 8}
    monkeypatch.setattr(decode, "EVERY", 1000)
    never = plain(model)(*given)
    assert often[0] == never[0]
    close(often[1], never[1], 1e-5)


def test_an_answer_depends_on_its_seed_and_not_on_the_batch_or_the_order(pangu):
    model, pad_id, prompts = pangu
    order = random.Random(0).sample(range(24), 24)
    decoder = plain(model)
    straight = decoder(prompts, 12, END, pad_id, list(range(24)), 1.0)[0]
    assert decoder([prompts[i] for i in order], 12, END, pad_id, order, 1.0)[0] == [straight[i] for i in order]
    assert [decoder([p], 12, END, pad_id, [i], 1.0)[0][0] for i, p in enumerate(prompts[:5])] == straight[:5]
    assert len({tuple(a) for a in decoder(prompts[:1] * 24, 12, END, pad_id, [hash((7, i)) for i in range(24)], 1.0)[0]}) == 24
    assert decoder([], 12, END, pad_id, [], 1.0) == ([], [])


def test_more_rows_than_the_largest_batch_are_sampled_in_turn(pangu, monkeypatch):
    model, pad_id, prompts = pangu
    whole = plain(model)(prompts, 9, END, pad_id, list(range(24)), 1.0)[0]
    monkeypatch.setattr(decode, "BUCKETS", (8,))
    assert plain(model)(prompts, 9, END, pad_id, list(range(24)), 1.0)[0] == whole


@pytest.mark.parametrize("new", [1, 2, 16, 17, 18])
def test_answers_are_as_long_as_asked_for(pangu, new):
    model, pad_id, prompts = pangu
    answers, logps = plain(model)(prompts[:3], new, [2399], pad_id, [0, 1, 2], 1.0)
    assert [len(a) for a in answers] == [new] * 3 == [len(x) for x in logps]


def test_new_weights_are_seen_and_longer_rows_and_more_of_them_get_room(pangu):
    model, pad_id, prompts = pangu
    model, decoder = copy.deepcopy(model), None
    decoder = plain(model)
    for rows, new in ((3, 4), (3, 90), (20, 4)):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        given = prompts[:rows], new, [2399], pad_id, list(range(rows)), 1.0
        assert decoder(*given)[0] == rollout(model, *given)[0]
    assert decoder.shape[0] == 32 and decoder.shape[1] >= 90
    decoder.free()
    assert not decoder.caches and decoder(*given)[0] == rollout(model, *given)[0]


def test_adapters_work_in_place(family):
    for name in ("pangu", "chatglm2"):
        model, pad_id, prompts = family(name)
        adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
        given = prompts[:5], 12, END, pad_id, list(range(5)), 1.0
        answers = plain(adapted)(*given)[0]
        assert answers == rollout(adapted, *given)[0] != rollout(model, *given)[0]


def test_the_model_is_left_as_it_was_also_after_an_error(pangu, monkeypatch):
    model, pad_id, prompts = pangu
    model = copy.deepcopy(model).train()
    model.transformer.h[1].eval()

    def state():
        return [m.training for m in model.modules()], model.config._attn_implementation, [set(vars(m)) for m in model.modules()]
    before = state()
    decoder = Decoder(model, capture=False, backend="eager")
    decoder(prompts[:3], 3, END, pad_id, [0, 1, 2], 1.0)
    assert state() == before
    monkeypatch.setattr(decode, "_finish", None)
    with pytest.raises(Exception):
        decoder(prompts[:3], 3, END, pad_id, [0, 1, 2], 1.0)
    assert state() == before


def test_rows_longer_than_the_table_of_positions_are_refused(pangu):
    model, pad_id, prompts = pangu
    with pytest.raises(ValueError, match="has 1024 positions; shorten the prompt or lower max_new_tokens"):
        plain(model)(prompts[:2], 1024, END, pad_id, [0, 1], 1.0)


@pytest.mark.parametrize("name, programs", [("pangu", 2), pytest.param("glm", 1, marks=pytest.mark.slow),
                                            pytest.param("chatglm", 1, marks=pytest.mark.slow), ("llama", 1)])
def test_layers_are_compiled_once_for_all_and_once_more_for_all_other_batches(name, programs, tmp_path):
    """Pangu's last layer, with queries of its own, is a second program; the choice of the token is one more."""
    torch._dynamo.reset()
    path = rk.tiny(tmp_path, family=name, hidden_size=16, num_layers=6)
    model, tokenizer, kind = rk.load_model(path), rk.load_tokenizer(path), rk.family_of(path)
    prompts = [kind.encode(tokenizer, rk.Record(text))[0] for text in TEXTS * 4]
    counter = CompileCounterWithBackend("eager")
    decoder = Decoder(model, capture=False, backend=counter)
    for rows, wanted in ((8, programs + 1), (16, 2 * (programs + 1)), (32, 2 * (programs + 1))):
        given = prompts[:rows], 3, [2399], tokenizer.pad_token_id, list(range(rows)), 1.0
        assert decoder(*given)[0] == rollout(model, *given)[0]
        assert counter.frame_count == wanted


SMALL = dict(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)


@pytest.mark.parametrize("config, reason", [
    (LlamaConfig(**SMALL), ""), (Qwen2Config(**SMALL, num_key_value_heads=1), ""), (GPTNeoXConfig(**SMALL), ""),
    (MistralConfig(**SMALL, sliding_window=8, num_key_value_heads=2), "some layers do not attend to all that came before"),
    (Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8), "some layers do not attend to all that came before"),
    (MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2), "its attention is not exchangeable"),
    (BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2), "its attention is not exchangeable"),
    (LlamaConfig(**SMALL, rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)), "rotary angles depend on the longest row"),
    (rk.models.baichuan.BaichuanConfig(**SMALL), "attention has a bias")])
def test_what_cannot_be_captured_is_told_from_the_config_and_the_classes(config, reason, monkeypatch):
    monkeypatch.setattr("rlhfkit.slots.find_spec", lambda name: True)
    model = AutoModelForCausalLM.from_config(config)
    assert supported(model, "cuda") == reason
    assert supported(model, "cpu") == "the device is no CUDA GPU"


def test_all_families_but_alibi_can_be_captured(family, monkeypatch):
    monkeypatch.setattr("rlhfkit.slots.find_spec", lambda name: True)
    assert {name: supported(family(name)[0], "cuda") for name in NAMES} == dict.fromkeys(NAMES, "")
    assert supported(get_peft_model(copy.deepcopy(family("llama")[0]), LoraConfig(target_modules="all-linear")), "cuda") == ""


@pytest.mark.parametrize("name, products", [("pangu", 4), ("llama", 4), ("chatglm2", 4)])
def test_layers_that_read_the_same_input_make_one_product(name, products, family, tmp_path):
    """q, k and v (and gate and up) lie behind one another in memory: no copy of them, the optimiser and a save see them as they were."""
    model, pad_id, prompts = family(name)
    model, seen = copy.deepcopy(model), []
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def counting(module, inputs):
        seen.append(sum(node.target is torch._C._nn.linear for node in module.graph.nodes))
        return module.forward
    torch._dynamo.reset()
    decoder = Decoder(model, capture=False, backend=counting)
    given = prompts[:8], 6, END, pad_id, list(range(8)), 1.0
    assert decoder(*given)[0] == plain(model)(*given)[0]
    assert products in seen
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert decoder(*given)[0] == plain(model)(*given)[0]
    model.save_pretrained(tmp_path)
    assert sum(f.stat().st_size for f in tmp_path.glob("*.safetensors")) < 1.1 * sum(p.nbytes for p in model.parameters()) + 1e5


@gpu
@pytest.mark.parametrize("name", NAMES)
def test_captured_answers_are_plain_ones(name, family):
    model, pad_id, prompts = family(name)
    model = copy.deepcopy(model).cuda()
    decoder = Decoder(model, compiled=False)
    for rows, options in ((24, OPTIONS[0]), (24, OPTIONS[1]), (5, OPTIONS[2])):
        given = prompts[:rows], 40, END, pad_id, list(range(rows)), *options
        answers, logps = decoder(*given)
        assert answers == rollout(model, *given)[0]
        close(logps, scored(model, prompts[:rows], answers, options[0] or 1.0), 1e-4)


@gpu
@pytest.mark.parametrize("name", ["pangu", "chatglm2"])
def test_compiled_and_captured_in_bfloat16_is_close_to_a_scoring_pass_and_sees_an_optimizer_s_step(name, family):
    model, pad_id, prompts = family(name)
    model = copy.deepcopy(model).cuda().bfloat16()
    decoder = Decoder(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    seen = []
    for _ in range(2):
        answers, logps = decoder(prompts, 40, END, pad_id, list(range(24)), 1.0)
        gaps = [abs(a - b) for x, y in zip(logps, scored(model, prompts, answers)) for a, b in zip(x, y)]
        assert sum(gaps) / len(gaps) < 2e-2                                                 # a tiny model's logits are coarser than a real one's
        seen.append((answers, len(decoder.graphs)))
        ids = torch.tensor([prompts[0] + answers[0]], device="cuda")
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert seen[0][0] != seen[1][0]


@gpu
@pytest.mark.parametrize("heads, key_heads, size", [(4, 4, 64), (4, 4, 80), (8, 2, 128), (14, 2, 96), (4, 4, 8)])
@pytest.mark.parametrize("splits", [1, 4])
def test_the_kernel_is_attention_over_the_filled_slots(heads, key_heads, size, splits, monkeypatch):
    from rlhfkit import kernels
    for tuned in kernels.TUNED.values():
        monkeypatch.setitem(tuned, "splits", splits)
    torch.manual_seed(0)
    query, keys, values = torch.randn(3, heads, 1, size), torch.randn(3, key_heads, 100, size), torch.randn(3, key_heads, 100, size)
    key, value, starts = torch.randn(3, key_heads, 1, size), torch.randn(3, key_heads, 1, size), torch.tensor([0, 37, 70])
    for slot in (0, 70, 99):
        here = [x.clone() for x in (query, key, value, keys, values, starts, torch.tensor([slot]))]
        there = [x.cuda() for x in here]
        wanted, got = (torch.ops.rlhfkit.attend(*x, size ** -0.5) for x in (here, there))
        torch.testing.assert_close(got.cpu(), wanted, atol=1e-5, rtol=0)
        assert torch.equal(there[3].cpu(), here[3]) and torch.equal(there[4].cpu(), here[4])
