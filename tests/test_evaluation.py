"""Evaluation: models whose score is known, scorers against ten-line references, statistics by worked numbers."""
import hashlib
import json
import math
import random
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from rlhfkit import evaluation, samples
from rlhfkit.configs import Result
from rlhfkit.evaluation.metrics import credit, mcnemar, mean_interval, paired_interval, wilson
from rlhfkit.evaluation.scorers import TokenModel, loglikelihoods
from rlhfkit.models.pangu import PanguConfig, PanguForCausalLM
from rlhfkit.models.value import RewardModel
from rlhfkit.records import Answer, Record
from rlhfkit.tasks import TASKS
from rlhfkit.tokenizers.pangu import train_vocab

CHOICE_TASKS = ["ocnli", "tnews", "c3", "ceval", "mmlu"]
TEXTS = [f.read_text(encoding="utf-8") for f in sorted(samples.EVAL.rglob("*.*"))]


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


class Uniform:
    def loglikelihoods(self, requests):
        return [-10.0] * len(requests)


class Hashed:
    def loglikelihoods(self, requests):
        return [-int(hashlib.sha256("|".join(r).encode()).hexdigest()[:8], 16) / 1e6 for r in requests]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """An untrained Pangu model of 96 positions in float64-like weights (large, so that scores differ), and its tokenizer."""
    tokenizer = train_vocab(TEXTS, tmp_path_factory.mktemp("vocab"), 2500)
    torch.manual_seed(0)
    config = PanguConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, num_layers=2, num_heads=4,
                         max_position_embeddings=96, initializer_range=0.3)
    return PanguForCausalLM(config).eval(), tokenizer


def scores(table):
    return {row.task: row.score for row in table.itertuples() if row.metric in ("accuracy", "f1", "gold")}


def test_a_model_that_knows_the_answer_scores_one():
    """Faults E1 and E2: the 2023 scorer gave a perfect model the score of a uniform one."""
    table = evaluation.evaluate(Oracle(TASKS.values(), samples.EVAL), list(TASKS))
    assert list(table.columns) == ["task", "metric", "score", "low", "high", "examples", "chance", "seconds"]
    assert list(dict.fromkeys(t.split("/")[0] for t in table.task)) == list(TASKS)
    assert (table.score == 1).all() and (table.high == 1).all() and (table.low < 1).all()
    assert table.attrs["left_out"]["ocnli"] == 1 and table[table.task == "ocnli"].examples.item() == 12


def test_on_real_rows_the_oracle_scores_one_and_ignorant_models_score_chance(shared):
    root = shared / "data/eval"
    assert (evaluation.evaluate(Oracle([TASKS[t] for t in CHOICE_TASKS], root), CHOICE_TASKS, root).score == 1).all()
    uniform = evaluation.evaluate(Uniform(), CHOICE_TASKS, root)
    assert np.allclose(uniform.score, uniform.chance)
    hashed = evaluation.evaluate(Hashed(), CHOICE_TASKS, root)
    for row in hashed[~hashed.task.str.contains("/")].itertuples():
        assert abs(row.score - row.chance) < 3.5 * math.sqrt(row.chance * (1 - row.chance) / row.examples), row.task


def test_with_shuffled_labels_the_oracle_scores_chance(shared):
    task, rng = TASKS["ceval"], random.Random(0)
    oracle = Oracle([task], shared / "data/eval")
    shuffled = replace(task, load=lambda folder, split: [{**e, "gold": rng.randrange(4)} for e in task.load(folder, split)])
    row = evaluation.evaluate(oracle, shuffled, shared / "data/eval").iloc[0]
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
    zero, two = Listener(), Listener()
    evaluation.evaluate(zero, name)
    evaluation.evaluate(two, name, shots=2)
    again = Listener()
    evaluation.evaluate(again, name, shots=2)
    assert two.contexts == again.contexts and len(set(two.contexts)) == len(set(zero.contexts)) or name == "tnews"
    asked = {e.get("question", e.get("sentence", e.get("second", e.get("prompt")))) for e in TASKS[name].load(samples.EVAL / name, TASKS[name].split)}
    for short, long in zip(zero.contexts, two.contexts):
        shots = long.removesuffix(short.split("\n\n", 1)[1] if name in ("ceval", "mmlu") else short)
        assert len(shots) > 20 and shots != long and not any(text in shots for text in asked)


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
        evaluation.evaluate(Uniform(), "ocnli", shots=1, split="train")
    with pytest.raises(ValueError, match="ceval has 5 rows for them in middle_school_physics; ask for fewer"):
        evaluation.evaluate(Uniform(), "ceval", shots=6)


