"""GLM's tokenizer against the ids and generation inputs of the 2023 original, on its published file."""
import json

import pytest

from rlhfkit.tokenizers.glm import GLMChineseTokenizer

SENTENCE = "春天来了，河边的柳树发芽了。"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return GLMChineseTokenizer.make_vocab([SENTENCE, "今天的花"], tmp_path_factory.mktemp("glm"), 40)


@pytest.fixture(scope="module")
def glm(shared):
    return GLMChineseTokenizer(shared / "data/tokenizers/glm-chinese/cog-pretrain.model")



def test_every_id_of_glms_2023_tokenizer_is_reproduced(glm, shared):
    cases = [json.loads(line) for line in (shared / "fixtures/tokenizers/glm_chinese.jsonl").open(encoding="utf-8")]
    assert len(cases) == 508 and sum("pair" in case for case in cases) == 60
    for case in cases:
        assert glm(case["text"], case.get("pair"))["input_ids"] == case["ids"], case["text"]


def test_glms_generation_inputs_are_the_originals(glm, shared):
    case = json.loads((shared / "fixtures/tokenizers/glm_chinese_generation_inputs.json").read_text(encoding="utf-8"))
    encoding = glm(case["sources"], padding=True, return_tensors="pt")
    built = glm.build_inputs_for_generation(encoding, case["max_gen_length"], targets=case["targets"])
    assert {name: built[name].tolist() for name in built} == {name: case[name] for name in built} and len(built) == 4
    bare = glm.build_inputs_for_generation(encoding, 3)
    S = encoding["input_ids"].shape[1]
    assert bare["input_ids"].tolist() == [row[:S] + [50006] for row in case["input_ids"]]
    assert bare["position_ids"].tolist() == [[row[:S + 3] for row in rows] for rows in case["position_ids"]]
    masks = [[[row[:S + 3] for row in rows[:S + 3]] for rows in one] for one in case["attention_mask"]]
    assert bare["generation_attention_mask"].tolist() == masks


def test_glms_answers_have_the_length_asked_for_and_keep_their_end(made):
    tokenizer = made
    encoding = tokenizer(["今天[MASK]", "[sMASK]花[gMASK]"], padding=True, return_tensors="pt")
    S, (answer,) = encoding["input_ids"].shape[1], tokenizer.encode_texts([SENTENCE])
    pad, eop = tokenizer.pad_token_id, tokenizer.eop_token_id
    built = tokenizer.build_inputs_for_generation(encoding, 4, targets=[SENTENCE, ""], padding=True)
    assert built["labels"].tolist() == [[pad] * S + answer[:3] + [eop], [pad] * S + [eop] + [pad] * 3]
    assert built["input_ids"][:, S:].tolist() == [[tokenizer.sop_token_id] + answer[:3], [tokenizer.sop_token_id, eop, pad, pad]]
    assert built["position_ids"][1].tolist() == [[*range(S), 1, 1, 1, 1], [0] * S + [1, 2, 3, 4]]      # [sMASK] comes first, at 1
    assert built["attention_mask"].shape == (2, 1, S + 4, S + 4)
    with pytest.raises(ValueError, match="row 1 has no .*append one"):
        tokenizer.build_inputs_for_generation(tokenizer(["[MASK]春", "春天"], padding=True, return_tensors="pt"), 4)
    with pytest.raises(ValueError, match="1 targets of at most 4 tokens for 2 sources"):
        tokenizer.build_inputs_for_generation(encoding, 4, targets="花")


def test_glms_special_tokens_have_the_published_ids(glm):
    names = ["<|endoftext|>", "[SEP]", "[CLS]", "[MASK]", "[UNUSED1]", "[UNUSED2]", "<|startofpiece|>", "<|endofpiece|>",
             "[sMASK]", "[gMASK]"]
    assert glm.convert_tokens_to_ids(names) == list(range(50000, 50010)) and len(glm) == 50010
    ids = {"cls": 50002, "sep": 50001, "mask": 50003, "smask": 50008, "gmask": 50009, "sop": 50006, "eop": 50007, "eos": 50000,
           "pad": 50000, "unk": 0}
    assert {name: getattr(glm, f"{name}_token_id") for name in ids} == ids
    assert glm.encode_texts(["[UNK][UNUSED1]"]) == [[0, 50004]] and 0 not in glm.encode_texts(["<s>"])[0]


def test_what_glms_vocabulary_loses_of_a_text(glm):
    for text, back in (("他说：“你好！”（笑）", "他说:“你好!”(笑)"), ("一\n二  三", "一 二 三"), ("一<n>二", "一<n>二"), ("春𠮷", "春 ⁇ ")):
        assert glm.decode(glm.encode_texts([text])[0]) == back
