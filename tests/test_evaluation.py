"""What `evaluate` makes of models whose score is known beforehand; they take strings, so no weights are needed."""
import hashlib
import json
import math
import random
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from rlhfkit import evaluation, samples
from rlhfkit.evaluation.metrics import credit
from rlhfkit.records import Record
from rlhfkit.tasks import TASKS

CHOICE_TASKS = ["ocnli", "tnews", "c3", "ceval", "mmlu"]


class Oracle:
    """Knows the answer of every item that it was shown the rendering of."""

    def __init__(self, tasks, root, split=None):
        self.known, self.answers = set(), {}
        for task in tasks:
            for example in task.load(root / task.name, split or task.split):
                record, choices, gold = task.render(example, ())
                if choices and gold is not None:
                    self.known.add((record.prompt + record.prefix, choices[gold]))
                elif not choices:
                    self.answers[record.prompt + record.prefix] = example["gold"][0]

    def loglikelihoods(self, requests):
        return [-1.0 if request in self.known else -50.0 for request in requests]

    def generate(self, prompts, max_new_tokens):
        return [self.answers[p] for p in prompts]


class Marker:
    """Has the answers as a list in the order of the file: real files hold the same question twice with two answers."""

    def __init__(self, tasks, root):
        rendered = [task.render(e, ()) for task in tasks for e in task.load(root / task.name, task.split)]
        self.marks = iter([i == gold for _, choices, gold in rendered if gold is not None for i in range(len(choices))])

    def loglikelihoods(self, requests):
        return [-1.0 if next(self.marks) else -2.0 for _ in requests]


class Uniform:
    def loglikelihoods(self, requests):
        return [-10.0] * len(requests)


class Hashed:
    def loglikelihoods(self, requests):
        return [-int(hashlib.sha256("|".join(r).encode()).hexdigest()[:8], 16) / 1e6 for r in requests]


def test_a_model_that_knows_the_answer_scores_one():
    """Faults E1 and E2: the 2023 scorer gave a perfect model the score of a uniform one."""
    table = evaluation.evaluate(Oracle(TASKS.values(), samples.EVAL), list(TASKS))
    assert list(table.columns) == ["task", "metric", "score", "low", "high", "examples", "chance", "seconds", "majority",
                                   "verdict"]
    assert list(dict.fromkeys(t.split("/")[0] for t in table.task)) == list(TASKS)
    assert (table.score == 1).all() and (table.high == 1).all() and (table.low < 1).all()
    assert table.attrs["left_out"]["ocnli"] == 1 and table[table.task == "ocnli"].examples.item() == 12


def test_on_real_rows_the_oracle_scores_one_and_ignorant_models_score_chance(shared):
    root = shared / "data/eval"
    assert (evaluation.evaluate(Marker([TASKS[t] for t in CHOICE_TASKS], root), CHOICE_TASKS, root).score == 1).all()
    assert (evaluation.evaluate(Oracle([TASKS["cmrc2018"]], root), "cmrc2018", root).score == 1).all()
    uniform = evaluation.evaluate(Uniform(), CHOICE_TASKS, root)
    assert np.allclose(uniform.score, uniform.chance)
    hashed = evaluation.evaluate(Hashed(), CHOICE_TASKS, root)
    for row in hashed[~hashed.task.str.contains("/")].itertuples():
        assert abs(row.score - row.chance) < 3.5 * math.sqrt(row.chance * (1 - row.chance) / row.examples), row.task


def test_with_shuffled_labels_the_oracle_scores_chance(shared):
    task, rng, root = TASKS["ceval"], random.Random(0), shared / "data/eval"
    shuffled = replace(task, load=lambda *of: [e | {"gold": rng.randrange(4)} for e in task.load(*of)])
    row = evaluation.evaluate(Marker([task], root), shuffled, root).iloc[0]
    assert abs(row.score - 0.25) < 3.5 * math.sqrt(0.25 * 0.75 / row.examples)


