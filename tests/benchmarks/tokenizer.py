"""Pangu's tokenizer against jieba + sentencepiece as the 2023 kit called them: speed, and ids of every line of a file.

    python tests/benchmarks/tokenizer.py vocab.model corpus.txt.xz [--limit 20000] [--num-proc 1 2]

The first `limit` lines time the peer and ours on one core, both loaded before, in CPU seconds: other work on the machine
does not count. The whole file times ours for each `num_proc` by the clock, the start of the processes included, and its ids
are compared with the peer's line by line, which takes the peer a minute for 15 million characters.
"""
import argparse
import lzma
import operator
import statistics
import time

import jieba
import sentencepiece

from rlhfkit.tokenizers.pangu import PanguTokenizer

VISIBLE = str.maketrans(" \n", "▂▃")


def peer_ids(sp, text):
    """What the 2023 kit did for a text without special tokens."""
    return sp.encode(" ".join(word.translate(VISIBLE) for word in jieba.cut(text, cut_all=False)))


def timed(clock, *functions, times=3):
    """Call functions in turn, `times` rounds -> the last result of each and the median of its seconds on a clock."""
    results, seconds = [None] * len(functions), [[] for _ in functions]
    for _ in range(times):
        for i, function in enumerate(functions):
            start = clock()
            results[i] = function()
            seconds[i].append(clock() - start)
    return results, [statistics.median(some) for some in seconds]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vocab")
    parser.add_argument("corpus")
    parser.add_argument("--limit", type=int, default=20_000)
    parser.add_argument("--num-proc", type=int, nargs="+", default=[1])
    options = parser.parse_args()

    with (lzma.open if options.corpus.endswith(".xz") else open)(options.corpus, "rt", encoding="utf-8", newline="\n") as file:
        lines = [line.removesuffix("\n") for line in file]
    part = lines[:options.limit or None]
    tokenizer, sp = PanguTokenizer(options.vocab), sentencepiece.SentencePieceProcessor(model_file=options.vocab)
    jieba.setLogLevel(60)
    jieba.initialize()
    _, (start,) = timed(time.perf_counter, lambda: tokenizer.encode_texts(part[:1]), times=1)
    print(f"first text: {start:.2f} s (dictionary and machine code); below, medians of 3")
    (expected, _), seconds = timed(
        time.process_time, lambda: [peer_ids(sp, text) for text in part], lambda: tokenizer.encode_texts(part))
    peer = show("jieba + sentencepiece, 2023", part, seconds[0])
    show("ours, one core", part, seconds[1], peer)
    expected += [peer_ids(sp, text) for text in lines[len(part):]]
    for num_proc in options.num_proc:
        (found,), (seconds,) = timed(time.perf_counter, lambda: tokenizer.encode_texts(lines, num_proc=num_proc))
        show(f"ours, num_proc={num_proc}", lines, seconds, peer)
        assert len(found) == len(lines)
        print(f"lines with other ids than the peer's: {sum(map(operator.ne, found, expected))} of {len(lines)}", flush=True)


def show(name, texts, seconds, peer=None):
    """Print a line of the table -> characters a second; peer: those of the peer, for the ratio."""
    characters = sum(map(len, texts))
    ratio = f"  ratio {characters / seconds / peer:5.2f}" if peer else ""
    print(f"{name:27} {len(texts):8} lines {characters:10} characters {seconds:8.2f} s "
          f"{characters / seconds / 1e6:6.3f} M characters/s{ratio}", flush=True)
    return characters / seconds


if __name__ == "__main__":
    main()
