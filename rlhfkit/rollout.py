"""Sampling answers, for PPO, samples and evaluation, and scoring them: left-padded prompts in batches on the training weights.

Each row draws noise from a seed of its own, so an answer does not depend on what else is in the batch or on the number of processes.
Log-probs are not taken here: PPO scores the sampled ids with the module that trains, which makes the first ratio exactly 1.
"""
import importlib
from dataclasses import replace

import torch
from transformers import (GenerationConfig, LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper,
                          TopPLogitsWarper)

from rlhfkit.engine import device
from rlhfkit.families import check_vocabulary, family_of, load_model, load_tokenizer
from rlhfkit.models.value import load_reward_model, score
from rlhfkit.records import Answer, Record
from rlhfkit.rows import pad
from rlhfkit.samples.couplets import applies, gold


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
    answers = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start:start + batch_size]
        seeds = [hash((seed, start + i)) for i in range(len(batch))]
        rows = rollout(model, batch, max_new_tokens, end_ids, pad_id, seeds, temperature, top_k, top_p)
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
def rollout(model, prompts, max_new_tokens, end_ids, pad_id, seeds, temperature, top_k=0, top_p=1.0, synced=False):
    """One batch -> lists of sampled ids up to and with the end token; a row without one was cut by length.

    seeds: one a row, for its noise; synced: sharded weights, all processes step together."""
    place = next(model.parameters()).device
    ids = pad(prompts, pad_id, side="left").to(place)                                       # (B, P)
    mask = pad([[1] * len(p) for p in prompts], 0, side="left").to(place)
    processors = LogitsProcessorList()
    if temperature > 0:
        processors.append(TemperatureLogitsWarper(float(temperature)))
        if top_k:
            processors.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            processors.append(TopPLogitsWarper(top_p))
        processors.append(RowNoise(seeds, place))
    was_training, own = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()            # not the folder's: a repetition penalty would change the distribution
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, eos_token_id=end_ids,
                         pad_token_id=pad_id, logits_processor=processors, use_cache=True, synced_gpus=synced)
    model.train(was_training)
    model.generation_config = own
    return [_until(row, end_ids) for row in out[:, ids.shape[1]:].tolist()]


class Rewards:
    """What scores an answer: the mean of the reward models of `reward_path`, plus the reward function."""

    def __init__(self, config, tokenizer):
        self.models = [self._load(path, config, tokenizer) for path in config.reward_path.split(",") if path]
        self.function = None
        if config.reward_function:
            module, _, name = config.reward_function.partition(":")
            self.function = getattr(importlib.import_module(module), name)

    def __call__(self, ids, mask, texts):
        """ids, mask (B, T), texts B pairs (prompt, answer) -> (B,) float32; raises ValueError for a wrong count or NaN."""
        total = torch.zeros(len(ids), device=ids.device)
        if self.models:
            with torch.no_grad():
                total = torch.stack([torch.cat([score(m, ids[i:i + 64], mask[i:i + 64]) for i in range(0, len(ids), 64)])
                                     for m in self.models]).mean(0)
        if self.function:
            given = self.function([p for p, _ in texts], [a for _, a in texts])
            if len(given) != len(texts):
                raise ValueError(f"the reward function gave {len(given)} scores for {len(texts)} answers; it must give one for each")
            total = total + torch.tensor([float(x) for x in given], device=ids.device)
        if not bool(torch.isfinite(total).all()):
            at = int((~torch.isfinite(total)).nonzero()[0])
            raise ValueError(f"the score of {texts[at]} is {float(total[at])}; scores must be finite numbers")
        return total

    @staticmethod
    def _load(path, config, tokenizer):
        theirs = load_tokenizer(path)
        if theirs.get_vocab() != tokenizer.get_vocab():
            raise ValueError(f"the reward model in {path} has another vocabulary than the actor in {config.model_path}; "
                             "train one on the actor's tokenizer, or give a reward_function")
        return load_reward_model(path).to(device()).requires_grad_(False)


class RowNoise(LogitsProcessor):
    """Gumbel noise on the logits, so that the likeliest token is a sample (Gumbel 1954); one generator a row."""

    def __init__(self, seeds, device):
        self.generators = [torch.Generator(device).manual_seed(seed % (1 << 62)) for seed in seeds]

    def __call__(self, input_ids, scores):
        uniform = torch.stack([torch.rand(scores.shape[1], generator=g, device=scores.device) for g in self.generators])   # (B, V)
        return scores.float() - torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))


def _until(row, end_ids):
    """The row up to and with its first end token."""
    for t, token in enumerate(row):
        if token in end_ids:
            return row[:t + 1]
    return row
