"""The sample corpora and evaluation rows that ship: our own texts, in the layouts of the public data sets."""
from pathlib import Path

RAW = Path(__file__).parent / "raw"
EVAL = Path(__file__).parent / "eval"
