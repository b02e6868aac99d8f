"""The value model: counts, scores that do not see padding, folders that say their family, named weights."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from rlhfkit.models.pangu import PanguConfig, PanguForCausalLM
from rlhfkit.models.value import RewardModel, load_reward_model, score

ROWS = [[11, 12, 13, 14, 15, 16, 17], [21, 22, 23], [31]]


def pangu(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "max_position_embeddings": 32}
    return PanguForCausalLM(PanguConfig(**(sizes | changes))).eval()


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                        intermediate_size=64, max_position_embeddings=32, pad_token_id=2)).eval()


def padded(rows, side, width, pad):
    ids = [[pad] * (width - len(row)) + row if side == "left" else row + [pad] * (width - len(row)) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) if side == "left" else [1] * len(row) + [0] * (width - len(row))
            for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


@pytest.fixture(params=[pangu, llama], ids=["pangu", "llama"])
def causal(request):
    return request.param()


def test_a_350m_reward_model_has_the_published_counts_also_with_17_of_24_layers_frozen():
    with torch.device("meta"):
        model = RewardModel(PanguConfig())
    assert model.num_parameters() == 345_369_600
    model.transformer.h[:17].requires_grad_(False)
    assert model.num_parameters(only_trainable=True) == 131_233_792


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("width", [7, 12])
@torch.no_grad()
def test_a_score_sees_neither_padding_nor_the_other_rows(causal, side, width):
    model = RewardModel.from_causal(causal)
    alone = torch.cat([score(model, torch.tensor([row]), torch.ones(1, len(row))) for row in ROWS])
    for pad in (6, 17):                     # 17 is also the first row's last token: the mask decides, not the id
        together = score(model, *padded(ROWS, side, width, pad))
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    assert alone.unique().numel() == 3


@torch.no_grad()
def test_values_are_the_head_of_the_backbone_and_the_score_is_the_last_of_them(causal):
    model = RewardModel.from_causal(causal)
    ids, mask = padded(ROWS, "right", 7, 6)
    values = model(ids, mask)
    assert values.shape == (3, 7) and values.dtype == torch.float32
    hidden = causal.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(values, hidden @ model.v_head.weight[0])
    assert torch.equal(score(model, ids, mask), torch.stack([values[0, 6], values[1, 2], values[2, 0]]))


def test_the_backbone_is_taken_over_unchanged_and_the_head_follows_the_seed(causal):
    before = {name: tensor.clone() for name, tensor in causal.base_model.state_dict().items()}
    for module in causal.modules():
        vars(module).pop("_is_hf_initialized", None)       # transformers draws what does not bear this mark
    model = RewardModel.from_causal(causal, seed=3)
    assert model.get_input_embeddings() is causal.get_input_embeddings()
    assert model.transformer is causal.base_model
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.transformer.state_dict().items())
    assert torch.equal(model.v_head.weight, RewardModel.from_causal(causal, seed=3).v_head.weight)
    assert not torch.equal(model.v_head.weight, RewardModel.from_causal(causal, seed=4).v_head.weight)
    assert causal.config.architectures is None and not model.training


@torch.no_grad()
def test_a_saved_folder_says_its_family_and_loads_to_equal_values(causal, tmp_path):
    model = RewardModel.from_causal(causal)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == (causal.config.model_type, ["RewardModel"])
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(causal.config)
    ids, mask = padded(ROWS, "left", 9, 6)
    for loaded in (load_reward_model(tmp_path), RewardModel.from_pretrained(tmp_path)):
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
        torch.testing.assert_close(loaded(ids, mask), model(ids, mask), rtol=0, atol=1e-6)
        assert not loaded.training


@torch.no_grad()
def test_in_bfloat16_the_head_stays_float32_and_values_come_out_float32(tmp_path):
    RewardModel.from_causal(pangu()).save_pretrained(tmp_path)
    model = load_reward_model(tmp_path, dtype=torch.bfloat16)
    assert (model.transformer.wte.weight.dtype, model.v_head.weight.dtype) == (torch.bfloat16, torch.float32)
    ids, mask = padded(ROWS, "left", 9, 6)
    values = model(ids, mask)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values * mask, load_reward_model(tmp_path)(ids, mask) * mask, rtol=0.1, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert load_reward_model(tmp_path)(ids, mask).dtype == torch.float32


def test_missing_unexpected_and_misshapen_weights_are_named(tmp_path):
    RewardModel.from_causal(pangu()).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["transformer.h.9.extra"] = tensors.pop("transformer.ln_f.weight")
    tensors["transformer.wpe.weight"] = torch.zeros(8, 32)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing: transformer\.ln_f\.weight; unexpected: transformer\.h\.9\.extra; "
                                         r"mismatched: .*transformer\.wpe\.weight"):
        load_reward_model(tmp_path)


def test_a_language_model_is_refused_as_a_reward_model(causal, tmp_path):
    causal.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not a complete reward model .missing: .*from_causal"):
        load_reward_model(tmp_path)


def test_a_2023_checkpoint_with_its_constant_buffers_loads(tmp_path):
    model = RewardModel.from_causal(pangu())
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    buffers = {f"transformer.h.{i}.attn.{name}": torch.ones(1) for i in range(3) for name in ("bias", "masked_bias")}
    save_file(load_file(file) | buffers, file, metadata={"format": "pt"})
    assert torch.equal(load_reward_model(tmp_path).transformer.wte.weight, model.transformer.wte.weight)


def test_as_a_critic_it_drops_out_as_configured_and_checkpoints_its_gradients():
    ids, mask = padded(ROWS, "left", 9, 6)
    gradients = []
    for checkpointing in (False, True):
        model = RewardModel.from_causal(pangu(resid_pdrop=0.3)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert all(block.gradient_checkpointing for block in model.transformer.h)
        torch.manual_seed(7)
        (model(ids, mask) * mask).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
    with torch.no_grad():
        assert not torch.equal(model(ids, mask), model(ids, mask))
        assert torch.equal(model.eval()(ids, mask), model(ids, mask))
