"""Made-up raw corpora of any size in the layouts of the six sources: for memory tests and benchmarks, not to be read by people."""
import csv
import json
import random
from io import StringIO

HAN = [chr(code) for code in range(0x8000, 0x8000 + 3000)]          # none of the signs that the layouts use
BLOCK = 10_000
FILES = {"weibo": "weibo_summary_comments_json.json", "couplets": "couplets.txt", "zhidao": "zhidao/all_filter.csv",
         "classical": "Classical-Modern/bitext/{}", "poetry": "chinese-poetry/ci/ci.song.{}.json", "baike": "baike_qa2019/baike_qa_train.json",
         "published": "train_data_external_v1.jsonl"}


def write(folder, kind, size=0, rows=0, seed=0):
    """Blocks of 10,000 rows of a kind below `folder`, until there are `rows` rows and `size` bytes -> number of rows. A block is drawn
    once and its characters are moved on for each of the next; books and poems have a file a block."""
    first = _WRITERS[kind](random.Random(f"{seed}-{kind}"))
    header = "title,question,reply,is_best\n" if kind == "zhidao" else ""
    written = block = 0
    while written < size or block * BLOCK < rows:
        path = folder / FILES[kind].format(block)
        path.parent.mkdir(parents=True, exist_ok=True)
        moved = {ord(c): HAN[(i + 37 * block) % len(HAN)] for i, c in enumerate(HAN)}
        data = (header + first.translate(moved)).encode()
        with open(path, "ab") as file:
            file.write(data)
        header, written, block = "", written + len(data), block + 1
    return block * BLOCK


def text(rng, least, most):
    return "".join(rng.choices(HAN, k=rng.randint(least, most)))


def _weibo(rng):
    def line():
        comments = [[" ".join(text(rng, 5, 20)), rng.randint(0, 300)] for _ in range(rng.randint(1, 12))]
        return json.dumps({"article": " ".join(text(rng, 100, 400)), "abstract": " ".join(text(rng, 10, 25)), "comments": comments}, ensure_ascii=False)
    return "".join(line() + "\n" for _ in range(BLOCK))


def _couplets(rng):
    lengths = [rng.choice((4, 5, 5, 6, 7, 7, 7, 7, 8, 9, 10, 11, 12)) for _ in range(BLOCK)]
    return "".join(f"{text(rng, n, n)}\t{text(rng, n, n)}\n" for n in lengths)


def _zhidao(rng):
    out = StringIO()
    writer = csv.writer(out, lineterminator="\n")
    title = text(rng, 8, 25)
    for _ in range(BLOCK):
        title = title if rng.random() < 0.5 else text(rng, 8, 25)
        writer.writerow([title, text(rng, 0, 40), text(rng, 10, 120), rng.randint(0, 1)])
    return out.getvalue()


def _classical(rng):
    return "".join(f"古文：{text(rng, 8, 30)}\n现代文：{text(rng, 12, 45)}\n\n" for _ in range(BLOCK))


def _poetry(rng):
    authors = [text(rng, 2, 3) for _ in range(300)]
    return json.dumps([{"author": rng.choice(authors), "rhythmic": text(rng, 3, 4), "paragraphs": [text(rng, 10, 16) for _ in range(4)]}
                       for _ in range(BLOCK)], ensure_ascii=False)


def _baike(rng):
    return "".join(json.dumps({"qid": str(i), "category": "", "title": text(rng, 8, 25), "desc": text(rng, 0, 80),
                               "answer": text(rng, 50, 250)}, ensure_ascii=False) + "\n" for i in range(BLOCK))


def _published(rng):
    return "".join(json.dumps({"prompt": "问题:" + text(rng, 8, 25), "answers": [{"answer": text(rng, 10, 120), "score": s} for s in (1, 0)],
                               "prefix": "回答:"}, ensure_ascii=False) + "\n" for _ in range(BLOCK))


_WRITERS = {"weibo": _weibo, "couplets": _couplets, "zhidao": _zhidao, "classical": _classical, "poetry": _poetry, "baike": _baike,
            "published": _published}
