"""Pangu's tokenizer against the ids of the 2023 original, and its behaviour as a transformers tokenizer."""
import json
import pickle
import subprocess
import sys

import jieba
import pytest

from rlhfkit.tokenizers.pangu import PanguTokenizer, patch_jieba, train_vocab, unpatch_jieba

TEXTS = ["春天来了，河边的柳树发芽了。", "小明问：今天吃什么？\n妈妈说：吃面条。", "上联：明月照窗前<sep>下联：清风拂柳岸",
         "我们明天去公园看花，然后回家做饭。", "他说 hello 两次，x<y 也成立。", "老师在黑板上写字，学生在下面抄写。",
         "网页里写着</b>这样的标记。", "秋天的田野里，稻子黄了，农民很高兴。", "这本书讲的是一个孩子和一只猫的故事。"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_vocab(TEXTS * 4, tmp_path_factory.mktemp("vocab"), 400)


@pytest.fixture(scope="module")
def real(shared):
    return PanguTokenizer(shared / "data/tokenizers/pangu-alpha/vocab.model")


@pytest.fixture(scope="module")
def cases(shared):
    return [json.loads(line) for line in (shared / "fixtures/tokenizers/pangu_alpha.jsonl").open(encoding="utf-8")]


def test_every_id_of_the_2023_tokenizer_is_reproduced(real, cases):
    assert len(cases) == 523
    for case in cases:
        if "pair" in case:
            assert real(case["text"], case["pair"])["input_ids"] == case["ids"], case["text"]
        else:
            assert real.encode(case["text"], add_special_tokens=False) == case["ids"], case["text"]


def test_every_decoded_text_of_the_2023_tokenizer_is_reproduced(real, cases):
    for case in cases:
        if "decoded" in case:
            assert real.decode(case["ids"]) == case["decoded"]


def test_the_batch_method_gives_the_ids_of_encode(real, cases, tokenizer):
    texts = [case["text"] for case in cases]
    assert real.encode_texts(texts) == [real.encode(text, add_special_tokens=False) for text in texts]
    one_by_one = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    assert tokenizer.encode_texts(["", *TEXTS]) == [[], *one_by_one]
    assert tokenizer.encode_texts([]) == []


def test_the_published_special_tokens_have_the_published_ids(real, tokenizer):
    for t in (real, tokenizer):
        assert (t.unk_token_id, t.bos_token_id, t.sep_token_id, t.pad_token_id, t.eos_token_id) == (0, 1, 5, 6, 9)
        assert [t.convert_tokens_to_ids(token) for token in ("</s>", "▃", "▂", "<mask>", "<eod>")] == [2, 3, 4, 7, 8]
        assert len(t) == t.vocab_size == len(t.get_vocab()) == len(t.sp)
    assert real.vocab_size == 40000


def test_special_tokens_stay_whole_and_other_angle_brackets_do_not_matter(tokenizer):
    words = tokenizer.tokenize("柳树<sep>x<y</s>")
    assert "<sep>" in words and "</s>" not in words
    assert tokenizer.decode(tokenizer.encode_texts(["柳树<sep>x<y"])[0]) == "柳树<sep>x<y"


def test_spaces_and_newlines_survive_a_round_trip(tokenizer):
    text = "他说 hello  两次\n\n妈妈说"
    assert tokenizer.decode(tokenizer.encode_texts([text])[0]) == text


def test_one_text_and_a_pair_have_the_published_layouts(tokenizer):
    a, b = tokenizer.encode_texts(["春天来了", "柳树发芽"])
    assert tokenizer("春天来了")["input_ids"] == [1, *a, 9]
    assert tokenizer("春天来了", "柳树发芽")["input_ids"] == [1, *a, 5, *b, 9]
    mask = tokenizer("春天来了", "柳树发芽", return_special_tokens_mask=True)["special_tokens_mask"]
    assert mask == [1, *[0] * len(a), 1, *[0] * len(b), 1]
    assert set(tokenizer("春天来了")) == {"input_ids", "attention_mask"}
    assert tokenizer.decode([1, *a, 5, *b, 9], skip_special_tokens=True) == "春天来了柳树发芽"


def test_truncation_keeps_the_special_tokens(tokenizer):
    a, b = tokenizer.encode_texts([TEXTS[0], TEXTS[3]])
    assert tokenizer(TEXTS[0], truncation=True, max_length=5)["input_ids"] == [1, *a[:3], 9]
    first = tokenizer(TEXTS[0], TEXTS[3], truncation="only_first", max_length=len(b) + 5)["input_ids"]
    assert first == [1, *a[:2], 5, *b, 9]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_padded_on_the_side_asked_for(tokenizer, side):
    short, long = tokenizer("春天")["input_ids"], tokenizer(TEXTS[3])["input_ids"]
    gap = len(long) - len(short)
    batch = tokenizer(["春天", TEXTS[3]], padding=True, padding_side=side, return_tensors="pt")
    pads, zeros = [6] * gap, [0] * gap
    assert batch["input_ids"].tolist() == [pads + short if side == "left" else short + pads, long]
    ones = [1] * len(short)
    assert batch["attention_mask"][0].tolist() == (zeros + ones if side == "left" else ones + zeros)


def test_saved_loaded_and_pickled_tokenizers_are_equal(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    expected = tokenizer.encode_texts(TEXTS)
    for other in (PanguTokenizer.from_pretrained(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert other.encode_texts(TEXTS) == expected
        assert other(TEXTS, padding=True) == tokenizer(TEXTS, padding=True)
        assert (other.eos_token, len(other)) == (tokenizer.eos_token, len(tokenizer))
    assert (tmp_path / "vocab.model").read_bytes() == tokenizer.sp.serialized_model_proto()


def test_an_added_token_is_kept_whole_by_both_ways_of_encoding(tokenizer):
    other = pickle.loads(pickle.dumps(tokenizer))
    other.add_tokens(["<user>"], special_tokens=True)
    ids = other.encode_texts(["<user>春天"])[0]
    assert ids == other.encode("<user>春天", add_special_tokens=False) and ids[0] == len(other) - 1
    assert other.decode(ids) == "<user>春天"


def test_ids_beyond_the_vocabulary_decode_to_unknown(real):
    assert real.decode([5772, 40063]) == real.decode([5772, 0])       # Pangu-13B has 40064 rows


def test_a_vocabulary_is_trained_to_equal_bytes(tokenizer, tmp_path):
    again = train_vocab(TEXTS * 4, tmp_path / "again", 400)
    assert (tmp_path / "again/vocab.model").read_bytes() == tokenizer.sp.serialized_model_proto()
    assert again.vocab_size <= 400
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["vocab.model"]


def test_a_vocabulary_too_small_for_the_characters_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vocab_size is 20; .*distinct characters"):
        train_vocab(TEXTS, tmp_path, 20)


def test_the_jieba_patch_keeps_tokens_whole_and_can_be_undone():
    text = "你好啊<sep>答：x<y</s>天<pad>"
    plain, count, total = jieba.lcut(text), len(jieba.dt.FREQ), jieba.dt.total
    patch_jieba()
    patch_jieba()
    try:
        assert jieba.lcut(text) == ["你好", "啊", "<sep>", "答", "：", "x", "<", "y", "</s>", "天", "<pad>"]
    finally:
        unpatch_jieba()
        unpatch_jieba()
    assert jieba.lcut(text) == plain and "<sep>" not in plain
    assert (len(jieba.dt.FREQ), jieba.dt.total) == (count, total)


def test_patches_and_user_words_in_jieba_do_not_move_an_id(tokenizer):
    texts = ["</s>结束，春天来了", *TEXTS]
    expected = tokenizer.encode_texts(texts)
    patch_jieba()
    jieba.add_word("春天来了", 10 ** 6)
    try:
        assert tokenizer.encode_texts(texts) == expected
    finally:
        jieba.dt.FREQ.pop("春天来了")
        jieba.dt.total -= 10 ** 6
        unpatch_jieba()


def test_jieba_writes_nothing_to_stderr():
    code = "from rlhfkit.tokenizers import pangu; pangu.join_words(['今天天气好']); pangu.patch_jieba()"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
