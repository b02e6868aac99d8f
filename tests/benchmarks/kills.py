"""PPO runs that are killed by SIGKILL and started again by the same command until they end, against a run that was let alone:
weights, figures, samples and kept rollouts must be equal, bit by bit.

    python tests/benchmarks/kills.py [--kills 100] [--processes 0 2] [--seed 0] [--folder runs/kills]

Moments are drawn between the first step and the end, most of them inside a phase (rollout, scoring, update, save), some uniformly
in time. processes: 0 trains in the process that is started, n in n workers; a third of the kills then take one worker only.
"""
import argparse
import collections
import functools
import hashlib
import importlib
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE, MARKERS = Path(__file__).resolve(), "RLHFKIT_KILLS_MARKERS"
METHODS = (("rlhfkit.experience:Experience", "sample", "rollout"), ("rlhfkit.experience:Experience", "score", "scoring"),
           ("rlhfkit.stages.ppo:PPOTrainer", "_update", "update"), ("rlhfkit.stages.ppo:PPOTrainer", "checkpoint", "save"),
           ("rlhfkit.stages.ppo:PPOTrainer", "finish", "save"))
PHASES = tuple(dict.fromkeys(phase for _, _, phase in METHODS))
STEPS, ROWS = 6, 16                     # of a run; prompts a step over all processes
PATIENCE = 300                          # seconds after which a start counts as stuck
UNEQUAL = ("seconds", "tokens_per_second", "memory")    # figures of the clock and the machine


def score(prompts, answers):
    """A reward function that needs no model: how many characters the first line has not."""
    return [float(len(set(answer) - set(prompt))) for prompt, answer in zip(prompts, answers)]


def prepared(folder):
    """The folder, with a tiny model and couplets."""
    import rlhfkit as rk
    from rlhfkit.samples.couplets import held_out
    rk.tiny(folder / "model", num_layers=2)
    records = [rk.Record(f"上联：{a}", (rk.Answer(b, 1.0), rk.Answer(a, 0.0)), "下联：") for a, b in held_out(40)]
    rk.write_records(records[:32], folder / "data/train.jsonl")
    rk.write_records(records[32:], folder / "data/dev.jsonl")
    return folder


