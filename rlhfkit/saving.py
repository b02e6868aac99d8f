"""The run folder: who owns it, what is in it, and that a save is whole or not at all.

A run is known by its config, data and model. The same run again returns its result or goes on from its newest whole checkpoint; another
run in the same folder is an error. Everything is written beside and renamed, so a full disk or a kill leaves what was there.
"""
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch

from rlhfkit.configs import Result
from rlhfkit.families import WEIGHTS
from rlhfkit.rows import data_hash
from rlhfkit.states import load_state, save_state

FREE = {"output_dir", "resume", "report_to", "save_steps", "save_total_limit"}       # may differ between two starts of one run
# Of PPO, whose checkpoints go on anywhere, also what changes only where things are computed; rows a process count times the processes.
PLACED = {"zero_stage", "offload", "bucket_size", "max_live_parameters", "overlap_comm", "pin_memory", "gradient_accumulation_steps",
          "gradient_checkpointing", "frozen_on"}
A_PROCESS = {"batch_size", "mini_batch_size", "ptx_batch_size"}


def open_run(config, num_processes=0):
    """The finished Result of this very run, or None after the folder is claimed for it (run.json).
    Raises FileExistsError for a folder that holds another run or other files."""
    folder = Path(config.output_dir)
    data = [data_hash(path) for path in (config.data_path, getattr(config, "ptx_path", "")) if path]
    run = {"config": config.to_dict(), "num_processes": num_processes, "data": " ".join(data),
           "models": {name: [fingerprint(path) for path in str(getattr(config, name, "")).split(",") if path]
                      for name in ("model_path", "reward_path")}}
    file = folder / "run.json"
    if file.is_file():
        other = _differences(run, json.loads(file.read_text(encoding="utf-8")))
        if other:
            raise FileExistsError(f"output_dir {folder} already holds another run ({'; '.join(other)}); choose another folder or delete it")
        if (folder / "result.json").is_file():
            return Result.load(folder)
    elif folder.exists() and (other := sorted(set(os.listdir(folder)) - {"run.partial"})):         # a claim that a full disk cut short
        raise FileExistsError(f"output_dir {folder} already holds other files ({other[0]}, …); choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    _write(file, json.dumps(run | {"versions": versions()}, ensure_ascii=False, indent=1))
    return None


def save_folder(folder, write):
    """`write(path)` into a folder beside, then move its files into `folder`: nothing is lost when writing fails half way."""
    folder, beside = Path(folder), Path(folder) / ".partial"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        write(str(beside))
        for file in sorted(beside.iterdir()):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def newest_checkpoint(folder, last_file):
    """The checkpoint-N with the largest N whose last-written file is there, or None; half-written ones are passed over."""
    whole = [p for p in Path(folder).glob("checkpoint-*") if (p / last_file).is_file() and p.name.split("-")[1].isdigit()]
    return max(whole, key=lambda p: int(p.name.split("-")[1]), default=None)


def save_checkpoint(folder, step, state, engines, keep, rank, barrier):
    """A checkpoint of a training loop of ours (PPO), by all processes together: `state` of plain numbers and tensors, the engines' states,
    each process's RNG. Written beside and renamed when all have written; the newest `keep` stay."""
    beside, final = Path(folder) / f".checkpoint-{step}", Path(folder) / f"checkpoint-{step}"
    if rank == 0:
        shutil.rmtree(beside, ignore_errors=True)
        for name in engines:
            (beside / name).mkdir(parents=True)
    barrier()
    for name, engine in engines.items():
        save_state(engine, beside / name)
    torch.save(rng_state(), beside / f"rng{rank}.pt")
    barrier()
    if rank == 0:
        torch.save(state | {"step": step}, beside / "state.pt")
        shutil.rmtree(final, ignore_errors=True)        # of an earlier start with resume=False
        os.replace(beside, final)
        for old in sorted(int(p.name.split("-")[1]) for p in Path(folder).glob("checkpoint-*"))[:-keep]:
            shutil.rmtree(Path(folder) / f"checkpoint-{old}")
    barrier()


def load_checkpoint(folder, engines, rank):
    """The state of the newest checkpoint that `save_checkpoint` wrote in `folder`, put into the engines and this process's RNG, or None."""
    newest = newest_checkpoint(folder, "state.pt")
    if newest is None:
        return None
    for name, engine in engines.items():
        load_state(engine, newest / name)
    if (newest / f"rng{rank}.pt").is_file():            # or there were fewer processes; sampling draws from seeds of its own
        set_rng_state(torch.load(newest / f"rng{rank}.pt", map_location="cpu", weights_only=True))
    return torch.load(newest / "state.pt", map_location="cpu", weights_only=True)


def rng_state():
    name, keys, *rest = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": [name, keys.tolist(), *rest]}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_rng_state(state):
    torch.set_rng_state(state["torch"])
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def fingerprint(path):
    """A hash of a model folder: names and sizes of its weight files, with the first and last MiB of each."""
    if not Path(path).is_dir():
        raise FileNotFoundError(f"{path} is no folder; give the folder of a model, or run the stage that makes it first")
    digest = hashlib.sha256()
    for file in sorted({f for pattern in WEIGHTS for f in Path(path).glob(pattern)}):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as f:
            digest.update(f.read(1 << 20))
            f.seek(max(0, size - (1 << 20)))
            digest.update(f.read())
    return digest.hexdigest()[:16]


def versions():
    """One line: the kit, its commit where it is a checkout, Python and the libraries that results depend on."""
    names = ("rlhfkit", "torch", "transformers", "trl", "peft", "deepspeed", "accelerate")
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} absent")
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        found.append(f"commit {commit.stdout.strip()}")
    except (OSError, subprocess.CalledProcessError):        # no git here, or no checkout
        pass
    return ", ".join([f"python {platform.python_version()}", *found])


def _differences(run, other):
    here, there, free = run["config"], other["config"], FREE
    found = [f"data: {other['data']} there, {run['data']} here"] if run["data"] != other["data"] else []
    found += [f"{key} has other weights" for key in run["models"] if run["models"][key] != other["models"].get(key)]
    processes = [max(1, r["num_processes"]) for r in (run, other)]
    if here["stage"] == "ppo":
        free = FREE | PLACED | A_PROCESS
        found += [f"{key}: {there.get(key)} for each of {processes[1]} processes there, {here[key]} for each of {processes[0]} here"
                  for key in sorted(A_PROCESS) if here[key] * processes[0] != there.get(key, 0) * processes[1]]
    elif run["num_processes"] != other["num_processes"]:
        found.append(f"num_processes: {other['num_processes']} there, {run['num_processes']} here")
    return [f"{key}: {there.get(key)!r} there, {value!r} here" for key, value in here.items()
            if key not in free and value != there.get(key)] + found


def _write(path, text):
    beside = path.with_suffix(".partial")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