def test_ties_share_the_credit():
    assert [credit(s, 0) for s in ([-1, -2], [-2, -1], [-1, -1], [-1, -1, -1, -9])] == [1, 0, 1 / 2, 1 / 3]
    with pytest.raises(ValueError, match="must be numbers"):
        credit([-1.0, float("nan")], 0)


def test_subjects_follow_the_total_and_add_up():
    table = evaluation.evaluate(Hashed(), "ceval")
    assert table.task.tolist()[:4] == ["ceval", "ceval/STEM", "ceval/Social Science", "ceval/Humanities"]
    assert table.examples.tolist() == [12, 4, 4, 4, 4, 4, 4]
    assert table.score[0] == pytest.approx(table.score[4:].mean())


def test_limit_is_spread_over_the_file():
    table = evaluation.evaluate(Uniform(), "ceval", limit=3)
    assert table.task.tolist()[4:] == ["ceval/middle_school_physics", "ceval/high_school_geography", "ceval/logic"]
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
    (dict(tasks="ceval", split="test"), ValueError, "none with a label: there is nothing to score; take split val"),
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


# The scorer of models

def one_by_one(model, prompt, continuation):
    """Ten-line reference: one forward pass an item, no padding, every position through the head."""
    with torch.no_grad():
        logps = model(input_ids=torch.tensor([prompt + continuation])).logits[0].double().log_softmax(-1)
    return sum(logps[len(prompt) - 1 + i, token].item() for i, token in enumerate(continuation))


def requests(vocab, count=40):
    rng = random.Random(1)
    return [([rng.randrange(10, vocab) for _ in range(rng.randint(1, 40))],
             [rng.randrange(10, vocab) for _ in range(rng.randint(1, 20))]) for _ in range(count)]


def test_loglikelihoods_equal_the_reference_for_every_batch_size_and_order(small):
    """Fault E2 again: the token at t is scored from the logits at t - 1, and E1: through one log_softmax."""
    model, asked = small[0], requests(small[0].config.vocab_size)
    expected = [one_by_one(model, p, c) for p, c in asked]
    order = random.Random(2).sample(range(len(asked)), len(asked))
    shuffled = dict(zip(order, loglikelihoods(model, [asked[i] for i in order], 300)))
    for values in (loglikelihoods(model, asked), loglikelihoods(model, asked, 1), loglikelihoods(model, asked, 420), shuffled):
        assert all(abs(values[i] - expected[i]) < 1e-5 * len(asked[i][1]) for i in range(len(asked)))


