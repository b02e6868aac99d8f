"""What the stages on HF's and TRL's trainers share: the arguments from a run's config, log lines and history, resume, the final save.

Held-out figures come from a function of the model that the stage gives (`judge`), at step 0, every eval_steps and at the end, so that every
stage can say before and after; HF's own evaluation averages batch means.
"""
import copy
import json
import math
import os
import resource
import shutil
import statistics
import time
import warnings
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback, TrainerCallback, set_seed

from rlhfkit import health
from rlhfkit.cache import arguments_of, prepared
from rlhfkit.configs import Result
from rlhfkit.engine import SCHEDULES, device, log_line, mean_over, rank, say, set_dropout, world_size
from rlhfkit.families import check_vocabulary, family_of, load_model, load_tokenizer
from rlhfkit.packing import IGNORE, Packed
from rlhfkit.rows import collate
from rlhfkit.saving import newest_checkpoint, save_folder
from rlhfkit.zero import deepspeed_config

LORA_TOLERANCE = 1e-3       # largest difference of a logit between adapter and merged weights, float32


def prepare(config, wrap=None):
    """(model in train mode with dropout and LoRA as configured, tokenizer, family) for a run; seeds everything. wrap: model -> model."""
    set_seed(config.seed)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="IProgress not found")
    family = family_of(config.model_path)
    model = load_model(config.model_path, dtype=config.dtype)
    if model.config.is_encoder_decoder:
        raise ValueError(f"{config.model_path} holds a {model.config.model_type} model, an encoder and a decoder; the stages train causal models: "
                         "give one of those; rk.time_steps measures this one")
    tokenizer = load_tokenizer(config.model_path)
    check_length(model, config.max_length)
    check_vocabulary(model, tokenizer)
    model = wrap(model) if wrap else model
    return adapt(set_dropout(model, config.dropout), config, family).train(), tokenizer, family


def rows_for(config, build):
    """The rows of the run's data, tokenised now or before (cache.py), and packed where `build` packs -> (train, dev, dev records).
    build: a functools.partial of a function of rows.py over family, tokenizer and other keywords. What is set aside is counted,
    said, and listed in rejected.jsonl."""
    found, arguments = prepared(config, build), arguments_of(build)
    rows, dev, facts = found.train, found.dev, found.facts
    if facts["aside"] and rank() == 0:
        shutil.copyfile(found.folder / "aside.jsonl", os.path.join(config.output_dir, "rejected.jsonl"))
        say(config.output_dir, f"{facts['aside']} of {facts['total']} rows set aside (rejected.jsonl): "
            + "; ".join(f"{n} × {reason}" for reason, n in facts["reasons"]))
    origin = f"tokenised in {found.seconds:.1f} s" if found.seconds else "from the cache"
    say(config.output_dir, f"rows: {len(rows):,} {origin}")
    if arguments.get("packing"):
        rows, dev = Packed(rows, arguments["max_length"]), Packed(dev, arguments["max_length"])
        say(config.output_dir, f"packed: {facts['train']:,} rows into {len(rows):,} of {rows.max_length} tokens, "
            f"{100 * rows.fill_rate:.1f} % filled")
    return rows, dev, found.dev_records


def loss_judge(config, dev, pad_id):
    """The held-out loss in nats a token, over all of the dev rows' labels."""
    def measure(model, rows):
        batch = {k: v.to(device()) for k, v in collate(rows, pad_id).items()}
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits[:, :-1].float()                     # (B, T-1, V)
        total = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")
        return {"loss": (total, (labels[:, 1:] != IGNORE).sum())}
    return (lambda model: mean_over(dev, config.batch_size, partial(measure, model))) if dev else None


def check_length(model, max_length):
    """Raise ValueError when rows could be longer than the model has positions."""
    room = getattr(model.config, "max_position_embeddings", None)
    if room and max_length > room:
        raise ValueError(f"max_length is {max_length}; the model has {room} positions; set max_length to {room} or less")


def adapt(model, config, family):
    """The model with LoRA adapters when lora_rank is set."""
    if not config.lora_rank:
        return model
    if config.zero_stage == 3:
        raise ValueError("lora_rank with zero_stage 3 is not supported: the merged weights could not be checked; use zero_stage 2")
    targets = [t.strip() for t in config.lora_targets.split(",") if t.strip()] or list(family.lora_targets) or "all-linear"
    return get_peft_model(model, LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, lora_dropout=config.dropout,
                                            target_modules=targets,
                                            modules_to_save=["v_head"] if hasattr(model, "v_head") else None))


