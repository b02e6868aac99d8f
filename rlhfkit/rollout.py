"""Sampling answers, for PPO, samples and evaluation: left-padded prompts in batches on the training weights; and keeping them.

Each row draws noise from a seed of its own, so an answer does not depend on what else is in the batch or on the number of processes.
On a GPU captured graphs do the steps (decode.py), elsewhere transformers' `generate`; the token is chosen by the same function.
"""
import json
import os
from dataclasses import replace
from pathlib import Path

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from rlhfkit.decode import Decoder, supported
from rlhfkit.engine import device
from rlhfkit.families import check_vocabulary, family_of, load_model, load_tokenizer
from rlhfkit.records import Answer, Record
from rlhfkit.rows import pad
from rlhfkit.samples.couplets import applies, gold
from rlhfkit.sampling import choose


def generate(model_path, prompts, max_new_tokens=64, temperature=0.0, top_k=0, top_p=1.0, seed=0):
    """Answers (list of str) of the model in a folder to prompts, each a string or a Record; temperature 0 takes the likeliest token."""
    if isinstance(prompts, (str, Record)):
        raise TypeError(f"prompts is {prompts!r:.80}; it must be a list of prompts; write [prompt]")
    for name, value, rule, good in (("temperature", temperature, ">= 0", temperature >= 0), ("top_k", top_k, ">= 0", top_k >= 0),
                                    ("top_p", top_p, "in (0, 1]", 0 < top_p <= 1),
                                    ("max_new_tokens", max_new_tokens, "> 0", max_new_tokens > 0)):
        if not good:
            raise ValueError(f"{name} is {value}; it must be {rule}; leave it out for its default")
    model, tokenizer, family = load_model(model_path, device=device()), load_tokenizer(model_path), family_of(model_path)
    check_vocabulary(model, tokenizer)
    records = [p if isinstance(p, Record) else Record(prompt=p) for p in prompts]
    room = getattr(model.config, "max_position_embeddings", None)
    if room and max_new_tokens >= room:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; the model has {room} positions for prompt and answer: ask for fewer")
    try:
        ids = [family.encode(tokenizer, r, None, room and room - max_new_tokens)[0] for r in records]
    except ValueError as error:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; the model has {room} positions, too few for it and a prompt ({error}); "
                         "ask for fewer") from error
    answers = sample(model, ids, max_new_tokens, family.end_ids(tokenizer), tokenizer.pad_token_id, temperature, top_k, top_p, seed)
    return [tokenizer.decode(a) for a in answers]


def judged_records(model_path, records, judge, answers_per_prompt=2, max_new_tokens=64, temperature=1.0, seed=0):
    """Records with the model's own sampled answers beside those they have, all scored by `judge(prompt, answer) -> float`, best first:
    preference data where the policy is, as annotators would label it. Empty answers are left out."""
    asked = [r for r in records for _ in range(answers_per_prompt)]
    texts = generate(model_path, asked, max_new_tokens, temperature, seed=seed)
    made = []
    for i, record in enumerate(records):
        given = texts[i * answers_per_prompt:(i + 1) * answers_per_prompt]
        wanted = dict.fromkeys([*(a.text for a in record.answers), *(t for t in given if t.strip())])
        answers = [Answer(text, judge(record.prompt, text)) for text in wanted]
        made.append(replace(record, answers=tuple(sorted(answers, key=lambda a: -a.score))))
    return made


def sample(model, prompts, max_new_tokens, end_ids, pad_id, temperature=0.0, top_k=0, top_p=1.0, seed=0, batch_size=64):
    """prompts: lists of ids -> lists of answer ids, without the end token."""
    answers, decoder = [], fast(model)
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start:start + batch_size]
        seeds = [hash((seed, start + i)) for i in range(len(batch))]
        rows, _ = rollout(model, batch, max_new_tokens, end_ids, pad_id, seeds, temperature, top_k, top_p, decoder=decoder)
        answers += [row[:-1] if row and row[-1] in end_ids else row for row in rows]
    return answers


