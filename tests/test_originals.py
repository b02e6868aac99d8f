"""Published folders: the original implementations' logits, each folder told apart, and what is said of folders that are damaged."""
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import rlhfkit as rk
from rlhfkit.models import baichuan, layouts, originals
from rlhfkit.models.value import RewardModel

FIXTURES = ["pangu", "glm", "chatglm", "chatglm2", "chatglm3", "baichuan_7b", "baichuan_13b", "qwen"]


@pytest.mark.supports("parity")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FIXTURES)
def test_a_published_folder_gives_the_logits_of_the_original_implementation(name, attention, shared, record_property):
    """1e-4 would be too loose: ChatGLM with the other GELU is within 4.3e-5."""
    folder = shared / "fixtures/models" / name
    model, cases = rk.load_model(folder), load_file(folder / "cases.safetensors")
    assert rk.family_of(folder).name == name.split("_")[0]
    model.set_attn_implementation(attention)
    for case in {key.split(".")[0] for key in cases}:
        given = {key.split(".")[1]: tensor for key, tensor in cases.items() if key.split(".")[0] == case}
        expected, mask = given.pop("logits"), given.get("attention_mask")
        with torch.no_grad():
            difference = (model(**given, use_cache=False).logits - expected).abs().amax(-1)
        attended = mask.bool() if mask is not None and mask.ndim == 2 else torch.ones_like(difference, dtype=torch.bool)
        record_property("parity", float(difference[attended].max()))
        assert float(difference[attended].max()) < 1e-5, case


def test_families_with_one_model_type_are_told_apart_by_their_fields():
    assert originals.original_family({"model_type": "glm", "num_layers": 24}) == "glm"
    assert originals.original_family({"model_type": "glm", "num_hidden_layers": 40}) == ""                  # GLM-4
    assert originals.original_family({"model_type": "chatglm", "inner_hidden_size": 16384}) == "chatglm"
    second = {"model_type": "chatglm", "padded_vocab_size": 65024, "seq_length": 32768}
    assert originals.original_family(second) == "chatglm2"
    assert originals.original_family(second | {"seq_length": 8192}) == "chatglm3"
    assert originals.original_family({"model_type": "gpt_pangu"}) == "pangu" and originals.original_family({"model_type": "llama"}) == ""


@pytest.fixture
def llama_like(tmp_path):
    """A tiny Baichuan-7B folder in its published layout, and a function that changes its config."""
    def make(**changes):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        rk.tiny(tmp_path / "model", family="baichuan", hidden_size=32, num_layers=2)
        raw = json.loads((tmp_path / "model/config.json").read_text(encoding="utf-8"))
        raw = {key: value for key, value in raw.items() if key != "rlhfkit_family"} | {"model_type": "baichuan"} | changes
        raw = {key: value for key, value in raw.items() if value is not None}
        (tmp_path / "model/config.json").write_text(json.dumps(raw), encoding="utf-8")
        weights = layouts.to_original(load_file(tmp_path / "model/model.safetensors"), layouts.BAICHUAN)
        save_file(weights, tmp_path / "model/model.safetensors", {"format": "pt"})
        return tmp_path / "model"
    return make


def test_a_folder_in_shards_of_pickles_is_the_folder_in_one_file(llama_like):
    folder = llama_like()
    whole = rk.load_model(folder).state_dict()
    weights = load_file(folder / "model.safetensors")
    assert any("W_pack" in key for key in weights)
    names, index = sorted(weights), {}
    for number in (1, 2):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        part = names[number - 1::2]
        torch.save({key: weights[key] for key in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    sharded = rk.load_model(folder).state_dict()
    assert sharded.keys() == whole.keys() and all(torch.equal(sharded[key], whole[key]) for key in whole)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    assert all(torch.equal(tensor, whole[key]) for key, tensor in rk.load_model(folder).state_dict().items())
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ValueError, match="00002-of-00002.bin is missing; the index of .* names it: copy the folder again"):
        rk.load_model(folder)


def test_a_pickle_with_code_in_it_is_refused_and_not_run(llama_like, tmp_path):
    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))
    folder = llama_like()
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Code()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds more than tensors and is refused.*ask its publisher for safetensors"):
        rk.load_model(folder)
    assert not (tmp_path / "ran").exists()


