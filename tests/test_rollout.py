"""Sampling: what an answer depends on (its seed) and what not (batch, order), greedy, ends, the distribution."""
import random

import pytest
import torch

import rlhfkit as rk
from rlhfkit.rollout import answer_samples, keep, repetition, rollout, rollouts, sample, sample_metrics

END = list(range(0, 2400, 12))                  # many ends, so that an untrained model finishes some answers


@pytest.fixture(scope="module")
def tokenizer(tiny_path):
    return rk.load_tokenizer(tiny_path)


@pytest.fixture(scope="module")
def model(tiny_path):
    return rk.load_model(tiny_path)


@pytest.fixture(scope="module")
def prompts(tiny_path, tokenizer):
    records = [rk.Record(text, prefix="下联：") for text in (
        "上联：晚风吹桥", "上联：红楼送秋月", "春风", "上联：悠悠白云", "问：什么是春风？", "秋", "上联：白云照岩", "上联：明月白云", "上联：春风中映明月")]
    return [rk.family_of(tiny_path).encode(tokenizer, r)[0] for r in records]


def ask(samples):
    return rk.SFT("model", "data", "out", max_length=64, max_new_tokens=4, samples=samples)


def drawn(model, prompts, seeds, temperature=1.0, tokens=10, **options):
    return rollout(model, prompts, tokens, END, 6, seeds, temperature, **options)[0]


def test_answers_do_not_depend_on_the_batch_size(model, prompts):
    one, eight = (sample(model, prompts, 10, END, 6, temperature=1.0, seed=3, batch_size=size) for size in (1, 8))
    assert one == eight and len({tuple(a) for a in one}) == len(prompts)


def test_answers_do_not_depend_on_the_order_of_the_rows(model, prompts):
    seeds, order = list(range(len(prompts))), random.Random(0).sample(range(len(prompts)), len(prompts))
    straight = drawn(model, prompts, seeds)
    mixed = drawn(model, [prompts[i] for i in order], [seeds[i] for i in order])
    assert mixed == [straight[i] for i in order]


def test_the_same_seed_draws_the_same_and_another_seed_another(model, prompts):
    torch.manual_seed(0)
    first = sample(model, prompts, 10, END, 6, temperature=1.0, seed=0)
    torch.manual_seed(1)                                                             # the global state is not used
    assert sample(model, prompts, 10, END, 6, temperature=1.0, seed=0) == first
    other = sample(model, prompts, 10, END, 6, temperature=1.0, seed=1)
    assert sum(a != b for a, b in zip(first, other)) >= len(prompts) - 1


def test_equal_prompts_get_answers_of_their_own(model, prompts):
    answers = sample(model, prompts[:1] * 16, 10, [9], 6, temperature=1.0)
    assert len({tuple(a) for a in answers}) == 16


def test_temperature_0_is_generate_s_greedy_row_by_row(model, prompts):
    answers = sample(model, prompts, 10, [9], 6)
    for prompt, answer in zip(prompts, answers):
        alone = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=10,
                               do_sample=False, pad_token_id=6)
        assert alone[0, len(prompt):].tolist() == answer


@pytest.mark.parametrize("options", [dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-4)])
def test_the_narrowest_filters_are_greedy(model, prompts, options):
    narrow = sample(model, prompts, 10, [9], 6, **({"temperature": 1.0} | options), seed=5)
    assert narrow == sample(model, prompts, 10, [9], 6)


def test_what_the_folder_s_generation_config_asks_for_does_not_change_the_distribution(tiny_path, model, prompts):
    """Published chat models bring a repetition penalty; PPO's log-probs are those of the plain distribution."""
    other = rk.load_model(tiny_path)
    other.generation_config.update(repetition_penalty=5.0, do_sample=True, temperature=0.3, top_k=5)
    assert drawn(other, prompts, range(9)) == drawn(model, prompts, range(9))
    assert drawn(other, prompts, range(9), temperature=0.0) == drawn(model, prompts, range(9), temperature=0.0)


def test_finished_rows_end_with_the_end_token_and_others_are_full(model, prompts):
    rows = drawn(model, prompts * 4, range(36))
    finished = [row for row in rows if row[-1] in END]
    assert 0 < len(finished) < len(rows)
    assert all(not set(row[:-1]) & set(END) for row in rows)
    assert all(len(row) == 10 for row in rows if row[-1] not in END)
    cut = sample(model, prompts * 4, 10, END, 6, temperature=1.0, seed=0)
    assert not {token for row in cut for token in row} & set(END)                    # sample leaves the end token away


def test_sampling_leaves_the_mode_of_the_model(model, prompts):
    for mode in (True, False):
        model.train(mode)
        drawn(model, prompts[:2], [0, 1])
        assert model.training is mode
    model.eval()


