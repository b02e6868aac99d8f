"""Measuring runs: a sweep over the fields of a config, timed steps of any model."""
from rlhfkit.bench.steps import time_steps
from rlhfkit.bench.sweep import sweep

__all__ = ["sweep", "time_steps"]
