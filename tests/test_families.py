"""How a family writes a record as ids, which folder is which, and what is said of folders that are damaged."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import rlhfkit as rk
from rlhfkit.families import NATIVE, empty_model
from rlhfkit.models.value import RewardModel

PLAIN = rk.Record("上联：晚风吹桥", (rk.Answer("明月照寺", 1),), prefix="下联：")
TEMPLATE = ("{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}")


@pytest.fixture(scope="module")
def native_path(tmp_path_factory):
    """A tiny Llama; its tokenizer has a token a byte, adds its own beginning, and its chat template writes it too."""
    folder = tmp_path_factory.mktemp("native")
    letters = pre_tokenizers.ByteLevel.alphabet()
    vocab = {token: i for i, token in enumerate(["<pad>", "<bos>", "<end>", *sorted(letters)])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>", eos_token="<end>", pad_token="<pad>",
                                        chat_template=TEMPLATE)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(vocab), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                 intermediate_size=32,
                                 max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
                                 pad_token_id=0)).save_pretrained(folder)
    return folder


@pytest.fixture(params=["pangu", "native"])
def family_and_tokenizer(request, tiny_path, native_path):
    path = tiny_path if request.param == "pangu" else native_path
    return rk.family_of(path), rk.load_tokenizer(path)


@pytest.fixture
def broken(tiny_path, tmp_path):
    return Path(shutil.copytree(tiny_path, tmp_path / "model"))


def test_pangu_s_row_is_s_prompt_sep_prefix_and_answer_eot(tiny_path):
    """In 2023 training had the `<s>` and generation had not."""
    tokenizer = rk.load_tokenizer(tiny_path)
    prompt, answer = rk.family_of(tiny_path).encode(tokenizer, PLAIN, "明月照寺")
    assert prompt[0] == 1 and prompt.count(tokenizer.sep_token_id) == 1 and answer[-1] == 9
    assert tokenizer.decode(prompt) == "上联：晚风吹桥<sep>下联：" and tokenizer.decode(answer) == "明月照寺<eot>"
    assert rk.family_of(tiny_path).encode(tokenizer, PLAIN) == (prompt, [])


def test_pangu_s_system_text_and_earlier_turns_stand_before_the_prompt(tiny_path):
    tokenizer = rk.load_tokenizer(tiny_path)
    record = rk.Record("那么明月呢", system="答得短些", history=(("什么是春风", "是风"),))
    assert tokenizer.decode(rk.family_of(tiny_path).encode(tokenizer, record)[0]) == "答得短些\n什么是春风\n是风\n那么明月呢<sep>"


def test_a_native_row_is_the_chat_template_with_one_beginning_and_ends_with_the_end_token(native_path):
    tokenizer, family = rk.load_tokenizer(native_path), rk.family_of(native_path)
    record = rk.Record("你好", system="答得短些", history=(("早", "早上好"),), prefix="答：")
    prompt, answer = family.encode(tokenizer, record, "好")
    assert tokenizer.decode(prompt) == "<bos><system>答得短些<end><user>早<end><assistant>早上好<end><user>你好<end><assistant>答："
    assert prompt.count(1) == 1 and answer == tokenizer.encode("好", add_special_tokens=False) + [2]
    assert family.encode(tokenizer, record) == (prompt, []) and family is NATIVE


def test_a_native_row_without_a_template_is_prompt_and_prefix_after_the_tokenizer_s_beginning(native_path):
    tokenizer = rk.load_tokenizer(native_path)
    tokenizer.chat_template = None
    assert tokenizer.decode(NATIVE.encode(tokenizer, PLAIN)[0]) == "<bos>上联：晚风吹桥下联："


def test_a_text_for_pre_training_has_one_beginning_and_one_end(family_and_tokenizer):
    family, tokenizer = family_and_tokenizer
    ids = sum(family.encode_text(tokenizer, "春风"), [])
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert (ids.count(ids[0]), ids.count(ids[-1])) == (1, 1) and tokenizer.decode(ids[1:-1]) == "春风"


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5, 7, 10])
@pytest.mark.parametrize("answer", ["明月照寺", None])
def test_only_the_user_s_text_is_shortened_never_template_prefix_or_answer(family_and_tokenizer, cut, answer):
    """With a token a byte a cut falls inside a character, whose rest must not become three tokens."""
    family, tokenizer = family_and_tokenizer
    record = rk.Record("上联：晚风吹桥，白云过岭，细雨染红桥", prefix="下联：")
    prompt, ids = family.encode(tokenizer, record, answer)
    short, same = family.encode(tokenizer, record, answer, max_length=len(prompt + ids) - cut)
    assert same == ids and len(short + same) <= len(prompt + ids) - cut
    before, after = tokenizer.decode(prompt).split(record.prompt)
    text = tokenizer.decode(short)
    assert text.startswith(before) and text.endswith(after)
    assert record.prompt.startswith(text[len(before):len(text) - len(after)])


def test_a_row_that_fits_is_left_as_it_is(family_and_tokenizer):
    family, tokenizer = family_and_tokenizer
    whole = family.encode(tokenizer, PLAIN, "明月照寺")
    assert family.encode(tokenizer, PLAIN, "明月照寺", max_length=len(whole[0] + whole[1])) == whole


def test_an_answer_longer_than_max_length_is_named_with_its_rule_and_a_length_that_works(family_and_tokenizer):
    family, tokenizer = family_and_tokenizer
    answer = "明月照寺" * 20
    length = len(family.encode(tokenizer, PLAIN, answer)[1])
    for max_length in (1, length - 1, length, length + 1):
        with pytest.raises(ValueError) as error:
            family.encode(tokenizer, PLAIN, answer, max_length)
        assert f"an answer of {length} tokens" in str(error.value)
        assert f"do not fit into max_length {max_length} " in str(error.value)
    enough = int(str(error.value).split("set max_length to ")[1].split()[0])
    assert sum(map(len, family.encode(tokenizer, PLAIN, answer, enough))) <= enough


def test_the_family_is_what_config_json_says_not_the_path(tiny_path, native_path, tmp_path):
    """The 2023 kit looked for "pangu" or "glm" in the path."""
    assert rk.family_of(tiny_path).name == "pangu" and rk.family_of(rk.load_model(tiny_path).config).name == "pangu"
    folder = shutil.copytree(native_path, tmp_path / "pangu-chatglm")
    assert rk.family_of(folder).name == "native" and type(rk.load_model(folder)).__name__ == "LlamaForCausalLM"


def test_a_model_is_in_eval_mode_and_float32_or_the_dtype_asked_for(tiny_path):
    model = rk.load_model(tiny_path)
    assert not model.training and model.dtype == torch.float32
    assert rk.load_model(tiny_path, dtype="bfloat16").dtype == torch.bfloat16


def test_an_empty_model_has_the_shapes_without_the_memory(tiny_path, native_path):
    for path in (tiny_path, native_path):
        made, loaded = empty_model(path), rk.load_model(path)
        assert {p.device.type for p in made.parameters()} == {"meta"}
        assert {n: p.shape for n, p in made.named_parameters()} == {n: p.shape for n, p in loaded.named_parameters()}


def test_a_tiny_model_of_the_same_seed_is_the_same_and_draws_nothing_from_the_caller(tiny_path, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    vocab = Path(tiny_path) / "vocab.model"
    again, other = (rk.tiny(tmp_path / name, vocab_path=vocab, seed=seed) for name,
                    seed in (("again", 0), ("other", 1)))
    assert torch.equal(torch.rand(3), expected)
    read = {path: (Path(path) / "model.safetensors").read_bytes() for path in (tiny_path, again, other)}
    assert read[tiny_path] == read[again] != read[other]
    assert rk.load_tokenizer(again).get_vocab() == rk.load_tokenizer(tiny_path).get_vocab()


def test_tiny_refuses_a_family_and_a_vocabulary_that_there_is_not(tmp_path):
    with pytest.raises(ValueError, match="family is 'bert'; tiny models exist for pangu"):
        rk.tiny(tmp_path / "a", family="bert")
    with pytest.raises(FileNotFoundError, match="vocab_path .*none.model is no file; give a sentencepiece model"):
        rk.tiny(tmp_path / "b", vocab_path=tmp_path / "none.model")
    with pytest.raises(ValueError, match="family is 'bert'; known: pangu, .*qwen, or leave it out"):
        rk.load_tokenizer(tmp_path, family="bert")


@pytest.mark.parametrize("load", [rk.load_model, rk.load_tokenizer, rk.family_of])
def test_a_folder_that_is_missing_or_has_no_config_says_so(load, broken):
    with pytest.raises(FileNotFoundError,
                       match="nowhere is no folder; give the folder of a model, or run the stage that makes it first"):
        load(broken / "nowhere")
    (broken / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="model has no config.json, so it is no model folder"):
        load(broken)


def test_a_config_that_is_not_json_names_its_file(broken):
    (broken / "config.json").write_text('{"model_type": "pan')
    with pytest.raises(ValueError, match="config.json"):
        rk.load_model(broken)


def test_a_folder_without_weights_says_what_is_expected(broken):
    (broken / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError,
                       match=r"has a config.json but no weights; expected \*.safetensors or pytorch_model\*.bin"):
        rk.load_model(broken)


@pytest.mark.parametrize("change, message", [
    (lambda w: w.pop("transformer.h.2.mlp.c_fc.bias"), "1 missing keys, first transformer.h.2.mlp.c_fc.bias"),
    (lambda w: w.update(extra=torch.zeros(2)), "1 unexpected keys, first extra"),
    (lambda w: w.update({f"h.{i}": torch.zeros(2) for i in range(5)}), "5 unexpected keys, first h.0, h.1, h.2, h.3, h.4;")])
def test_missing_and_unexpected_weights_are_counted_and_named(broken, change, message):
    weights = load_file(broken / "model.safetensors")
    change(weights)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError) as error:
        rk.load_model(broken)
    assert message in str(error.value)
    assert "do not belong together, or a file is missing: copy the folder again" in str(error.value)


def test_weights_of_another_shape_than_config_json_are_refused(broken):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 1}))
    with pytest.raises(ValueError, match="transformer.wte.weight"):
        rk.load_model(broken)


def cut(weights):
    weights.write_bytes(weights.read_bytes()[:100_000])


@pytest.mark.parametrize("damage",
                         [cut, lambda weights: weights.write_bytes(b"\xff" * 64),
                          lambda weights: weights.write_bytes(b"")],
                         ids=["cut short", "noise", "empty"])
def test_a_damaged_weight_file_is_said_to_be_unreadable(broken, damage):
    damage(broken / "model.safetensors")
    with pytest.raises(ValueError, match="the weights in .*model cannot be read: .*it is damaged or cut short.*copy it again"):
        rk.load_model(broken)


def test_a_shard_that_is_missing_is_noticed(tiny_path, tmp_path):
    rk.load_model(tiny_path).save_pretrained(tmp_path, max_shard_size="700KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[-1].unlink()
    with pytest.raises(ValueError, match="copy the folder again"):
        rk.load_model(tmp_path)


def test_a_reward_model_is_not_taken_for_a_language_model(tiny_path, tmp_path):
    RewardModel.from_causal(rk.load_model(tiny_path)).save_pretrained(tmp_path)
    with pytest.raises(ValueError,
                       match="holds a reward model, not a language model; give it as reward_path, or to rk.score"):
        rk.load_model(tmp_path)


def test_a_folder_without_its_vocabulary_says_where_it_belongs(broken):
    (broken / "vocab.model").unlink()
    with pytest.raises(ValueError,
                       match="no tokenizer of family pangu in .*; put its vocabulary file beside config.json"):
        rk.load_tokenizer(broken)


def test_a_vocabulary_larger_than_the_model_is_noticed_when_the_two_meet(tiny_path, tmp_path):
    """An id past the embedding otherwise is an IndexError in the middle of a run, or an assert on a GPU."""
    small = rk.load_model(tiny_path)
    small.resize_token_embeddings(1000)
    small.save_pretrained(tmp_path)
    rk.load_tokenizer(tiny_path).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="vocabulary"):
        rk.generate(tmp_path, ["上联：晚风吹桥"], max_new_tokens=2)