def answer_samples(model, tokenizer, family, records, config, step):
    """Answers to the first config.samples records that fit -> sample dicts for a Result, with the judge's score where its rules apply.
    Each record has noise of its own, the same at every step, so that before and after can be paired."""
    kept = []
    for record in records:
        if len(kept) == config.samples:
            break
        try:
            kept.append((record, family.encode(tokenizer, record, None, config.max_length - config.max_new_tokens)[0]))
        except ValueError:                      # the stage's rows have set it aside and counted it
            continue
    answers = sample(model, [ids for _, ids in kept], config.max_new_tokens, family.end_ids(tokenizer), tokenizer.pad_token_id,
                     config.temperature, seed=config.seed)
    rows = [dict(step=step, prompt=r.prompt, answer=tokenizer.decode(a)) for (r, _), a in zip(kept, answers)]
    return [row | ({"gold": gold(row["prompt"], row["answer"])} if applies(row["prompt"]) else {}) for row in rows]


def sample_metrics(samples):
    """Mean gold score of a stage's first and last samples, `gold_before` and `gold`, as far as the judge's rules apply."""
    figures = {}
    for name, step in (("gold_before", min), ("gold", max)):
        golds = [s["gold"] for s in samples if s["step"] == step(x["step"] for x in samples) and "gold" in s]
        figures |= {name: sum(golds) / len(golds)} if golds else {}
    return figures


@torch.no_grad()
def rollout(model, prompts, max_new_tokens, end_ids, pad_id, seeds, temperature, top_k=0, top_p=1.0, synced=False, decoder=None):
    """One batch -> (answers: lists of sampled ids up to and with the end token, one without it was cut by length; their log-probs, of the
    temperature-scaled distribution without filters).

    seeds: one a row, for its noise; synced: sharded weights, all processes step together; decoder: captured graphs of this model."""
    if decoder:
        return decoder(prompts, max_new_tokens, end_ids, pad_id, list(seeds), temperature, top_k, top_p)
    place = next(model.parameters()).device
    ids = pad(prompts, pad_id, side="left").to(place)                                       # (B, P)
    mask = pad([[1] * len(p) for p in prompts], 0, side="left").to(place)
    choice = Choice(seeds, temperature, top_k, top_p, place)
    was_training, own = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()            # not the folder's: a repetition penalty would change the distribution
    try:
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1,
                             eos_token_id=end_ids, pad_token_id=pad_id, logits_processor=LogitsProcessorList([choice]), use_cache=True,
                             synced_gpus=synced)
    finally:
        model.train(was_training)
        model.generation_config = own
    answers = [_until(row, end_ids) for row in out[:, ids.shape[1]:].tolist()]
    logps = torch.stack(choice.logps, 1).tolist()                                           # (B, A)
    return answers, [row[:len(answer)] for row, answer in zip(logps, answers)]


def fast(model, compiled=False, length=0):
    """A Decoder for a model that can be sampled from captured graphs, or None; length: tokens of a row to reserve."""
    return Decoder(model, compiled, length) if not supported(model, next(model.parameters()).device) else None


class Choice(LogitsProcessor):
    """Chooses the next token as the captured graphs do, and leaves `generate` no other one."""

    def __init__(self, seeds, temperature, top_k, top_p, place):
        self.seeds, self.options, self.logps = torch.tensor(list(seeds), device=place), (temperature, top_k, top_p), []

    def __call__(self, input_ids, scores):
        tokens, logps = choose(scores, self.seeds, len(self.logps), *self.options)
        self.logps.append(logps)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


def keep(folder, step, answers):
    """Store a rollout's answers, dicts, as `rollouts/step-000012.jsonl` of a run folder, whole or not at all."""
    file = Path(folder) / "rollouts" / f"step-{step:06d}.jsonl"
    file.parent.mkdir(exist_ok=True)
    beside = file.with_suffix(".partial")
    beside.write_text("".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers), encoding="utf-8")
    os.replace(beside, file)


def rollouts(output_dir):
    """The answers that a PPO run with keep_rollouts stored, step by step: dicts with step, id, prompt, answer, prompt_ids, ids, score, finished,
    and, a number for each of the answer's tokens, logps, ref_logps, kl, values (None without a critic), advantages."""
    files = sorted((Path(output_dir) / "rollouts").glob("step-*.jsonl"))
    if not files:
        raise FileNotFoundError(f"{output_dir} holds no rollouts; run PPO with keep_rollouts=True")
    for file in files:
        with open(file, encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def repetition(ids):
    """Share of the bigrams of a list of ids that occurred before in it."""
    pairs = list(zip(ids, ids[1:]))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def _until(row, end_ids):
    """The row up to and with its first end token."""
    for t, token in enumerate(row):
        if token in end_ids:
            return row[:t + 1]
    return row
