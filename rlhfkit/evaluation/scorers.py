"""The model's side of an evaluation: log-likelihoods of continuations, greedy answers, perplexity, reward scores.

A token is scored from the logits of the position before it, through one log_softmax, and only tokens of the choice
count; the 2023 kit scored each token from its own position and applied softmax twice, so that a perfect model looked
uniform. Results do not depend on batch size, order, padding or on what is shared (prefixes.py).
"""
import math
import os
from dataclasses import replace
from functools import lru_cache
from itertools import zip_longest

import pandas as pd
import torch

from rlhfkit.engine import device
from rlhfkit.evaluation.prefixes import Runner, plan, reads_ahead, want
from rlhfkit.families import family_of, load_model, load_tokenizer
from rlhfkit.models import value
from rlhfkit.records import Record
from rlhfkit.rollout import sample
from rlhfkit.rows import pad, text_of

BATCH_TOKENS = 8192         # positions of a batch of answers or of reward scores, padding included
AT_ONCE = 4_000_000         # tokens of requests that are planned together: about 300 MB of lists
POSITIONS = ("max_position_embeddings", "max_sequence_length", "seq_length", "model_max_length")


@torch.no_grad()
def loglikelihoods(model, requests, batch_tokens=None, batch_size=None, side="right", share=True):
    """(prompt_ids, continuation_ids) each -> sum of ln p(token | all before it) over the continuation, in nats, float64.

    What requests share is run once: whole prompts of models that read them both ways, any beginning in the others.
    batch_tokens: positions of a batch, what is attended to included (None: by free memory); batch_size: its rows; side: of
    the pads of rows without a shared beginning; share: False runs every row whole. ValueError for a request without a
    prompt or continuation token.
    """
    if not requests:
        return []
    rows, ends, trained = {}, [], trained_length(model.config)
    for number, (prompt, continuation) in enumerate(requests):
        if not prompt or not continuation:
            raise ValueError(f"request {number} has {len(prompt)} prompt and {len(continuation)} continuation tokens; "
                             "it needs one of each")
        ends.append((*prompt, *continuation[:-1]))
        rows[ends[-1]] = max(len(prompt), rows.get(ends[-1], 0))
    share = share and not model._is_stateful                # a recurrent state is no past that rows can be continued from
    uncut = {row: len(row) for row in rows if not share or len(row) > trained}
    was_training, ahead = model.training, False
    model.eval()
    roots, leaves = plan(dict.fromkeys(rows, 0) | uncut)
    if any(root.children for root in roots) and (ahead := reads_ahead(model, max(rows, key=rows.get))):
        roots, leaves = plan(rows | uncut)
    runner = Runner(model, len(requests), max(map(len, rows)), batch_tokens, batch_size, side, ahead)
    for number, ((prompt, continuation), row) in enumerate(zip(requests, ends)):
        want(leaves[row], number, len(prompt) - 1, continuation)
    runner.run(roots)
    model.train(was_training)
    return runner.totals.tolist()


def perplexity(model, records):
    """Table of held-out perplexity: source, perplexity, tokens, characters, nats_per_character; the total first.

    model: a path or a (model, tokenizer) pair. A record's text is prompt, prefix and best answer; every token is predicted
    once, in windows of the model's positions that each have the family's beginning. Perplexities of models with different
    tokenizers do not compare; nats a character do.
    """
    reader, records, requests, owners = open_model(model), list(records), [], []
    if not isinstance(reader, TokenModel):
        raise TypeError(f"model is a {type(model).__name__}; perplexity needs a path or a (model, tokenizer) pair")
    if not records:
        raise ValueError("records is empty; there is no text to measure")
    for number, record in enumerate(records):
        read, ids = reader.family.encode_text(reader.tokenizer, text_of(record))
        read, ids = (read, ids) if read else (ids[:1], ids[1:])     # without a beginning the first is not predicted
        room = reader.positions - len(read) + 1
        for start in range(0, len(ids), room):
            requests.append((read, ids[start:start + room]))
            owners.append(number)
    rows = [dict(source=r.source, characters=len(text_of(r)), tokens=0, nats=0.0) for r in records]
    for owner, (_, window), logp in zip(owners, requests, loglikelihoods(reader.model, requests)):
        rows[owner]["tokens"] += len(window)
        rows[owner]["nats"] -= logp
    texts = pd.DataFrame(rows)
    table = pd.concat([texts.assign(source="total"), texts]).groupby("source", sort=False, as_index=False).sum()
    table["perplexity"] = (table.nats / table.tokens).map(math.exp)
    table["nats_per_character"] = table.nats / table.characters
    return table[["source", "perplexity", "tokens", "characters", "nats_per_character"]]


