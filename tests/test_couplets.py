"""The gold judge rule by rule on worked lines, the grammar it comes from, and that no constant answer passes it."""
import pytest

import rlhfkit as rk
from rlhfkit.samples import RAW
from rlhfkit.samples.couplets import LEXICON, PATTERNS, SHIPPED, applies, held_out, make, parse

FIRST = "晚风吹桥"                 # evening wind (noun of two characters), blows (verb), bridge (noun, level tone)


@pytest.fixture(scope="module")
def shipped():
    return make(SHIPPED)


@pytest.fixture(scope="module")
def unseen():
    return held_out(400)


@pytest.mark.parametrize("answer, score, why", [
    ("明月照寺", 1.0, "right: bright moon, shines on, temple, oblique"),
    ("明月照", 0.0, "shorter"), ("明月照细雨", 0.0, "longer"), ("", 0.0, "nothing"),
    ("明月照翠", 0.75, "the fourth is an adjective: 3 of 4 parts of speech")])
def test_length_and_parts_of_speech(answer, score, why):
    assert rk.gold("上联：" + FIRST, answer) == pytest.approx(score), why


@pytest.mark.parametrize("answer, score, why", [
    ("晚风照寺", 0.5, "2 of 4 characters are those of the first line"), ("明月吹寺", 0.75, "one is"),
    (FIRST, 0.0, "the line itself has nothing new")])
def test_characters_of_the_first_line_cost_their_share(answer, score, why):
    assert rk.gold("上联：" + FIRST, answer) == pytest.approx(score), why


def test_a_tone_that_is_not_mirrored_costs_half():
    assert rk.gold("上联：" + FIRST, "明月照峰") == 0.5                    # level under level
    assert rk.gold("上联：明月照寺", "晚风吹桥") == 1.0                    # level under oblique
    assert rk.gold("上联：明月照寺", "晚风吹岭") == 0.5                    # oblique under oblique


def test_the_factors_multiply():
    assert rk.gold("上联：" + FIRST, "晚风照峰") == 0.25                   # half new, not mirrored


def test_an_unknown_word_matches_no_part_of_speech_and_mirrors_no_tone():
    assert rk.gold("上联：" + FIRST, "明月照猫") == 0.375                  # 3 of 4, and no tone known
    assert rk.gold("上联：" + FIRST, "猫猫猫猫") == 0.0


def test_place_in_a_word_counts():
    """晚 is the beginning of a word of two; a word of one character is not half of it."""
    assert parse("晚风吹桥") == (("noun2", 0), ("noun2", 1), ("verb", 0), ("noun1", 0))
    assert rk.gold("上联：" + FIRST, "寺路照岭") == 0.5                    # one-character nouns over 晚风


@pytest.mark.parametrize("prompt", ["上联：晚风吹桥", "晚风吹桥", "对对联。上联：晚风吹桥", "上联：晚风吹桥\n下联：", " 上联：晚风吹桥 "])
@pytest.mark.parametrize("answer", ["明月照寺", "下联：明月照寺", " 明月照寺\n"])
def test_the_line_is_found_in_what_stands_around_it(prompt, answer):
    assert rk.gold(prompt, answer) == 1.0


@pytest.mark.parametrize("prompt", ["上联：猫吃鱼", "上联：", "今天天气如何？", "上联：晚风吹桥。"])
def test_a_first_line_outside_of_the_lexicon_raises_and_does_not_apply(prompt):
    assert not applies(prompt)
    with pytest.raises(ValueError, match="outside of the judge's lexicon.*ask .*applies"):
        rk.gold(prompt, "明月照寺")


def test_the_judge_applies_to_first_lines_of_its_lexicon_that_say_so():
    assert applies("上联：晚风吹桥") and not applies("晚风吹桥")


def test_right_couplets_score_1(shipped, unseen):
    assert {rk.gold("上联：" + first, second) for first, second in shipped + unseen} == {1.0}


def test_the_score_is_in_0_to_1_whatever_is_answered(unseen):
    answers = [text for pair in unseen[:40] for text in pair] + ["", "，", "a b", "下联：", "晚" * 7]
    scores = [rk.gold("上联：" + first, answer) for first, _ in unseen[:40] for answer in answers]
    assert min(scores) == 0.0 and max(scores) == 1.0


def test_no_constant_answer_scores_above_three_tenths(unseen):
    worst = max(sum(rk.gold("上联：" + first, answer) for first, _ in unseen) / len(unseen) for _, answer in unseen[:300])
    assert 0.1 < worst < 0.3


def test_the_file_that_ships_is_what_the_grammar_makes(shipped):
    lines = (RAW / "couplets.txt").read_text("utf-8").splitlines()
    assert lines == [f"{first}\t{second}" for first, second in shipped] and len(lines) == 6000


def test_held_out_first_lines_are_new_and_every_line_is_there_once(shipped, unseen):
    firsts = [first for first, _ in shipped + unseen]
    assert len(set(firsts)) == len(firsts) == 6400
    assert held_out(10) == unseen[:10]


def test_another_seed_makes_other_couplets_and_the_same_seed_the_same():
    assert make(24, seed=1) == make(24, seed=1) != make(24, seed=2)


def test_every_pattern_is_drawn_equally_often(shipped):
    counts = {}
    for first, second in shipped:
        assert parse(first) == parse(second)
        counts[parse(first)] = counts.get(parse(first), 0) + 1
    assert sorted(counts.values()) == [500] * len(PATTERNS) == [500] * 12


def test_a_character_has_one_tone_and_a_word_one_part_of_speech():
    tones, words = {}, []
    for level, oblique in LEXICON.values():
        words += level.split() + oblique.split()
        for tone, side in (("level", level), ("oblique", oblique)):
            for word in side.split():
                tones.setdefault(word[-1], set()).add(tone)
    assert not {c for c, found in tones.items() if len(found) > 1}
    assert sorted(words) == sorted(set(words))