@pytest.mark.parametrize("name", ["ocnli", "c3"])
def test_the_order_of_the_choices_does_not_change_an_oracle(name):
    def swapped(example, shots):
        record, choices, gold = TASKS[name].render(example, shots)
        return record, choices[::-1], len(choices) - 1 - gold
    oracle = Oracle([TASKS[name]], samples.EVAL)
    assert evaluation.evaluate(oracle, replace(TASKS[name], render=swapped)).score.item() == 1


@pytest.mark.parametrize("name", CHOICE_TASKS + ["cmrc2018", "couplets"])
def test_shots_come_from_another_split_and_are_the_same_for_every_candidate(name):
    """Fault E3: the 2023 kit drew shots from the scored file, anew for every candidate, wrong answers among them."""
    class Listener(Hashed):
        def loglikelihoods(self, requests):
            self.contexts = [context for context, _ in requests]
            return super().loglikelihoods(requests)

        def generate(self, prompts, max_new_tokens):
            self.contexts = prompts
            return [""] * len(prompts)
    zero, two, again = Listener(), Listener(), Listener()
    for model, shots in ((zero, 0), (two, 2), (again, 2)):
        evaluation.evaluate(model, name, shots=shots)
    assert two.contexts == again.contexts and len(set(two.contexts)) == len(set(zero.contexts))
    asked = [e.get("question", e.get("sentence", e.get("second", e.get("prompt"))))
             for e in TASKS[name].load(samples.EVAL / name, TASKS[name].split)]
    for short, long in zip(zero.contexts, two.contexts):
        shown = long.removesuffix(short.split("\n\n", 1)[1] if name in ("ceval", "mmlu") else short)
        assert len(shown) > 20 and shown != long and not any(text in shown for text in asked)


def test_a_shot_that_is_the_scored_item_itself_is_passed_over(tmp_path):
    rows = (samples.EVAL / "ocnli/dev.json").read_text(encoding="utf-8")
    for split in ("dev", "train"):
        (tmp_path / "ocnli").mkdir(exist_ok=True)
        (tmp_path / f"ocnli/{split}.json").write_text(rows, encoding="utf-8")
    table = evaluation.evaluate(Uniform(), "ocnli", tmp_path, shots=3, output_dir=tmp_path / "out")
    assert table.examples.item() == 12
    for line in (tmp_path / "out/items.jsonl").read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        *shots, question = item["prompt"].split("\n")
        assert len(shots) == 3 and question + item["choices"][item["gold"]] not in shots


def test_shots_without_a_file_or_from_the_scored_split_are_refused(tmp_path):
    (tmp_path / "tnews").mkdir()
    (tmp_path / "tnews/dev.json").write_text('{"label": "100", "sentence": "a"}\n', encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="shots is 1; they come from split train or .* set shots to 0"):
        evaluation.evaluate(Uniform(), "tnews", tmp_path, shots=1)
    with pytest.raises(FileNotFoundError, match="split train is the one that is scored"):
        evaluation.evaluate(Uniform(), replace(TASKS["ocnli"], shot_splits=("train",)), shots=1, split="train")
    with pytest.raises(ValueError, match="ceval has 5 rows for them in middle_school_physics; ask for fewer"):
        evaluation.evaluate(Uniform(), "ceval", shots=6)


def test_ties_share_the_credit():
    assert [credit(s, 0) for s in ([-1, -2], [-2, -1], [-1, -1], [-1, -1, -1, -9])] == [1, 0, 1 / 2, 1 / 3]
    with pytest.raises(ValueError, match="must be numbers"):
        credit([-1.0, float("nan")], 0)


def test_subjects_follow_the_total_and_add_up():
    table = evaluation.evaluate(Hashed(), "ceval")
    assert table.task.tolist()[:5] == ["ceval", "ceval/macro", "ceval/STEM", "ceval/Social Science", "ceval/Humanities"]
    assert table.examples.tolist()[:5] == [12, 12, 4, 4, 4] and table.examples.tolist()[-3:] == [4, 4, 4]
    assert table.score[0] == table.score[1] == pytest.approx(table.score[-3:].mean())


def test_limit_is_spread_over_the_file():
    table = evaluation.evaluate(Uniform(), "ceval", limit=3)
    assert table.task.tolist()[-3:] == ["ceval/middle_school_physics", "ceval/high_school_geography", "ceval/logic"]
    assert len(evaluation.evaluate(Uniform(), "ocnli", limit=99)) == 1


