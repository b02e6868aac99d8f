"""ChatGLM-6B and 1.1-6B on today's transformers; published weights load under their own names.

Blocks whose residual is the normed input times alpha, and a rotary whose halves turn by the place in the row and in the
answer. Unlike the 2023 code: both follow from the ids for each row of a batch and each packed document, special ids come from
the config, padding is masked, labels of -100 are ignored, and no query-key scaling (it undoes itself but in float16).
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


class ChatGLMConfig(PreTrainedConfig):
    """Defaults are ChatGLM-6B. `alpha_layers`: alpha is sqrt(2 * alpha_layers), 28 in the original for any depth.

    `gmask_positions`: after [gMASK] <sop> the place is counted on ("arange", the 2023 full forward) or stays at [gMASK]
    ("collapse", its cached decoding and all later code); after [MASK] <sop> it always stays."""

    model_type = "chatglm"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"num_hidden_layers": "num_layers", "max_position_embeddings": "max_sequence_length",
                     "intermediate_size": "inner_hidden_size"}

    vocab_size: int = 150528
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    inner_hidden_size: int = 16384
    max_sequence_length: int = 2048
    layernorm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int = 150004                         # <sop>
    eos_token_id: int | list[int] | None = 150005      # <eop>
    pad_token_id: int | None = 20003
    mask_token_id: int = 150000
    gmask_token_id: int = 150001
    alpha_layers: int = 28
    gmask_positions: str = "arange"
    tie_word_embeddings: bool = True


class ChatGLMAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, False
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, attention_mask, rotary, past_key_values=None, **kwargs):
        """hidden_states (B, T, hidden), attention_mask bool (B, 1, T, K), rotary: see below -> (B, T, hidden), weights."""
        shape = (*hidden_states.shape[:2], -1, 3 * self.head_dim)               # query, key, value of one head side by side
        query, key, value = self.query_key_value(hidden_states).view(shape).transpose(1, 2).chunk(3, -1)
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, weights = attend(self, query, key, value, attention_mask, scaling=self.head_dim ** -0.5, **kwargs)
        return self.dense(output.reshape(*hidden_states.shape).contiguous()), weights


class ChatGLMMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, hidden_states):
        return self.dense_4h_to_h(nn.functional.gelu(self.dense_h_to_4h(hidden_states), approximate="tanh"))


class ChatGLMBlock(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.alpha = (2 * config.alpha_layers) ** 0.5
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = ChatGLMAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = ChatGLMMLP(config)

    def forward(self, hidden_states, **kwargs):
        normed = self.input_layernorm(hidden_states)
        normed = self.post_attention_layernorm(self.alpha * normed + self.attention(normed, **kwargs)[0])
        return self.alpha * normed + self.mlp(normed)


class ChatGLMPreTrainedModel(PrefixPreTrainedModel):
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["ChatGLMBlock"]
    _can_record_outputs = {"hidden_states": ChatGLMBlock, "attentions": ChatGLMAttention}
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$"]       # a constant in the published files
    mask_is_one_where_attended = False

    @property
    def rule(self):
        c = self.config
        return dict(start_id=c.bos_token_id, mask_ids=((c.gmask_token_id,), (c.mask_token_id,)),
                    counting=c.gmask_positions == "arange")


class ChatGLMModel(ChatGLMPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        require(config, position_encoding_2d=True, quantization_bit=0, pre_seq_len=None)
        if config.gmask_positions not in ("arange", "collapse"):
            raise ValueError(f"gmask_positions is {config.gmask_positions!r}; it must be 'arange' or 'collapse'")
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([ChatGLMBlock(config, i) for i in range(config.num_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, **kwargs):
        """input_ids (B, T) -> last_hidden_state (B, T, hidden), after the last norm.

        attention_mask: (B, T), 1 where a token is real; or None; or the original's (B, 1, T, K), True is masked. position_ids:
        None, or the original's (B, 2, T); packed rows: (B, T) that start at 0 in each document, no mask, use_cache False."""
        positions, keep = self.layout(input_ids, attention_mask, position_ids, past_key_values)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        hidden_states = self.word_embeddings(input_ids)
        rotary = rotary_tables(positions, self.config.hidden_size // self.config.num_attention_heads // 2, hidden_states.dtype)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask=keep, rotary=rotary, past_key_values=past_key_values, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.final_layernorm(hidden_states),
                                       past_key_values=past_key_values if use_cache else None)


class ChatGLMForCausalLM(PrefixLM, ChatGLMPreTrainedModel, GenerationMixin):
    """The 6B files hold the head beside the word embeddings, and transformers 4 tied them unseen (6,173,286,400 parameters).

    Here they are tied where the two tensors are equal or one is absent, and else kept apart; the config says which it was."""

    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def tie_weights(self, *args, **kwargs):
        super().tie_weights(*args, **kwargs)
        self.config.tie_word_embeddings = self.lm_head.weight is self.transformer.word_embeddings.weight


def rotary_tables(positions, size, dtype):
    """positions (B, 2, T) -> cos, sin (B, 1, T, 2, size), for the two halves of a head.

    Frequencies are rounded to float16, as published, then used in float32. Computed here and not kept as a buffer, which
    loading would leave empty and a cast to bfloat16 would spoil; no device's last digits turn a rounding of the 6B ones."""
    exponents = torch.arange(0, size, 2, device=positions.device).float() / size
    bits = (1 / 10000.0 ** exponents).view(torch.int32)
    bits = bits + 0xFFF + ((bits >> 13) & 1) & ~0x1FFF      # to even, in the bits: torch.compile drops a cast to float16 and back
    frequencies = bits.view(torch.float32)                                                     # (size / 2,)
    angles = positions.transpose(1, 2)[:, None, ..., None].float() * frequencies               # (B, 1, T, 2, size / 2)
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """x (B, heads, T, head_dim): each half turned by its own angles; within a half, dimension j goes with j + size / 2."""
    halves = x.unflatten(-1, (2, -1))
    one, two = halves.chunk(2, -1)
    return (halves * cos + torch.cat([-two, one], -1) * sin).flatten(-2)


AutoConfig.register("chatglm", ChatGLMConfig)
AutoModel.register(ChatGLMConfig, ChatGLMModel)
AutoModelForCausalLM.register(ChatGLMConfig, ChatGLMForCausalLM)
