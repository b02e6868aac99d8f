"""The scorers of our own models against references of a few lines: log-likelihoods, cutting, perplexity, reward."""
import math
import random
from dataclasses import replace

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from rlhfkit import evaluation, samples
from rlhfkit.evaluation import scorers
from rlhfkit.evaluation.scorers import TokenModel, loglikelihoods
from rlhfkit.models.pangu import PanguConfig, PanguForCausalLM
from rlhfkit.models.value import RewardModel
from rlhfkit.records import Answer, Record
from rlhfkit.tasks import TASKS
from rlhfkit.tokenizers.pangu import train_vocab

TEXTS = [f.read_text(encoding="utf-8") for f in sorted(samples.EVAL.rglob("*.*"))]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """An untrained Pangu model of 96 positions, its weights large so that scores differ, and its tokenizer."""
    tokenizer = train_vocab(TEXTS, tmp_path_factory.mktemp("vocab"), 2500)
    torch.manual_seed(0)
    config = PanguConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, num_layers=2, num_heads=4,
                         max_position_embeddings=96, initializer_range=0.3)
    return PanguForCausalLM(config).eval(), tokenizer


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
    for values in (shuffled, *(loglikelihoods(model, asked, tokens) for tokens in (1, 420, 8192))):
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


def test_long_items_lose_shots_from_the_end_before_their_context_is_cut(small):
    reader, shots = TokenModel(*small), ["问：春天去哪里？答：山里\n", "问：桥有多长？答：十二米\n", "问：" + "桥" * 80 + "？答：四年\n"]
    records = [Record("".join(shots[:n]) + "问：谁有姐姐？\n", prefix="答：") for n in (3, 2, 1, 0)]
    choices = ("小李", "小王")
    scores, prompts = reader.rank([records[0], records[1]], [choices] * 2, [records[1:], records[2:]])
    assert reader.cut == 1 and prompts == [records[1].prompt + "答："] * 2 and scores[0] == pytest.approx(scores[1], abs=1e-5)
    long = Record("文" * 200 + records[3].prompt, prefix="答：")
    _, (prompt,) = reader.rank([long], [choices], [[replace(long, prompt=long.prompt[1:])]])
    assert reader.cut == 2 and prompt.endswith("文问：谁有姐姐？\n答：") and 60 < len(small[1].encode_texts([prompt])[0]) < 96
    answers, prompts = reader.answer([records[0], records[3]], 4, shorter=[records[1:], []])
    assert reader.cut == 3 and len(answers) == 2 and prompts == [records[1].prompt + "答：", records[3].prompt + "答："]


def test_a_plan_of_part_of_the_requests_at_a_time_changes_no_score(small, monkeypatch):
    records = [Record(f"问：{text}？\n", prefix="答：") for text in ("谁有姐姐", "谁有弟弟", "桥有多长")]
    together = TokenModel(*small).rank(records, [("小李", "小王")] * 3)
    monkeypatch.setattr(scorers, "AT_ONCE", 1)
    apart = TokenModel(*small).rank(records, [("小李", "小王")] * 3)
    assert apart[1] == together[1] and sum(apart[0], []) == pytest.approx(sum(together[0], []), abs=1e-5)


def test_a_model_that_caps_its_logits_is_refused_since_its_head_alone_is_read(small):
    config = Gemma2Config(vocab_size=small[1].vocab_size, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                          num_attention_heads=2, num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.1)
    with pytest.raises(ValueError, match="logits of Gemma2ForCausalLM are not its head's"):
        TokenModel(Gemma2ForCausalLM(config), small[1])


def test_a_label_before_a_long_article_stays_and_the_article_loses_its_end(small):
    reader = TokenModel(*small)
    article = "的文章:" + "春天去山里看茶园" * 40
    _, ids, tails = reader._fit(Record("这是关于"), ("体育" + article, "故事" + article))
    heads = small[1].encode_texts(["体育", "故事"])
    assert len(ids) + max(map(len, tails)) == 96 and reader.cut == 1
    assert all(tail[:len(head)] == head for tail, head in zip(tails, heads))
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
    assert alone == pytest.approx(together[1][1], abs=1e-5)


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
