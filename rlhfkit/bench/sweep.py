"""A sweep: the same run once for each combination of the given fields, measured by the run itself.

Each row is a launched run in a folder of its own, so a sweep that was cut short goes on where it stopped, and a
row that runs out of memory is a row with an error, not the end of the sweep.
"""
import contextlib
import dataclasses
import difflib
import io
import math
import os
from itertools import product
from pathlib import Path

import pandas as pd

from rlhfkit.launcher import WorkerError, launch

FIGURES = ("tokens_per_second", "seconds_per_step", "memory_gib")
OWN = ("output_dir", "logging_steps")       # set by the sweep


def sweep(config, num_processes=0, **lists):
    """Cross the named fields of `config` -> DataFrame: the fields, tokens_per_second (of all processes, no padding),
    seconds_per_step, memory_gib (one process's peak), error; also written to table.csv in config.output_dir.

    lists: field=[value, …], e.g. batch_size=[4, 8], zero_stage=[0, 2]. A few steps each do: set max_steps.
    num_processes 0 counts as 1, a worker of its own for each row. A row that fails has the worker's last error in
    `error` and is tried again by the next call. Raises ValueError for a name that the config lacks or an empty list,
    TypeError for a value of the wrong type, FileExistsError when output_dir holds a sweep of another run."""
    _check(config, lists)
    folder, table = Path(config.output_dir), pd.DataFrame()
    rows = [dict(zip(lists, values)) for values in product(*lists.values())]
    for row, one in zip(rows, [_config(config, row) for row in rows]):
        found = dict.fromkeys(FIGURES, math.nan) | {"error": ""} | _measure(one, num_processes)
        print(_name(row), found["error"] or "  ".join(f"{name} {found[name]:.4g}" for name in FIGURES), sep="  ", flush=True)
        table = pd.concat([table, pd.DataFrame([row | found])], ignore_index=True)
        folder.mkdir(parents=True, exist_ok=True)
        table.to_csv(folder / "table.partial", index=False)
        os.replace(folder / "table.partial", folder / "table.csv")
    return table


def _check(config, lists):
    known = [f.name for f in dataclasses.fields(config) if f.name not in OWN]
    for name, values in lists.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            why = "the sweep sets it for each row; leave it out" if name in OWN else \
                f"{type(config).__name__} has no such field; did you mean {near!r}?"
            raise ValueError(f"{name} cannot be swept: {why}")
        if not isinstance(values, (list, tuple)) or not values:
            raise ValueError(f"{name} is {values!r}; it must be a list of values that is not empty; "
                             f"write {name}=[{getattr(config, name)!r}]")
    if not lists:
        raise ValueError("nothing to sweep; name a field and its values, e.g. batch_size=[4, 8]")


def _config(config, row):
    """The row's config, or the ValueError of what does not go together (offload with zero_stage 0, say)."""
    folder = os.path.join(config.output_dir, _name(row))
    try:
        return dataclasses.replace(config, **row, logging_steps=1, output_dir=folder)
    except ValueError as error:
        return error


def _measure(config, num_processes):
    if isinstance(config, ValueError):
        return {"error": str(config)}
    try:
        with contextlib.redirect_stdout(io.StringIO()):         # the run's lines are in its log.txt
            metrics = launch(config, max(1, num_processes)).metrics
    except WorkerError as error:
        return {"error": str(error).splitlines()[0].removeprefix("a worker failed: ")}
    return {name: metrics[name] for name in FIGURES if name in metrics}


def _name(row):
    return ",".join(f"{name}={str(value).replace(os.sep, '_')}" for name, value in row.items())
