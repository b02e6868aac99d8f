"""What holds for each tokenizer of the 2023 families but Pangu's, and the layouts of ChatGLM 1 to 3 and of Baichuan.

ChatGLM's and Baichuan's own files are not at hand: they are shown on LLaMA 2's, which is of the format of ChatGLM2's, ChatGLM3's
and Baichuan's, and on vocabularies made in the same format. GLM and Qwen, whose files are, have test files of their own.
"""
import itertools
import json
import pickle

import pytest
import sentencepiece

from rlhfkit.tokenizers.baichuan import BaichuanTokenizer
from rlhfkit.tokenizers.chatglm import ChatGLM2Tokenizer, ChatGLM3Tokenizer, ChatGLMTokenizer
from rlhfkit.tokenizers.glm import GLMChineseTokenizer
from rlhfkit.tokenizers.qwen import QwenTokenizer

TEXTS = ["春天来了，河边的柳树发芽了。", "小明问：今天吃什么？\n妈妈说：吃面条。", "def f(x):\n\treturn  x ** 2    # 平方", "他说 hello 两次，It's 2023!",
         "philosophy sop eop [gMASK]", "我们明天去公园看花，然后回家做饭。"]
CLASSES = [GLMChineseTokenizer, ChatGLMTokenizer, ChatGLM2Tokenizer, ChatGLM3Tokenizer, BaichuanTokenizer, QwenTokenizer]
LLAMA_LIKE = [ChatGLM2Tokenizer, ChatGLM3Tokenizer, BaichuanTokenizer]
UNSEEN = ["", " ", "\n", "🎉 émigré 龘", "<n></s>[MASK]<|user|>", *TEXTS]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return {c: c.make_vocab(TEXTS, tmp_path_factory.mktemp(c.__name__), 430) for c in CLASSES}


@pytest.fixture(scope="module")
def llama(shared):
    return shared / "data/tokenizers/llama2/tokenizer.model"


@pytest.fixture(scope="module", params=CLASSES, ids=lambda c: c.__name__)
def tokenizer(request, made):
    return made[request.param]


def publish(tokenizer, folder, config=None):
    """A folder as published: the vocabulary file, and what is named in `config`."""
    folder.mkdir(exist_ok=True)
    tokenizer.save_vocabulary(folder)
    for name, content in (config or {}).items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


# what holds for each

def test_the_batch_method_gives_the_ids_of_encode(tokenizer):
    tokenizer(UNSEEN, padding=True, truncation=True, max_length=4)          # its settings stay in a fast backend
    assert tokenizer.encode_texts(UNSEEN) == [tokenizer.encode(text, add_special_tokens=False) for text in UNSEEN]
    assert tokenizer.encode_texts([]) == [] and tokenizer.encode_texts([""]) == [[]]


def test_ids_are_the_places_in_the_vocabulary(tokenizer):
    vocab = tokenizer.get_vocab()
    assert sorted(vocab.values()) == list(range(len(tokenizer)))
    assert {tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens} <= set(vocab.values())
    assert max(i for ids in tokenizer.encode_texts(UNSEEN) for i in ids) < len(tokenizer)


def test_a_saved_a_pickled_and_a_bare_folder_give_the_same_tokenizer(tokenizer, tmp_path):
    cls, vocab = type(tokenizer), tokenizer.vocab_files_names["vocab_file"]
    tokenizer.save_pretrained(tmp_path / "saved")
    bare = publish(tokenizer, tmp_path / "bare")
    expected = tokenizer(UNSEEN, padding=True), tokenizer(UNSEEN[3], "b"), tokenizer.all_special_tokens, len(tokenizer)
    for other in (cls.from_pretrained(tmp_path / "saved"), cls.from_pretrained(bare), pickle.loads(pickle.dumps(tokenizer))):
        assert (other(UNSEEN, padding=True), other(UNSEEN[3], "b"), other.all_special_tokens, len(other)) == expected
        for name in ("eos_token_id", "pad_token_id", "padding_side", "truncation_side"):
            assert getattr(other, name) == getattr(tokenizer, name)
    assert (tmp_path / "saved" / vocab).read_bytes() == (bare / vocab).read_bytes()


def test_an_added_token_is_whole_and_survives_saving(tokenizer, tmp_path):
    other = pickle.loads(pickle.dumps(tokenizer))
    other.add_tokens(["<user>"], special_tokens=True)
    other.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    for t in (other, again):
        ids = t.encode_texts(["<user>春天"])[0]
        assert ids == t.encode("<user>春天", add_special_tokens=False) and ids[0] == len(tokenizer) == len(t) - 1
        assert t.decode(ids, skip_special_tokens=True) == "春天"


