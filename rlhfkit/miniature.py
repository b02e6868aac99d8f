"""Tiny, untrained models of every family with a tokenizer learnt from the samples: folders that nothing below can tell from downloaded ones.

Their configs are written in the published field names and go through the same reading as a published folder's.
"""
import string
from pathlib import Path

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, LlamaConfig, PreTrainedTokenizerFast

from rlhfkit.families import FAMILIES, MARK
from rlhfkit.tokenizers.chatglm import ChatGLMTokenizer
from rlhfkit.tokenizers.pangu import PanguTokenizer, train_vocab
from rlhfkit.tokenizers.qwen import QwenTokenizer

PIECES = 2400
NATIVE = "llama"            # the name of a tiny model that is transformers' own in all respects


def tiny(output_dir, family="pangu", seed=0, vocab_path="", hidden_size=64, num_layers=4):
    """Write the folder of a tiny, untrained model and its tokenizer -> its path; the vocabulary is learnt from the samples, or (pangu) a
    given vocab.model. family: a name in FAMILIES, or "llama" for one that transformers has."""
    if family not in (*FAMILIES, NATIVE):
        raise ValueError(f"family is {family!r}; tiny models exist for {', '.join(FAMILIES)} and {NATIVE}")
    if vocab_path and FAMILIES[family].tokenizer_class is not PanguTokenizer:
        raise ValueError(f"vocab_path is {vocab_path}; only pangu takes one: leave it empty for {family}")
    if vocab_path and not Path(vocab_path).is_file():
        raise FileNotFoundError(f"vocab_path {vocab_path} is no file; give a sentencepiece model")
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = PanguTokenizer(vocab_file=str(vocab_path)) if vocab_path else _tokenizer(family, folder)
    tokenizer.save_pretrained(folder)
    config = _config(family, tokenizer, hidden_size, num_layers)
    config.initializer_range = 0.06                         # 0.02 suits a width of 1024; a narrow model would start too flat
    if family in FAMILIES:
        setattr(config, MARK, family)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).save_pretrained(folder)
    return str(folder)


def _tokenizer(family, folder):
    from rlhfkit.sources import build
    texts = sorted({t for r in build() for t in (r.prompt, r.prefix, *(a.text for a in r.answers)) if t})
    texts += [" ".join(string.ascii_letters + string.digits + string.punctuation)]      # options A to D, dates, units
    if family == NATIVE:
        made = QwenTokenizer.make_vocab(texts, folder, PIECES)
        (folder / QwenTokenizer.vocab_files_names["vocab_file"]).unlink()
        return PreTrainedTokenizerFast(tokenizer_object=made.backend_tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made = FAMILIES[family].tokenizer_class
    if made is PanguTokenizer:
        return train_vocab(texts, folder, PIECES)
    return made.make_vocab(texts, folder, PIECES, **({"num_image_tokens": 0} if made is ChatGLMTokenizer else {}))


def _config(family, tokenizer, size, layers):
    """The config of a width and depth, from the published names of its fields."""
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in (
        ("mask", "[MASK]"), ("gmask", "[gMASK]"), ("smask", "[sMASK]"), ("eop", FAMILIES[family].end if family in FAMILIES else ""))}
    both = dict(vocab_size=len(tokenizer), hidden_size=size, num_attention_heads=4, max_position_embeddings=1024)
    special = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    llama = both | special | dict(num_hidden_layers=layers, intermediate_size=4 * size)
    prefix = both | special | dict(num_layers=layers, mask_token_id=ids["mask"], gmask_token_id=ids["gmask"], max_sequence_length=1024)
    chatglm2 = both | special | dict(
        num_layers=layers, padded_vocab_size=len(tokenizer), ffn_hidden_size=2 * size, kv_channels=size // 4, multi_query_group_num=2,
        layernorm_epsilon=1e-5, add_qkv_bias=True, seq_length=1024)
    if family == NATIVE:
        return LlamaConfig(**llama)
    raw = {
        "pangu": both | dict(num_layers=layers, num_heads=4),
        "glm": prefix | dict(sop_token_id=tokenizer.convert_tokens_to_ids("<|startofpiece|>"), eos_token_id=ids["eop"],
                             smask_token_id=ids["smask"]),
        "chatglm": prefix | dict(inner_hidden_size=4 * size), "chatglm2": chatglm2, "chatglm3": chatglm2, "baichuan": llama, "internlm": llama,
        "qwen": llama | dict(intermediate_size=8 * size, seq_length=1024)}[family]
    return FAMILIES[family].config(raw)
