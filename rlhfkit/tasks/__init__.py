"""The benchmarks, one small file each: a new one is a file with a TASK, and its name below.

`rk.evaluate` takes a Task of your own too, without a change here.
"""
from difflib import get_close_matches

from rlhfkit.tasks import (afqmc, c3, ceval, ceval_cot, chid, cluewsc2020, cmmlu, cmnli, cmrc2018, couplets, csl, iflytek, mmlu,
                           ocnli, tnews)
from rlhfkit.tasks.task import Task

TASKS = {module.TASK.name: module.TASK for module in (
    ocnli, cmnli, chid, cmrc2018, cluewsc2020, c3, afqmc, csl, iflytek, tnews, ceval, ceval_cot, cmmlu, mmlu, couplets)}


def find_tasks(tasks):
    """A name, a Task or a list of them -> list of Tasks; ValueError offers the nearest names."""
    tasks = [tasks] if isinstance(tasks, (str, Task)) else list(tasks)
    if not tasks:
        raise ValueError(f"tasks is empty; name one or more of {', '.join(TASKS)}")
    for name in tasks:
        if not isinstance(name, Task) and name not in TASKS:
            near = get_close_matches(str(name).lower(), TASKS, n=3, cutoff=0.4)
            raise ValueError(f"task {name!r} is unknown; " + (f"did you mean {' or '.join(near)}? " if near else "")
                             + f"the tasks are {', '.join(TASKS)}")
    return [t if isinstance(t, Task) else TASKS[t] for t in tasks]
