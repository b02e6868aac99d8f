"""What the sentencepiece tokenizers of the 2023 families share: reading the published file, ids, saving, tiny vocabularies.

A tokenizer follows from its vocabulary file alone: special tokens have the published names and ids whatever tokenizer_config.json
says, and the remote classes named there are ignored. Unlike in 2023 spaces beside a special token stay, and a piece that has a
special token's name keeps its own id.
"""
import io
import itertools
import os
import re
from pathlib import Path

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from transformers import AddedToken, PreTrainedTokenizer

LLAMA_FORMAT = {"model_type": "bpe", "byte_fallback": True, "split_digits": True, "allow_whitespace_only_pieces": True,
                "remove_extra_whitespaces": False, "normalization_rule_name": "identity"}


class SentencePieceTokenizer(PreTrainedTokenizer):
    """Ids in order: `leading` tokens (images), the file's pieces, `appended` tokens. A subclass states its facts and layouts."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]
    appended = ()
    named = {}              # attribute -> token; names that transformers lacks (`gmask_token`) get an `_id` as well
    parsed = ()             # the special tokens that stay whole when a text spells them, as in 2023; the others are plain text
    training = {}           # what `make_vocab` asks of sentencepiece

    def __init__(self, vocab_file, **kwargs):
        self._file = read_model(vocab_file, type(self), kwargs.get("name_or_path"))
        self.sp = sentencepiece.SentencePieceProcessor(model_proto=self._complete(self._file))
        self.leading = self._leading(vocab_file)
        pieces = map(self.sp.id_to_piece, range(len(self.sp)))
        pieces = (f"<piece {piece}>" if piece in self.appended else piece for piece in pieces)      # `sop` may be part of a word
        self._tokens = [*self.leading, *pieces, *self.appended]
        self._ids = {token: i for i, token in enumerate(self._tokens)}
        given = {int(i): token for i, token in (kwargs.pop("added_tokens_decoder", None) or {}).items()}
        known = {str(t): t for t in (*kwargs.values(), *given.values()) if isinstance(t, AddedToken)}      # keeps `single_word`
        own = dict.fromkeys([*self.named.values(), *self.appended])
        self._own = frozenset(own)
        self._added_tokens_decoder = {i: t for i, t in given.items() if str(t) not in own} | {
            self._ids[t]: known.get(t) or AddedToken(t, special=True, normalized=False) for t in own}
        extra = extra_tokens(kwargs, self.appended, {str(token) for token in given.values()})
        super().__init__(**own_settings(kwargs), **self.named, extra_special_tokens=extra)

    @classmethod
    def make_vocab(cls, texts, folder, vocab_size, **kwargs):
        """Learn a vocabulary of at most `vocab_size` pieces from texts -> tokenizer; writes it into `folder` under the published
        name, equal bytes for equal texts. Signs keep their width. ValueError: fewer pieces than distinct characters."""
        path = Path(folder) / cls.vocab_files_names["vocab_file"]
        lines = [line for text in texts for line in text.split("\n") if line.strip()]
        train_model(lines, path, vocab_size, **cls.training)
        return cls(path, **kwargs)

    def encode_texts(self, texts):
        """texts: list of str -> list of list of ids without special tokens around them, in one sentencepiece call; equal to
        `encode(text, add_special_tokens=False)` for each text."""
        split, shift = self._splitter().split, len(self.leading)
        rows = [split(text) for text in texts]
        encoded = self.sp.encode([self._prepare(part) for row in rows for part in row[::2]], num_threads=1)
        ids = iter([[i + shift for i in part] for part in encoded] if shift else encoded)
        return [next(ids) if len(row) == 1 else
                [i for k, part in enumerate(row) for i in ([self.convert_tokens_to_ids(part)] if k % 2 else next(ids))]
                for row in rows]

    @property
    def vocab_size(self):
        return len(self._tokens)

    def get_vocab(self):
        return self._ids | self._added_tokens_encoder

    def tokenize(self, text, **kwargs):
        if kwargs.get("split_special_tokens", self.split_special_tokens):
            return self._tokenize(text)
        return [t for k, part in enumerate(self._splitter().split(text)) for t in ([part] if k % 2 else self._tokenize(part))]

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        before, between, after = self._frame(token_ids_0, token_ids_1 is not None)
        return [*before, *token_ids_0, *between, *(token_ids_1 or ()), *after]

    def get_special_tokens_mask(self, token_ids_0, token_ids_1=None, already_has_special_tokens=False):
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens=True)
        before, between, after = self._frame(token_ids_0, token_ids_1 is not None)
        parts = (before, 1), (token_ids_0, 0), (between, 1), (token_ids_1 or (), 0), (after, 1)
        return [flag for ids, flag in parts for _ in ids]

    def convert_tokens_to_string(self, tokens):
        """Special tokens stand as they are; ` ⁇ ` is a character that the vocabulary lacks."""
        special = self._added_tokens_encoder.keys() - {self.unk_token}
        runs, shift = itertools.groupby(tokens, special.__contains__), len(self.leading)
        return "".join("".join(run) if whole else self.sp.decode([self._convert_token_to_id(t) - shift for t in run])
                       for whole, run in runs)

    def save_vocabulary(self, save_directory, filename_prefix=None):
        name = self.vocab_files_names["vocab_file"]
        path = Path(save_directory) / (f"{filename_prefix}-{name}" if filename_prefix else name)
        path.write_bytes(self._file)
        return (str(path),)

    def _frame(self, token_ids_0, pair):
        """-> the ids before the first text, between the two (after the only one), and at the end."""
        return [], [], []

    def _leading(self, vocab_file):
        """Tokens whose ids precede the pieces'."""
        return ()

    def _complete(self, model):
        """The bytes of the published file -> those of the model to run."""
        return model

    def _prepare(self, text):
        """A part of a text without special tokens -> what sentencepiece sees."""
        return text

    def _splitter(self):
        """The pattern that cuts a text at the tokens that stay whole: plain parts, maybe empty, alternate with those tokens."""
        words = {t.content: t.single_word for t in self._added_tokens_decoder.values()}
        words = {t: words.get(t) for t in (*(words.keys() - self._own), *self.parsed)}
        longest_first = sorted(words, key=lambda t: (-len(t), t))
        patterns = [rf"(?<![^ ]){re.escape(t)}(?![^ ])" if words[t] else re.escape(t) for t in longest_first]
        return re.compile(f"({'|'.join(patterns) or '(?!)'})")

    def _tokenize(self, text, **kwargs):
        return [self._tokens[i + len(self.leading)] for i in self.sp.encode(self._prepare(text))]

    def _convert_token_to_id(self, token):
        return self._ids.get(token, self.sp.unk_id() + len(self.leading))

    def _convert_id_to_token(self, index):
        """Published heads have more rows than there are tokens: such ids are unknown, not an error."""
        return self._tokens[index] if 0 <= index < len(self._tokens) else self.sp.id_to_piece(self.sp.unk_id())


