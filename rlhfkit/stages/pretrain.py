"""Pre-training, or continued pre-training: next-token loss on packed text, no document seen by another.

Unlike in the 2023 kit, positions restart with each document, no tail is thrown away, and every document ends with its end token.
"""
from functools import partial

from transformers import Trainer, TrainingArguments

from rlhfkit.rows import collate, text_rows
from rlhfkit.trainer import arguments, loss_judge, prepare, rows_for, train


def run(config):
    model, tokenizer, family = prepare(config)
    rows, dev, _ = rows_for(config, partial(text_rows, family=family, tokenizer=tokenizer, max_length=config.max_length))
    trainer = Trainer(model=model, args=TrainingArguments(**arguments(config, rows)), train_dataset=rows,
                      data_collator=partial(collate, pad_id=tokenizer.pad_token_id))
    return train(config, trainer, tokenizer, loss_judge(config, dev, tokenizer.pad_token_id))
