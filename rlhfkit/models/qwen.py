"""Qwen-1: transformers' Qwen2 with Qwen-1's two rules past the trained length, NTK-aware rotary bases and log-n scaled queries.

Up to `seq_length` tokens it is Qwen2 itself. As in the original both rules hold in eval mode only, and the base is that of the row when it was
read first, frozen while it is continued from a cache. Unlike there, a row's own length counts, without padding, and masks are honoured.
"""
import math

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen2Model
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, apply_rotary_pos_emb, eager_attention_forward


class QwenConfig(Qwen2Config):
    """Qwen2's fields and Qwen-1's three; `max_position_embeddings` is how far the rules are meant to reach."""

    model_type = "qwen"

    seq_length: int = 2048
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True


class QwenAttention(Qwen2Attention):
    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
        """As Qwen2's; position_embeddings: cosines, sines (B, T, head_dim) and the scale of the queries (B, 1, T, 1) or None."""
        cos, sin, scale = position_embeddings
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        query, key, value = (proj(hidden_states).view(shape).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        query = query if scale is None else query * scale
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling,
                                 dropout=self.attention_dropout if self.training else 0.0, **kwargs)
        return self.o_proj(output.reshape(*hidden_states.shape[:2], -1).contiguous()), weights


class QwenRotary(nn.Module):
    """Angles and query scales; no buffers, so nothing can be lost when a model is made without memory."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.alpha = None                   # (B, 1) set before each forward; None: the trained base

    def forward(self, hidden_states, position_ids):
        config = self.config
        size = config.hidden_size // config.num_attention_heads
        base = torch.full((), float(config.rope_parameters["rope_theta"]), device=hidden_states.device)
        if self.alpha is not None:
            base = base * self.alpha ** (size / (size - 2))                                                  # (B, 1)
        exponents = torch.arange(0, size, 2, device=hidden_states.device).float() / size
        angles = position_ids[..., None].float() * (1.0 / base[..., None] ** exponents)                      # (B, T, size / 2)
        angles = torch.cat((angles, angles), -1)
        scale = None
        if config.use_logn_attn and not self.training:
            scale = (torch.log(position_ids + 1.0) / math.log(config.seq_length)).clamp(min=1.0)
            scale = scale[:, None, :, None].to(hidden_states.dtype)
        return angles.cos().to(hidden_states.dtype), angles.sin().to(hidden_states.dtype), scale


class QwenModel(Qwen2Model):
    config_class = QwenConfig

    def __init__(self, config):
        super().__init__(config)
        for i, layer in enumerate(self.layers):
            layer.self_attn = QwenAttention(config, i)
        self.rotary_emb = QwenRotary(config)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, **kwargs):
        """As Qwen2Model; positions count real tokens, so that padding on either side changes nothing."""
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = _positions(input_ids, attention_mask, past)
        continued = past_key_values is not None and (input_ids.shape[1] == 1 or isinstance(past, int) and past > 0)
        self.rotary_emb.alpha = None if self.training or not self.config.use_dynamic_ntk else \
            self._alpha(position_ids, past_key_values, continued)
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
                               use_cache=use_cache, **kwargs)

    def _alpha(self, position_ids, cache, continued):
        """(B, 1): 1 up to seq_length, then 3, 7, 15 as the length doubles; taken from the cache when the row is continued."""
        frozen = getattr(cache, "ntk_alpha", None)
        if continued and frozen is not None:
            return frozen
        ratio = (position_ids.amax(-1, keepdim=True) + 1).double() / self.config.seq_length
        alpha = torch.where(ratio > 1, 2.0 ** (torch.log2(ratio).ceil() + 1) - 1, 1.0).float()
        if cache is not None:
            cache.ntk_alpha = alpha
        return alpha


class QwenForCausalLM(Qwen2ForCausalLM):
    config_class = QwenConfig

    def __init__(self, config):
        super(Qwen2ForCausalLM, self).__init__(config)
        self.model = QwenModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def _positions(input_ids, attention_mask, past):
    """(B or 1, T): the number of real tokens before each token."""
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1]:]
    return torch.arange(input_ids.shape[1], device=input_ids.device)[None] + past


AutoConfig.register("qwen", QwenConfig)
AutoModel.register(QwenConfig, QwenModel)
AutoModelForCausalLM.register(QwenConfig, QwenForCausalLM)