@torch.no_grad()
def score(reward_path, records):
    """The reward model's score of every answer: a list of floats for each record, in the order of its answers."""
    tokenizer, family = load_tokenizer(reward_path), family_of(reward_path)
    model = value.load_reward_model(reward_path).to(device())
    rows, limit, scores = {}, positions(model.config), {}
    for r, record in enumerate(records):
        for a, answer in enumerate(record.answers):
            prompt_ids, answer_ids = family.encode(tokenizer, record, answer.text, limit)
            rows.setdefault((*prompt_ids, *answer_ids), []).append((r, a))
    for batch in _batches(list(rows), BATCH_TOKENS):
        for row, number in zip(batch, value.score(model, *_padded(batch, model)).tolist()):
            scores.update({place: number for place in rows[row]})
    return [[scores[r, a] for a in range(len(record.answers))] for r, record in enumerate(records)]


def open_model(model):
    """A path, a (model, tokenizer) pair, or an object that takes strings -> what `rank` and `answer` are asked of."""
    if isinstance(model, (str, os.PathLike)):
        return TokenModel(load_model(model, device=device()), load_tokenizer(model))
    if isinstance(model, (tuple, list)) and len(model) == 2:
        return TokenModel(*model)
    if hasattr(model, "loglikelihoods") or (hasattr(model, "generate") and not hasattr(model, "config")):
        return StringModel(model)
    raise TypeError(f"model is a {type(model).__name__}; give a folder, a (model, tokenizer) pair, or an object with "
                    "loglikelihoods(list of (context, continuation)) and generate(list of prompts, max_new_tokens)")


class TokenModel:
    """A causal model and its tokenizer. `cut` counts items that were longer than the model's positions."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer, self.family, self.cut = model, tokenizer, family_of(model.config), 0
        self.positions = positions(model.config)
        self.tail = lru_cache(1024)(self._tail)                 # the letters of an exam are the same for all its items
        _check_head(model)

    def rank(self, records, choices, shorter=()):
        """Records and the texts to rank after each -> (a list of scores each, the prompts as the model saw them).

        shorter: for each record those that take its place where it is too long, each with one shot less than the last."""
        scores, prompts, requests, size = [], [], [], 0
        for record, texts, others in zip_longest(records, choices, shorter):
            prompt, ids, tails = self._fit(record, texts, shorter=others)
            prompts.append(prompt)
            requests += [(ids, tail) for tail in tails]
            size += sum(len(ids) + len(tail) for tail in tails)
            if size > AT_ONCE:
                scores, requests, size = scores + loglikelihoods(self.model, requests), [], 0
        return _regroup(scores + loglikelihoods(self.model, requests), choices), prompts

    def answer(self, records, max_new_tokens, temperature=0.0, shorter=()):
        """Records -> (answers, the prompts as the model saw them); temperature 0 is greedy; shorter: as in `rank`."""
        fitted = [self._fit(record, (), max_new_tokens, others) for record, others in zip_longest(records, shorter)]
        order = sorted(range(len(fitted)), key=lambda i: len(fitted[i][1]))
        longest = len(fitted[order[-1]][1]) + max_new_tokens
        rows = sample(self.model, [fitted[i][1] for i in order], max_new_tokens, self.family.end_ids(self.tokenizer),
                      self.tokenizer.pad_token_id, temperature, batch_size=max(1, BATCH_TOKENS // longest))
        answers = {i: self.tokenizer.decode(row) for i, row in zip(order, rows)}
        return [answers[i] for i in range(len(fitted))], [prompt for prompt, _, _ in fitted]

    def _fit(self, record, texts, reserve=0, shorter=None):
        """(prompt text, prompt ids, ids of each text without its end token), together within the model's positions.

        What is too long loses shots from the end, then the beginning of its prompt, the same for all texts. Only where the
        texts alone are too long, in templates whose label is followed by an article, the end of each goes too, equally many
        tokens.
        """
        tails = [self.tail(record.prefix, text) for text in texts]
        room = self.positions - max([reserve, *map(len, tails)])
        ids, others = self.family.encode(self.tokenizer, record)[0], iter(shorter or ())
        self.cut += len(ids) > room
        while len(ids) > room and (other := next(others, None)):
            record, ids = other, self.family.encode(self.tokenizer, other)[0]
        last = replace(record, prompt=record.prompt.rstrip()[-1:])
        while len(ids) > room and record != last:
            rest = record.prompt[math.ceil((len(ids) - room) * len(record.prompt) / len(ids)):]
            record = replace(record, prompt=rest) if rest.strip() else last
            ids = self.family.encode(self.tokenizer, record)[0]
        tails = [tail[:len(tail) - max(0, len(ids) - room)] for tail in tails]
        if not all(tails) or (reserve and len(ids) > room):
            needed = texts or f"{reserve} new tokens"
            raise ValueError(f"the model has {self.positions} positions, too few for {needed} behind "
                             f"{(record.prompt + record.prefix)[-20:]!r}; take a model with more positions")
        return record.prompt + record.prefix, ids, tails

    def _tail(self, prefix, text):
        return self.family.encode(self.tokenizer, Record("。", prefix=prefix), text)[1][:-1]        # whatever the prompt is


class StringModel:
    """Somebody's object that takes strings: it gets prompt + prefix as they stand, and nothing is cut."""

    cut = 0

    def __init__(self, model):
        self.model = model

    def rank(self, records, choices, shorter=()):
        prompts = [record.prompt + record.prefix for record in records]
        requests = [(prompt, text) for prompt, texts in zip(prompts, choices) for text in texts]
        return _regroup(map(float, self._ask("loglikelihoods", requests)), choices), prompts

    def answer(self, records, max_new_tokens, temperature=0.0, shorter=()):
        prompts = [record.prompt + record.prefix for record in records]
        return self._ask("generate", prompts, max_new_tokens=max_new_tokens), prompts

    def _ask(self, method, requests, **options):
        name = type(self.model).__name__
        if not hasattr(self.model, method):
            raise TypeError(f"the model, a {name}, has no method {method}, which this task needs")
        results = list(getattr(self.model, method)(requests, **options))
        if len(results) != len(requests):
            raise ValueError(f"{method} of {name} gave {len(results)} results for {len(requests)} requests; "
                             "it must give one each")
        return results


