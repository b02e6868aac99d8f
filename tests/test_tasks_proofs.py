"""Every task, through rk.evaluate, under models whose score is known beforehand: on our rows and on real ones.

The models take strings and know no order of requests. A real question that stands in its file twice with two answers has no right
answer to know, and is left out of the oracle's rows.
"""
import hashlib
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

import rlhfkit as rk
from rlhfkit import samples
from rlhfkit.tasks import TASKS

RANKED = [name for name, task in TASKS.items() if task.scoring != "generation"]
EXAMS = ("ceval", "ceval_cot", "cmmlu", "mmlu")
WITH_SHOTS = ("ocnli", "cmrc2018", "cluewsc2020", "c3", "csl", "iflytek", "tnews", *EXAMS)      # real rows for shots are at hand
CARDS = Path(__file__).resolve().parents[1] / "data_cards"
LIMIT = 250


class Oracle:
    """Knows the right text behind each prompt, shots before it or not; what it was not told gets -50."""

    def __init__(self, task, root):
        self.known, self.answers = {}, {}           # {text: prompts}, {prompt: text}
        for example in (e for e in task.load(root / task.name, task.split) if e["gold"] is not None):
            record, choices, gold = task.render(example, ())
            asked = question(record.prompt + record.prefix)
            self.known.setdefault(choices[gold] if choices else "", set()).add(asked)
            self.answers[asked] = example["gold"][0] if not choices else ""

    def loglikelihoods(self, requests):
        return [0.0 if any(question(context).endswith(asked) for asked in self.known.get(text, ())) else -50.0
                for context, text in requests]

    def generate(self, prompts, max_new_tokens):
        return [next(text for asked, text in self.answers.items() if question(prompt).endswith(asked))
                for prompt in prompts]


class Formula:
    """Log-likelihoods by a formula of context and text; keeps what it was asked."""

    def __init__(self, formula):
        self.formula = formula

    def loglikelihoods(self, requests):
        self.requests = list(requests)
        return [self.formula(*request) for request in requests]

    def generate(self, prompts, max_new_tokens):
        self.requests = [(prompt, "") for prompt in prompts]
        return [""] * len(prompts)


def hashed(context, text):
    return -int(hashlib.sha256(f"{context}|{text}".encode()).hexdigest()[:8], 16) / 1e6


UNIFORM, HASHED, SHORT, LONG = lambda c, t: -10.0, hashed, lambda c, t: -float(len(t)), lambda c, t: float(len(t))


def question(prompt):
    """The last block, where an instruction or shots stand before it."""
    return prompt.rsplit("\n\n", 1)[-1]


def consistent(task):
    """The task without questions that have two right answers in its file."""
    def load(folder, split):
        rows, golds = [e for e in task.load(folder, split) if e["gold"] is not None], {}
        asked = [(record.prompt, choices) for record, choices, _ in (task.render(e, ()) for e in rows)]
        for key, row in zip(asked, rows):
            golds.setdefault(key, set()).add(row["gold"])
        return [row for key, row in zip(asked, rows) if len(golds[key]) == 1]
    return replace(task, load=load)


def total(model, task, root=None, **options):
    return rk.evaluate(model, task, root, **options).iloc[0]


def at_chance(row, chances, z=3.29):
    """Inside the 99.9 % binomial interval of guessing; chances: one an item, for choices may differ in number."""
    return abs(row.score - row.chance) < z * math.sqrt(sum(p * (1 - p) for p in chances)) / len(chances)


