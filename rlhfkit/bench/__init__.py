"""Speed and memory: a run for each combination of fields, each in processes of its own."""
from rlhfkit.bench.sweep import sweep

__all__ = ["sweep"]