def test_a_task_of_your_own_needs_no_change_to_the_package():
    mine = replace(TASKS["couplets"], name="mine", metric=lambda answer, prompt: {"length": min(1.0, len(answer) / 10)})
    table = evaluation.evaluate(Oracle([mine], samples.EVAL), [mine, "couplets"], limit=20)
    assert table.metric.tolist() == ["length", "gold"] and 0.3 < table.score[0] < 0.9


@pytest.mark.parametrize("options, error, message", [
    (dict(tasks="oncli"), ValueError, "did you mean ocnli"),
    (dict(tasks="ocnli", shots=-1), ValueError, "shots is -1; it must be a whole number >= 0"),
    (dict(tasks="ocnli", limit="5"), ValueError, "limit is '5'"),
    (dict(tasks="ocnli", data_dir="/nowhere"), FileNotFoundError, "expected ocnli/"),
    (dict(tasks="ceval", subjects="logics"), ValueError, "subject 'logics' is none of the 3 .* did you mean logic"),
    (dict(tasks="ocnli", subjects=["logic"]), ValueError, "none of the 0 that ocnli has rows of; leave subjects out"),
    (dict(tasks=["ocnli", "ocnli"]), ValueError, "ocnli is named twice"),
    (dict(tasks="ocnli", model=(Uniform(), None)), TypeError, "its tokenizer is None"),
    (dict(tasks="cmrc2018"), TypeError, "no method generate"),
    (dict(tasks="ocnli", model=object()), TypeError, "give a folder"),
    (dict(tasks="ocnli", model="/nowhere"), FileNotFoundError, "is no folder")])
def test_bad_arguments_say_what_to_do(options, error, message):
    with pytest.raises(error, match=message):
        evaluation.evaluate(**{"model": Uniform(), **options})


@pytest.mark.parametrize("choices", [(), ("a", " ")])
def test_empty_choices_are_refused(choices):
    empty = replace(TASKS["ocnli"], render=lambda example, shots: (Record("a"), choices, 0))
    with pytest.raises(ValueError, match="item 0 of ocnli has the choices"):
        evaluation.evaluate(Uniform(), empty)


def test_a_model_that_loses_a_request_is_noticed():
    class Lossy(Uniform):
        def loglikelihoods(self, requests):
            return [-1.0] * (len(requests) - 1)
    with pytest.raises(ValueError, match="gave 35 results for 36 requests"):
        evaluation.evaluate(Lossy(), "ocnli")


def test_a_table_is_saved_with_its_items(tmp_path):
    table = evaluation.evaluate(Hashed(), ["c3", "mmlu"], output_dir=tmp_path)
    saved = pd.read_csv(tmp_path / "table.csv")
    assert saved.task.tolist() == table.task.tolist() and np.allclose(saved.score, table.score)
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(items) == 20 and items[8]["subject"] == "world_religions" and len(items[1]["scores"]) == 3
    assert sorted(f.name for f in tmp_path.iterdir()) == ["items.jsonl", "table.csv"]


def test_compare_pairs_tables_and_their_folders_item_by_item(tmp_path):
    oracle = Oracle([TASKS["ocnli"], TASKS["mmlu"]], samples.EVAL)
    evaluation.evaluate(Uniform(), ["ocnli", "mmlu"], output_dir=tmp_path)
    best = evaluation.evaluate(oracle, ["mmlu", "ocnli", "c3"])
    table = evaluation.compare(tmp_path, best)
    assert table.task.tolist() == ["ocnli", "mmlu"] and table.difference.tolist() == pytest.approx([2 / 3, 3 / 4])
    assert table.p.tolist() == pytest.approx([2 / 2 ** 12] * 2) and table.examples.tolist() == [12, 12]
    with pytest.raises(ValueError, match="share no item"):
        evaluation.compare(evaluation.evaluate(Uniform(), "c3"), tmp_path)
    with pytest.raises(ValueError, match="no item credits"):
        evaluation.compare(pd.read_csv(tmp_path / "table.csv"), best)
