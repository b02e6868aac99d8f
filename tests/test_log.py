"""The item log: what a killed evaluation keeps, what is scored again when something changed, and what no model is needed for."""
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import PROJECT

from rlhfkit import evaluation, samples
from rlhfkit.evaluation import log
from rlhfkit.families import load_model, load_tokenizer
from rlhfkit.tasks import TASKS

SCRIPT = '''
import hashlib, os, signal, sys
from rlhfkit import evaluation

class Fake:
    asked, deadly = 0, 1000

    def loglikelihoods(self, requests):
        for number, request in enumerate(requests):
            Fake.asked += 1
            if Fake.asked == Fake.deadly:
                os.kill(os.getpid(), signal.SIGKILL)
        return [-int(hashlib.sha256("|".join(r).encode()).hexdigest()[:6], 16) / 1e6 for r in requests]

if __name__ == "__main__":
    evaluation.evaluate(Fake(), "ocnli", sys.argv[1], output_dir=sys.argv[2])
'''


@pytest.fixture
def fake(tmp_path):
    """A module with a model that counts what it is asked."""
    (tmp_path / "fake.py").write_text(SCRIPT, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("fake", tmp_path / "fake.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.Fake.deadly = 0
    return module.Fake


def write_rows(folder, labels):
    (folder / "ocnli").mkdir(parents=True, exist_ok=True)
    rows = [{"sentence1": f"第{i}句", "sentence2": f"后{i}句", "label": label} for i, label in enumerate(labels)]
    (folder / "ocnli/dev.json").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def lines_of(folder):
    return [json.loads(line) for line in (folder / "items.jsonl").read_text(encoding="utf-8").splitlines()]


def same(table, other):
    pd.testing.assert_frame_equal(table.drop(columns="seconds"), other.drop(columns="seconds"))
    return table.attrs["credits"] == other.attrs["credits"] and table.attrs["cut"] == other.attrs["cut"]


def test_a_killed_evaluation_loses_one_chunk_and_ends_with_the_same_table(tmp_path, fake):
    data, out = tmp_path / "data", tmp_path / "out"
    write_rows(data, ["neutral", "entailment", "contradiction"] * 200)
    killed = subprocess.run([sys.executable, tmp_path / "fake.py", data, out], cwd=PROJECT)
    assert killed.returncode == -signal.SIGKILL and not (out / "table.csv").exists()
    assert len(lines_of(out)) == 256                                # of 600; it died in the second chunk
    partial = evaluation.tabulate(out)
    assert partial.examples.tolist() == [256]
    with open(out / "items.jsonl", "ab") as file:                   # as if killed while it wrote, within a character
        file.write('{"key": "0", "prompt": "第'.encode()[:-1])
    table = evaluation.evaluate(fake(), "ocnli", data, output_dir=out)
    assert fake.asked == 3 * (600 - 256)
    assert same(table, evaluation.evaluate(fake(), "ocnli", data)) and same(table, evaluation.tabulate(out))
    assert [line["id"] for line in lines_of(out)] == [str(i) for i in range(600)]
    assert sorted(f.name for f in out.iterdir()) == ["items.jsonl", "table.csv"]


def test_a_finished_evaluation_opens_no_model(tmp_path, tiny_path, monkeypatch):
    first = evaluation.evaluate(tiny_path, ["c3", "cmrc2018"], limit=2, output_dir=tmp_path)
    monkeypatch.setattr(evaluation, "open_model", None)
    assert same(first, evaluation.evaluate(tiny_path, ["c3", "cmrc2018"], limit=2, output_dir=tmp_path))
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="is no folder"):    # a slip of the pen costs nothing
        evaluation.evaluate(f"{tiny_path}x", ["c3", "cmrc2018"], limit=2, output_dir=tmp_path)
    assert same(first, evaluation.tabulate(tmp_path)) and (tmp_path / "table.csv").exists()


def test_a_changed_row_is_asked_again_alone(tmp_path, fake):
    out = tmp_path / "out"
    for labels in (["neutral"] * 5, ["neutral"] * 3 + ["entailment"] + ["neutral"]):
        write_rows(tmp_path, labels)
        fake.asked = 0
        evaluation.evaluate(fake(), "ocnli", tmp_path, output_dir=out)
    assert fake.asked == 3 and [line["gold"] for line in lines_of(out)] == [1, 1, 1, 0, 1]


def test_a_changed_prompt_is_asked_again(tmp_path, fake):
    evaluation.evaluate(fake(), "c3", output_dir=tmp_path)
    before, fake.asked = lines_of(tmp_path), 0

    def render(*of):
        record, choices, gold = TASKS["c3"].render(*of)
        return replace(record, prefix="我答："), choices, gold
    spoken = replace(TASKS["c3"], render=render)
    evaluation.evaluate(fake(), spoken, output_dir=tmp_path)
    assert fake.asked == sum(len(line["choices"]) for line in before)
    assert all(line["prompt"].endswith("我答：") for line in lines_of(tmp_path)) and len(lines_of(tmp_path)) == len(before)
    fake.asked = 0
    evaluation.evaluate(fake(), "c3", shots=1, output_dir=tmp_path)
    assert fake.asked == sum(len(line["choices"]) for line in before)


def test_a_changed_model_is_noticed(tmp_path, tiny_path):
    path = tmp_path / "model"
    shutil.copytree(tiny_path, path)
    names = {log.identity(path), log.identity(str(path))}
    (path / "result.json").write_text("{}", encoding="utf-8")       # no part of the model
    names.add(log.identity(path))
    assert len(names) == 1
    weights = path / "model.safetensors"
    raw, times = bytearray(weights.read_bytes()), weights.stat()
    raw[1 << 19] ^= 1                                               # same name, size and time
    weights.write_bytes(raw)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert log.identity(path) not in names
    raw[1 << 19] ^= 1
    weights.write_bytes(raw)                                        # same bytes, another time
    assert log.identity(path) not in names
    model, tokenizer = load_model(path), load_tokenizer(path)
    before = log.identity((model, tokenizer))
    assert before == log.identity((load_model(path), load_tokenizer(path)))
    next(model.parameters()).data[0, 0] += 1e-3
    assert log.identity((model, tokenizer)) != before


def test_objects_are_told_apart_by_class_methods_texts_and_modules(fake, tiny_path):
    class Remote:
        def __init__(self, address, calls, model=None):
            self.address, self.calls, self.model = address, calls, model

        def loglikelihoods(self, requests):
            return [0.0] * len(requests)
    model = load_model(tiny_path)
    names = [log.identity(m) for m in (Remote("a", 1), Remote("b", 1), Remote("a", 1, model), fake())]
    assert len(set(names)) == 4 and log.identity(Remote("a", 2)) == names[0]
    next(model.parameters()).data[0, 0] += 1e-3
    assert log.identity(Remote("a", 1, model)) != names[2]


def test_a_changed_metric_needs_no_model(tmp_path, tiny_path, monkeypatch):
    evaluation.evaluate(tiny_path, "cmrc2018", limit=2, output_dir=tmp_path)
    monkeypatch.setattr(evaluation, "open_model", None)
    mine = replace(TASKS["cmrc2018"], metric=lambda answer, gold: {"written": float(len(answer) >= 0)})
    table = evaluation.evaluate(tiny_path, mine, limit=2, output_dir=tmp_path)
    assert table.metric.tolist() == ["written"] and table.score.item() == 1
    assert evaluation.tabulate(tmp_path).metric.tolist() == ["written"]


def test_answers_that_are_drawn_by_chance_are_taken_over_all_or_none(tmp_path):
    """Their noise depends on their place among the others, so that a part of another evaluation would not fit."""
    asked = []

    class Poet:
        def generate(self, prompts, max_new_tokens):
            asked.append(len(prompts))
            return ["春"] * len(prompts)
    for limit in (3, 3, 4):
        evaluation.evaluate(Poet(), "couplets", limit=limit, output_dir=tmp_path)
    assert asked == [3, 4]


def test_a_damaged_line_is_named_and_a_folder_without_a_log_too(tmp_path, fake):
    with pytest.raises(FileNotFoundError, match="holds no evaluation"):
        evaluation.tabulate(tmp_path)
    (tmp_path / "items.jsonl").write_text('{"key": "0\n{"key": "1"}\n', encoding="utf-8")
    for call in (evaluation.tabulate, lambda out: evaluation.evaluate(fake(), "ocnli", output_dir=out)):
        with pytest.raises(ValueError, match="items.jsonl, line 1 is damaged .* delete the line"):
            call(tmp_path)


def test_chunks_keep_order_and_subjects_together():
    sizes = {"a": 3, "b": 70, "c": 250, "d": 10, "e": 600, "f": 1, "g": 60, "h": 5}
    questions = [(subject, i) for subject, size in sizes.items() for i in range(size)]
    chunks = list(log.chunks(questions, lambda q: q[0]))
    assert [q for chunk in chunks for q in chunk] == questions
    assert [len(chunk) for chunk in chunks] == [73, 250, 10, 256, 256, 88, 66]
    homes = Counter(subject for chunk in chunks for subject in {q[0] for q in chunk})
    assert {subject for subject, count in homes.items() if count > 1} == {"e"}


class Second:
    def loglikelihoods(self, requests):
        return [-1.0 if letter == "B" else -2.0 for _, letter in requests]

    def generate(self, prompts, max_new_tokens):
        return ["x"] * len(prompts)


def test_a_split_without_labels_gets_answers_and_no_score(tmp_path):
    table = evaluation.evaluate(Second(), "ceval", split="test", output_dir=tmp_path)
    assert table.score.isna().all() and set(table.verdict) == {"no labels"} and table.attrs["left_out"] == {"ceval": 0}
    assert table.attrs["credits"] == {"ceval": {"accuracy": {}}}
    submission = json.loads((tmp_path / "submission.json").read_text(encoding="utf-8"))
    assert submission.keys() == {line["subject"] for line in lines_of(tmp_path)}
    assert all(answers == {str(i): "B" for i in range(len(answers))} for answers in submission.values())
    evaluation.evaluate(Second(), "ceval", output_dir=tmp_path)
    assert not (tmp_path / "submission.json").exists()
    task = TASKS["cmrc2018"]
    blind = replace(task, load=lambda *of: [e | {"gold": None} for e in task.load(*of)])
    table = evaluation.evaluate(Second(), blind, output_dir=tmp_path)
    assert table.metric.tolist() == ["unlabelled"] and np.isnan(table.score.item())


def test_the_submission_has_the_sites_52_keys(shared, tmp_path):
    evaluation.evaluate(Second(), "ceval", shared / "data/eval", split="test", output_dir=tmp_path)
    submission = json.loads((tmp_path / "submission.json").read_text(encoding="utf-8"))
    assert len(submission) == 52 and submission["accountant"]["0"] == "B"


def test_rows_with_the_same_id_are_refused(fake):
    twice = replace(TASKS["ocnli"], load=lambda *of: TASKS["ocnli"].load(*of) * 2)
    with pytest.raises(ValueError, match="has 2 rows with the id 0; ids must be unique"):
        evaluation.evaluate(fake(), twice)
    with pytest.raises(ValueError, match="has no rows"):
        evaluation.evaluate(fake(), replace(TASKS["ocnli"], load=lambda *of: []), samples.EVAL)


def test_what_was_cut_is_counted_over_a_stop_too(tmp_path, tiny_path):
    """The count is the scorer's; lines that are taken over bring their share of it."""
    model, tokenizer = load_model(tiny_path), load_tokenizer(tiny_path)
    model.config.max_position_embeddings = 60
    evaluate = lambda **more: evaluation.evaluate((model, tokenizer), "c3", output_dir=tmp_path, **more).attrs["cut"]["c3"]
    whole = evaluate()
    assert whole >= 3
    lines = (tmp_path / "items.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "items.jsonl").write_text("".join(lines[:3]), encoding="utf-8")
    assert abs(evaluate() - whole) <= 1 and evaluation.tabulate(tmp_path).attrs["cut"]["c3"] == evaluate()


def test_the_scorer_is_given_the_prompts_with_fewer_shots():
    class Reader:
        cut = 0

        def rank(self, records, choices, shorter=()):
            self.asked, self.shorter = records, shorter
            return [[0.0] * len(texts) for texts in choices], [r.prompt for r in records]
    reader, task = Reader(), TASKS["ceval"]
    examples, shown, _ = evaluation._load(task, samples.EVAL / "ceval", "val", 2, 1, None)
    [line] = evaluation._answered(task, evaluation._questions(task, "val", examples, shown, ""), reader)
    [[one, none]] = reader.shorter
    assert none == task.render(examples[0], ())[0] and one == task.render(examples[0], shown[0][:1])[0]
    assert line["prompt"] == reader.asked[0].prompt and line["shots"] == 2