def merged(model, ids):
    """The model with its adapters merged; raises ValueError where the logits on `ids` (1, T) move by more than LORA_TOLERANCE."""
    if not hasattr(model, "merge_and_unload"):
        return model

    def outputs():                          # logits, or a reward model's values
        found = model(input_ids=ids)
        return getattr(found, "logits", found)

    model.eval()
    with torch.no_grad():
        before = outputs()
        model = model.merge_and_unload()
        worst = float((outputs() - before).abs().max())
    if worst > LORA_TOLERANCE * max(1.0, float(before.abs().max())) and before.dtype == torch.float32:        # halves round more than that
        raise ValueError(f"merging LoRA moved a logit by {worst:.1e}, more than {LORA_TOLERANCE}; train with dtype float32 or mixed")
    return model


def arguments(config, rows):
    """Keywords of HF's TrainingArguments (and TRL's configs) for a run on `rows`. An epoch's incomplete last batch is left out: over several
    processes it would be filled up with rows that one process does not see."""
    together = config.batch_size * world_size()
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", os.path.join(config.output_dir, "tensorboard"))
    distributed = int(os.environ.get("WORLD_SIZE", 1)) > 1 or config.zero_stage > 0
    return dict(
        output_dir=config.output_dir, seed=config.seed, data_seed=config.seed, per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps, learning_rate=config.learning_rate,
        lr_scheduler_type=SCHEDULES.get(config.lr_scheduler_type, config.lr_scheduler_type),
        num_train_epochs=config.num_epochs, max_steps=config.max_steps or -1, warmup_steps=config.warmup_ratio,
        weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm,
        bf16=config.dtype == ("bfloat16" if distributed else "mixed"), fp16=distributed and config.dtype == "float16",
        dataloader_drop_last=len(rows) >= together,
        gradient_checkpointing=config.gradient_checkpointing, logging_steps=config.logging_steps, disable_tqdm=True,
        save_strategy="steps" if config.save_steps else "no", save_steps=config.save_steps or 500, save_total_limit=config.save_total_limit,
        eval_strategy="no", report_to=config.report_to, remove_unused_columns=False, use_cpu=device().type == "cpu",
        deepspeed=deepspeed_config(config, trainer=True) if distributed else None)


def train(config, trainer, tokenizer, judge=None, samples=()):
    """Run an HF or TRL trainer to its end, save model and tokenizer into the run folder -> Result."""
    trainer.remove_callback(PrinterCallback)
    log = History(config, trainer, judge)
    trainer.add_callback(log)
    start = time.perf_counter()
    checkpoint = newest_checkpoint(config.output_dir, "trainer_state.json") if config.resume else None
    holders = trainer.model.config, getattr(trainer.model, "generation_config", None)
    own = [(holder, name, getattr(holder, name)) for holder in holders for name in ("bos_token_id", "eos_token_id", "pad_token_id")
           if hasattr(holder, name)]
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    for holder, name, value in own:             # HF's trainer puts the tokenizer's there, and GLM's answers end with another token
        setattr(holder, name, value)
    save(config, trainer, tokenizer)
    metrics = log.metrics | speed(config, log.history, trainer.train_dataset) | {
        "seconds": time.perf_counter() - start, "steps": trainer.state.global_step}
    return Result(config.stage, config.to_dict(), metrics, config.output_dir, log.history, list(samples))


def speed(config, history, rows):
    """seconds_per_step (median over the logged stretches but the first), tokens_per_second (no padding counted, all processes),
    memory_gib."""
    spans = [row["seconds"] / config.logging_steps for row in history if "loss" in row]
    seconds = statistics.median(spans[1:] or spans) if spans else math.nan
    lengths = rows.lengths if hasattr(rows, "lengths") else [
        sum(len(row[k]) for k in ("prompt_ids", "prompt_ids", "chosen_ids", "rejected_ids")) for row in rows]
    tokens = float(np.mean(lengths)) * config.batch_size * config.gradient_accumulation_steps * world_size()
    return {"seconds_per_step": seconds, "tokens_per_second": tokens / seconds, "memory_gib": peak_memory()}


