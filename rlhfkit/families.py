"""What differs from one model family to the next: how a record becomes ids, which classes load the folder, what LoRA adapts.

The family is looked up in a folder's config.json, never in its path (the 2023 kit tested substrings of paths, some 100 times). A model
type that is not listed here but that transformers knows is written through the chat template that ships with it.
"""
import json
import os
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from rlhfkit.models.pangu import PanguConfig, PanguForCausalLM
from rlhfkit.tokenizers.pangu import PanguTokenizer, train_vocab

DTYPES = {"float32": torch.float32, "mixed": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
hf_logging.disable_progress_bar()           # a bar for each load and save hides the lines that matter
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")      # or DeepSpeed says at each start that it guessed so
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class Family:
    """`encode(tokenizer, record, answer=None, max_length=None) -> (prompt_ids, answer_ids)`: only the user's text is shortened, never the
    template; answer_ids end with the end token; without an answer they are empty and prompt_ids are ready for generation.
    `encode_text(tokenizer, text) -> ids` of one document for pre-training, its end token included."""

    name: str
    encode: Callable
    encode_text: Callable
    lora_targets: tuple = ()            # empty: every linear layer
    config_class: type = AutoConfig
    model_class: type = AutoModelForCausalLM
    tokenizer_class: type = AutoTokenizer


def encode_pangu(tokenizer, record, answer=None, max_length=None):
    """`<s> prompt <sep> prefix`, then `answer <eot>`; in the 2023 kit generation lacked the `<s>` that training had.
    System text and earlier turns, which it dropped, stand before the prompt, a line each."""
    earlier = "".join(line + "\n" for line in (record.system, *(t for turn in record.history for t in turn)) if line)
    before, user, prefix, *answers = tokenizer.encode_texts([earlier, record.prompt, record.prefix] + ([answer] if answer is not None else []))
    answer_ids = answers[0] + [tokenizer.eos_token_id] if answers else []
    user = _shorten(user, 2 + len(before) + len(prefix) + len(answer_ids), len(answer_ids), max_length)
    return [tokenizer.bos_token_id] + before + user + [tokenizer.sep_token_id] + prefix, answer_ids


def encode_chat(tokenizer, record, answer=None, max_length=None):
    """The chat template that ships with the tokenizer, or `prompt` and `prefix` as they stand where there is none; end: eos."""
    answer_ids = []
    if answer is not None:
        answer_ids = tokenizer.encode(answer, add_special_tokens=False) + [tokenizer.eos_token_id]
    prompt_ids = _chat_ids(tokenizer, record, record.prompt)
    if max_length and len(prompt_ids) + len(answer_ids) > max_length:
        user = tokenizer.encode(record.prompt, add_special_tokens=False)
        user = _shorten(user, len(_chat_ids(tokenizer, record, "")) + len(answer_ids), len(answer_ids), max_length)
        while len(prompt_ids) + len(answer_ids) > max_length:      # a cut inside a character can make it longer
            prompt_ids = _chat_ids(tokenizer, record, tokenizer.decode(user).rstrip("\ufffd"))
            user = user[:-1]
    return prompt_ids, answer_ids


def text_pangu(tokenizer, text):
    """`<s> text <eot>`."""
    return [tokenizer.bos_token_id, *tokenizer.encode_texts([text])[0], tokenizer.eos_token_id]


def text_plain(tokenizer, text):
    """The tokenizer's own beginning, if it has one, the text, and eos."""
    return tokenizer.encode(text) + [tokenizer.eos_token_id]


FAMILIES = {
    "pangu": Family("pangu", encode_pangu, text_pangu, ("q_proj", "k_proj", "v_proj", "c_proj", "c_fc"),
                    PanguConfig, PanguForCausalLM, PanguTokenizer),
}
NATIVE = Family("native", encode_chat, text_plain)


def family_of(path):
    """The Family of a model folder, or of a model's config."""
    model_type = getattr(path, "model_type", None) or _read_config(path).get("model_type", "")
    return FAMILIES.get(model_type, NATIVE)


def load_tokenizer(path, family=None):
    """The tokenizer of a folder; `family` (a name or a Family) only where config.json does not tell."""
    folder = _folder(path)
    family = _family(folder, family)
    try:
        tokenizer = family.tokenizer_class.from_pretrained(folder)
    except (OSError, ValueError, TypeError, RuntimeError) as error:         # RuntimeError: sentencepiece
        raise ValueError(f"no tokenizer of family {family.name} in {folder}: {error}; put its vocabulary file beside config.json") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(path, family=None):
    """The model's config of a folder."""
    return _family(_folder(path), family).config_class.from_pretrained(_folder(path))


def load_model(path, family=None, dtype=None):
    """The causal language model of a folder, in eval mode; dtype: float32 (default), bfloat16, float16.
    Raises ValueError for weights that are damaged, missing or left over; the reward model of a folder is `rk.score`'s to load."""
    folder = _folder(path)
    family = _family(folder, family)
    if "RewardModel" in (_read_config(folder).get("architectures") or ()):
        raise ValueError(f"{folder} holds a reward model, not a language model; give it as reward_path, or to rk.score")
    if not any(list(folder.glob(pattern)) for pattern in WEIGHTS):
        raise FileNotFoundError(f"{folder} has a config.json but no weights; expected {' or '.join(WEIGHTS)}")
    try:
        model, info = family.model_class.from_pretrained(folder, dtype=DTYPES[dtype or "float32"], output_loading_info=True,
                                                         ignore_mismatched_sizes=True)      # check_keys names them
    except Exception as error:
        if isinstance(error, (OSError, ValueError, RuntimeError)) or "Safetensor" in type(error).__name__:
            raise ValueError(f"the weights in {folder} cannot be read: {error}; copy the folder again") from error
        raise
    check_keys(folder, info)
    return model.eval()


def check_keys(folder, info):
    """Raise ValueError when from_pretrained's loading info names missing, unexpected or misshapen weights."""
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(k) for k in info.get(what) or ())
        if names:
            raise ValueError(f"{folder}: {len(names)} {what.replace('_', ' ')}, first {', '.join(names[:3])}; the weights and config.json "
                             "do not belong together, or a file is missing: copy the folder again")