def test_the_odd_fields_of_published_configs_change_nothing(tokenizer, tmp_path):
    flags = {"lstrip": False, "rstrip": False, "normalized": True, "single_word": False}
    odd = {"name_or_path": "THUDM/x", "tokenizer_class": "ChatGLMTokenizer",
           "auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}, "remove_space": False,
           "do_lower_case": False, "add_prefix_space": False, "use_fast": False, "sp_model_kwargs": {},
           "model_max_length": 10 ** 30, "bos_token": flags | {"__type": "AddedToken", "content": "<s>"}, "unk_token": "[UNK]",
           "gmask_token": "[gMASK]", "end_token": "</s>", "eop_token": "<eop>", "additional_special_tokens": ["<|nobody|>"],
           "added_tokens_decoder": {"0": flags | {"content": tokenizer.convert_ids_to_tokens(0), "special": True}}}
    if type(tokenizer) is QwenTokenizer:
        del odd["added_tokens_decoder"]                                     # it has no such token
    folder = publish(tokenizer, tmp_path / "odd", {"tokenizer_config.json": odd, "config.json": {"model_type": "x"},
                                                   "special_tokens_map.json": {"cls_token": "[CLS]", "eos_token": "</s>"}})
    other = type(tokenizer).from_pretrained(folder)
    assert (len(other), other.all_special_tokens) == (len(tokenizer), tokenizer.all_special_tokens)
    assert other(UNSEEN)["input_ids"] == tokenizer(UNSEEN)["input_ids"]
    other.save_pretrained(tmp_path / "saved")
    assert "auto_map" not in (tmp_path / "saved/tokenizer_config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_padded_on_the_side_asked_for(tokenizer, side):
    short, long = tokenizer("春")["input_ids"], tokenizer(TEXTS[0])["input_ids"]
    gap = len(long) - len(short)
    batch = tokenizer(["春", TEXTS[0]], padding=True, padding_side=side, return_tensors="pt")
    pads, ones = [tokenizer.pad_token_id] * gap, [1] * len(short)
    assert gap > 0 and batch["input_ids"].tolist() == [pads + short if side == "left" else short + pads, long]
    assert batch["attention_mask"][0].tolist() == ([0] * gap + ones if side == "left" else ones + [0] * gap)
    assert set(batch) == {"input_ids", "attention_mask"}


def test_the_mask_of_special_tokens_marks_what_was_put_around_the_texts(tokenizer):
    a, b = tokenizer.encode_texts([TEXTS[0], TEXTS[5]])
    for pair, texts in ((None, a), (TEXTS[5], a + b)):
        row = tokenizer(TEXTS[0], pair, return_special_tokens_mask=True)
        assert [i for i, special in zip(row["input_ids"], row["special_tokens_mask"]) if not special] == texts


def test_truncation_spares_the_special_tokens(tokenizer):
    for pair, strategy in ((None, True), ("花", "only_first")):
        around = len(tokenizer("", pair)["input_ids"])
        ids = tokenizer.encode_texts([TEXTS[0]])[0]
        row = tokenizer(TEXTS[0], pair, truncation=strategy, max_length=around + 3, return_special_tokens_mask=True)
        kept = [i for i, special in zip(row["input_ids"], row["special_tokens_mask"]) if not special][:3]
        assert kept == (ids[-3:] if tokenizer.truncation_side == "left" else ids[:3]) and len(row["input_ids"]) == around + 3


def test_ids_beyond_the_vocabulary_decode_without_error(tokenizer):
    assert "春" in tokenizer.decode([*tokenizer.encode_texts(["春"])[0], len(tokenizer) + 50])


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_a_vocabulary_is_made_to_equal_bytes_and_never_too_large(cls, made, tmp_path):
    again, name = cls.make_vocab(TEXTS, tmp_path / "again", 430), cls.vocab_files_names["vocab_file"]
    assert [path.name for path in (tmp_path / "again").iterdir()] == [name]
    assert publish(made[cls], tmp_path / "first").joinpath(name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    large = cls.make_vocab(TEXTS, tmp_path / "large", 100_000)              # more than these texts can fill
    assert len(again) <= len(large) < 100_000
    with pytest.raises(ValueError, match="vocab_size is 20; "):
        cls.make_vocab(TEXTS, tmp_path, 20)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_a_missing_or_damaged_vocabulary_names_file_rule_and_way_out(cls, made, tmp_path):
    folder, name = publish(made[cls], tmp_path / "folder"), cls.vocab_files_names["vocab_file"]
    whole = (folder / name).read_bytes()
    for damaged in (b"", whole[:len(whole) // 3], whole[:-1], b"<html>not here</html>", *(whole[:-cut] for cut in range(30, 60))):
        if damaged.endswith(b"\n") and cls is QwenTokenizer:
            continue                                                        # a text file cut between two lines shows nothing
        (folder / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{name}.*copy (it|the file) again"):
            cls.from_pretrained(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"folder/{name} is no file; .*copy it beside config.json"):
        cls.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match=f"{name} is no file"):
        cls(folder / name)


# ChatGLM-6B

def test_chatglms_layouts(made):
    t = made[ChatGLMTokenizer]
    a, b = t.encode_texts(["春天", "柳树"])
    mask, gmask, sop, eop, end = t.convert_tokens_to_ids(["[MASK]", "[gMASK]", "<sop>", "<eop>", "</s>"])
    assert t("春天")["input_ids"] == [*a, gmask, sop] and t("春天", "柳树")["input_ids"] == [*a, gmask, sop, *b, eop]
    assert t("")["input_ids"] == [gmask, sop]
    assert t("春天[MASK]", "柳树")["input_ids"] == [*a, mask, sop, *b, eop]
    assert t("[MASK]春天")["input_ids"] == [mask, *a, end, sop]
    assert (t.eos_token_id, t.bos_token_id, t.pad_token_id, t.unk_token_id, end) == (eop, sop, 20003, 20000, 20002)


def test_chatglms_special_ids_follow_the_pieces_of_the_file(made, tmp_path):
    t = made[ChatGLMTokenizer]
    bare = len(sentencepiece.SentencePieceProcessor(model_proto=publish(t, tmp_path).joinpath("ice_text.model").read_bytes()))
    names = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>", "<|tab|>", "<|blank_2|>"]
    start = 20000 + bare                                                    # with the published 130,000 pieces: 150000
    assert t.convert_tokens_to_ids(names) == list(range(start, start + 10))
    assert t.convert_tokens_to_ids(["<|blank_80|>", "<0x00>", "<0xFF>"]) == [start + 87, start + 88, start + 343]
    assert len(t) == start + 8 + 80 + 256 and t.num_image_tokens == 20000


@pytest.mark.parametrize("images", [20000, 0])
def test_chatglms_image_tokens_follow_from_config_or_tokenizer_config(made, tmp_path, images):
    t = made[ChatGLMTokenizer]
    sop = t.sp.piece_to_id("<sop>")
    facts = ("config.json", {"bos_token_id": sop + images}), ("tokenizer_config.json", {"num_image_tokens": images})
    for number, (file, content) in enumerate(facts):
        other = ChatGLMTokenizer.from_pretrained(publish(t, tmp_path / f"{number}", {file: content}))
        assert (other.bos_token_id, other.pad_token_id, other.unk_token_id) == (sop + images, images + 3, images)
        other.save_pretrained(tmp_path / f"saved{number}")
        again = ChatGLMTokenizer.from_pretrained(tmp_path / f"saved{number}")
        assert again(TEXTS) == other(TEXTS) and again.num_image_tokens == images and len(again) == len(t) - 20000 + images
        assert again.encode_texts(TEXTS) == [[i - 20000 + images for i in ids] for ids in t.encode_texts(TEXTS)]
    with pytest.raises(ValueError, match="config.json has bos_token_id 3, but <sop> is piece .*copy the folder again"):
        ChatGLMTokenizer.from_pretrained(publish(t, tmp_path / "odd", {"config.json": {"bos_token_id": 3}}))


def test_a_chatglm_file_with_and_without_the_appended_pieces_is_the_same(made, tmp_path):
    t = made[ChatGLMTokenizer]
    (tmp_path / "ice_text.model").write_bytes(t.sp.serialized_model_proto())
    complete = ChatGLMTokenizer(tmp_path / "ice_text.model")
    assert complete(UNSEEN) == t(UNSEEN) and complete.get_vocab() == t.get_vocab()


def test_chatglm_keeps_newlines_tabs_and_runs_of_spaces(made):
    t = made[ChatGLMTokenizer]
    tokens = t.tokenize("花\n\t花" + " " * 83)
    assert [token for token in tokens if token.startswith("<")] == ["<n>", "<|tab|>", "<|blank_80|>", "<|blank_3|>"]
    for text in (*TEXTS, "  a\n\n\n b", "🎉 龘", "花" + " " * 200 + "花"):
        assert t.decode(t.encode_texts([text])[0]) == text
    assert t.decode([5, 19999, *t.encode_texts(["花"])[0]]) == "花"          # image tokens have no text


def test_a_text_spells_only_those_special_tokens_of_chatglm_that_it_could_in_2023(made):
    t = made[ChatGLMTokenizer]
    special = set(t.convert_tokens_to_ids(["[MASK]", "<sop>", "<eop>", "<pad>", "[gMASK]", "[sMASK]", "</s>"]))
    spelt = [set(ids) & special for ids in t.encode_texts(["春[MASK]", "<sop>", "<eop>", "<pad>", "[gMASK]", "[sMASK]", "</s>"])]
    assert [len(ids) for ids in spelt] == [1, 1, 1, 1, 0, 0, 0]


# ChatGLM2, ChatGLM3 and Baichuan, on LLaMA 2's file, which is of the same format

@pytest.mark.parametrize("cls", LLAMA_LIKE, ids=lambda c: c.__name__)
def test_text_has_sentencepieces_ids_and_comes_back(cls, llama, shared):
    t, sp = cls(llama), sentencepiece.SentencePieceProcessor(model_file=str(llama))
    with (shared / "data/corpus/clue_corpus_small_sampled.txt").open(encoding="utf-8") as file:
        lines = [line.rstrip("\n") for line in itertools.islice(file, 500)]
    texts = [*lines, *TEXTS, "  a\n\n b", "🎉 龘", ""]
    assert t.encode_texts(texts) == sp.encode(texts)
    assert [t.decode(ids) for ids in t.encode_texts(texts)] == texts


def test_chatglm2s_and_3s_layouts_and_commands(llama):
    two, three = ChatGLM2Tokenizer(llama), ChatGLM3Tokenizer(llama)
    a, b = two.encode_texts(["春天", "柳树"])
    assert two("春天")["input_ids"] == three("春天")["input_ids"] == [32001, 32003, *a]
    assert two("春天", "柳树")["input_ids"] == [32001, 32003, *a, *b, 32004]
    assert three("春天", "柳树")["input_ids"] == [32001, 32003, *a, *b, 2]
    names = ["<pad>", "<bos>", "<eos>", "[MASK]", "[gMASK]", "[sMASK]", "sop", "eop",
             "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
    assert [three.get_command(name) for name in names] == [0, 1, 2, *range(32000, 32009)]
    assert [two.get_command(name) for name in names[:8]] == [0, 1, 2, *range(32000, 32005)]
    with pytest.raises(ValueError, match="'<|user|>' is no special token of ChatGLM2Tokenizer; known: <bos>"):
        two.get_command("<|user|>")
    assert (two.pad_token_id, two.eos_token_id, two.gmask_token_id, two.eop_token_id) == (0, 2, 32001, 32004)
    assert (two.padding_side, three.padding_side) == ("right", "left")
    assert two.decode(two("春天", "柳树")["input_ids"], skip_special_tokens=True) == "春天 柳树"


def test_no_text_spells_a_special_token_of_chatglm2_or_3(llama):
    for t in (ChatGLM2Tokenizer(llama), ChatGLM3Tokenizer(llama)):
        text = "philosophy sop eop [MASK][gMASK]<|user|></s><s><unk>"
        assert max(t.encode_texts([text])[0]) < 32000 and not {0, 1, 2} & set(t.encode_texts([text])[0])
        assert t.decode(t.encode_texts([text])[0]) == text


def test_a_piece_with_the_name_of_a_special_token_stays_a_piece(made, tmp_path):
    for cls in (ChatGLM2Tokenizer, ChatGLM3Tokenizer):                      # the original gave it the special token's id
        t = cls.make_vocab(["sop eop"] * 40 + ["sopeop"], tmp_path, 300)
        assert "<piece sop>" in t.get_vocab() or "<piece eop>" in t.get_vocab()
        assert t.encode("sop eop sopeop", add_special_tokens=False) == t.encode_texts(["sop eop sopeop"])[0]
        assert max(t.encode_texts(["sop eop sopeop"])[0]) < t.get_command("[MASK]") < t.convert_tokens_to_ids("sop")
        assert t.decode(t.encode_texts(["sop eop sopeop"])[0]) == "sop eop sopeop"


def test_baichuans_layouts_specials_and_pads(llama, tmp_path):
    t = BaichuanTokenizer(llama)
    a, b = t.encode_texts(["春天", "柳树"])
    assert t("春天")["input_ids"] == [1, *a] and t("春天", "柳树")["input_ids"] == [1, *a, 1, *b]
    assert (t.bos_token_id, t.eos_token_id, t.pad_token_id, t.unk_token_id) == (1, 2, 2, 0)
    assert t.encode_texts(["春天</s>"]) == [[*a, 2]]
    flags = {"__type": "AddedToken", "lstrip": False, "rstrip": False, "normalized": True, "single_word": True}
    published = {"add_bos_token": False, "pad_token": flags | {"content": "<unk>"}, "eos_token": flags | {"content": "</s>"}}
    other = BaichuanTokenizer.from_pretrained(publish(t, tmp_path / "a", {"tokenizer_config.json": published}))
    other.save_pretrained(tmp_path / "b")
    for t in (other, BaichuanTokenizer.from_pretrained(tmp_path / "b")):
        assert t("春天", "柳树")["input_ids"] == [*a, *b] and t.pad_token_id == 0
        assert 2 not in t.encode_texts(["春天</s>"])[0] and 2 in t.encode_texts(["春天 </s>"])[0]       # single_word
