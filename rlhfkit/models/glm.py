"""GLM of 2021-22 (350M, large, 10B, Chinese) on today's transformers; published weights load under their own names.

GPT-2's blocks with a second table of positions, for the place within the answer, and a context seen whole. Its type here is
"glm_v1", since "glm" is GLM-4's. Unlike the 2023 code: word embeddings are trained (there a buffer, which no optimiser
ever saw), keys and values are cached (there hidden states), and rows are ordinary next-token rows.
"""
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig
from transformers.cache_utils import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from rlhfkit.models.prefix import PrefixLM, PrefixPreTrainedModel, eager_attention, require


class GlmV1Config(PreTrainedConfig):
    """Defaults are GLM-350M-chinese. The published files carry no special ids; `eop_token_id` is the end token's other name."""

    model_type = "glm_v1"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"num_hidden_layers": "num_layers", "max_position_embeddings": "max_sequence_length",
                     "eop_token_id": "eos_token_id"}

    vocab_size: int = 50048
    hidden_size: int = 1024
    num_layers: int = 24
    num_attention_heads: int = 16
    max_sequence_length: int = 1024
    embedding_dropout_prob: float | int = 0.1
    attention_dropout_prob: float | int = 0.1
    output_dropout_prob: float | int = 0.1
    layernorm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = 50000
    eos_token_id: int | list[int] | None = 50007       # <|endofpiece|>
    sop_token_id: int = 50006                          # <|startofpiece|>
    mask_token_id: int = 50003
    smask_token_id: int = 50008
    gmask_token_id: int = 50009
    tie_word_embeddings: bool = True


class GlmV1Attention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, False
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.attention_dropout = nn.Dropout(config.attention_dropout_prob)
        self.output_dropout = nn.Dropout(config.output_dropout_prob)

    def forward(self, hidden_states, attention_mask, past_key_values=None, **kwargs):
        """hidden_states (B, T, hidden), attention_mask bool (B, 1, T, K) -> (B, T, hidden), weights."""
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        query, key, value = (x.view(shape).transpose(1, 2) for x in self.query_key_value(hidden_states).chunk(3, -1))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, weights = attend(self, query, key, value, attention_mask, scaling=self.head_dim ** -0.5,
                                 dropout=self.attention_dropout.p if self.training else 0.0, **kwargs)
        return self.output_dropout(self.dense(output.reshape(*hidden_states.shape).contiguous())), weights


class GlmV1MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.dense_4h_to_h = nn.Linear(4 * config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.output_dropout_prob)

    def forward(self, hidden_states):
        return self.dropout(self.dense_4h_to_h(nn.functional.gelu(self.dense_h_to_4h(hidden_states))))


class GlmV1Block(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = GlmV1Attention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = GlmV1MLP(config)

    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.attention(self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class GlmV1PreTrainedModel(PrefixPreTrainedModel):
    config_class = GlmV1Config
    base_model_prefix = "glm"
    _no_split_modules = ["GlmV1Block"]
    _can_record_outputs = {"hidden_states": GlmV1Block, "attentions": GlmV1Attention}

    @property
    def rule(self):
        c = self.config
        return dict(start_id=c.sop_token_id, mask_ids=((c.mask_token_id, c.smask_token_id, c.gmask_token_id),))


class GlmV1Stack(nn.Module):
    """The position tables, the blocks and the last norm, under the published prefix `transformer`."""

    def __init__(self, config):
        super().__init__()
        self.embedding_dropout = nn.Dropout(config.embedding_dropout_prob)
        self.position_embeddings, self.block_position_embeddings = (
            nn.Embedding(config.max_sequence_length + 1, config.hidden_size) for _ in range(2))
        self.layers = nn.ModuleList([GlmV1Block(config, i) for i in range(config.num_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, embeds, positions, **kwargs):
        """embeds (B, T, hidden), positions (B, 2, T) -> (B, T, hidden)."""
        rows = self.position_embeddings.num_embeddings
        torch._assert_async((positions < rows).all(), f"a context or an answer is longer than this model's {rows} positions; "
                            "shorten the prompt or lower max_length or max_new_tokens")     # without waiting for the device
        place, block = positions.unbind(1)
        hidden_states = self.embedding_dropout(embeds + self.position_embeddings(place) + self.block_position_embeddings(block))
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        return self.final_layernorm(hidden_states)


class GlmV1Model(GlmV1PreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        require(config, relative_encoding=False, block_position_encoding=True)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.transformer = GlmV1Stack(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, **kwargs):
        """input_ids (B, T) -> last_hidden_state (B, T, hidden), after the last norm.

        attention_mask: (B, T), 1 where a token is real; or None; or the original's (B, 1, T, K), 1 is attend. position_ids:
        None, or the original's (B, 2, T); packed rows: (B, T) that start at 0 in each document, no mask, use_cache False."""
        positions, keep = self.layout(input_ids, attention_mask, position_ids, past_key_values)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        hidden_states = self.transformer(self.word_embeddings(input_ids), positions, attention_mask=keep,
                                         past_key_values=past_key_values, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values if use_cache else None)


class GlmV1ForCausalLM(PrefixLM, GlmV1PreTrainedModel, GenerationMixin):
    """The head is the word embeddings, so no file has an `lm_head`: neither the published ones nor those saved here."""

    _tied_weights_keys = {"lm_head.weight": "glm.word_embeddings.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.glm = GlmV1Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register("glm_v1", GlmV1Config)
AutoModel.register(GlmV1Config, GlmV1Model)
AutoModelForCausalLM.register(GlmV1Config, GlmV1ForCausalLM)
