"""Building records from raw corpora: the 2023 kit's loops, made to run, against ours, on made-up rows of each kind.

    python tests/benchmarks/building.py [--rows 200000] [--num-proc 1 2] [--kinds weibo couplets …]

CPU seconds of one process, from the raw file to JSON lines on disk; the kit's loops draw every row's negatives from a list of all
candidates that they make anew for the row, so they are timed on a sample of rows where that takes long, and scaled up (marked ~).
Then ours for each number of processes by the clock, split, near duplicates and shuffle included, which the kit did not have.
"""
import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

import rlhfkit as rk
from rlhfkit.records import to_line
from rlhfkit.sources import TEMPLATES, records_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import synthetic  # noqa: E402

SAMPLE = 300                # rows whose negatives the kit's loops draw


def clean(text):
    return text.replace("\r", "").replace("\n", "") if isinstance(text, str) else ""


def weibo(folder):
    rows = []
    with open(folder / synthetic.FILES["weibo"], encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            answers = [{"answer": text.replace(" ", ""), "score": int(likes)} for text, likes in row["comments"]]
            answers.sort(key=lambda answer: (answer["score"], len(answer["answer"])), reverse=True)
            article, abstract = row["article"].replace(" ", ""), row["abstract"].replace(" ", "")
            rows.append({"prompt": f"新闻内容：{article} 摘要：{abstract}", "answers": answers, "prefix": "评论："})
    return rows, None


def couplets(folder):
    rows, by_length = [], {}
    with open(folder / "couplets.txt", encoding="utf-8") as file:
        for line in file:
            line = line.strip()
            middle = len(line) // 2
            first, second = line[:middle], line[middle + 1:]
            by_length.setdefault(len(second), []).append(second)
            rows.append({"prompt": f"上联：{first}", "answers": [{"answer": second, "score": 1}], "prefix": "下联："})

    def draw(row):
        gold = row["answers"][0]["answer"]
        same = random.sample(list(set(by_length[len(gold)]) - {gold}), 2)
        lengths = random.sample(list(set(by_length) - {len(gold)}), 2)
        row["answers"] += [{"answer": text, "score": 0} for text in same]
        row["answers"] += [{"answer": random.choice(by_length[length]), "score": -1} for length in lengths]
    return rows, draw


def zhidao(folder):
    frame = pd.read_csv(folder / synthetic.FILES["zhidao"]).sort_values(["title", "is_best"], ascending=False)
    rows, last = [], None
    for _, (title, question, reply, best) in frame[["title", "question", "reply", "is_best"]].iterrows():
        if title != last:
            prompt = f"问题：{title} 内容：{question}" if isinstance(question, str) and question != title else f"问题：{title}"
            rows.append({"prompt": prompt, "answers": [], "prefix": "答："})
            last = title
        rows[-1]["answers"].append({"answer": reply, "score": best})
    return rows, None


def classical(folder):
    rows, by_book = [], {}
    for path in sorted((folder / "Classical-Modern/bitext").iterdir()):
        pair = []
        for line in open(path, encoding="utf-8"):
            if line.strip():
                pair.append(line.strip())
                continue
            a, b = pair[0][3:], pair[1][4:]
            by_book.setdefault(path.name, []).append((a, b))
            way = random.random() < 0.5
            rows.append({"prompt": f"古文：{a}" if way else f"现代文：{b}", "prefix": "现代文：" if way else "古文：", "book": path.name,
                         "answers": [{"answer": b if way else a, "score": 1}]})
            pair = []

    def draw(row):
        gold, side = row["answers"][0]["answer"], row["prefix"] == "现代文："
        same = random.sample(list({pair[side] for pair in by_book[row["book"]]} - {gold}), 2)
        books = random.sample(list(set(by_book) - {row["book"]}), 2)
        row["answers"] += [{"answer": text, "score": 0} for text in same]
        row["answers"] += [{"answer": random.choice(by_book[book])[side], "score": -1} for book in books]
    return rows, draw


def poetry(folder):
    rows, by_author = [], {}
    for path in sorted((folder / "chinese-poetry/ci").iterdir()):
        for poem in json.loads(path.read_text(encoding="utf-8")):
            author, title, text = poem["author"], poem["rhythmic"], "".join(poem["paragraphs"])
            by_author.setdefault(author, {})[title] = text
            rows.append({"prompt": f"以{author}的风格，写一首词，题为{title}", "prefix": "", "author": author, "title": title,
                         "answers": [{"answer": text, "score": 1}]})

    def draw(row):
        titles = list(set(by_author[row["author"]]) - {row["title"]})
        row["answers"] += [{"answer": by_author[row["author"]][random.choice(titles)], "score": 0}] if titles else []
        other = random.choice(list(set(by_author) - {row["author"]}))
        row["answers"].append({"answer": random.choice(list(by_author[other].values())), "score": -1})
    return rows, draw


def baike(folder):
    rows = []
    with open(folder / synthetic.FILES["baike"], encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            question = row["title"] if len(row["title"]) > len(row["desc"]) else row["desc"]
            rows.append({"prompt": clean(question), "answers": [{"answer": clean(row["answer"]), "score": 1}], "prefix": "答："})
    return rows, None


LOOPS = {loop.__name__: loop for loop in (weibo, couplets, zhidao, classical, poetry, baike)}


def peer_seconds(kind, folder, out):
    """The kit's way: all rows into a list, negatives row by row, its own file and then the merged one."""
    random.seed(0)
    start = time.process_time()
    rows, draw = LOOPS[kind](folder)
    seconds, few = time.process_time() - start, bool(draw) and len(rows) > SAMPLE
    if draw:
        start, some = time.process_time(), random.sample(rows, SAMPLE) if few else rows
        for row in some:
            draw(row)
        seconds += (time.process_time() - start) * len(rows) / len(some)
    start = time.process_time()
    for name in ("own", "merged"):
        with open(out / name, "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return seconds + time.process_time() - start, few


def our_seconds(kind, folder, out):
    start, rejected = time.process_time(), []
    with open(out / "ours", "wb") as file:
        for record in records_of(kind, folder, rejected, 0, TEMPLATES["HEAD"]):
            file.write(to_line(record))
    return time.process_time() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--num-proc", type=int, nargs="+", default=[1])
    parser.add_argument("--kinds", nargs="+", default=list(LOOPS), choices=list(LOOPS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, out, total = Path(scratch, "raw"), Path(scratch), [0.0, 0.0]
        print(f"{options.rows:,} rows of each kind; CPU seconds of one process\n{'kind':<12}{'2023':>9}{'ours':>9}{'ratio':>8}")
        for kind in options.kinds:
            synthetic.write(folder, kind, rows=options.rows)
            (peer, few), ours = peer_seconds(kind, folder, out), our_seconds(kind, folder, out)
            total = [total[0] + peer, total[1] + ours]
            print(f"{kind:<12}{'~' if few else '':>1}{peer:>8.1f}{ours:>9.1f}{peer / ours:>8.1f}", flush=True)
        print(f"{'all':<13}{total[0]:>8.1f}{total[1]:>9.1f}{total[0] / total[1]:>8.1f}")
        print("\nrk.build_corpus, split and near duplicates included, by the clock")
        first = None
        for num_proc in options.num_proc:
            start = time.perf_counter()
            counts = rk.build_corpus(out / f"built{num_proc}", options.kinds, folder, num_proc=num_proc)
            seconds = time.perf_counter() - start
            first = first or seconds
            print(f"{num_proc} processes {seconds:7.1f} s, {first / seconds:.2f} times as fast; {counts['train']:,} records to train on, "
                  f"{counts['dev']:,} held out, same files: {(out / f'built{num_proc}/train.jsonl').read_bytes() == first_bytes(out, options)}")


def first_bytes(out, options):
    return (out / f"built{options.num_proc[0]}/train.jsonl").read_bytes()


if __name__ == "__main__":
    main()