def chances(task, root, limit=10 ** 9):
    rows = [e for e in task.load(root / task.name, task.split) if e["gold"] is not None]
    count = min(limit, len(rows))
    return [1 / len(task.render(rows[i * len(rows) // count], ())[1]) for i in range(count)]


def mixed(task, seed=0):
    """The task with labels drawn at random."""
    rng = random.Random(seed)
    return replace(task, load=lambda *of: [e if e["gold"] is None else e | {"gold": rng.randrange(len(task.render(e, ())[1]))}
                                           for e in task.load(*of)])


@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize("name", [name for name in TASKS if name != "couplets"])
def test_a_model_that_knows_the_answers_scores_one_on_the_samples(name, shots):
    table = rk.evaluate(Oracle(TASKS[name], samples.EVAL), name, shots=shots)
    assert (table.score == 1).all() and table.examples[0] >= 8


@pytest.mark.parametrize("name", [name for name in TASKS if name != "couplets"])
def test_a_model_that_knows_the_answers_scores_one_on_real_rows(name, shared):
    task, root = consistent(TASKS[name]), shared / "data/eval"
    before, after = (len(t.load(root / name, t.split)) for t in (TASKS[name], task))
    assert after > 0.97 * before
    assert total(Oracle(task, root), task, root, limit=LIMIT).score == 1


@pytest.mark.parametrize("name", RANKED)
def test_a_uniform_model_scores_chance_exactly_and_a_hashed_one_within_its_interval(name, shared):
    for root, limit in ((samples.EVAL, None), (shared / "data/eval", LIMIT)):
        guesses = chances(TASKS[name], root, limit or 10 ** 9)
        uniform, guess = (total(Formula(f), name, root, limit=limit) for f in (UNIFORM, HASHED))
        assert uniform.score == pytest.approx(uniform.chance) == pytest.approx(sum(guesses) / len(guesses))
        assert uniform.examples == len(guesses) and at_chance(guess, guesses)


@pytest.mark.parametrize("name", RANKED)
def test_with_shuffled_labels_a_model_that_knew_them_scores_chance(name, shared):
    task, root = TASKS[name], shared / "data/eval"
    assert at_chance(total(Oracle(task, root), mixed(task), root, limit=LIMIT), chances(task, root, LIMIT))


@pytest.mark.parametrize("name", [name for name in RANKED if name not in EXAMS])
def test_the_order_of_the_candidates_does_not_change_an_oracle(name):
    def turned(example, shots):
        record, choices, gold = TASKS[name].render(example, shots)
        return record, choices[::-1], len(choices) - 1 - gold
    assert total(Oracle(TASKS[name], samples.EVAL), replace(TASKS[name], render=turned)).score == 1


@pytest.mark.parametrize("name", ["ceval", "cmmlu", "mmlu"])
def test_exchanged_letters_do_not_change_a_model_that_knows_what_stands_behind_them(name, shared):
    task, rng = consistent(TASKS[name]), random.Random(0)

    def exchanged(folder, split):
        rows = []
        for e in (e for e in task.load(folder, split) if len(set(e["options"])) == 4):      # one real row offers a text twice
            order = rng.sample(range(4), 4)
            rows.append(e | {"options": tuple(e["options"][i] for i in order), "gold": order.index(e["gold"])})
        return rows

    for root in (samples.EVAL, shared / "data/eval"):
        right = {(e["question"], *sorted(e["options"])): e["options"][e["gold"]] for e in task.load(root / name, task.split)}

        def knows(context, letter):
            asked, *options = re.split(r"\n[A-D]\. ", context.split("\n\n", 1)[1].rsplit("\n", 1)[0])
            return 0.0 if right[asked, *sorted(options)] == options["ABCD".index(letter)] else -1.0
        assert total(Formula(knows), replace(task, load=exchanged), root, limit=LIMIT).score == 1


@pytest.mark.parametrize("name", [name for name in TASKS if name != "couplets"])
def test_shots_are_whole_rows_of_another_split_the_same_for_all_candidates_and_fixed(name):
    task, (zero, two, again) = TASKS[name], (Formula(HASHED) for _ in range(3))
    for model, shots in ((zero, 0), (two, 2), (again, 2)):
        rk.evaluate(model, name, shots=shots)
    assert two.requests == again.requests                                               # fixed by seed, not by the run
    shown = {}
    for (bare, text), (context, same) in zip(zero.requests, two.requests):
        assert text == same and question(context).endswith(question(bare))
        shown.setdefault(bare, set()).add(context.removesuffix(question(bare)))
    assert all(len(parts) == 1 for parts in shown.values())                             # the same for every candidate
    assert len({part for parts in shown.values() for part in parts}) == (3 if name in EXAMS else 1)      # and, in a subject, item
    for example in task.load(samples.EVAL / name, task.split):
        record, choices, _ = task.render(example, ())
        asked = question(record.prompt + record.prefix)
        assert not any(asked + choice in part for parts in shown.values() for part in parts for choice in choices or ("",))


@pytest.mark.parametrize("name", WITH_SHOTS)
def test_shots_of_real_rows_never_hold_the_scored_item(name, shared):
    zero, one = Formula(UNIFORM), Formula(UNIFORM)
    for model, shots in ((zero, 0), (one, 1)):
        rk.evaluate(model, name, shared / "data/eval", shots=shots, limit=40)
    for (bare, text), (context, _) in zip(zero.requests, one.requests):
        bare = question(bare)
        assert context.endswith(bare) and len(context) > len(bare) and bare + text not in context.removesuffix(bare)


def test_shots_come_from_train_then_fewclue_then_dev_but_not_from_what_is_scored(tmp_path):
    (tmp_path / "tnews").mkdir()
    for split in ("test", "dev", "fewclue_train_0", "train"):
        (tmp_path / f"tnews/{split}.json").write_text(f'{{"label": 100, "sentence": "{split}"}}\n', encoding="utf-8")
    for missing, shot in ((None, "train"), ("train", "fewclue_train_0"), ("fewclue_train_0", "dev")):
        if missing:
            (tmp_path / f"tnews/{missing}.json").unlink()
        model = Formula(UNIFORM)
        rk.evaluate(model, "tnews", tmp_path, shots=1, split="test")
        assert model.requests[0][0] == f"这是关于故事的文章:{shot}\n这是关于"
    with pytest.raises(FileNotFoundError, match="shots is 1; they come from split train or fewclue_train_0 or dev of tnews"):
        rk.evaluate(model, "tnews", tmp_path, shots=1, split="dev")


@pytest.mark.parametrize("name", RANKED)
def test_what_a_model_scores_by_length_alone_is_chance_or_stands_in_the_card(name, shared):
    """A model that has read nothing but likes short texts, or long ones: far from chance, scores want a normalised length."""
    card = (CARDS / f"{name}.md").read_text("utf-8")
    found = re.search(r"shortest candidate scores ([\d.]+), the longest ([\d.]+);\s+chance is ([\d.]+)\.", card)
    short, long = (total(Formula(f), name, shared / "data/eval", limit=None if found else LIMIT) for f in (SHORT, LONG))
    if found:
        assert [f"{x:.3f}" for x in (short.score, long.score, short.chance)] == list(found.groups())
    else:
        assert short.score == long.score == pytest.approx(short.chance)
