"""Rows: made, found again, and packed, each beside the plain way in one run; medians of 3.

    python tests/benchmarks/rows.py make vocab.model corpus.txt.xz [--limit 20000] [--num-proc 2] [--max-length 512]
    python tests/benchmarks/rows.py start vocab.model corpus.txt.xz [--megabytes 1000]
    python tests/benchmarks/rows.py train vocab.model instructions.json [--rows 32] [--hidden-size 256]

make: lines of a text, from JSON lines to packed rows, against `datasets.map` over the 2023 tokenizer with the same packing, ids
compared; one process in CPU seconds, several by the clock. start: the first batch of a prepared corpus in a fresh process,
against preparing it. train: an epoch forward and backward on packed rows, against rows padded to the longest of the batch, as
many tokens a step.
"""
import argparse
import itertools
import json
import lzma
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import sentencepiece
from tokenizer import peer_ids, timed

import rlhfkit as rk
from rlhfkit.cache import prepared
from rlhfkit.packing import IGNORE, Packed
from rlhfkit.rows import collate, sft_rows, text_rows
from rlhfkit.tokenizers.pangu import PanguTokenizer


def builder(vocab, max_length):
    return partial(text_rows, family=rk.FAMILIES["pangu"], tokenizer=PanguTokenizer(vocab), max_length=max_length)


def lines_of(path):
    with (lzma.open if path.endswith(".xz") else open)(path, "rt", encoding="utf-8") as file:
        yield from (line for line in map(str.strip, file) if line)


def show(name, tokens, seconds, peer=None):
    ratio = f"  ratio {peer / seconds:5.2f}" if peer else ""
    print(f"{name:53} {tokens:11,} tokens {seconds:8.2f} s {tokens / seconds / 1e3:9.1f} k tokens/s{ratio}", flush=True)


class Mapped:
    """A data set of `datasets` as packing takes rows."""

    def __init__(self, rows):
        self.rows, self.lengths = rows, rows.data.column("input_ids").combine_chunks().value_lengths().to_numpy()

    def __getitem__(self, index):
        return self.rows[index]


def make(options, folder):
    import datasets
    import jieba

    datasets.disable_progress_bars()
    jieba.setLogLevel(60)
    jieba.initialize()
    file, build = folder / "data" / "train.jsonl", builder(options.vocab, options.max_length)
    rk.write_records((rk.Record(line) for line in itertools.islice(lines_of(options.file), options.limit or None)), file)
    sp, tokenizer = sentencepiece.SentencePieceProcessor(model_file=options.vocab), build.keywords["tokenizer"]
    room = options.max_length - 1

    def pieces(batch):
        texts = [peer_ids(sp, text) + [tokenizer.eos_token_id] for text in batch["prompt"]]
        parts = [ids[start:start + room] for ids in texts for start in range(0, len(ids), room)]
        return {"input_ids": [[tokenizer.bos_token_id] + part for part in parts], "labels": [[IGNORE] + part for part in parts]}

    def plain():
        shutil.rmtree(folder / "peer", ignore_errors=True)
        rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(folder / "peer"))
        return Packed(Mapped(rows.map(pieces, batched=True, remove_columns=rows.column_names)), options.max_length)

    def ours(num_proc):
        shutil.rmtree(file.parent / ".rows", ignore_errors=True)
        config = SimpleNamespace(data_path=str(file.parent), output_dir=str(folder))
        return Packed(prepared(config, build, num_proc).train, options.max_length)

    ours(1)                                     # dictionary and machine code
    (theirs, packed), seconds = timed(time.process_time, plain, partial(ours, 1))
    tokens = int(packed.lengths.sum())
    show("datasets.map, 2023 tokenizer", tokens, seconds[0])
    show("ours, one process", tokens, seconds[1], seconds[0])
    same = len(packed) == len(theirs) and all(a == b for a, b in zip(packed, theirs))
    (_, packed), seconds = timed(time.perf_counter, plain, partial(ours, options.num_proc))
    show("datasets.map, 2023 tokenizer, by the clock", tokens, seconds[0])
    show(f"ours, {options.num_proc} processes, by the clock", tokens, seconds[1], seconds[0])
    same &= all(a == b for a, b in zip(packed, theirs))
    print(f"packed rows: {len(packed):,}, {100 * packed.fill_rate:.2f} % filled; equal: {same}")