def command(folder, name, processes, **more):
    """-> the command that starts the run `name` in a folder that `prepared` made, and starts it again."""
    share = max(1, processes)
    config = dict(
        stage="ppo", model_path=f"{folder}/model", data_path=f"{folder}/data", output_dir=f"{folder}/{name}", seed=1,
        max_length=64, max_new_tokens=12, batch_size=ROWS // share, mini_batch_size=ROWS // 2 // share, ppo_epochs=2,
        max_steps=STEPS, save_steps=2, eval_steps=3, logging_steps=1, learning_rate=1e-3, critic="actor",
        reward_function="kills:score", kl_target=1.0, kl_horizon=100, normalize_scores="running", ema_decay=0.9,
        ptx_path=f"{folder}/data", ptx_coefficient=0.1, ptx_batch_size=2 // share, keep_rollouts=True, samples=2, report_to="none")
    file = folder / f"{name}-{processes}.json"
    file.write_text(json.dumps({"config": config | more, "processes": processes}), encoding="utf-8")
    return [sys.executable, str(HERE), "child", str(file)]


class Start:
    """One start of a command, and the phases that its rank 0 has entered since: (name, seconds) each."""

    def __init__(self, arguments, log):
        self.markers, self.log = Path(f"{log}.markers"), log
        self.markers.write_text("")
        paths = os.pathsep.join(p for p in (str(HERE.parent), os.environ.get("PYTHONPATH", "")) if p)
        environment = {MARKERS: str(self.markers), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with open(log, "w", encoding="utf-8") as lines:
            self.process = subprocess.Popen(arguments, stdout=lines, stderr=lines, env=os.environ | environment,
                                            start_new_session=True)

    def phases(self):
        lines = self.markers.read_text(encoding="utf-8").splitlines(keepends=True)
        return [(name, float(at)) for name, at in (line.split() for line in lines if line.endswith("\n"))]

    def wait_for(self, phase, count=1):
        """Until `phase`, or any where it is None, was entered `count` times -> False when the run ended before."""
        deadline = time.monotonic() + PATIENCE
        while sum(phase in (None, name) for name, _ in self.phases()) < count:
            if self.process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {phase or 'step'} within {PATIENCE} s; see {self.log}")
            time.sleep(0.001)
        return True

    def kill(self, members):
        """SIGKILL to processes of the run, which must then end by itself -> the phase that was hit, None where it was over."""
        if self.process.poll() is not None:
            return None
        for pid in members:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.wait(timeout=PATIENCE)
        while any(_state(pid)[:1] not in ([], ["Z"]) for pid in members):
            time.sleep(0.01)
        return self.phases()[-1][0]

    def end(self):
        """Let it run to its end -> whether it ended well."""
        return self.process.wait(timeout=PATIENCE) == 0


def tree(pid):
    """The process and all that descend from it, parents first; workers are in sessions of their own."""
    parents, found = {int(name): _state(name)[1:2] for name in os.listdir("/proc") if name.isdigit()}, [pid]
    for parent in found:
        found += [child for child, its in parents.items() if its == [str(parent)]]
    return found


def workers(pids):
    found = []
    for pid in pids:
        try:
            line = Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            continue
        found += [pid] if "rlhfkit.launcher" in line and "torch.distributed.run" not in line else []
    return found


def _state(pid):
    """[state, parent, …] of a process, [] where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def outcome(folder):
    """What a finished run left: hashes of its weights, its figures without those of the clock, its samples and rollouts."""
    files = [file for file in sorted(folder.rglob("*.safetensors")) if "checkpoint-" not in str(file.relative_to(folder))]
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    rows, kept = (*result["history"], result["metrics"]), sorted((folder / "rollouts").glob("*.jsonl"))
    return {"weights": {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
            "figures": [{name: x for name, x in row.items() if not name.startswith(UNEQUAL)} for row in rows],
            "samples": result["samples"],
            "rollouts": [json.loads(line) for file in kept for line in file.read_text(encoding="utf-8").splitlines()]}


def differences(ours, theirs):
    """-> the names of what differs between two outcomes."""
    return [name for name in ours if ours[name] != theirs[name]]


def undisturbed(folder, processes):
    """A run that is let alone -> its outcome, {phase: its median seconds}, seconds from the first step to the end."""
    name = f"whole{processes}"
    start = Start(command(folder, name, processes), folder / f"{name}.log")
    if not start.end():
        raise RuntimeError(f"the run failed that nobody killed: {start.log.read_text(encoding='utf-8')[-2000:]}")
    entered, spans = start.phases(), collections.defaultdict(list)
    for (phase, at), (_, until) in zip(entered, entered[1:]):
        spans[phase].append(until - at)
    medians = {phase: statistics.median(some) for phase, some in spans.items()}
    return outcome(folder / name), medians, entered[-1][1] - entered[0][1]


def moments(processes, spans, total, rng):
    """Draw moments without end: (phase or None, the how-manieth of a start, seconds into it, whether one worker alone dies)."""
    while True:
        phase = rng.choice([*PHASES, None])             # None: uniformly in time
        yield (phase, 1 if phase is None else rng.randint(1, 3), rng.uniform(0, spans.get(phase, total)),
               processes > 1 and rng.random() < 1 / 3)


def killed_run(folder, name, processes, drawn):
    """Start a run once for each drawn moment, with a kill there if it lives so long, and once more -> (phases hit, whether it
    ended well)."""
    arguments, hits = command(folder, name, processes), []
    for number, (phase, count, seconds, one) in enumerate(drawn):
        start = Start(arguments, folder / f"{name}.{number}.log")
        if not start.wait_for(None):
            return hits, start.end()
        members = tree(start.process.pid)
        if not start.wait_for(phase, count):
            return hits, start.end()
        time.sleep(seconds)
        hit = start.kill(workers(members)[-1:] if one else members)
        if hit is None:
            return hits, start.end()
        hits.append(hit)
    return hits, Start(arguments, folder / f"{name}.last.log").end()


def campaign(folder, processes, kills, seed=0, a_run=4):
    """Kill runs of `a_run` kills each until there were `kills` -> {"kills": phases hit, "runs", "ended", "equal", "wrong"}."""
    whole, spans, total = undisturbed(folder, processes)
    drawn = moments(processes, spans, total, random.Random(seed * 1000 + processes))
    found = {"kills": collections.Counter(), "runs": 0, "ended": 0, "equal": 0, "wrong": []}
    while found["kills"].total() < kills:
        name, most = f"killed{processes}-{found['runs']}", min(a_run, kills - found["kills"].total())
        hits, ended = killed_run(folder, name, processes, itertools.islice(drawn, most))
        wrong = differences(outcome(folder / name), whole) if ended else ["its end"]
        found["kills"].update(hits)
        for count, more in (("runs", 1), ("ended", ended), ("equal", not wrong)):
            found[count] += more
        if wrong:
            found["wrong"].append(f"{folder / name}, killed in {', '.join(hits)}: {', '.join(wrong)}")
        else:
            shutil.rmtree(folder / name)
    return found


def mark_phases(file):
    """Let this process write into `file` which phase it enters, and "other" when it leaves one."""
    def marked(real, phase):
        @functools.wraps(real)
        def method(*args, **kwargs):
            _mark(file, phase)
            try:
                return real(*args, **kwargs)
            finally:
                _mark(file, "other")
        return method

    for place, method, phase in METHODS:
        module, _, name = place.partition(":")
        owner = getattr(importlib.import_module(module), name)
        setattr(owner, method, marked(getattr(owner, method), phase))


def _mark(file, phase):
    with open(file, "a", encoding="utf-8") as lines:
        lines.write(f"{phase} {time.time()}\n")


def child(file):
    import rlhfkit as rk
    from rlhfkit.configs import config_from
    values = json.loads(Path(file).read_text(encoding="utf-8"))
    rk.launch(config_from(values["config"]), values["processes"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="for each number of processes")
    parser.add_argument("--processes", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="new, and kept; left out: a temporary one")
    options = parser.parse_args()
    folder = prepared((options.folder or Path(tempfile.mkdtemp())).resolve())
    names = ("processes", "kills", *PHASES, "other", "runs", "ended", "equal", "seconds")
    print("".join(f"{name:>10}" for name in names), flush=True)
    for processes in options.processes:
        start, found = time.perf_counter(), campaign(folder, processes, options.kills, options.seed)
        row = {"processes": processes, "seconds": round(time.perf_counter() - start)} | found["kills"] | found
        row["kills"] = found["kills"].total()
        print("".join(f"{row.get(name, 0):>10}" for name in names), *found["wrong"], sep="\n    ", flush=True)
    if not options.folder:
        shutil.rmtree(folder)


if MARKERS in os.environ and __name__ == "kills" and int(os.environ.get("RANK", 0)) == 0:      # imported for `score`, in a run
    mark_phases(os.environ[MARKERS])

if __name__ == "__main__":
    child(sys.argv[2]) if sys.argv[1:2] == ["child"] else main()