def positions(config):
    """A model's positions, from whichever of the usual names its config has; a billion where it states none."""
    return next((n for n in (getattr(config, name, None) for name in POSITIONS) if isinstance(n, int)), 10 ** 9)


def trained_length(config):
    """The least number of positions that a config names; the rotary angles of longer rows may follow their own length."""
    scaled = (getattr(config, "rope_parameters", None) or {}).get("original_max_position_embeddings")
    return min((n for n in (scaled, *(getattr(config, name, None) for name in POSITIONS)) if isinstance(n, int)), default=10 ** 9)


@torch.no_grad()
def _check_head(model):
    """ValueError for a model that does more than its head to the last hidden states, such as capping logits."""
    ids, was_training = torch.tensor([[0, 1]], device=next(model.parameters()).device), model.training
    model.eval()
    logits = model.get_output_embeddings()(model.base_model(input_ids=ids, use_cache=False).last_hidden_state).float()
    whole = model(input_ids=ids, use_cache=False).logits.float()
    same = torch.allclose(whole, logits, rtol=0, atol=1e-3 * float(logits.abs().max()))
    model.train(was_training)
    if not same:
        raise ValueError(f"the logits of {type(model).__name__} are not its head's of its last hidden states; give an "
                         "object with loglikelihoods and generate that asks it")


def _regroup(scores, choices):
    """The scores of all choices in a row -> one list an item."""
    scores = iter(scores)
    return [[next(scores) for _ in texts] for texts in choices]


def _batches(rows, tokens):
    """Rows (tuples of ids), longest first, in batches of at most `tokens` positions, one row at least."""
    rows = sorted(rows, key=len, reverse=True)
    while rows:
        size = max(1, tokens // len(rows[0]))
        yield rows[:size]
        rows = rows[size:]


def _padded(batch, model):
    """ids, mask (B, T) on the model's device, padded on the right."""
    device = next(model.parameters()).device
    return pad([list(row) for row in batch], 0).to(device), pad([[1] * len(row) for row in batch], 0).to(device)
