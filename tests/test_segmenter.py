"""The batch segmenter against jieba itself: every word of every text is the same, with numba and without."""
import json
import random
import subprocess
import sys

import jieba
import pytest
from conftest import PROJECT

from rlhfkit.sources import build
from rlhfkit.tokenizers import segmenter, spread
from rlhfkit.tokenizers.pangu import train_vocab

NAMED = {"他来到了网易杭研大厦": "他 来到 了 网易 杭研 大厦",        # 杭研 is in no dictionary: the model finds it
         "a  b\nc": "a ▂ ▂ b ▃ c", "": "", " ": "▂",
         "3.14%的x-y_z.5+6.": "3.14% 的 x - y _ z.5 + 6 .", "1.5.3": "1.5 . 3", "v2.0-rc": "v2.0 - rc", "50%%&": "50% %&",
         "常在沈阆": "常 在 沈 阆",                                          # the two best cuts differ by 1.5e-7
         "\0天\0": "\0 天 \0", "一\r\n二": "一 \r ▃ 二", "\ud800鬱": "\ud800 鬱"}


@pytest.fixture(scope="module")
def reference():
    """Text -> what jieba gives; a dictionary of its own, so that no other test's words are in it."""
    dictionary = jieba.Tokenizer()
    return lambda text: " ".join(dictionary.cut(text.translate(str.maketrans(" \n", "▂▃"))))


def fuzz(count, seed=0):
    """Lines of up to 30 pieces of one to four kinds: words, han, ASCII, numbers, whitespace, emoji, rare planes."""
    chance = random.Random(seed)
    words = [word for word, times in segmenter._dictionary().FREQ.items() if times]
    common, odd = chance.sample(words, 3000), ["\r\n", *"\r\n \t\x1c\x85\u3000\u200b\0é١Ａ・😀", "👨\u200d👩\u200d👧"]
    planes = [(0x3400, 0x4DBF), (0x9FD6, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2FFFF), (0x30000, 0x10FFFF)]
    kinds = [lambda: chance.choice(common), lambda: chance.choice(words), lambda: chance.choice(common)[:1],
             lambda: chr(chance.randint(0x4E00, 0x9FD5)), lambda: chr(chance.randrange(128)), lambda: chance.choice("abXYz的一了，"),
             lambda: chance.choice("+#&._%-") * chance.randint(1, 3), lambda: str(chance.randrange(3000)),
             lambda: f"{chance.random():.2f}%", lambda: chance.choice(odd), lambda: chr(chance.randint(*chance.choice(planes)))]
    for _ in range(count):
        some = chance.sample(kinds, chance.randint(1, 4))
        yield "".join(chance.choice(some)() for _ in range(chance.randint(0, 30)))


def test_words_of_known_texts():
    assert segmenter.numba
    assert segmenter.join_words(list(NAMED)) == list(NAMED.values())
    assert [segmenter.join_words([text]) for text in NAMED] == [[words] for words in NAMED.values()]
    assert segmenter.join_words([]) == [] and segmenter.join_words([""]) == [""]


def test_known_texts_are_cut_as_jieba_does(reference):
    assert [reference(text) for text in NAMED] == list(NAMED.values())


def test_words_of_the_samples_are_those_of_jieba(reference):
    texts = [text for record in build() for text in (record.prompt, *(answer.text for answer in record.answers))][::10]
    assert len(texts) > 500
    assert segmenter.join_words(texts) == [reference(text) for text in texts]


def test_words_of_random_texts_are_those_of_jieba(reference):
    texts = list(fuzz(2000))
    assert segmenter.join_words(texts) == [reference(text) for text in texts]


def test_words_of_the_fixture_texts_are_those_of_jieba(reference, shared):
    cases = [json.loads(line) for line in (shared / "fixtures/tokenizers/pangu_alpha.jsonl").open(encoding="utf-8")]
    texts = [case[key] for case in cases for key in ("text", "pair") if key in case]
    assert segmenter.join_words(texts) == [reference(text) for text in texts]


