"""What differs from one model family to the next: how a record becomes ids, which classes load the folder, what LoRA adapts.

The family is looked up in a folder's config.json, never in its path (the 2023 kit tested substrings of paths, some 100 times). A model
type that is not listed here but that transformers knows is written through the chat template that ships with it.
"""
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from rlhfkit import encodings
from rlhfkit.models import layouts, originals
from rlhfkit.tokenizers.baichuan import BaichuanTokenizer
from rlhfkit.tokenizers.chatglm import ChatGLM2Tokenizer, ChatGLM3Tokenizer, ChatGLMTokenizer
from rlhfkit.tokenizers.glm import GLMChineseTokenizer
from rlhfkit.tokenizers.pangu import PanguTokenizer
from rlhfkit.tokenizers.qwen import QwenTokenizer

DTYPES = {"float32": torch.float32, "mixed": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
hf_logging.disable_progress_bar()           # a bar for each load and save hides the lines that matter
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")      # or DeepSpeed says at each start that it guessed so
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
MARK = "rlhfkit_family"                     # in the config.json of our folders, whose model type is that of a native class


@dataclass(frozen=True)
class Family:
    """`encode(tokenizer, record, answer=None, max_length=None) -> (prompt_ids, answer_ids)`: only the user's text is shortened, never the
    template; answer_ids end with the end token; without an answer they are empty and prompt_ids are ready for generation.
    `encode_text(tokenizer, text) -> (read_ids, text_ids)` of one document: the loss is on the second, its end token included.
    `blank(tokenizer, text_ids) -> (read_ids, text_ids)`: pre-training rows of a model that reads both ways.
    `config(raw) -> config`: of an original folder's config.json; `table`: its tensors' names (models/layouts.py)."""

    name: str
    encode: Callable
    encode_text: Callable
    lora_targets: tuple = ()            # empty: every linear layer
    tokenizer_class: type = AutoTokenizer
    config: Callable | None = None
    table: dict = field(default_factory=dict)
    end: str = ""                       # the token that ends an answer, empty: the tokenizer's eos
    blank: Callable | None = None

    def end_ids(self, tokenizer):
        """Ids that end an answer."""
        return [tokenizer.convert_tokens_to_ids(self.end) if self.end else tokenizer.eos_token_id]


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LLAMA_LIKE = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
FUSED = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
FAMILIES = {family.name: family for family in (
    Family("pangu", encodings.encode_pangu, encodings.text_pangu, ("q_proj", "k_proj", "v_proj", "c_proj", "c_fc"), PanguTokenizer,
           originals.pangu_config),
    Family("glm", encodings.encode_glm, encodings.text_glm, FUSED, GLMChineseTokenizer, originals.glm_config,
           end="<|endofpiece|>", blank=encodings.blank_glm),
    Family("chatglm", encodings.encode_chatglm, encodings.text_chatglm, FUSED, ChatGLMTokenizer, originals.chatglm_config, end="<eop>"),
    Family("chatglm2", encodings.encode_chatglm2, encodings.text_chatglm2, (*ATTENTION, "gate_up_proj", "down_proj"), ChatGLM2Tokenizer,
           originals.chatglm2_config, layouts.CHATGLM2),
    Family("chatglm3", encodings.encode_chatglm3, encodings.text_chatglm2, (*ATTENTION, "gate_up_proj", "down_proj"), ChatGLM3Tokenizer,
           originals.chatglm2_config, layouts.CHATGLM2),
    Family("baichuan", encodings.encode_plain, encodings.text_bos, LLAMA_LIKE, BaichuanTokenizer, originals.baichuan_config, layouts.BAICHUAN),
    Family("internlm", encodings.encode_plain, encodings.text_bos, LLAMA_LIKE, BaichuanTokenizer, originals.internlm_config),
    Family("qwen", encodings.encode_qwen, encodings.text_qwen, LLAMA_LIKE, QwenTokenizer, originals.qwen_config, layouts.QWEN,
           end="<|im_end|>"),
)}
NATIVE = Family("native", encodings.encode_chat, encodings.text_plain)


def family_of(path):
    """The Family of a model folder, or of a model's config."""
    raw = path.to_dict() if hasattr(path, "model_type") else _read_config(path)
    return FAMILIES.get(raw.get(MARK) or originals.original_family(raw), NATIVE)


def load_tokenizer(path, family=None):
    """The tokenizer of a folder; `family` (a name or a Family) only where config.json does not tell."""
    folder = _folder(path)
    family = _family(folder, family)
    try:
        tokenizer = family.tokenizer_class.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, TypeError, RuntimeError) as error:         # RuntimeError: sentencepiece
        raise ValueError(f"no tokenizer of family {family.name} in {folder}: {error}; put its vocabulary file beside config.json") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(path, family=None):
    """The model's config of a folder."""
    raw, family = _read_config(path), _family(_folder(path), family)
    if family.config is None or MARK in raw:
        try:
            return AutoConfig.from_pretrained(path, trust_remote_code=False)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path} has model_type {raw.get('model_type')!r}, which neither rlhfkit nor transformers knows; rlhfkit has "
                             f"{', '.join(FAMILIES)}, and its README says how to add one") from error
    try:
        config = family.config(raw)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}/config.json is not that of a {family.name} model ({error}); copy the folder again, or name its "
                         f"family: {', '.join(FAMILIES)}") from error
    setattr(config, MARK, family.name)
    return config


