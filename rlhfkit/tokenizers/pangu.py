"""Pangu's tokenizer: jieba's words, each encoded by sentencepiece on its own, with the ids of the 2023 tokenizer.

Special tokens are cut out of the text before jieba sees it, so jieba's source needs no edit as it did in 2023, and user
words or patches in jieba's shared state cannot move an id. `</s>`, `<mask>`, `<eod>` in a text are plain, as then.
"""
import io
import os
import re
from itertools import chain
from pathlib import Path

import jieba
import sentencepiece
from transformers import PreTrainedTokenizer

from rlhfkit.tokenizers.segmenter import BLOCK, join_words, loaded
from rlhfkit.tokenizers.spread import batches, encode, tokens_in

VOCAB_FILE = "vocab.model"
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "<eot>", "pad_token": "<pad>", "unk_token": "<unk>",
                  "sep_token": "<sep>"}
_FROM_VISIBLE = str.maketrans("▂▃", " \n", " ")


class PanguTokenizer(PreTrainedTokenizer):
    """Layouts: `<s> a <eot>` and, for a pair, `<s> a <sep> b <eot>`. Pads right unless `padding_side="left"`."""

    vocab_files_names = {"vocab_file": VOCAB_FILE}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file, **kwargs):
        self.vocab_file = str(vocab_file)
        self.sp = sentencepiece.SentencePieceProcessor(model_file=self.vocab_file)
        self._pieces = {self.sp.id_to_piece(i): i for i in range(len(self.sp))}    # super().__init__ asks for them
        self._remembered = {}
        super().__init__(**(SPECIAL_TOKENS | kwargs))

    def encode_texts(self, texts, num_proc=1):
        """texts: list of str -> list of list of ids without `<s>` and `<eot>`, in the order of the texts.

        The same ids as `encode(text, add_special_tokens=False)` for each text, without transformers' work per call.
        `num_proc` processes share the work; they start in half a second and pay from some million characters on.
        """
        if texts and all(text in self._remembered for text in texts):
            return [list(self._remembered[text]) for text in texts]
        return encode(self.sp, self._added_tokens_encoder, texts, num_proc)

    def remember(self, texts):
        """Encode texts at once, for calls of `encode_texts` with a few of them each; the next call of this forgets them."""
        self._remembered, texts = {}, list(dict.fromkeys(texts))
        self._remembered = dict(zip(texts, self.encode_texts(texts)))

    @property
    def vocab_size(self):
        return len(self._pieces)

    def get_vocab(self):
        return self._pieces | self._added_tokens_encoder

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        pair = [] if token_ids_1 is None else [self.sep_token_id, *token_ids_1]
        return [self.bos_token_id, *token_ids_0, *pair, self.eos_token_id]

    def get_special_tokens_mask(self, token_ids_0, token_ids_1=None, already_has_special_tokens=False):
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens=True)
        pair = [] if token_ids_1 is None else [1, *[0] * len(token_ids_1)]
        return [1, *[0] * len(token_ids_0), *pair, 1]

    def convert_tokens_to_string(self, tokens):
        """`▂` and `▃` become space and newline, unknown pieces `⁇`; `<s>` and `</s>` have no text."""
        return self.sp.decode(list(tokens)).translate(_FROM_VISIBLE)

    def save_vocabulary(self, save_directory, filename_prefix=None):
        path = Path(save_directory) / (f"{filename_prefix}-{VOCAB_FILE}" if filename_prefix else VOCAB_FILE)
        path.write_bytes(self.sp.serialized_model_proto())
        return (str(path),)

    def _tokenize(self, text, **kwargs):
        return self.sp.encode(join_words([text])[0], out_type=str)

    def _convert_token_to_id(self, token):
        return self._pieces.get(token, self.sp.unk_id())

    def _convert_id_to_token(self, index):
        """Pangu-13B's head has 64 rows more than the vocabulary has pieces: such ids are unknown, not an error."""
        return self.sp.id_to_piece(index) if index < len(self.sp) else self.sp.id_to_piece(self.sp.unk_id())


def train_vocab(texts, folder, vocab_size):
    """Train a sentencepiece vocabulary on jieba's words -> PanguTokenizer; writes `folder/vocab.model`.

    Special ids are the published ones. `vocab_size` is an upper bound: a small corpus gives fewer pieces. Characters
    stay as they are (the published model makes full-width signs half-width). Equal texts give equal bytes.
    Raises ValueError when the distinct characters of the texts alone are more than `vocab_size`.
    """
    parts = (part for text in texts for part in tokens_in(SPECIAL_TOKENS.values()).split(text) if part)
    model = io.BytesIO()                                        # a file's name would be stored in the model's bytes
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=chain.from_iterable(map(join_words, batches(parts))), model_writer=model, model_type="unigram",
            vocab_size=vocab_size, hard_vocab_limit=False, num_threads=1, normalization_rule_name="identity",
            character_coverage=1.0, max_sentence_length=1 << 24, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
            user_defined_symbols=["▃", "▂", "<sep>", "<pad>", "<mask>", "<eod>", "<eot>"])
    except RuntimeError as error:
        raise ValueError(f"vocab_size is {vocab_size}; sentencepiece cannot train with it on these texts; it must be "
                         f"above their number of distinct characters + 10 ({error})") from error
    path = Path(folder) / VOCAB_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_bytes(model.getvalue())
    os.replace(path.with_suffix(".part"), path)
    return PanguTokenizer(path)


def patch_jieba():
    """Make jieba's own functions keep Pangu's special tokens whole, for people who call jieba themselves.

    Two things are needed together: the tokens in the class that jieba splits by, and each token in its dictionary.
    """
    if _undo:
        return
    loaded(jieba.dt)
    tokens = ("</s>", *SPECIAL_TOKENS.values())
    prefixes = {token[:end] for token in tokens for end in range(1, len(token) + 1)}
    _undo.update(regex=jieba.re_han_default, counts={prefix: jieba.dt.FREQ.get(prefix) for prefix in prefixes})
    total = jieba.dt.total
    for token in tokens:
        jieba.dt.add_word(token)
    _undo["added"] = jieba.dt.total - total
    jieba.re_han_default = re.compile("(" + "|".join(map(re.escape, tokens)) + "|" + BLOCK.pattern[1:])


def unpatch_jieba():
    """Put jieba's splitting class and dictionary counts back as they were before `patch_jieba()`."""
    if not _undo:
        return
    jieba.re_han_default = _undo["regex"]
    jieba.dt.total -= _undo["added"]
    for prefix, count in _undo["counts"].items():
        if count is None:
            jieba.dt.FREQ.pop(prefix, None)
        else:
            jieba.dt.FREQ[prefix] = count
    _undo.clear()


_undo = {}
