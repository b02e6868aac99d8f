"""Log-likelihoods of benchmarks beside lm-eval's HFLM in one run: the same model and prompts, seconds, tokens, the ratio.

    python tests/benchmarks/evaluation.py [--model folder] [--data eval folder] [--limit 100] [--device cpu] [--tasks ceval c3]

Both read strings; a chat template is left out, as lm-eval's prompts are plain. Items are the first of a file, so that subjects
are as whole as the limit lets them be (whole files: --limit 20000); zero-shot tasks get as many requests as that many items
with four choices have. lm-eval runs with the fastest of three batch sizes. CPU ratio: of processor time, which neighbours do
not disturb. least: tokens of the tree of all requests without padding; nothing exact runs fewer.
"""
import argparse
import logging
import statistics
import tempfile
import time
from itertools import chain
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import LlamaConfig, LlamaForCausalLM

import rlhfkit as rk
from rlhfkit import samples
from rlhfkit.evaluation.prefixes import plan
from rlhfkit.evaluation.scorers import TokenModel
from rlhfkit.tasks import TASKS

EXAMS = {"ceval": 5, "mmlu": 5, "cmmlu": 5}                     # shots; the others are asked without
CLUE = ("ocnli", "cmnli", "afqmc", "csl", "cluewsc2020", "c3", "chid", "tnews", "iflytek")
SHAPES = {"cpu": (256, 8), "cuda": (1024, 24)}                  # width, layers; the latter has 350M parameters
PEER_BATCHES = {"cpu": (1, 4, 16), "cuda": (4, 16, 32)}
COLUMNS = ("task", "items", "lm-eval s", "ours s", "ratio", "CPU ratio", "lm-eval tokens", "ours", "least", "least/ours", "nats apart")


def load(options):
    """The model of a folder, or a random one with the vocabulary of 40,000 that Chinese models have."""
    if options.model:
        model, tokenizer = rk.load_model(options.model), rk.load_tokenizer(options.model)
    else:
        size, layers = SHAPES[options.device]
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=40000, hidden_size=size, intermediate_size=11 * size // 4, num_hidden_layers=layers,
            num_attention_heads=size // 64, max_position_embeddings=8192)).eval()
        tokenizer = rk.load_tokenizer(rk.tiny(tempfile.mkdtemp(), family="llama"))
    tokenizer.chat_template = None
    return model.to(options.device, torch.float32 if options.device == "cpu" else torch.bfloat16), tokenizer


def asked(name, options):
    """Records and choices of the first items of a task."""
    task, shots, folder = TASKS[name], EXAMS.get(name, 0), options.data / name
    pool, items = task.load(folder, task.shot_splits[0]) if shots else [], []
    for example in task.load(folder, task.split):
        if example["gold"] is not None and sum(len(choices) for _, choices in items) < 4 * options.limit:
            own = [s for s in pool if s["subject"] == example["subject"] and s["question"] != example["question"]]
            items.append(task.render(example, own[:shots])[:2])
    return zip(*items)


def measured(run, model):
    """-> result, seconds, processor seconds, tokens that went through the model, padding included; on a GPU of a second run, as the first
    one loads kernels for each new shape, which takes either side some seconds."""
    if model.device.type == "cuda":
        run()
    def synchronize():
        if model.device.type == "cuda":
            torch.cuda.synchronize()
    tokens = []
    hook = model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: tokens.append((args[0] if args else kwargs["input_ids"]).numel()), with_kwargs=True)
    synchronize()
    start, processor = time.perf_counter(), time.process_time()
    result = run()
    synchronize()
    hook.remove()
    return result, time.perf_counter() - start, time.process_time() - processor, sum(tokens)


def peer(model, tokenizer, records, choices, batch_size):
    requests = [Instance("loglikelihood", {}, (record.prompt + record.prefix, text), 0)
                for record, texts in zip(records, choices) for text in texts]
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(model.device))
    return [score for score, _ in harness.loglikelihood(requests, disable_tqdm=True)]


def least(reader, records, choices):
    """Tokens of the tree of all rows: each once that has the same tokens before it."""
    fitted = [reader._fit(record, texts) for record, texts in zip(records, choices)]
    rows = {(*ids, *tail[:-1]) for _, ids, tails in fitted for tail in tails}
    roots, count = plan(dict.fromkeys(rows, 0), worth=0)[0], 0
    while roots:
        count += sum(s.end - s.start for s in roots)
        roots = [child for s in roots for child in s.children]
    return count


def line(name, model, tokenizer, options):
    """Measure one task -> the row of the table."""
    records, choices = asked(name, options)
    few, reader = max(1, len(records) // 8), TokenModel(model, tokenizer)
    peer(model, tokenizer, records[:1], choices[:1], 1)
    reader.rank(records[:1], choices[:1])                       # both warm
    batch = min(PEER_BATCHES[options.device],
                key=lambda size: measured(lambda: peer(model, tokenizer, records[:few], choices[:few], size), model)[2])
    theirs, *peers = measured(lambda: peer(model, tokenizer, records, choices, batch), model)
    (ours, _), *own = measured(lambda: reader.rank(records, choices), model)
    bound = least(reader, records, choices)
    apart = statistics.median(abs(a - b) for a, b in zip(chain(*ours), theirs))
    return (name, len(records), f"{peers[0]:.2f} ({batch})", f"{own[0]:.2f}", f"{peers[0] / own[0]:.2f}",
            f"{peers[1] / own[1]:.2f}", peers[2], own[2], bound, f"{bound / own[2]:.2f}", f"{apart:.1e}"), peers[0], own[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path, default=samples.EVAL)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--device", choices=SHAPES, default="cpu")
    parser.add_argument("--tasks", nargs="+", default=["ceval", "mmlu", *CLUE])
    options = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model, tokenizer = load(options)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters, {model.dtype}, {options.device}, "
          f"{torch.get_num_threads()} threads")
    print("  ".join(f"{column:>12}" for column in COLUMNS), flush=True)
    totals = [0.0, 0.0]
    for name in options.tasks:
        row, theirs, ours = line(name, model, tokenizer, options)
        print("  ".join(f"{cell:>{max(12, len(column))}}" for cell, column in zip(row, COLUMNS)), flush=True)
        totals = [totals[0] + theirs, totals[1] + ours] if name in CLUE else totals
    if all(totals):
        print(f"zero-shot tasks together: lm-eval {totals[0]:.2f} s, ours {totals[1]:.2f} s, ratio {totals[0] / totals[1]:.2f}")


if __name__ == "__main__":
    main()
