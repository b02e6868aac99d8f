"""Qwen-1's tokenizer on transformers' fast backend, built from the ranks in `qwen.tiktoken`; ids equal the `tiktoken` package's.

`eos_token` is `<|im_end|>`, which ends a turn of the chat models and a row of the 2023 kit; `pad_token` is `<|endoftext|>`, which
ends a document. Special tokens in a text stay whole; as in the original none is added around it (the 2023 kit added two).
Saving writes `tokenizer.json` too, which AutoTokenizer loads without this package.
"""
import base64
import json
import os
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlhfkit.tokenizers.pieces import extra_tokens, own_settings, read_file

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
NAMED = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "im_start_token": "<|im_start|>"}
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}       # bytes that the byte-level alphabet shows as themselves
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_CHARACTER = [chr(byte) if byte in _PRINTABLE else chr(256 + _OTHERS.index(byte)) for byte in range(256)]
_BYTE = {character: byte for byte, character in enumerate(_CHARACTER)}


class QwenTokenizer(PreTrainedTokenizerFast):
    """Layouts: `a`; a pair is `a b`. Ids: the file's ranks, then `SPECIAL_TOKENS`."""

    vocab_files_names = {"vocab_file": "qwen.tiktoken", "tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file=None, tokenizer_file=None, **kwargs):
        self._tokenizer = _backend(_ranks(read_file(vocab_file, type(self), kwargs.get("name_or_path")), vocab_file))
        added = {str(token) for token in (kwargs.get("added_tokens_decoder") or {}).values()}
        super().__init__(**own_settings(kwargs), **NAMED, extra_special_tokens=extra_tokens(kwargs, SPECIAL_TOKENS, added))

    @classmethod
    def convert_to_native_format(cls, **kwargs):
        return kwargs                       # `__init__` reads the published file, never a tokenizer.json that someone made of it

    @classmethod
    def make_vocab(cls, texts, folder, vocab_size):
        """Learn at most `vocab_size` ranks, 256 or more, from texts -> tokenizer; writes `folder/qwen.tiktoken`, equal bytes for
        equal texts."""
        if vocab_size < 256:
            raise ValueError(f"vocab_size is {vocab_size}; the bytes alone are 256: set it to 256 or more")
        backend = _pipeline(Tokenizer(models.BPE()))
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=_CHARACTER, show_progress=False)
        backend.train_from_iterator(texts, trainer)
        path = Path(folder) / cls.vocab_files_names["vocab_file"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").write_bytes(_lines(backend))
        os.replace(path.with_suffix(".part"), path)
        return cls(path)

    def encode_texts(self, texts):
        """texts: list of str -> list of list of ids; equal to `encode(text, add_special_tokens=False)` for each text."""
        self._tokenizer.no_padding()                # transformers leaves there what the last call asked for
        self._tokenizer.no_truncation()
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def save_vocabulary(self, save_directory, filename_prefix=None):
        name = self.vocab_files_names["vocab_file"]
        path = Path(save_directory) / (f"{filename_prefix}-{name}" if filename_prefix else name)
        path.write_bytes(_lines(self._tokenizer))
        return (str(path),)

    def _save_pretrained(self, save_directory, file_names, legacy_format=None, filename_prefix=None):
        saved = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        config = Path(file_names[0])
        text = json.loads(config.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        config.write_text(json.dumps(text, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return (*saved, *self.save_vocabulary(save_directory, filename_prefix))


def _ranks(data, path):
    """`qwen.tiktoken`: lines of base64 token and rank -> dict bytes to rank; ValueError with the file's name when it is damaged.
    A file cut between two lines shows nothing."""
    ranks, lines = {}, data.splitlines(keepends=True)
    try:
        for token, rank in (line.split() for line in lines):
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except ValueError as error:                     # binascii's too
        raise ValueError(f"{path}, line {len(ranks) + 1}: {error}; it must be base64 and a rank: copy it again") from error
    whole = sorted(ranks.values()) == list(range(len(lines))) and data.endswith(b"\n")
    if not whole or any(bytes([i]) not in ranks for i in range(256)):
        raise ValueError(f"{path} has {len(ranks)} tokens in {len(lines)} lines; ranks must be 0 to {len(lines) - 1}, each line "
                         "whole and the 256 bytes among them: copy it again")
    return ranks


def _backend(ranks):
    """tiktoken merges any two neighbours whose union is a token, lowest rank first: each split of a token is a merge."""
    names = {token: "".join(_CHARACTER[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        merges += [(names[a], names[b]) for a, b in cuts if a in ranks and b in ranks]
    model = models.BPE(vocab={names[t]: rank for t, rank in ranks.items()}, merges=merges, ignore_merges=True)
    backend = _pipeline(Tokenizer(model))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return backend


def _pipeline(backend):
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
                                                     pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    return backend


def _lines(backend):
    """The bytes of qwen.tiktoken for a backend's vocabulary."""
    ids = backend.get_vocab(with_added_tokens=False)
    tokens = (bytes(_BYTE[c] for c in token) for token in sorted(ids, key=ids.get))
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
