"""I15: a log-likelihood does not depend on the batch, the order, the side of the padding or on what is shared, in any family."""
import json
import random
from pathlib import Path

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

import rlhfkit as rk
from rlhfkit import samples
from rlhfkit.evaluation.prefixes import plan, want
from rlhfkit.evaluation.scorers import TokenModel, loglikelihoods
from rlhfkit.tasks import TASKS

NAMES = [*rk.FAMILIES, "baichuan_13b", "llama"]
AHEAD = ("glm", "chatglm")                  # they read a prompt both ways


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def loaded(name, tmp_path_factory):
    path = rk.tiny(tmp_path_factory.mktemp("tiny") / name, family=name.removesuffix("_13b"), hidden_size=32, num_layers=2)
    if name == "baichuan_13b":                                              # the same weights with ALiBi
        file = Path(path, "config.json")
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"model_type": "baichuan"}), encoding="utf-8")
    return rk.load_model(path), rk.load_tokenizer(path)


def asked(model, tokenizer):
    """Requests of our own rows: a shot and letters, a context with several questions, labels before texts."""
    reader, requests = TokenModel(model, tokenizer), []
    for task, shots in ((TASKS["ceval"], 1), (TASKS["c3"], 0), (TASKS["tnews"], 0)):
        pool = task.load(samples.EVAL / task.name, task.shot_splits[0]) if shots else []
        for example in task.load(samples.EVAL / task.name, task.split)[:4]:
            record, choices, _ = task.render(example, pool[:shots])
            _, ids, tails = reader._fit(record, choices[:5])
            requests += [(ids, tail) for tail in tails]
    return requests


@torch.no_grad()
def one_by_one(model, prompt, continuation):
    """One forward pass a request, no padding, no cache, every position through the head."""
    logps = model(input_ids=torch.tensor([[*prompt, *continuation]]), use_cache=False).logits[0].double().log_softmax(-1)
    return sum(logps[len(prompt) - 1 + i, token].item() for i, token in enumerate(continuation))


def apart(model, requests, expected, order=None, **options):
    """What the requests, asked in an order, are off by, in nats a token."""
    order = order or range(len(requests))
    found = loglikelihoods(model, [requests[i] for i in order], **options)
    return [(value - expected[i]) / len(requests[i][1]) for i, value in zip(order, found)]


def seen(model):
    """A list that the shapes of what the model reads are added to, and the hook that does it."""
    shapes = []
    return shapes, model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)


def test_every_batch_order_side_and_sharing_gives_the_same_log_likelihoods(loaded):
    model, requests = loaded[0], asked(*loaded)
    expected = [one_by_one(model, *request) for request in requests]
    order = random.Random(0).sample(range(len(requests)), len(requests))
    for options in (dict(batch_size=1), dict(batch_size=7), dict(batch_size=64), dict(side="left"), dict(batch_tokens=300),
                    dict(order=order)):
        for share in (True, False):
            off = apart(model, requests, expected, share=share, **options)
            assert max(map(abs, off)) < 1e-5, (options, share)
            assert abs(sum(off)) / len(off) < 1e-6, "a drift to one side"


def test_what_is_shared_runs_once_and_whole_prompts_where_they_are_read_both_ways(name, loaded):
    """Two items of 40 shared and 20 own tokens, each with two choices of 5, whose last token is never read."""
    model, tokenizer = loaded
    ids = [i for i in range(300, 420) if i not in tokenizer.all_special_ids]
    start = asked(*loaded)[0][0][-1]                                        # what a prompt of the family ends with
    items = [[*ids[:40], *ids[n:n + 19], start] for n in (40, 60)]
    requests = [(item, ids[n:n + 5]) for item in items for n in (80, 90)]
    shapes, hook = seen(model)
    values = loglikelihoods(model, requests, batch_size=1)
    hook.remove()
    assert shapes.pop(0) == (2, 8)                                          # whether it reads ahead
    assert sum(a * b for a, b in shapes) == (2 * 60 if name in AHEAD else 40 + 2 * 20) + 4 * 4
    assert values == pytest.approx([one_by_one(model, *request) for request in requests], abs=5e-5)


@pytest.fixture(scope="module")
def pangu(tmp_path_factory):
    path = rk.tiny(tmp_path_factory.mktemp("tiny") / "pangu", hidden_size=32, num_layers=2)
    return rk.load_model(path), rk.load_tokenizer(path)


def test_when_memory_runs_out_batches_are_halved_and_nothing_is_counted_twice(pangu):
    def full(module, args, output):
        if len(output) > room:
            raise torch.OutOfMemoryError(f"no memory for {len(output)} rows")
    model, requests, room = pangu[0], asked(*pangu), 3
    expected, (shapes, counter) = [one_by_one(model, *request) for request in requests], seen(model)
    hook = model.transformer.h[-1].register_forward_hook(full)
    off = apart(model, requests, expected)
    assert max(map(abs, off)) < 1e-5 and max(rows for rows, _ in shapes) > 3 and sum(rows > 3 for rows, _ in shapes) < 20
    room = 0
    with pytest.raises(torch.OutOfMemoryError):
        loglikelihoods(model, requests, batch_size=1, share=False)
    hook.remove()
    counter.remove()


def test_rows_beyond_the_trained_length_are_not_shared_since_their_angles_follow_their_length(tmp_path):
    """Qwen-1 takes another rotary base for a row of 130 tokens than for its beginning, where it was trained on 64."""
    model = rk.load_model(rk.tiny(tmp_path, family="qwen", hidden_size=32, num_layers=2))
    model.config.seq_length = 64
    ids = random.Random(1).sample(range(300, 1300), 200)
    requests = [(ids[:60] + ids[n:n + size], ids[150:160]) for n, size in ((60, 60), (70, 60), (80, 4), (90, 4), (100, 20))]
    expected = [one_by_one(model, *request) for request in requests]
    for options in (dict(), dict(batch_size=1)):
        assert max(map(abs, apart(model, requests, expected, **options))) < 1e-5


def test_a_sliding_window_of_a_native_model_sees_a_shared_beginning():
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(
        vocab_size=500, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        sliding_window=16, initializer_range=0.1)).eval()
    ids = random.Random(1).sample(range(500), 200)
    requests = [(ids[:40] + ids[n:n + 9], ids[n + 9:n + 15]) for n in range(40, 160, 10)]
    off = apart(model, requests, [one_by_one(model, *request) for request in requests])
    assert max(map(abs, off)) < 1e-5


def test_the_segments_of_a_row_are_the_row_and_each_wanted_token_stands_in_one_of_them():
    rng = random.Random(0)
    rows = {tuple(rng.choice((1, 2)) for _ in range(rng.randint(1, 30))) for _ in range(200)}
    roots, leaves = plan({row: 3 for row in rows})
    for owner, row in enumerate(rows):
        want(leaves[row], owner, 0, row)
        path, leaf = [], leaves[row]
        while leaf is not None:
            path, leaf = [leaf, *path], leaf.parent
        assert path[0] in roots and sum((s.row[s.start:s.end] for s in path), ()) == row
        assert all(s.end >= 3 for s in path if s.children)
        found = [(first + i, token) for s in path for who, first, tokens in s.wanted if who == owner
                 for i, token in enumerate(tokens)]
        assert sorted(found) == list(enumerate(row))