def test_letters_share_one_row_and_keep_their_own_score(small):
    prompt, rows = [1, 20, 30, 40], []
    hook = small[0].transformer.register_forward_hook(
        lambda module, args, kwargs, out: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    values = loglikelihoods(small[0], [(prompt, [letter]) for letter in (50, 51, 52, 53)])
    hook.remove()
    assert rows == [1]
    assert values == pytest.approx([one_by_one(small[0], prompt, [letter]) for letter in (50, 51, 52, 53)], abs=1e-5)


def test_a_request_without_tokens_is_refused(small):
    with pytest.raises(ValueError, match="0 continuation tokens"):
        loglikelihoods(small[0], [([1], [])])


def test_a_model_that_was_trained_on_the_answers_scores_above_chance(small):
    """From rows to table with our own model: what it learnt of the items is what the scorer finds."""
    model, tokenizer = PanguForCausalLM(small[0].config), small[1]
    with torch.no_grad():
        for parameter, source in zip(model.parameters(), small[0].parameters()):
            parameter.copy_(source * 0.1)
    reader = TokenModel(model, tokenizer)
    optimizer, batches = torch.optim.Adam(model.parameters(), lr=3e-3), []
    for example in TASKS["c3"].load(samples.EVAL / "c3", "dev"):
        record, choices, gold = TASKS["c3"].render(example, ())
        _, ids, (tail,) = reader._fit(record, (choices[gold],))
        batches.append((ids, tail))
    for _ in range(25):
        for ids, tail in batches:
            logps = model(input_ids=torch.tensor([ids + tail])).logits[0, len(ids) - 1:-1].log_softmax(-1)
            optimizer.zero_grad()
            (-logps.gather(1, torch.tensor(tail)[:, None]).mean()).backward()
            optimizer.step()
    assert evaluation.evaluate((model.eval(), tokenizer), "c3").score.item() == 1


def test_long_items_lose_the_beginning_of_their_context_never_a_choice(small):
    reader = TokenModel(*small)
    record, choices, _ = TASKS["cmrc2018"].render(TASKS["cmrc2018"].load(samples.EVAL / "cmrc2018", "dev")[0], ())
    prompt, ids, tails = reader._fit(record, ("十二米", "四年"))
    assert reader.cut == 1 and len(ids) + max(map(len, tails)) <= 96
    assert (record.prompt + "答：").endswith(prompt) and prompt.endswith("问：青石桥有多长？\n答：")
    assert tails == [small[1].encode_texts([t])[0] for t in ("十二米", "四年")]
    assert len(ids) + max(map(len, tails)) > 80                                     # and no more than needed


def test_a_label_before_a_long_article_stays_and_the_article_loses_its_end(small):
    reader = TokenModel(*small)
    _, ids, tails = reader._fit(Record("这是关于"), tuple(f"{label}的文章:{'春天去山里看茶园' * 40}" for label in ("体育", "故事")))
    heads = [small[1].encode_texts([label])[0] for label in ("体育", "故事")]
    assert len(ids) + max(map(len, tails)) == 96 and all(t[:len(h)] == h for t, h in zip(tails, heads)) and reader.cut == 1
    with pytest.raises(ValueError, match="too few for 96 new tokens"):
        reader.answer([Record("上联：春风", prefix="下联：")], 96)


def test_evaluating_a_model_leaves_its_mode_and_counts_what_was_cut(small):
    model, tokenizer = small
    model.train()
    table = evaluation.evaluate((model, tokenizer), ["ceval", "cmrc2018", "couplets"], limit=4)
    assert model.training and table.attrs["cut"] == {"ceval": 4, "cmrc2018": 4, "couplets": 0}
    model.eval()


def test_perplexity_counts_every_token_once_also_in_windows(small):
    model, tokenizer = small
    texts = ["小李有一个姐姐", "青石桥建于村口小溪之上" * 20]
    table = evaluation.perplexity((model, tokenizer), [Record(t, source=s) for t, s in zip(texts, "ab")])
    ids = [[1, *tokenizer.encode_texts([t])[0], tokenizer.eos_token_id] for t in texts]
    assert table.source.tolist() == ["total", "a", "b"] and len(ids[1]) > 96
    assert table.tokens.tolist() == [len(ids[0]) + len(ids[1]) - 2, len(ids[0]) - 1, len(ids[1]) - 1]
    assert table.characters.tolist() == [7 + 220, 7, 220]
    nats = -one_by_one(model, ids[0][:1], ids[0][1:])
    assert table.perplexity[1] == pytest.approx(math.exp(nats / (len(ids[0]) - 1)), rel=1e-5)
    assert table.nats_per_character[1] == pytest.approx(nats / 7, rel=1e-5)
    with pytest.raises(ValueError, match="records is empty"):
        evaluation.perplexity(small, [])


@pytest.fixture(scope="module")
def reward_path(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    RewardModel.from_causal(small[0]).save_pretrained(folder)
    small[1].save_pretrained(folder)
    return str(folder)


def preferences():
    answers = ["晨露", "晨露润花花更红", "花", "春雨"]
    return [Record(f"上联：{line}", tuple(Answer(a, 3.0 - i) for i, a in enumerate(answers)), "下联：", source=source)
            for line, source in (("晚风", "couplets"), ("秋月照寒江", "couplets"), ("小溪", "poetry"))]


def test_reward_scores_do_not_see_their_neighbours(reward_path):
    """I10: the score of an answer is the same alone and in a padded batch."""
    records = preferences()
    together = evaluation.score(reward_path, records)
    assert [len(s) for s in together] == [4, 4, 4]
    alone = evaluation.score(reward_path, [replace(records[1], answers=records[1].answers[1:2])])[0][0]
    assert alone == pytest.approx(together[1][1], abs=1e-6)


def test_a_report_card_counts_all_ordered_pairs(reward_path):
    records = preferences()
    card = evaluation.report_card(reward_path, records)
    scores = evaluation.score(reward_path, records)
    right = [s[i] > s[j] for s in scores for i in range(4) for j in range(i + 1, 4)]
    assert card.by.tolist() == ["total", "source", "source", "margin", "margin", "margin"]
    assert card.pairs.tolist() == [18, 12, 6, 9, 6, 3] and card.group.tolist()[3:] == [1, 2, 3]
    assert card.accuracy[0] == pytest.approx(sum(right) / 18) and card.low[0] < card.accuracy[0] < card.high[0]
    assert -1 <= card.length_correlation[0] <= 1
    with pytest.raises(ValueError, match="no pair to rank"):
        evaluation.report_card(reward_path, [Record("上联：晚风", (Answer("晨露", 1.0),))])


# Statistics

@pytest.mark.parametrize("successes, n, low, high", [
    (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)])    # Newcombe 1998
def test_wilson_intervals_are_the_published_ones(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_the_interval_of_a_mean_has_its_standard_error():
    assert mean_interval([0.0, 1.0] * 50) == pytest.approx((0.5 - 1.96 * 0.0502519, 0.5 + 1.96 * 0.0502519), abs=1e-5)
    assert mean_interval([0.0] * 10) == pytest.approx((0.0, 0.2775), abs=1e-4)       # all alike is no certainty


def test_mcnemar_is_the_exact_sign_test():
    assert mcnemar([1] * 8 + [-1] * 2 + [0] * 50) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert mcnemar([0, 0]) == 1.0


def test_paired_intervals_are_seeded_and_cover_at_their_level():
    rng = np.random.default_rng(3)
    draws = [paired_interval(rng.normal(0.2, 1.0, 60), resamples=200) for _ in range(200)]
    assert 180 <= sum(low <= 0.2 <= high for low, high in draws) <= 199
    assert paired_interval([1, 2, 3, 9]) == paired_interval([1, 2, 3, 9])


def test_compare_takes_numbers_over_the_same_items():
    row = evaluation.compare([0.0, 0.5, 0.25, 0.0], [1.0, 0.5, 0.75, 0.5]).iloc[0]
    assert (row.a, row.b, row.difference, row.examples) == (0.1875, 0.6875, 0.5, 4)
    assert 0 < row.low < 0.5 < row.high <= 1 and row.p == pytest.approx(0.25)
    with pytest.raises(ValueError, match="2 and 3 numbers"):
        evaluation.compare([1, 2], [1, 2, 3])


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


def test_compare_takes_the_last_samples_and_the_figures_of_results(tmp_path):
    def result(name, golds, loss):
        rows = [dict(step=step, prompt=p, answer="x", gold=g * step / 20) for step in (10, 20) for p, g in zip("aabc", golds)]
        folder = tmp_path / name
        folder.mkdir()
        return Result("sft", {}, {"eval_loss": loss}, str(folder), [], rows).save()
    before, after = result("before", [0.2, 0.4, 0.0, 0.0], 2.0), result("after", [0.4, 0.6, 0.2, 0.2], 1.5)
    for table in (evaluation.compare(before, after), evaluation.compare(before.output_dir, after.output_dir)):
        rows = {r.metric: r for r in table.itertuples()}
        assert rows["gold"].difference == pytest.approx(0.2) and rows["gold"].examples == 4
        assert rows["gold"].low == pytest.approx(0.2) and rows["eval_loss"].difference == -0.5
        assert math.isnan(rows["eval_loss"].low)


def test_the_published_tables_are_kept_as_data():
    folder = samples.EVAL.parents[1] / "evaluation/tables"
    ceval, clue = pd.read_csv(folder / "ceval.csv"), pd.read_csv(folder / "clue.csv")
    assert len(ceval) == len(pd.read_csv(folder / "mmlu.csv")) == 18 and ceval.average.between(20, 100).all()
    assert len(clue) == 80 and clue.score.between(0, 1).all()