def test_a_shard_cut_short_is_named(llama_like):
    folder = llama_like()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    data = (folder / "pytorch_model.bin").read_bytes()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(data[:len(data) // 2])
    with pytest.raises(ValueError, match="pytorch_model.bin cannot be read, it is damaged or cut short .*copy it again"):
        rk.load_model(folder)


@pytest.mark.parametrize("change, message", [
    ("missing", "2 missing keys, first model.layers.1.mlp.down_proj.weight, model.layers.1.mlp.up_proj.weight"),
    ("surplus", "1 unexpected keys, first model.layers.1.mlp.extra.weight"),
    ("shape", "mismatched keys, first .*lm_head.weight")])
def test_weights_that_are_missing_left_over_or_of_another_shape_are_named(change, message, llama_like):
    """The published Pangu-13B may lack one MLP."""
    folder = llama_like()
    weights = load_file(folder / "model.safetensors")
    if change == "missing":
        weights = {key: t for key, t in weights.items() if key not in ("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight")}
    elif change == "surplus":
        weights["model.layers.1.mlp.extra.weight"] = torch.zeros(2)
    else:
        weights["lm_head.weight"] = weights["lm_head.weight"][:-3].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        rk.load_model(folder)


def test_baichuan2_s_head_is_normalised_once_and_folding_again_changes_nothing(llama_like):
    folder = llama_like(z_loss_weight=0)
    raw = load_file(folder / "model.safetensors")["lm_head.weight"]
    model = rk.load_model(folder)
    torch.testing.assert_close(model.lm_head.weight.detach(), F.normalize(raw, dim=-1), atol=0, rtol=0)
    torch.testing.assert_close(F.normalize(model.lm_head.weight, dim=-1), model.lm_head.weight, atol=1e-7, rtol=0)
    assert float(torch.linalg.vector_norm(model.lm_head.weight, dim=-1).std()) < 1e-6


def test_a_baichuan_without_a_table_of_positions_has_alibi_s_slopes_and_goes_past_its_trained_length(llama_like):
    assert baichuan.slopes(6).tolist() == [.25, .0625, .015625, .00390625, .5, .125]
    assert baichuan.slopes(8).tolist() == [2.0 ** -i for i in range(1, 9)]
    folder = llama_like(max_position_embeddings=None, model_max_length=16)
    model = rk.load_model(folder)
    assert type(model).__name__ == "BaichuanForCausalLM" and rk.family_of(folder).name == "baichuan"
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        long, short = model(ids, use_cache=False).logits, model(ids[:, :20], use_cache=False).logits
    torch.testing.assert_close(long[:, :20], short, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = rk.tiny(tmp_path_factory.mktemp("qwen") / "qwen", family="qwen", hidden_size=32, num_layers=2)
    raw = json.loads(open(f"{folder}/config.json", encoding="utf-8").read()) | {"seq_length": 16}
    open(f"{folder}/config.json", "w", encoding="utf-8").write(json.dumps(raw))
    return folder


def qwen2_from_outside(model, alpha, length):
    """Plain Qwen2 with the same weights, its rotary base raised and its queries scaled by hooks."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rms_norm_eps")
    plain = Qwen2ForCausalLM(Qwen2Config(**{name: getattr(model.config, name) for name in names}, tie_word_embeddings=False)).eval()
    plain.load_state_dict(model.state_dict())
    base = 10000 * alpha ** (8 / 6)                                     # heads of 8
    plain.model.rotary_emb.inv_freq = 1 / base ** (torch.arange(0, 8, 2) / 8)
    scale = torch.tensor([max(1.0, torch.log(torch.tensor(i + 1.0)).item() / torch.log(torch.tensor(16.0)).item()) for i in range(length)])
    for layer in plain.model.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda module, args, out: out * scale[None, :, None])
    return plain


@pytest.mark.parametrize("length, alpha", [(16, 1), (17, 3), (32, 3), (33, 7), (64, 7)])
def test_qwen_s_base_grows_in_steps_past_the_trained_length_and_queries_with_the_logarithm(qwen, length, alpha):
    model = rk.load_model(qwen)
    ids = torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = model(ids, use_cache=False).logits, qwen2_from_outside(model, alpha, length)(ids, use_cache=False).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_qwen_keeps_the_base_of_its_prompt_while_it_writes_and_has_the_trained_one_in_training(qwen):
    """The original kept the raised base for all later training steps, 0.8 off."""
    model = rk.load_model(qwen)
    ids = torch.randint(0, 256, (1, 20), generator=torch.Generator().manual_seed(0))
    options = dict(max_new_tokens=16, do_sample=False, eos_token_id=-1, pad_token_id=0, attention_mask=torch.ones_like(ids))
    written = model.generate(ids, **options)
    with torch.no_grad():
        at_36 = qwen2_from_outside(model, 3, 36)(written, use_cache=False).logits[0, 19:-1].argmax(-1)
        trained = model.train()(ids, use_cache=False).logits
    assert torch.equal(written[0, 20:], at_36)
    plain = qwen2_from_outside(model, 1, 20)
    for layer in plain.model.layers:
        layer.self_attn.q_proj._forward_hooks.clear()
    torch.testing.assert_close(trained, plain(ids, use_cache=False).logits, atol=1e-5, rtol=0)


def test_pangu_s_published_reward_folder_with_its_constant_buffers_scores_answers(tiny_path, tmp_path):
    folder = tmp_path / "reward"
    RewardModel.from_causal(rk.load_model(tiny_path)).save_pretrained(folder)
    rk.load_tokenizer(tiny_path).save_pretrained(folder)
    record = rk.Record("上联：晚风", (rk.Answer("晨露", 1), rk.Answer("山", 0)), "下联：")
    scores = rk.score(folder, [record])
    weights = load_file(folder / "model.safetensors")
    weights |= {f"transformer.h.{i}.attn.{name}": torch.ones(1) for i in range(4) for name in ("bias", "masked_bias")}
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert rk.score(folder, [record]) == scores


def test_a_family_that_nobody_knows_is_said_with_those_that_are_known(tmp_path, tiny_path):
    folder = shutil.copytree(tiny_path, tmp_path / "model")
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    raw = {key: value for key, value in raw.items() if key != "rlhfkit_family"} | {"model_type": "moss"}
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(ValueError, match="model_type 'moss', which neither rlhfkit nor transformers knows; rlhfkit has pangu, glm.*how to add one"):
        rk.load_model(folder)