def test_log_probs_are_those_of_the_tempered_distribution_without_filters(model, prompts):
    """I2, P4: sampled at temperature 0.7, with and without top-k, and scored by one pass over the ids."""
    for options in ({}, {"top_k": 5}):
        answers, logps = rollout(model, prompts, 10, END, 6, range(9), 0.7, **options)
        for prompt, answer, found in zip(prompts, answers, logps):
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1:-1] / 0.7
            wanted = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
            assert len(found) == len(answer)
            torch.testing.assert_close(torch.tensor(found), wanted, rtol=0, atol=1e-5)


def test_repetition_is_the_share_of_bigrams_seen_before():
    assert repetition([1, 2, 1, 2, 1]) == 0.5                       # 12 21 12 21: two of four
    assert repetition([7] * 5) == 0.75 and repetition([1, 2, 3]) == 0 and repetition([1]) == 0 and repetition([]) == 0


def test_kept_rollouts_come_back_in_the_order_of_steps(tmp_path):
    for step in (10, 9):
        keep(tmp_path, step, [{"step": step, "answer": text} for text in ("花", "鸟")])
    assert [(row["step"], row["answer"]) for row in rollouts(tmp_path)] == [(9, "花"), (9, "鸟"), (10, "花"), (10, "鸟")]
    with pytest.raises(FileNotFoundError, match="keep_rollouts=True"):
        next(rollouts(tmp_path / "elsewhere"))


def test_generate_gives_one_text_a_prompt_for_strings_and_records(tiny_path):
    strings = rk.generate(tiny_path, ["上联：晚风吹桥", "春风"], max_new_tokens=4)
    assert strings == rk.generate(tiny_path, [rk.Record("上联：晚风吹桥"), rk.Record("春风")], max_new_tokens=4)
    assert len(strings) == 2 and all(type(text) is str for text in strings)
    assert rk.generate(tiny_path, []) == []


def test_a_prompt_that_is_no_list_is_refused_not_read_character_by_character(tiny_path):
    with pytest.raises((TypeError, ValueError), match="list"):
        rk.generate(tiny_path, "上联：晚风吹桥", max_new_tokens=2)


def test_more_tokens_than_the_model_has_positions_are_refused(tiny_path):
    with pytest.raises(ValueError,
                       match="max_new_tokens is 1024; the model has 1024 positions .*: ask for fewer"):
        rk.generate(tiny_path, ["上联：晚风吹桥"], max_new_tokens=1024)


def test_tokens_that_leave_no_room_for_the_template_are_refused_by_their_name(tiny_path):
    """1,023 of 1,024 was answered with a max_length, which generate does not have."""
    with pytest.raises(ValueError, match="max_new_tokens is 1023"):
        rk.generate(tiny_path, ["上联：晚风吹桥"], max_new_tokens=1023)


@pytest.mark.parametrize("options", [dict(temperature=-1.0), dict(top_p=0.0), dict(top_p=2.0), dict(top_k=-1)])
def test_sampling_options_out_of_range_are_refused(tiny_path, options):
    with pytest.raises(ValueError, match=f"{list(options)[0]} is {list(options.values())[0]}"):
        rk.generate(tiny_path, ["春风"], max_new_tokens=2, **({"temperature": 1.0} | options))


def test_a_prompt_longer_than_the_model_is_shortened_in_the_user_s_text(tiny_path):
    assert len(rk.generate(tiny_path, ["春风" * 2000], max_new_tokens=4)) == 1


def test_samples_carry_the_judge_s_score_where_its_rules_apply(tiny_path, model, tokenizer):
    records = [rk.Record("上联：晚风吹桥", prefix="下联："), rk.Record("什么是春风？"), rk.Record("春风")]
    rows = answer_samples(model, tokenizer, rk.family_of(tiny_path), records, ask(2), step=7)
    assert [row["prompt"] for row in rows] == ["上联：晚风吹桥", "什么是春风？"] and {row["step"] for row in rows} == {7}
    assert "gold" in rows[0] and "gold" not in rows[1]
    assert rows[0]["gold"] == rk.gold(rows[0]["prompt"], rows[0]["answer"])
    assert answer_samples(model, tokenizer, rk.family_of(tiny_path), records, ask(0), step=0) == []


def test_a_held_out_record_that_does_not_fit_does_not_stop_a_run(tiny_path, model, tokenizer):
    """Rows set it aside and count it; the samples met it again and raised, before the first step or after the last."""
    records = [rk.Record("长", prefix="下联：" * 60), rk.Record("上联：晚风吹桥", prefix="下联：")]
    rows = answer_samples(model, tokenizer, rk.family_of(tiny_path), records, ask(2), step=0)
    assert "上联：晚风吹桥" in [row["prompt"] for row in rows]


def test_gold_before_and_after_are_means_of_the_first_and_the_last_samples():
    samples = [dict(step=0, gold=0.0), dict(step=0, gold=0.5), dict(step=0), dict(step=9, gold=1.0),
               dict(step=9, gold=0.5), dict(step=5, gold=0.1)]
    assert sample_metrics(samples) == {"gold_before": 0.25, "gold": 0.75}
    assert sample_metrics([dict(step=0), dict(step=9)]) == {} == sample_metrics([])
