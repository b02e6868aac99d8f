"""Many texts to ids in batches, here or over several processes; the results come in the order of the texts.

The processes are joblib's, which unlike multiprocessing's start from a notebook's cell and from a script without a guard.
"""
import functools
import gc
import re
from contextlib import contextmanager
from itertools import chain

import sentencepiece
from joblib import Parallel, delayed

from rlhfkit.tokenizers import segmenter

BATCH_TEXTS, BATCH_CHARACTERS = 10_000, 1 << 20                 # a batch ends at either: 100 MB of memory at the most


def encode(sp, whole, texts, num_proc=1):
    """sp: SentencePieceProcessor, whole: token -> id, for the tokens that are cut out of a text first -> list of ids of each text.

    Raises ValueError when `num_proc` is below 1.
    """
    if num_proc < 1:
        raise ValueError(f"num_proc is {num_proc}; it is the number of processes that share the work: give 1 or more")
    some = list(batches(texts))
    num_proc = min(num_proc, len(some))
    with no_collection():
        if num_proc > 1:
            model = sp.serialized_model_proto()
            results = Parallel(num_proc)(delayed(_encode_elsewhere)(model, whole, batch) for batch in some)
        else:
            results = [_encode(sp, whole, batch) for batch in some]
        return list(chain.from_iterable(results))


def tokens_in(whole):
    """The pattern of tokens that stay whole, as a group: splitting by it keeps them. Of two that fit, the longer."""
    return re.compile("(" + "|".join(re.escape(token) for token in sorted(whole, key=len, reverse=True)) + ")")


def batches(texts):
    """Texts, one by one -> lists of them."""
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) == BATCH_TEXTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


@contextmanager
def no_collection():
    """Python does not look for garbage here: it would walk millions of new lists again and again (1.4 times as long)."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _encode(sp, whole, batch):
    """The work on one batch, in this process."""
    split = tokens_in(whole).split
    rows = [split(text) for text in batch]                      # texts and tokens in turn, the first and last are texts
    ids = iter(sp.encode(segmenter.join_words([part for row in rows for part in row[::2]]), num_threads=1))
    encoded = []
    for row in rows:
        encoded.append(next(ids))
        for token in row[1::2]:
            encoded[-1] += [whole[token], *next(ids)]
    return encoded


def _encode_elsewhere(model, whole, batch):
    """The work on one batch, in a process of its own that keeps model and dictionary for the next."""
    return _encode(_processor(model), whole, batch)


@functools.lru_cache(1)
def _processor(model):
    return sentencepiece.SentencePieceProcessor(model_proto=model)