def load_model(path, family=None, dtype=None, device="cpu"):
    """The causal language model of a folder, in eval mode; dtype: float32 (default), bfloat16, float16. (T5 is loaded too, for `rk.time_steps`.)
    Raises ValueError for weights that are damaged, missing or left over; the reward model of a folder is `rk.score`'s to load."""
    folder = _folder(path)
    family = _family(folder, family)
    if "RewardModel" in (_read_config(folder).get("architectures") or ()):
        raise ValueError(f"{folder} holds a reward model, not a language model; give it as reward_path, or to rk.score")
    if not any(list(folder.glob(pattern)) for pattern in WEIGHTS):
        raise FileNotFoundError(f"{folder} has a config.json but no weights; expected {' or '.join(WEIGHTS)}")
    given = dict(dtype=DTYPES[dtype or "float32"], output_loading_info=True, ignore_mismatched_sizes=True)      # check_keys names them
    if str(device) != "cpu":
        given["device_map"] = {"": str(device)}             # each tensor goes there from its file
    try:
        if family.config is None:
            config = load_config(folder)
            kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            model, info = kind.from_pretrained(folder, config=config, trust_remote_code=False, **given)
        else:
            config = load_config(folder, family)
            weights = layouts.to_ours(layouts.read_weights(folder), family.table, config, originals.has_normed_head(_read_config(folder)))
            if "device_map" in given:           # the host would convert at a third of the speed
                given["dtype"] = next((t.dtype for t in weights.values() if t.is_floating_point()), given["dtype"])
            model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(None, config=config, state_dict=weights, **given)
    except Exception as error:
        if isinstance(error, (OSError, ValueError, RuntimeError)) or "Safetensor" in type(error).__name__:
            raise ValueError(f"the weights in {folder} cannot be read: {error}") from error
        raise
    check_keys(folder, info)
    model.config._name_or_path = str(folder)
    for p in model.parameters():                # buffers stay as their classes made them
        p.data = p.data.to(DTYPES[dtype or "float32"])
    model.config.dtype = DTYPES[dtype or "float32"]
    return model.eval()


def check_keys(folder, info):
    """Raise ValueError when from_pretrained's loading info names missing, unexpected or misshapen weights."""
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(k) for k in info.get(what) or ())
        if names:
            raise ValueError(f"{folder}: {len(names)} {what.replace('_', ' ')}, first {', '.join(names[:5])}; the weights and config.json "
                             "do not belong together, or a file is missing: copy the folder again")


def check_vocabulary(model, tokenizer):
    """Raise ValueError when the tokenizer has ids that the model has no embedding for (Pangu-13B has 64 rows more than ids)."""
    rows, ids = model.get_input_embeddings().num_embeddings, len(tokenizer)
    if ids > rows:
        raise ValueError(f"the vocabulary has {ids} tokens, the model embeds {rows}; they do not belong together: copy the folder again")


def empty_model(path):
    """The model of a folder on the meta device: shapes without memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(load_config(path))


def _folder(path):
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give the folder of a model, or run the stage that makes it first")
    return folder


def _family(folder, family):
    if family is None:
        return family_of(folder)
    if isinstance(family, Family):
        return family
    if family not in FAMILIES:
        raise ValueError(f"family is {family!r}; known: {', '.join(FAMILIES)}, or leave it out for a native transformers model")
    return FAMILIES[family]


def _read_config(path):
    file = _folder(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path} has no config.json, so it is no model folder")
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} cannot be read: {error}; copy the folder again") from error
