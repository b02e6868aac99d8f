"""The model's side of an evaluation: log-likelihoods of continuations, greedy answers, perplexity, reward scores.

A token is scored from the logits of the position before it, through one log_softmax, and only tokens of the choice
count; the 2023 kit scored each token from its own position and applied softmax twice, so that a perfect model looked
uniform. Results do not depend on batch size or order.
"""
import math
import os
from dataclasses import replace

import pandas as pd
import torch

from rlhfkit.engine import device
from rlhfkit.families import family_of, load_model, load_tokenizer
from rlhfkit.models import value
from rlhfkit.rollout import sample
from rlhfkit.rows import pad, text_of

BATCH_TOKENS = 8192         # positions of a forward pass, padding included
HEAD_ROWS = 1024            # positions that go through the head at once: 164 MB of float32 logits for 40,000 pieces
POSITIONS = ("max_position_embeddings", "max_sequence_length", "seq_length", "model_max_length")


@torch.no_grad()
def loglikelihoods(model, requests, batch_tokens=BATCH_TOKENS):
    """(prompt_ids, continuation_ids) each -> sum of ln p(token | all before it) over the continuation, in nats.

    Summed in float64; right-padded batches of like length. Requests that differ in their last token only, such as
    four letters, share one row. ValueError for a request without a prompt or continuation token.
    """
    rows = {}
    for number, (prompt, continuation) in enumerate(requests):
        if not prompt or not continuation:
            raise ValueError(f"request {number} has {len(prompt)} prompt and {len(continuation)} continuation tokens; "
                             "it needs one of each")
        rows.setdefault((*prompt, *continuation[:-1]), []).append(number)
    totals, was_training = torch.zeros(len(requests), dtype=torch.float64), model.training
    model.eval()
    for batch in _batches(list(rows), batch_tokens):
        ids, mask = _padded(batch, model)                                                               # (B, T)
        hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state  # (B, T, H)
        wanted = [(b, len(requests[n][0]) - 1 + t, token, n) for b, row in enumerate(batch) for n in rows[row]
                  for t, token in enumerate(requests[n][1])]
        for start in range(0, len(wanted), HEAD_ROWS):
            row, time, token, owner = torch.tensor(wanted[start:start + HEAD_ROWS], device=ids.device).T    # (N,)
            logits = model.get_output_embeddings()(hidden[row, time]).float()                               # (N, V)
            logps = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
            totals.index_add_(0, owner.cpu(), logps.double().cpu())
    model.train(was_training)
    return totals.tolist()


def perplexity(model, records):
    """Table of held-out perplexity: source, perplexity, tokens, characters, nats_per_character; the total first.

    model: a path or a (model, tokenizer) pair. A record's text is prompt, prefix and best answer; every token
    is predicted once, in windows of the model's positions that each have the family's beginning. Perplexities of models with different tokenizers do
    not compare; nats a character do.
    """
    reader, records, requests, owners = open_model(model), list(records), [], []
    if not isinstance(reader, TokenModel):
        raise TypeError(f"model is a {type(model).__name__}; perplexity needs a path or a (model, tokenizer) pair")
    if not records:
        raise ValueError("records is empty; there is no text to measure")
    for number, record in enumerate(records):
        read, ids = reader.family.encode_text(reader.tokenizer, text_of(record))
        read, ids = (read, ids) if read else (ids[:1], ids[1:])             # without a beginning the first token is not predicted
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

    def rank(self, records, choices):
        """Records and the texts to rank after each -> (a list of scores each, the prompts as the model saw them)."""
        fitted = [self._fit(record, texts) for record, texts in zip(records, choices)]
        requests = [(ids, tail) for _, ids, tails in fitted for tail in tails]
        return _regroup(loglikelihoods(self.model, requests), choices), [prompt for prompt, _, _ in fitted]

    def answer(self, records, max_new_tokens, temperature=0.0):
        """Records -> (answers, the prompts as the model saw them); temperature 0 is greedy."""
        fitted = [self._fit(record, (), max_new_tokens) for record in records]
        order = sorted(range(len(fitted)), key=lambda i: len(fitted[i][1]))
        longest = len(fitted[order[-1]][1]) + max_new_tokens
        rows = sample(self.model, [fitted[i][1] for i in order], max_new_tokens, self.family.end_ids(self.tokenizer), self.tokenizer.pad_token_id,
                      temperature, batch_size=max(1, BATCH_TOKENS // longest))
        answers = {i: self.tokenizer.decode(row) for i, row in zip(order, rows)}
        return [answers[i] for i in range(len(fitted))], [prompt for prompt, _, _ in fitted]

    def _fit(self, record, texts, reserve=0):
        """(prompt text, prompt ids, ids of each text without its end token), together within the model's positions.

        What is too long loses the beginning of its prompt, the same for all texts. Only where the texts alone are too
        long, in templates whose label is followed by an article, the end of each text goes too, equally many tokens.
        """
        last = replace(record, prompt=record.prompt.rstrip()[-1:])      # the texts' ids do not depend on it
        tails = [self.family.encode(self.tokenizer, last, text)[1][:-1] for text in texts]
        room = self.positions - max([reserve, *map(len, tails)])
        ids = self.family.encode(self.tokenizer, record)[0]
        self.cut += len(ids) > room
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


class StringModel:
    """Somebody's object that takes strings: it gets prompt + prefix as they stand, and nothing is cut."""

    cut = 0

    def __init__(self, model):
        self.model = model

    def rank(self, records, choices):
        prompts = [record.prompt + record.prefix for record in records]
        requests = [(prompt, text) for prompt, texts in zip(prompts, choices) for text in texts]
        return _regroup(map(float, self._ask("loglikelihoods", requests)), choices), prompts

    def answer(self, records, max_new_tokens, temperature=0.0):
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
