"""Reward model: every strictly ordered pair of a prompt's answers, -log sigmoid of the difference of their end scores.

One prompt's comparisons stand in one batch element and weigh as one (InstructGPT, Ouyang et al. 2022, eq. 1), and each answer is encoded
once. The 2023 kit averaged over all tokens from the first difference on, padding included, and took -log(sigmoid), which overflows.
"""
from functools import partial

import torch
import torch.nn.functional as F
from transformers import Trainer, TrainingArguments

from rlhfkit.engine import device, mean_over
from rlhfkit.models.value import RewardModel, score
from rlhfkit.rows import collate_answers, reward_rows
from rlhfkit.trainer import arguments, prepare, rows_for, train


def run(config):
    model, tokenizer, family = prepare(config, partial(RewardModel.from_causal, seed=config.seed))
    rows, dev, _ = rows_for(config, partial(reward_rows, family=family, tokenizer=tokenizer, max_length=config.max_length,
                                         max_answers=config.max_answers))
    batches = partial(collate_answers, pad_id=tokenizer.pad_token_id)
    trainer = PairTrainer(model=model, args=TrainingArguments(**arguments(config, rows)),
                          train_dataset=rows, data_collator=batches)

    def measure(model, rows):
        batch = {k: v.to(device()) for k, v in batches(rows).items()}
        margins, prompts = pair_margins(score(model, batch["input_ids"], batch["attention_mask"]), batch["scores"], batch["prompt"])
        weights = pair_weights(prompts)
        return {"loss": ((-F.logsigmoid(margins) * weights).sum(), weights.sum()), "accuracy": ((margins > 0).sum(), len(margins)),
                "margin": (margins.sum(), len(margins))}
    result = train(config, trainer, tokenizer, (lambda model: mean_over(dev, config.batch_size, partial(measure, model))) if dev else None)
    result.metrics["margins"] = margins_of(trainer.model, dev, batches, config.batch_size)
    return result


@torch.no_grad()
def margins_of(model, rows, batches, batch_size):
    """The held-out margins, chosen less rejected, of all pairs, as a list: for the figure."""
    model.eval()
    found = []
    for start in range(0, len(rows), batch_size):
        batch = {k: v.to(device()) for k, v in batches(rows[start:start + batch_size]).items()}
        found += pair_margins(score(model, batch["input_ids"], batch["attention_mask"]), batch["scores"], batch["prompt"])[0].tolist()
    return found


class PairTrainer(Trainer):
    """HF's trainer with the ranking loss; prompts, not pairs, are what a batch counts."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        margins, prompts = pair_margins(score(model, inputs["input_ids"], inputs["attention_mask"]), inputs["scores"], inputs["prompt"])
        weights = pair_weights(prompts)
        loss = (-F.logsigmoid(margins) * weights).sum() / weights.sum()
        return (loss, margins) if return_outputs else loss


def pair_margins(values, scores, prompt):
    """values, scores, prompt (N,) -> (margins (P,), prompt (P,)) of all pairs of one prompt, the strictly better answer first."""
    better = (prompt[:, None] == prompt[None]) & (scores[:, None] > scores[None])           # (N, N)
    chosen, rejected = better.nonzero(as_tuple=True)
    return values[chosen] - values[rejected], prompt[chosen]


def pair_weights(prompts):
    """prompt of each pair (P,) -> (P,) weights that sum to 1 for each prompt."""
    return 1.0 / torch.bincount(prompts)[prompts]
