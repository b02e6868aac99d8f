"""A backbone with one value a token: reward model and PPO critic, of any family.

Tensor names are those of the 2023 reward checkpoints: `transformer.*` for the backbone, `v_head.weight`. An answer's
score is the value at its last real token, found from the mask; the 2023 code looked for the first pad id, which is
wrong for padding on the left and where a family pads with its end token.
"""
import copy

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers import initialization as init

import rlhfkit.models.pangu  # noqa: F401  makes the family known to the Auto classes


class RewardModel(PreTrainedModel):
    """Saved folders keep the backbone's `model_type`, so family and tokenizer are found as for any model."""

    config_class = AutoConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["v_head"]      # 8 bits of bfloat16 cannot tell close answers apart

    def __init__(self, config, transformer=None):
        super().__init__(config)
        self.transformer = AutoModel.from_config(config) if transformer is None else transformer
        self._keys_to_ignore_on_load_unexpected = self.transformer._keys_to_ignore_on_load_unexpected
        self.v_head = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    @classmethod
    def from_causal(cls, model, seed=0):
        """model: a causal language model, whose backbone is taken over, not copied; the head is drawn from `seed`.

        The head's standard deviation is 1 / sqrt(hidden + 1) (Stiennon et al. 2020).
        """
        with init.no_init_weights():       # or post_init could draw the backbone again
            reward_model = cls(copy.deepcopy(model.config), transformer=model.base_model)
        head = torch.randn(1, model.config.hidden_size, generator=torch.Generator().manual_seed(seed))
        reward_model.v_head.weight = nn.Parameter((head / (model.config.hidden_size + 1) ** 0.5).to(model.device))
        return reward_model.train(model.training)

    def forward(self, input_ids, attention_mask=None, **kwargs):
        """input_ids, attention_mask (B, T), 1 where real, padded on either side -> values (B, T) in float32.

        Values at pads mean nothing.
        """
        outputs = self.transformer(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs)
        hidden = outputs.last_hidden_state                                                       # (B, T, hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.v_head(hidden.to(self.v_head.weight.dtype)).squeeze(-1).float()


def score(model, ids, mask):
    """ids, mask (B, T), padded on either side -> scores (B,) in float32: the value at each row's last real token."""
    last = (mask.long() * torch.arange(ids.shape[1], device=ids.device)).argmax(1, keepdim=True)          # (B, 1)
    return model(ids, attention_mask=mask).gather(1, last).squeeze(1)


def load_reward_model(path, dtype=None):
    """Folder -> RewardModel in eval mode, float32 unless `dtype` is given; the value head stays float32.

    Raises ValueError naming weights that are missing from the folder, have no place in the model, or another shape.
    """
    model, info = RewardModel.from_pretrained(path, dtype=dtype or torch.float32, output_loading_info=True,
                                              ignore_mismatched_sizes=True)
    wrong = {kind: sorted(str(key) for key in info[f"{kind}_keys"]) for kind in ("missing", "unexpected", "mismatched")}
    if any(wrong.values()):
        found = "; ".join(f"{kind}: {_first(keys)}" for kind, keys in wrong.items() if keys)
        raise ValueError(f"{path} is not a complete reward model ({found}); "
                         "make one from a language model with RewardModel.from_causal")
    return model


def _first(keys, limit=5):
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")
