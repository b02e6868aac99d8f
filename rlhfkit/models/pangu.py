"""Pangu-alpha on today's transformers; published folders load as they are, under their own tensor names.

GPT-2's blocks with two differences: `ln_f` stands before the last block, and that block's query comes from a table of
positions (`wqe`) alone. Unlike the 2023 code: padding on either side is masked, positions count real tokens only, keys
and values are cached, labels of -100 are ignored. Importing it makes `model_type` "pangu" known to the Auto classes.
"""
import math

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationMixin
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from rlhfkit.tokenizers.pangu import PanguTokenizer


class PanguConfig(PreTrainedConfig):
    """Defaults are Pangu-350M. `num_layers` counts the query layer; `intermediate_size` None is 4 x `hidden_size`."""

    model_type = "pangu"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
                     "hidden_act": "activation_function"}

    vocab_size: int = 40000
    max_position_embeddings: int = 1024
    hidden_size: int = 1024
    intermediate_size: int | None = None
    num_layers: int = 24
    num_heads: int = 16
    activation_function: str = "gelu"
    resid_pdrop: float | int = 0.1
    embd_pdrop: float | int = 0.1
    attn_pdrop: float | int = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = 6
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 9
    tie_word_embeddings: bool = True


class PanguAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        size, heads = config.hidden_size, config.num_heads
        if size % heads:
            raise ValueError(f"hidden_size is {size} and num_heads is {heads}; it must be a multiple of num_heads; "
                             f"try hidden_size={size // heads * heads or heads}")
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.head_dim = size // heads
        self.q_proj, self.k_proj, self.v_proj, self.c_proj = (nn.Linear(size, size) for _ in range(4))
        self.c_proj.ends_branch = True
        self.attn_dropout, self.resid_dropout = nn.Dropout(config.attn_pdrop), nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states, query_states, attention_mask=None, past_key_values=None, **kwargs):
        """Keys, values of hidden_states, queries of query_states, both (B, T, hidden) -> (B, T, hidden), weights."""
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        query = self.q_proj(query_states).view(shape).transpose(1, 2)                          # (B, heads, T, head_dim)
        key, value = (proj(hidden_states).view(shape).transpose(1, 2) for proj in (self.k_proj, self.v_proj))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, weights = attend(self, query, key, value, attention_mask, scaling=self.head_dim ** -0.5,
                                 dropout=self.attn_dropout.p if self.training else 0.0, **kwargs)
        return self.resid_dropout(self.c_proj(output.reshape(*hidden_states.shape).contiguous())), weights


class PanguMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        inner = config.intermediate_size or 4 * config.hidden_size
        self.c_fc, self.c_proj = nn.Linear(config.hidden_size, inner), nn.Linear(inner, config.hidden_size)
        self.c_proj.ends_branch = True
        self.act, self.dropout = ACT2FN[config.activation_function], nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states):
        return self.dropout(self.c_proj(self.act(self.c_fc(hidden_states))))


class PanguBlock(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = PanguAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = PanguMLP(config)

    def forward(self, hidden_states, query_states=None, **kwargs):
        """query_states: what the query layer's query is projected from; None elsewhere: the normed hidden states."""
        normed = self.ln_1(hidden_states)
        query_states = normed if query_states is None else query_states
        hidden_states = hidden_states + self.attn(normed, query_states, **kwargs)[0]
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class PanguPreTrainedModel(PreTrainedModel):
    config_class = PanguConfig
    base_model_prefix = "transformer"
    _input_embed_layer = "wte"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PanguBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = _supports_flash_attn = _supports_attention_backend = _can_compile_fullgraph = True
    _keys_to_ignore_on_load_unexpected = [r"attn\.(masked_)?bias$"]       # constant buffers in the published files
    _can_record_outputs = {"hidden_states": PanguBlock, "attentions": PanguAttention}

    def _init_weights(self, module):
        super()._init_weights(module)
        if getattr(module, "ends_branch", False):      # as in GPT-2: two residual additions a layer
            init.normal_(module.weight, std=self.config.initializer_range / math.sqrt(2 * self.config.num_layers))


class PanguModel(PanguPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.wqe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([PanguBlock(config, i) for i in range(config.num_layers)])
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None,
                **kwargs):
        """input_ids (B, T) -> last_hidden_state (B, T, hidden), which no norm follows.

        attention_mask: (B, past + T), 1 where a token is real; or None. Packed rows: None, with position_ids (B, T)
        that start at 0 in each document. Raises ValueError for a row longer than the position tables.
        """
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        self._check_length(input_ids, position_ids, past_key_values, past)
        embeds = self.wte(input_ids)
        # The caller's cache, not one made below: transformers keeps packed documents apart only where there is none.
        mask = create_causal_mask(config=self.config, inputs_embeds=embeds, attention_mask=attention_mask,
                                  past_key_values=past_key_values, position_ids=position_ids)
        if position_ids is None:
            position_ids = _positions(input_ids, attention_mask, past)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        kwargs |= {"attention_mask": mask, "past_key_values": past_key_values, "position_ids": position_ids}

        hidden_states = self.drop(embeds + self.wpe(position_ids))
        for block in self.h[:-1]:
            hidden_states = block(hidden_states, **kwargs)
        query_states = self.wqe(position_ids).expand_as(hidden_states)
        hidden_states = self.h[-1](self.ln_f(hidden_states), query_states, **kwargs)
        past_key_values = past_key_values if use_cache else None
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)

    def _check_length(self, input_ids, position_ids, past_key_values, past):
        """By shape, since reading positions would stall an accelerator. A packed row may be longer than a document."""
        packed = position_ids is not None and past_key_values is None
        length = input_ids.shape[1] + (past if isinstance(past, int) else 0)
        if length > self.config.max_position_embeddings and not packed:
            raise ValueError(f"the row has {length} tokens; this model has {self.config.max_position_embeddings} "
                             "positions; shorten the prompt or lower max_length or max_new_tokens")


class PanguForCausalLM(PanguPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.transformer = PanguModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def adjust_generation_fn(self, *args, **kwargs):
        """A 2023 config.json names no end token, and `generate` reads the file: without this it would never stop."""
        super().adjust_generation_fn(*args, **kwargs)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self.generation_config, name) is None:
                setattr(self.generation_config, name, getattr(self.config, name))

    @can_return_tuple
    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None,
                labels=None, logits_to_keep=0, **kwargs):
        """As PanguModel -> logits (B, T or logits_to_keep, vocabulary); labels (B, T) are unshifted, -100 ignored."""
        outputs = self.transformer(input_ids, attention_mask=attention_mask, position_ids=position_ids,
                                   past_key_values=past_key_values, use_cache=use_cache, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values,
                                      hidden_states=outputs.hidden_states, attentions=outputs.attentions)


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention written out: (B, heads, T, head_dim) -> (B, T, heads, head_dim), weights (B, heads, T, keys)."""
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (nn.functional.dropout(weights, dropout, module.training) @ value).transpose(1, 2), weights


def _positions(input_ids, attention_mask, past):
    """(B or 1, T): the number of real tokens before each token, so that padding on the left shifts nothing."""
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1]:]
    return torch.arange(input_ids.shape[1], device=input_ids.device)[None] + past


AutoConfig.register("pangu", PanguConfig)
AutoModel.register(PanguConfig, PanguModel)
AutoModelForCausalLM.register(PanguConfig, PanguForCausalLM)
AutoTokenizer.register(PanguConfig, slow_tokenizer_class=PanguTokenizer)
