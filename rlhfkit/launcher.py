"""From a notebook cell to n workers: `launch` writes the run's JSON, starts torch's launcher in a process group of its own, streams rank 0's
lines and returns the Result from disk. Training never shares a process with the kernel; no notebook_launcher, which forks it.

num_processes 0 runs in this very process, without DeepSpeed; the numbers are the same.
"""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from rlhfkit.configs import Result, config_from
from rlhfkit.saving import open_run
from rlhfkit.stages import run

ENDED = "run.pid"           # there while a detached run lives


class WorkerError(RuntimeError):
    """A worker failed; the message holds its last lines and the path of the whole log."""


def launch(config, num_processes=0, hostfile=None, detach=False):
    """Run a config to its end -> Result. 0: in this kernel; n: n workers with DeepSpeed; hostfile: DeepSpeed's launcher over its hosts.
    detach: return at once with the folder; `attach` goes on with the stream, `stop` ends it."""
    _check(config, num_processes, hostfile)
    if num_processes == 0 and not hostfile:
        if detach:
            raise ValueError("detach is True with num_processes 0; a detached run needs workers: set num_processes to 1 or more")
        return run(config)
    done = open_run(config, num_processes)
    if done:
        print(f"{config.output_dir} holds this very run, finished: its result is returned")
        return done
    folder = Path(config.output_dir)
    if _alive(folder):                      # of a kernel that was killed, or detached
        print(f"the workers of {folder} are still running: this cell follows them")
        return str(folder) if detach else attach(folder)
    with open(folder / "worker.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(_command(folder, num_processes, hostfile), stdout=log, stderr=subprocess.STDOUT,
                                   env=_environment(num_processes), start_new_session=True)
    (folder / ENDED).write_text(str(process.pid))
    if detach:
        return str(folder)
    try:
        return _follow(folder, lambda: process.poll() is None)
    finally:
        _end(process.pid)
        process.wait()
        (folder / ENDED).unlink(missing_ok=True)


def attach(output_dir):
    """Go on with the stream of a detached run, from its beginning, to its end -> Result."""
    folder = Path(output_dir)
    if not (folder / "worker.log").is_file():
        raise FileNotFoundError(f"{folder} holds no launched run (no worker.log); attach takes the output_dir of a launch with workers")
    result = _follow(folder, lambda: _alive(folder))
    (folder / ENDED).unlink(missing_ok=True)
    return result


def stop(output_dir):
    """End a detached run and all its workers; what its last checkpoint holds is kept."""
    file = Path(output_dir) / ENDED
    if file.is_file():
        _end(int(file.read_text()))
        file.unlink()


def worker(run_file):
    """What each worker runs: the config of run.json under the process group that torch's launcher describes."""
    values = json.loads(Path(run_file).read_text(encoding="utf-8"))
    import deepspeed
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False      # gloo alone: nothing is compiled at start, no g++ is needed
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    run(config_from(values["config"]), values["num_processes"])
    torch.distributed.destroy_process_group()


def _check(config, num_processes, hostfile):
    gpus = torch.cuda.device_count()
    if type(num_processes) is not int or num_processes < 0:
        raise ValueError(f"num_processes is {num_processes!r}; it must be a whole number, 0 for this kernel")
    if gpus and num_processes > gpus:
        raise ValueError(f"num_processes is {num_processes}; this machine has {gpus} GPUs; ask for {gpus} or fewer")
    if num_processes == 0 and not hostfile and config.zero_stage:
        raise ValueError(f"zero_stage is {config.zero_stage} with num_processes 0; ZeRO needs workers: set num_processes to 1 or more")
    if hostfile and not Path(hostfile).is_file():
        raise FileNotFoundError(f"hostfile {hostfile} is no file; expected lines like 'host1 slots=8'")


def _command(folder, num_processes, hostfile):
    target = ["-m", "rlhfkit.launcher", str(folder / "run.json")] if not hostfile else ["--module", "rlhfkit.launcher", str(folder / "run.json")]
    if hostfile:
        return [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), *target]
    return [sys.executable, "-u", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes),
            "--redirects", "3", "--tee", "0:3", "--log-dir", str(folder / "workers"), *target]


def _environment(num_processes):
    threads = max(1, (os.cpu_count() or 1) // max(1, num_processes))
    cpu = {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}
    return {**os.environ, "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", **cpu}


def _follow(folder, alive):
    """Print the stage's own lines (log.txt) as they come; when the workers have ended, the Result or a WorkerError."""
    shown, last = folder / "log.txt", False
    position = 0
    while not last:
        last = not alive()                      # read once more after the end
        if shown.is_file():
            with open(shown, encoding="utf-8") as f:
                f.seek(position)
                text = f.read()
                position = f.tell()
            print(text, end="", flush=True)
        if not last:
            time.sleep(0.2)
    if (folder / "result.json").is_file():
        return Result.load(folder)
    raise WorkerError(_failure(folder))


def _failure(folder):
    """The error of the worker that failed first (the others then lose their connection to it) and its last lines."""
    logs = sorted((folder / "workers").glob("*/attempt_*/*/stderr.log"), key=os.path.getmtime)      # it also stopped writing first
    for log in [*logs, folder / "worker.log"]:
        lines = [re.sub(r"^\[(default|rank)\d+\]:", "", line) for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
        errors = [line for line in lines if "Error" in line and "ChildFailedError" not in line]
        if errors:
            break
    return f"a worker failed: {errors[-1].strip() if errors else 'no message'}\nall of it: {log}\n" + "\n".join(lines[-30:])


def _alive(folder):
    try:
        pid = int((folder / ENDED).read_text())
        try:
            return os.waitpid(pid, os.WNOHANG) == (0, 0)         # a child of this kernel
        except ChildProcessError:
            os.kill(pid, 0)                                     # of a kernel before
            return True
    except (FileNotFoundError, ProcessLookupError):
        return False


def _end(pid, patience=10.0):
    """Ask the process group to end, then kill it."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(pid, sign)
        except ProcessLookupError:
            return
        end = time.monotonic() + patience
        while time.monotonic() < end:
            try:
                os.killpg(pid, 0)
                os.waitpid(-pid, os.WNOHANG)
            except (ProcessLookupError, ChildProcessError):
                break
            time.sleep(0.1)


if __name__ == "__main__":
    worker(sys.argv[-1])