def own_settings(kwargs):
    """tokenizer_config.json's fields without special tokens and remote classes: both are the class's to say."""
    ignored = "auto_map", "tokenizer_file", "additional_special_tokens", "model_specific_special_tokens", "extra_special_tokens"
    return {k: v for k, v in kwargs.items() if k not in ignored and (isinstance(v, bool) or not k.endswith("_token"))}


def extra_tokens(kwargs, own, added):
    """The special tokens beyond transformers' names: ours, and of the folder's those that it really added to the vocabulary."""
    return list(dict.fromkeys([*own, *(str(t) for t in kwargs.get("extra_special_tokens") or () if str(t) in added)]))


def read_file(path, tokenizer_class, folder=""):
    """The bytes of a published vocabulary file; an error names the file when it is absent."""
    name = tokenizer_class.vocab_files_names["vocab_file"]
    if path and Path(path).is_file():
        return Path(path).read_bytes()
    error = FileNotFoundError if path else ValueError       # from_pretrained, which gives no path, hides an OSError's text
    raise error(f"{path or Path(folder or '.') / name} is no file; {tokenizer_class.__name__} reads the published vocabulary "
                f"{name}: copy it beside config.json")


def read_model(path, tokenizer_class, folder=""):
    """The bytes of a whole sentencepiece file; ValueError with its name when it is damaged."""
    data = read_file(path, tokenizer_class, folder)
    try:
        model = sentencepiece_model_pb2.ModelProto.FromString(data)
        damage = "" if model.pieces and model.HasField("normalizer_spec") else "no end"     # cut between two fields it parses
    except DecodeError as error:
        damage = str(error)
    if damage:
        raise ValueError(f"{path} ({len(data)} bytes) is no whole sentencepiece model ({damage}); it is cut short, or another "
                         "file: copy it again")
    return data


def train_model(lines, path, vocab_size, **options):
    """Train a sentencepiece model of at most `vocab_size` pieces on a list of str and write it to `path` whole or not at all."""
    model = io.BytesIO()                                        # a file's name would be stored in the model's bytes
    options = {"pad_id": -1, "num_threads": 1, "character_coverage": 1.0, "max_sentence_length": 1 << 24} | options
    try:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, vocab_size=vocab_size,
                                                 unk_id=0, bos_id=1, eos_id=2, minloglevel=2, **options)
    except RuntimeError as error:
        most = re.search(r"too high .*<= (\d+)", str(error))    # so few texts give a BPE fewer pieces
        if most and int(most[1]) < vocab_size:
            return train_model(lines, path, int(most[1]), **options)
        raise ValueError(f"vocab_size is {vocab_size}; sentencepiece cannot train with it on these texts; it must be above their "
                         f"number of distinct characters + 10 (+ 256 bytes where the format has them) ({error})") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_bytes(model.getvalue())
    os.replace(path.with_suffix(".part"), path)