def run(code, *arguments):
    ran = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=PROJECT, input="")
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


USER_WORDS = """
import jieba, json, sys
from rlhfkit.tokenizers import pangu, segmenter
jieba.add_word("天今天气", 10 ** 8); pangu.patch_jieba()
print(json.dumps(segmenter.join_words(["今天今天气好<sep>"])), segmenter.numba is None)
"""


@pytest.mark.parametrize("without_numba", [False, True])
def test_user_words_and_patches_in_jieba_change_nothing(without_numba, reference):
    printed = run("import sys; sys.modules.update(numba=None)" * without_numba + USER_WORDS)
    assert printed == f"{json.dumps([reference('今天今天气好<sep>')])} {without_numba}\n"


def test_without_numba_the_words_are_the_same(tmp_path):
    texts = [*list(NAMED), *fuzz(200, seed=1)]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    code = """if True:
        import json, pathlib, sys
        sys.modules["numba"] = None
        from rlhfkit.tokenizers import segmenter
        assert segmenter.numba is None
        print(json.dumps(segmenter.join_words(json.loads(pathlib.Path(sys.argv[1]).read_text()))))
        """
    assert json.loads(run(code, str(tmp_path / "texts.json"))) == segmenter.join_words(texts)


def test_where_no_compiled_code_can_be_stored_it_is_compiled_anew():
    code = """if True:
        import pathlib, sys
        from rlhfkit.tokenizers import segmenter
        assert segmenter._slot.stats.cache_path
        source = pathlib.Path(segmenter.__file__).read_text(encoding="utf-8")
        exec(compile(source, "/dev/null/segmenter.py", "exec"))     # numba finds no folder for a file that is not there
        assert _slot.stats.cache_path is None
        print(join_words(["他来到了网易杭研大厦"]) == ["他 来到 了 网易 杭研 大厦"])
        """
    assert run(code) == "True\n"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A tokenizer and texts that make several batches."""
    texts = [f"第{i}天<sep>春天来了" for i in range(12_000)] + ["", "<sep>", "柳树\n发芽 \0"]
    return train_vocab(texts[:300] + texts[-3:], tmp_path_factory.mktemp("vocab"), 400), texts


def test_processes_give_the_same_ids_in_the_same_order(small):
    tokenizer, texts = small
    assert tokenizer.encode_texts(texts, num_proc=2) == tokenizer.encode_texts(texts)
    assert tokenizer.encode_texts(texts[-3:], num_proc=8) == tokenizer.encode_texts(texts[-3:])


def test_a_script_without_a_main_guard_may_use_processes(small, tmp_path):
    tokenizer, _ = small
    script = tmp_path / "script.py"
    script.write_text(f"""from rlhfkit.tokenizers.pangu import PanguTokenizer
tokenizer = PanguTokenizer({tokenizer.vocab_file!r})
print(len(tokenizer.encode_texts(["春天", "柳树"] * 6000, num_proc=2)))
""")
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=PROJECT)
    assert (ran.stdout, ran.stderr) == ("12000\n", "")


def test_an_error_in_a_process_is_raised_here(small):
    tokenizer, texts = small
    bad = [*texts, "\ud800"]                                        # half a character: sentencepiece takes only UTF-8
    for num_proc in (1, 2):
        with pytest.raises(TypeError):
            tokenizer.encode_texts(bad, num_proc=num_proc)
    with pytest.raises(ValueError, match="num_proc is 0; .*give 1 or more"):
        tokenizer.encode_texts(texts, num_proc=0)


def test_batches_end_at_ten_thousand_texts_or_a_million_characters():
    assert [len(batch) for batch in spread.batches(["天"] * 25_000)] == [10_000, 10_000, 5_000]
    assert [len(batch) for batch in spread.batches(["天" * 600_000] * 5)] == [2, 2, 1]
    assert list(spread.batches([])) == []
