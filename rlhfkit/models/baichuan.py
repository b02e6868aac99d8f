"""Baichuan-13B and Baichuan2-13B: transformers' Llama with ALiBi in place of rotary positions (Press et al. 2022).

The 7B models are plain Llama and need no class. Unlike in the 2023 code, padding is masked on either side, packed rows are kept apart, and
keys and values may stand in a static cache. There is no flash attention: the bias is a mask of (B, heads, T, keys), shared by the layers.
"""
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask


class BaichuanConfig(LlamaConfig):
    """Llama's fields; `max_position_embeddings` is the trained length, which ALiBi may exceed."""

    model_type = "baichuan"


class BaichuanModel(LlamaModel):
    config_class = BaichuanConfig
    _supports_flash_attn = _supports_flex_attn = False

    def __init__(self, config):
        super().__init__(config)
        self.rotary_emb = NoRotation()

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None, use_cache=None,
                **kwargs):
        """input_ids (B, T), or inputs_embeds (B, T, hidden) -> last_hidden_state (B, T, hidden).

        attention_mask: (B, past + T), 1 where a token is real; or 4-D, as `generate` makes it for a static cache; or None. Packed rows: None,
        with position_ids (B, T) that start at 0 in each document."""
        use_cache = self.config.use_cache if use_cache is None else use_cache
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        keep = create_causal_mask(config=self.config, inputs_embeds=embeds, attention_mask=attention_mask, past_key_values=past_key_values,
                                  position_ids=position_ids, allow_is_causal_skip=False)                     # (B, 1, T, keys)
        keep = keep if keep.dtype == torch.bool else keep >= 0
        queries = torch.arange(embeds.shape[1], device=embeds.device)[:, None] + past
        distance = torch.arange(keep.shape[-1], device=embeds.device)[None] - queries                        # (T, keys), <= 0 where kept
        bias = slopes(self.config.num_attention_heads, embeds.device)[:, None, None] * distance              # (heads, T, keys), float32
        mask = torch.where(keep, bias, torch.finfo(embeds.dtype).min).to(embeds.dtype)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        return super().forward(inputs_embeds=embeds, attention_mask=mask, position_ids=embeds.new_zeros(1, 1, dtype=torch.long),
                               past_key_values=past_key_values, use_cache=use_cache, **kwargs)


class BaichuanForCausalLM(LlamaForCausalLM):
    config_class = BaichuanConfig
    _supports_flash_attn = _supports_flex_attn = False

    def __init__(self, config):
        super(LlamaForCausalLM, self).__init__(config)
        self.model = BaichuanModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class NoRotation(nn.Module):
    """Rotary embeddings by an angle of zero."""

    def forward(self, hidden_states, position_ids):
        return hidden_states.new_ones(1, 1, 1), hidden_states.new_zeros(1, 1, 1)


def slopes(heads, device=None):
    """(heads,) float32: 2^(-8(i+1)/n) for n a power of two, else those of the power below, then every second one of twice as many."""
    power = 1 << (heads.bit_length() - 1)
    found = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    found += [2.0 ** (-4 * (i + 1) / power) for i in range(0, 2 * (heads - power), 2)]
    return torch.tensor(found, device=device)


AutoConfig.register("baichuan", BaichuanConfig)
AutoModel.register(BaichuanConfig, BaichuanModel)
AutoModelForCausalLM.register(BaichuanConfig, BaichuanForCausalLM)
