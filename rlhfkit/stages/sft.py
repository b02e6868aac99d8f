"""Supervised fine-tuning: loss on the best answer and its end token.

The 2023 kit trained on the prompt and, for some families, on padding; LLaMA-like answers had no end token and never learnt to stop.
"""
from functools import partial

from transformers import Trainer, TrainingArguments

from rlhfkit.rollout import answer_samples, sample_metrics
from rlhfkit.rows import collate, sft_rows
from rlhfkit.trainer import arguments, loss_judge, prepare, rows_for, train


def run(config):
    model, tokenizer, family = prepare(config)
    rows, dev, dev_records = rows_for(config, partial(
        sft_rows, family=family, tokenizer=tokenizer, max_length=config.max_length, packing=config.packing))
    answers = partial(answer_samples, tokenizer=tokenizer, family=family, records=dev_records, config=config)
    before = answers(model, step=0)
    trainer = Trainer(model=model, args=TrainingArguments(**arguments(config, rows)), train_dataset=rows,
                      data_collator=partial(collate, pad_id=tokenizer.pad_token_id))
    result = train(config, trainer, tokenizer, loss_judge(config, dev, tokenizer.pad_token_id))
    result.samples = before + answers(trainer.model, step=trainer.state.global_step)
    result.metrics |= sample_metrics(result.samples)
    return result