def peak_memory():
    """GiB: the peak of this process, on its GPU or else in its host memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


def save(config, trainer, tokenizer):
    """Weights (adapters merged) and tokenizer into the run folder, whole or not at all."""
    if config.lora_rank:
        model = trainer.accelerator.unwrap_model(trainer.model)
        ids = torch.arange(8, 24, device=next(model.parameters()).device)[None]
        model = merged(model, ids)

        def write(folder):
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        if rank() == 0:
            save_folder(config.output_dir, write)
    elif config.zero_stage == 3:            # every process takes part in the gather
        trainer.save_model(os.path.join(config.output_dir, ".gathered"))
        if rank() == 0:
            tokenizer.save_pretrained(os.path.join(config.output_dir, ".gathered"))
            save_folder(config.output_dir, lambda folder: _move(os.path.join(config.output_dir, ".gathered"), folder))
    elif rank() == 0:
        model = trainer.accelerator.unwrap_model(trainer.model)
        save_folder(config.output_dir, lambda folder: (model.save_pretrained(folder), tokenizer.save_pretrained(folder)))


def save_engine(engine, tokenizer, folder, last=True):
    """The model of an Engine and its tokenizer into a folder, whole or not at all (call it on all processes). Adapters are merged, into a copy
    of the model unless this is the `last` use of it."""
    weights = engine.weights() if engine.config.zero_stage == 3 else None
    if rank() == 0:
        model = copy.deepcopy(engine.model) if engine.config.lora_rank and not last else engine.model
        model = merged(model, torch.arange(8, 24, device=device())[None])
        save_folder(folder, lambda beside: (
            model.save_pretrained(beside, **({"state_dict": weights} if weights else {})), tokenizer.save_pretrained(beside)))


class History(TrainerCallback):
    """Log lines as they come, the history for the Result, held-out figures from the stage's judge, health warnings."""

    def __init__(self, config, trainer, judge):
        self.config, self.trainer, self.judge = config, trainer, judge
        self.history, self.metrics, self.last = [], {}, time.perf_counter()
        self.file = os.path.join(config.output_dir, "history.jsonl")

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step and os.path.isfile(self.file):         # going on from a checkpoint
            with open(self.file, encoding="utf-8") as f:
                self.history = [row for row in map(json.loads, f) if row["step"] <= state.global_step]
        self._store("w", self.history)
        if not self.history:
            self._judge(0)
        self.metrics = {f"{k}_before": v for k, v in (self.history[0] if self.history else {}).items() if k.startswith("eval_")}
        self.last = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        now = time.perf_counter()
        row = {"step": state.global_step, **{k: float(v) for k, v in logs.items() if k != "epoch"}, "seconds": now - self.last}
        self.last = now
        self._add(row)

    def on_step_end(self, args, state, control, **kwargs):
        if self.config.eval_steps and state.global_step % self.config.eval_steps == 0 and state.global_step < state.max_steps:
            self._judge(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        self._judge(state.global_step)
        losses = [row["loss"] for row in self.history if "loss" in row]
        self.metrics |= {k: v for k, v in (self.history[-1] if self.history else {}).items() if k.startswith("eval_")}
        self.metrics |= {"loss": losses[-1]} if losses else {}

    def _judge(self, step):
        if self.judge is None:
            return
        model, start = self.trainer.model_wrapped, time.perf_counter()
        was_training = model.training
        model.eval()
        figures = self.judge(model)
        model.train(was_training)
        self.last += time.perf_counter() - start        # not the steps' time
        if figures:
            self._add({"step": step, **{f"eval_{k}": v for k, v in figures.items()}})

    def _store(self, mode, rows):
        if rank() == 0:
            with open(self.file, mode, encoding="utf-8") as f:
                f.writelines(json.dumps(row) + "\n" for row in rows)

    def _add(self, row):
        self.history.append(row)
        self._store("a", [row])
        say(self.config.output_dir, log_line(row))
        for line in health.warnings_at(self.history, self.config.to_dict()):
            say(self.config.output_dir, line)


def _move(source, target):
    for name in os.listdir(source):
        os.replace(os.path.join(source, name), os.path.join(target, name))
    os.rmdir(source)