def check_vocabulary(model, tokenizer):
    """Raise ValueError when the tokenizer has ids that the model has no embedding for (Pangu-13B has 64 rows more than ids)."""
    rows, ids = model.get_input_embeddings().num_embeddings, len(tokenizer)
    if ids > rows:
        raise ValueError(f"the vocabulary has {ids} tokens, the model embeds {rows}; they do not belong together: copy the folder again")


def empty_model(path):
    """The model of a folder on the meta device: shapes without memory."""
    with torch.device("meta"):
        return family_of(path).model_class.from_config(load_config(path)) if family_of(path) is NATIVE else \
            family_of(path).model_class(load_config(path))


def tiny(output_dir, family="pangu", seed=0, vocab_path="", hidden_size=64, num_layers=4):
    """Write the folder of a tiny, untrained model and its tokenizer; the vocabulary is learnt from the samples, or a given vocab.model."""
    if family not in FAMILIES:
        raise ValueError(f"family is {family!r}; tiny models exist for {', '.join(FAMILIES)}")
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if vocab_path:
        if not Path(vocab_path).is_file():
            raise FileNotFoundError(f"vocab_path {vocab_path} is no file; give a sentencepiece model")
        tokenizer = PanguTokenizer(vocab_file=str(vocab_path))
    else:
        from rlhfkit.sources import build
        texts = sorted({t for r in build() for t in (r.prompt, r.prefix, *(a.text for a in r.answers)) if t})
        texts += [" ".join(string.ascii_letters + string.digits + string.punctuation)]      # options A to D, dates, units
        tokenizer = train_vocab(texts, folder, 2400)
    tokenizer.save_pretrained(folder)
    config = PanguConfig(vocab_size=tokenizer.vocab_size, hidden_size=hidden_size, num_layers=num_layers, num_heads=4,
                         initializer_range=0.06)            # 0.02 suits a width of 1024; a narrow model would start too flat
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        PanguForCausalLM(config).save_pretrained(folder)
    return str(folder)


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


def _shorten(user, template, answer, max_length):
    """The user's ids cut at their end so that all fits; ValueError when template and answer alone do not."""
    if not max_length or len(user) + template <= max_length:
        return user
    room = max_length - template
    if room < 1:
        raise ValueError(f"an answer of {answer} tokens and its template do not fit into max_length {max_length} with a prompt; "
                         f"set max_length to {template + 1} or more")
    return user[:room]


def _chat_ids(tokenizer, record, text):
    if not tokenizer.chat_template:
        return tokenizer.encode(text + record.prefix)
    messages = [{"role": "system", "content": record.system}] if record.system else []
    for user, assistant in record.history:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    messages.append({"role": "user", "content": text})
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    return list(ids) + tokenizer.encode(record.prefix, add_special_tokens=False)
