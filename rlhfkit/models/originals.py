"""The config.json of the published folders -> configs of our classes and transformers' own.

Told apart by their fields, since `chatglm` is the type of three models and `glm` now that of GLM-4. What a published file leaves to its code
(special ids, the width of a fused MLP, ties that it claims and its tensors deny) stands in the configs made here.
"""
from transformers import GlmConfig, LlamaConfig

from rlhfkit.models.baichuan import BaichuanConfig
from rlhfkit.models.chatglm import ChatGLMConfig
from rlhfkit.models.glm import GlmV1Config
from rlhfkit.models.pangu import PanguConfig
from rlhfkit.models.qwen import QwenConfig

SHARED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "initializer_range",
          "rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id")          # names that Baichuan has in common with Llama


def original_family(raw):
    """config.json as a dict -> the family's name, or "" for none of ours."""
    kind = raw.get("model_type", "")
    if kind in ("pangu", "gpt_pangu", "gptpangu"):
        return "pangu"
    if kind == "glm_v1" or kind == "glm" and "num_layers" in raw:       # GLM-4 has num_hidden_layers
        return "glm"
    if kind == "chatglm":
        if "inner_hidden_size" in raw or raw.get("position_encoding_2d"):
            return "chatglm"
        return "chatglm3" if _is_chatglm3(raw) else "chatglm2"
    return kind if kind in ("baichuan", "internlm", "qwen") else ""


def pangu_config(raw):
    return PanguConfig.from_dict({name: value for name, value in raw.items() if name not in ("model_type", "auto_map")})


def glm_config(raw):
    return GlmV1Config(**_known(GlmV1Config, raw))


def chatglm_config(raw):
    return ChatGLMConfig(**_known(ChatGLMConfig, raw))              # tied where the file's two tensors are equal


def chatglm2_config(raw):
    """ChatGLM2 and 3, which are GLM-4's architecture; the long-context variants divide positions (2) or raise the base (3)."""
    ratio = float(raw.get("rope_ratio", 1))
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    if ratio != 1:
        rope |= {"rope_theta": 10000.0 * ratio} if _is_chatglm3(raw) else {"rope_type": "linear", "factor": ratio}
    vocab, pad = raw.get("padded_vocab_size", raw.get("vocab_size")), raw.get("pad_token_id")
    return GlmConfig(
        vocab_size=vocab, hidden_size=raw["hidden_size"], intermediate_size=raw["ffn_hidden_size"], num_hidden_layers=raw["num_layers"],
        num_attention_heads=raw["num_attention_heads"], head_dim=raw["kv_channels"], rms_norm_eps=raw["layernorm_epsilon"],
        num_key_value_heads=raw["multi_query_group_num"] if raw.get("multi_query_attention", True) else raw["num_attention_heads"],
        attention_bias=raw["add_qkv_bias"], max_position_embeddings=raw["seq_length"], rope_parameters=rope, bos_token_id=1, eos_token_id=2,
        pad_token_id=pad if pad is not None and 0 <= pad < vocab else 0, attention_dropout=0.0, tie_word_embeddings=False)


def baichuan_config(raw):
    """7B: rotary positions, Llama itself; 13B names no table of positions: ALiBi."""
    fields = {name: raw[name] for name in SHARED if name in raw} | {"tie_word_embeddings": False}
    if "max_position_embeddings" in raw:
        return LlamaConfig(**fields, max_position_embeddings=raw["max_position_embeddings"])
    return BaichuanConfig(**fields, max_position_embeddings=raw.get("model_max_length", 4096))


def internlm_config(raw):
    """InternLM-7B and 20B of 2023: Llama whose attention has biases; the tensors have Llama's names."""
    fields = {name: raw[name] for name in (*SHARED, "max_position_embeddings") if name in raw}
    return LlamaConfig(**fields, attention_bias=raw.get("bias", True), tie_word_embeddings=False)


def has_normed_head(raw):
    """Whether the head is Baichuan2's, whose rows are normalised."""
    return raw.get("model_type") == "baichuan" and ("z_loss_weight" in raw or raw.get("vocab_size") == 125696)


def qwen_config(raw):
    """Both generations of Qwen-1's field names; half of the published MLP width is each of gate and up."""
    def first(*names):
        return next((raw[name] for name in names if name in raw), None)
    heads, length = first("num_attention_heads", "n_head"), first("seq_length", "n_positions", "max_position_embeddings")
    return QwenConfig(
        vocab_size=first("padded_vocab_size", "vocab_size"), hidden_size=first("hidden_size", "n_embd"), num_attention_heads=heads,
        num_hidden_layers=first("num_hidden_layers", "n_layer"), num_key_value_heads=heads, rms_norm_eps=raw.get("layer_norm_epsilon", 1e-6),
        intermediate_size=first("intermediate_size", "ffn_hidden_size") // 2, seq_length=length,
        max_position_embeddings=max(length, raw.get("max_position_embeddings", length)),
        rope_parameters={"rope_type": "default", "rope_theta": float(raw.get("rotary_emb_base", 10000.0))},
        initializer_range=raw.get("initializer_range", 0.02), use_dynamic_ntk=raw.get("use_dynamic_ntk", True),
        use_logn_attn=raw.get("use_logn_attn", True), bos_token_id=raw.get("bos_token_id"), eos_token_id=raw.get("eos_token_id"),
        pad_token_id=raw.get("pad_token_id"), tie_word_embeddings=False)


def _is_chatglm3(raw):
    """The published files differ in little: 3 has the shorter window, or the length that its own code saved, or says its name."""
    return "chatglm3" in str(raw.get("_name_or_path", "")) or "vocab_size" in raw or raw["seq_length"] == 8192


def _known(cls, raw):
    return {name: value for name, value in raw.items() if name in cls.__annotations__}
