"""The raw corpora that ship: every layout is there, every row is used, no text twice."""
import json
from collections import Counter

from rlhfkit.records import pairs
from rlhfkit.samples import RAW
from rlhfkit.sources import build, poetry

OURS = ["weibo", "zhidao", "classical", "poetry", "baike"]       # couplets come from a grammar, which has its own tests


def test_every_source_reads_every_row_of_the_samples():
    rejected = []
    counts = Counter(record.source for record in build(OURS, rejected=rejected))
    assert counts == {"weibo": 40, "zhidao": 80, "classical": 100, "poetry": 60, "baike": 50} and not rejected


def test_every_folder_of_poetry_has_a_sample():
    empty = [pattern for pattern in poetry.LAYOUT if not list(RAW.glob(pattern))]
    assert not empty
    assert isinstance(json.loads((RAW / "chinese-poetry/sishuwujing/daxue.json").read_text("utf-8")), dict)


def test_the_samples_have_what_makes_each_corpus_odd():
    shi = "".join(path.read_text("utf-8") for path in sorted(RAW.glob("chinese-poetry/shi/*.json")))
    assert "風" in shi and "风" not in shi                                        # traditional characters
    weibo = [json.loads(line) for line in (RAW / "weibo_summary_comments_json.json").read_text("utf-8").splitlines()]
    assert {type(likes) for row in weibo for _, likes in row["comments"]} == {int, str}
    assert all(" " in row["article"] and 3 <= len(row["comments"]) <= 6 for row in weibo)
    best = Counter(sum(answer.score for answer in record.answers) for record in build("zhidao"))
    assert best[0] == 8 and best[2] == 2                                          # no best reply, two of them


def test_no_text_of_ours_stands_there_twice():
    records = build(OURS)
    assert len({record.prompt for record in records}) == len(records)
    golds = [record.answers[0].text for record in records]
    assert len(set(golds)) == len(golds)


def test_every_source_but_baike_gives_reward_pairs():
    counts = Counter()
    for record in build(OURS):
        counts[record.source] += len(pairs(record))
    assert counts["baike"] == 0 and min(counts[name] for name in OURS if name != "baike") > 60


def test_the_raw_samples_without_the_couplets_are_under_half_a_megabyte():
    files = [path for path in RAW.rglob("*") if path.is_file() and path.name != "couplets.txt"]
    assert sum(path.stat().st_size for path in files) < 500_000
