"""DPO on TRL's trainer; ours are the rows: one encoding of the prompt for both answers, no second tokenisation, nothing cut silently.

The reference is the model that the run starts from; its log-probs are computed once, before training.
"""
import random
from functools import partial

import torch
import torch.nn.functional as F
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from rlhfkit.engine import device, gather_list, mean_over, rank, world_size
from rlhfkit.rl import token_logps
from rlhfkit.rollout import answer_samples, sample_metrics
from rlhfkit.rows import pad, pair_rows
from rlhfkit.trainer import arguments, prepare, rows_for, train


def run(config):
    model, tokenizer, family = prepare(config)
    rows, dev, dev_records = rows_for(config, partial(
        pair_rows, family=family, tokenizer=tokenizer, max_length=config.max_length, pairs_per_prompt=config.pairs_per_prompt,
        seed=config.seed, pair_rule=config.pair_rule))
    seen = config.max_steps * config.batch_size * config.gradient_accumulation_steps * world_size()
    # the reference is asked only about what the steps will see
    rows, dev = random.Random(config.seed).sample(rows, seen) if 0 < seen < len(rows) else list(rows), list(dev)
    answers = partial(answer_samples, tokenizer=tokenizer, family=family, records=dev_records, config=config)
    before = answers(model, step=0)
    measure = partial(pair_figures, pad_id=tokenizer.pad_token_id, beta=config.beta)
    add_reference(model.to(device()).eval(), rows, config.batch_size, tokenizer.pad_token_id)
    add_reference(model, dev, config.batch_size, tokenizer.pad_token_id)
    args = DPOConfig(**arguments(config, rows), beta=config.beta, max_length=None, precompute_ref_log_probs=True, disable_dropout=True)
    columns = [{k: r[k] for k in ("prompt_ids", "chosen_ids", "rejected_ids")}
               | dict(zip(("ref_chosen_logps", "ref_rejected_logps"), r["reference"])) for r in rows]
    trainer = RowTrainer(model=model, args=args, train_dataset=Dataset.from_list(columns), processing_class=tokenizer)
    judge = (lambda model: mean_over(dev, config.batch_size, partial(measure, model))) if dev else None
    result = train(config, trainer, tokenizer, judge)
    result.samples = before + answers(trainer.model, step=trainer.state.global_step)
    result.metrics |= sample_metrics(result.samples)
    return result


class RowTrainer(DPOTrainer):
    """TRL's trainer on rows that are ids already and carry their reference log-probs; its own way through a cache file does not work with
    several processes and a dataset from memory."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset

    def _precompute_ref_logps(self, dataset, *args, **kwargs):
        return dataset


def add_reference(model, rows, batch_size, pad_id):
    """Give each row `reference`, the model's log-probs of its two answers; each process asks about a share of them."""
    mine, found = list(range(rank(), len(rows), world_size())), []
    for start in range(0, len(mine), batch_size):
        batch = mine[start:start + batch_size]
        found += zip(batch, pair_logps(model, [rows[i] for i in batch], pad_id).tolist())
    for i, reference in gather_list(found):
        rows[i]["reference"] = reference


@torch.no_grad()
def pair_logps(model, rows, pad_id):
    """Summed log-probs (B, 2) of the chosen and the rejected answer of each row."""
    ids = [row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids") for row in rows]
    answers = [[0] * len(row["prompt_ids"]) + [1] * len(row[side]) for side in ("chosen_ids", "rejected_ids") for row in rows]
    input_ids, answer = pad(ids, pad_id).to(device()), pad(answers, 0).to(device())         # (2B, T), chosen first
    mask = pad([[1] * len(x) for x in ids], 0).to(device())
    logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
    return (token_logps(logits[:, :-1], input_ids[:, 1:]) * answer[:, 1:]).sum(1).view(2, -1).T


def pair_figures(model, rows, pad_id, beta):
    """Sums and counts of the held-out loss, accuracy and margin against the reference log-probs that the rows carry."""
    margins = (pair_logps(model, rows, pad_id).cpu() - torch.tensor([row["reference"] for row in rows])) @ torch.tensor([beta, -beta])
    return {"loss": (-F.logsigmoid(margins).sum(), len(rows)), "accuracy": ((margins > 0).sum(), len(rows)), "margin": (margins.sum(), len(rows))}
