"""Many texts to ids in batches, here or over several processes; the results come in the order of the texts.

The processes are plain children with pipes. Those of multiprocessing would run the caller's script again, from its first
line, and a notebook's cells have no file to run. They import neither torch nor transformers and start in half a second.
"""
import gc
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain

import sentencepiece

from rlhfkit.tokenizers import segmenter

BATCH_TEXTS, BATCH_CHARACTERS = 10_000, 1 << 20                 # a batch ends at either: 100 MB of memory at the most


def encode(sp, whole, texts, num_proc=1):
    """sp: SentencePieceProcessor, whole: token -> id, for the tokens that are cut out of a text first -> list of ids of each text.

    Raises ValueError when `num_proc` is below 1, RuntimeError when one of its processes dies.
    """
    if num_proc < 1:
        raise ValueError(f"num_proc is {num_proc}; it is the number of processes that share the work: give 1 or more")
    some = list(batches(texts))
    num_proc = min(num_proc, len(some))
    with _no_collection():
        results = _spread(sp, whole, some, num_proc) if num_proc > 1 else [_encode(sp, whole, batch) for batch in some]
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
def _no_collection():
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


def _spread(sp, whole, some, num_proc):
    """Encode batches in `num_proc` processes, each fed by a thread of this one -> their results, in order."""
    code = "import sys; sys.path[:] = sys.argv[1:]; from rlhfkit.tokenizers import spread; spread._serve()"
    tables = segmenter.tables() if segmenter.numba else None
    first = pickle.dumps((sp.serialized_model_proto(), whole, tables), pickle.HIGHEST_PROTOCOL)
    own = threading.local()

    def work(batch):
        message = pickle.dumps(batch, pickle.HIGHEST_PROTOCOL)
        if not hasattr(own, "child"):
            command = [sys.executable, "-c", code, *sys.path]
            own.child = children.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            message = first + message
        try:
            own.child.stdin.write(message)
            own.child.stdin.flush()
            result = pickle.load(own.child.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            with suppress(OSError):
                own.child.stdin.close()                         # else it is tried again, and that error hides this one
            raise RuntimeError(f"one of num_proc={num_proc} tokenizing processes ended with code {own.child.wait()}; each must "
                               "live to the end; if memory was short (code -9), use a smaller num_proc") from error
        if isinstance(result, Exception):
            raise result
        return result

    with ExitStack() as children, ThreadPoolExecutor(num_proc) as threads:
        return list(threads.map(work, some))


def _serve():
    """The life of such a process: the model, then batches come on stdin; ids, or an error, go to stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)                # an interrupt is the parent's to handle; our end is that of stdin
    gc.disable()
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)                                               # a library that prints must not break the pickles
    model, whole, tables = pickle.load(sys.stdin.buffer)
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    if tables:
        segmenter.tables = lambda: tables                       # it takes a second to make them
    while sys.stdin.buffer.peek(1):
        try:
            result = _encode(sp, whole, pickle.load(sys.stdin.buffer))
        except Exception as error:
            result = error
        pickle.dump(result, results, pickle.HIGHEST_PROTOCOL)
        results.flush()