def start(options, folder):
    folder, size, lines = Path(options.folder or folder), 0, list(lines_of(options.file))
    file = folder / "data" / "train.jsonl"
    if not file.is_file():
        def records():
            nonlocal size
            for number, line in enumerate(itertools.cycle(lines)):
                if size > options.megabytes * 1e6:
                    return
                size += len(line.encode()) + 40         # the keys
                yield rk.Record(f"{number} {line}")
        rk.write_records(records(), file)
    config = SimpleNamespace(data_path=str(file.parent), output_dir=str(folder))
    found = prepared(config, builder(options.vocab, options.max_length), options.num_proc)
    print(f"{file.stat().st_size / 1e6:.0f} MB, {len(found.train):,} documents")
    show(f"preparing, {options.num_proc} processes", int(found.train.lengths.sum()), found.seconds or float("nan"))
    seconds = []
    for _ in range(3):
        command = [sys.executable, __file__, "first", options.vocab, str(folder), "--max-length", str(options.max_length)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        seconds.append(json.loads(output.splitlines()[-1])["seconds"])
    median = statistics.median(seconds)
    print(f"first batch in a fresh process: {median:.2f} s, median of {[round(x, 2) for x in seconds]}; "
          f"preparing takes {found.seconds / median:.0f} times as long")


def first(options, folder):
    """In a process of its own: seconds from a loaded tokenizer to the first batch."""
    from rlhfkit.trainer import rows_for

    config = SimpleNamespace(data_path=f"{options.file}/data", output_dir=options.file)
    build = builder(options.vocab, options.max_length)
    begin = time.perf_counter()
    rows, _, _ = rows_for(config, build)
    batch = collate(rows[:8], build.keywords["tokenizer"].pad_token_id)
    print(json.dumps({"seconds": time.perf_counter() - begin, "shape": list(batch["input_ids"].shape)}))


def train(options, folder):
    import torch

    from rlhfkit.engine import device

    path = rk.tiny(folder / "model", vocab_path=options.vocab, hidden_size=options.hidden_size)
    model, tokenizer = rk.load_model(path, device=device()).train(), rk.load_tokenizer(path)
    records = rk.read_records(options.file, [])[:options.limit or None]
    rows, _ = sft_rows(records, rk.FAMILIES["pangu"], tokenizer, options.max_length)
    packed, room = Packed(rows, options.max_length), options.rows * options.max_length
    padded, some = [], []
    for row in random.Random(0).sample(rows, len(rows)):                # as many rows a batch as fit, padded to the longest
        if (len(some) + 1) * max(len(r["input_ids"]) for r in [*some, row]) > room:
            padded.append(some)
            some = []
        some = [*some, row]
    padded.append(some)
    together = [packed[at:at + options.rows] for at in range(0, len(packed), options.rows)]

    def epoch(batches):
        for rows in batches:
            batch = {name: values.to(device()) for name, values in collate(rows, tokenizer.pad_token_id).items()}
            count, length = batch["input_ids"].shape
            for at in range(0, count, max(1, options.at_once // length)):       # memory for logits is bounded
                part = {name: values[at:at + max(1, options.at_once // length)] for name, values in batch.items()}
                labels = part.pop("labels")[:, 1:].flatten()
                logits = model(**part, use_cache=False).logits[:, :-1].flatten(0, 1)
                loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
                loss.backward()
            model.zero_grad()
            loss.item()                         # waits for the accelerator
    epoch(together[:1])
    _, seconds = timed(time.perf_counter, partial(epoch, padded), partial(epoch, together))
    useful = int(packed.lengths.sum())
    print(f"{len(rows):,} rows of at most {options.max_length} tokens, {useful:,} in all; up to {room:,} a step; {device()}")
    for name, batches, spent in zip(("padded to the longest of the batch", "packed"), (padded, together), seconds):
        share = useful / sum(len(rows) * max(len(r["input_ids"]) for r in rows) for rows in batches)
        show(f"{name}, {100 * share:.1f} % of them useful", useful, spent, None if batches is padded else seconds[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "start", "train", "first"])
    parser.add_argument("vocab")
    parser.add_argument("file")
    parser.add_argument("--limit", type=int, default=20_000, help="lines or rows, 0 for all")
    parser.add_argument("--num-proc", type=int, default=2)
    parser.add_argument("--max-length", type=int)
    parser.add_argument("--megabytes", type=float, default=1000)
    parser.add_argument("--folder", help="keep the corpus and its rows here")
    parser.add_argument("--rows", type=int, default=32, help="packed rows a step")
    parser.add_argument("--at-once", type=int, default=8192, help="tokens of a step that go through the model together")
    parser.add_argument("--hidden-size", type=int, default=256)
    options = parser.parse_args()
    options.max_length = options.max_length or (1024 if options.what == "train" else 512)
    with tempfile.TemporaryDirectory() as folder:
        globals()[options.what](options, Path(folder))


if __name__ == "__main__":
    main()
