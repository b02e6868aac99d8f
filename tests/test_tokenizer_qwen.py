"""Qwen-1's tokenizer against the tiktoken package, on its published file, and in plain transformers."""
import base64
import itertools
import lzma
import unicodedata
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from rlhfkit.tokenizers.qwen import SPECIAL_TOKENS, SPLIT, QwenTokenizer

TEXTS = ["春天来了，河边的柳树发芽了。", "def f(x):\n\treturn  x ** 2    # 平方", "他说 hello 两次，It's 2023!", "", " \n\t", "🎉 émigré 龘"]
CODE = Path(__file__).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return QwenTokenizer.make_vocab(TEXTS, tmp_path_factory.mktemp("qwen"), 300)


@pytest.fixture(scope="module")
def qwen(shared):
    return QwenTokenizer(shared / "data/tokenizers/qwen/qwen.tiktoken")


@pytest.fixture(scope="module")
def lines(shared):
    texts = []
    for name in ("modern_translations", "classical_originals", "poetry"):
        with lzma.open(shared / f"data/corpus/{name}.txt.xz", "rt", encoding="utf-8") as file:
            texts += itertools.islice(file, 400)
    return texts



def test_qwens_special_tokens_have_the_published_ids(qwen):
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>", "<|extra_204|>"]
    assert qwen.convert_tokens_to_ids(names) == [151643, 151644, 151645, 151646, 151850] and len(qwen) == 151851
    assert (qwen.eos_token_id, qwen.pad_token_id, qwen.im_start_token_id, qwen.bos_token_id) == (151645, 151643, 151644, None)
    assert qwen("你好", "你好")["input_ids"] == 2 * qwen.encode_texts(["你好"])[0]


def test_qwens_ids_are_tiktokens(qwen, shared, lines):
    tiktoken = pytest.importorskip("tiktoken", reason="the tiktoken package, the reference, is not installed")
    file = (shared / "data/tokenizers/qwen/qwen.tiktoken").read_bytes()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, file.splitlines())}
    specials = {token: 151643 + i for i, token in enumerate(SPECIAL_TOKENS)}
    reference = tiktoken.Encoding("qwen", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=specials)
    texts = [*TEXTS, *lines, CODE, "👨‍👩‍👧‍👦 e\u0301migre\u0301 ＡＢＣ\u3000全角", "'S 'LL I'm", " " * 90 + "x", "a" * 50, "\t\r\n \n",
             "<|im_start|>user\n你好<|im_end|>\n<|extra_9|>", "\u0085\u180e\u200b\ufeff"]
    texts += map("".join, itertools.product(["a", " ", "\n", "'s", "1", "你", "."], repeat=4))
    normal = [unicodedata.normalize("NFC", text) for text in texts]
    expected = [reference.encode(text, allowed_special="all") for text in normal]
    assert qwen.encode_texts(texts) == expected
    assert [qwen.decode(ids) for ids in expected] == normal


def test_a_saved_folder_loads_in_plain_transformers_with_equal_ids(qwen, shared, lines, tmp_path):
    qwen.save_pretrained(tmp_path)
    assert (tmp_path / "qwen.tiktoken").read_bytes() == (shared / "data/tokenizers/qwen/qwen.tiktoken").read_bytes()
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}', encoding="utf-8")
    plain, texts = AutoTokenizer.from_pretrained(tmp_path), [*TEXTS, *lines, CODE, "<|im_start|>你好<|im_end|>"]
    assert plain(texts)["input_ids"] == qwen.encode_texts(texts)
    assert (plain.eos_token_id, plain.pad_token_id, len(plain)) == (151645, 151643, 151851)


def test_a_saved_folder_without_a_config_loads_in_plain_transformers(made, tmp_path):
    made.save_pretrained(tmp_path)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    assert plain(TEXTS)["input_ids"] == made.encode_texts(TEXTS) and plain.all_special_tokens == made.all_special_tokens


def test_specials_stay_whole_and_are_skipped_in_decoding(made):
    ids = made.encode_texts(["<|im_start|>春天<|im_end|>\n<|extra_7|>"])[0]
    assert ids[0] == made.im_start_token_id and made.eos_token_id in ids and len(made) == made.vocab_size + 208
    assert made.decode(ids, skip_special_tokens=True) == "春天\n"


def test_text_comes_back_composed_and_otherwise_as_it_was(made):
    assert [made.decode(ids) for ids in made.encode_texts(TEXTS)] == TEXTS
    assert made.decode(made.encode_texts(["e\u0301"])[0]) == "é"
