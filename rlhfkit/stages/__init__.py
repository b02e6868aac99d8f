"""One stage, one file; `run` opens the run folder, hands over to the stage and stores what it returns."""
from importlib import import_module

from rlhfkit.engine import rank, say
from rlhfkit.saving import open_run


def run(config, num_processes=0):
    """Run a config in this process to the end -> Result; a finished run of the same config, data and model is returned as it is."""
    done = open_run(config, num_processes) if rank() == 0 else None
    if done:
        say(config.output_dir, f"{config.output_dir} holds this very run, finished: its result is returned")
        return done
    result = import_module(f"rlhfkit.stages.{config.stage}").run(config)
    return result.save() if rank() == 0 else result
