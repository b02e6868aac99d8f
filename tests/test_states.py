"""Training state as plain tensors: saved under one number of processes and ZeRO stage, gone on with under another, bit by bit the same."""
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import torch

import rlhfkit as rk
from rlhfkit.engine import Engine, rank, world_size
from rlhfkit.states import Average, load_state, save_state

CONFIG = rk.SFT("model", "data", "out", warmup_ratio=0.0)
ROWS = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(1))


def engine(stage=0, offload="none"):
    """A small engine with an average; its two layers do not divide evenly among two processes."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    made = Engine(model, dataclasses.replace(CONFIG, zero_stage=stage, offload=offload), 0.01, 10)
    made.average = Average(made, 0.9)
    return made


def trained(made, steps):
    for i in steps:
        made.backward(made(ROWS[i][rank()::world_size()]).pow(2).sum() / 4)
        made.step()
        made.advance()
    return made


def weights(made, average=False):
    """On rank 0: all weights, or their average, as one list."""
    if average:
        with made.average.in_place():
            return weights(made)
    found = made.weights()
    return None if rank() else [round(x, 6) for tensor in found.values() for x in tensor.flatten().tolist()]


def test_a_plain_engine_goes_on_bit_by_bit(tmp_path):
    straight = trained(engine(), range(6))
    save_state(trained(engine(), range(3)), tmp_path)
    again = engine()
    load_state(again, tmp_path)
    trained(again, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(again.weights().values(), straight.weights().values()))
    assert all(torch.equal(a, b) for a, b in zip(again.average.shares.values(), straight.average.shares.values()))
    assert again.learning_rate == straight.learning_rate


def test_a_state_before_the_first_step_is_a_state_too(tmp_path):
    save_state(engine(), tmp_path)
    again = engine()
    load_state(again, tmp_path)
    assert weights(trained(again, [0])) == weights(trained(engine(), [0]))


def test_large_states_are_written_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("rlhfkit.states.SHARD", 100)
    made = trained(engine(), range(3))
    save_state(made, tmp_path)
    again = engine()
    load_state(again, tmp_path)
    assert len(list(tmp_path.glob("state-*.safetensors"))) > 3 and weights(again) == weights(made)


def test_the_average_by_hand_and_in_place_only_for_a_while():
    made = engine()
    first = made.model[0].weight.clone()
    trained(made, [0])
    own, wanted = made.model[0].weight.clone(), 0.9 * first + 0.1 * made.model[0].weight
    with made.average.in_place():
        torch.testing.assert_close(made.model[0].weight, wanted)
    assert torch.equal(made.model[0].weight, own)


def test_every_stage_goes_on_from_every_other_one_and_samples_from_whole_weights(tmp_path):
    """I7: DeepSpeed refuses its own checkpoints under another number of processes; ours are of no stage and no number."""
    straight = trained(engine(), range(6))
    (tmp_path / "plain").mkdir()
    save_state(trained(engine(), range(3)), tmp_path / "plain")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, str(tmp_path)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("0", "1", "2", "3", "2-offload", "3-offload"):
        again = engine()
        load_state(again, tmp_path / name)
        trained(again, range(3, 6))
        assert weights(again) == weights(straight), name
        assert weights(again, average=True) == weights(straight, average=True), name


def worker(folder):
    """Two processes: each stage saves after three steps, goes on from the plain state and from stage 3's, and gives its weights together."""
    import deepspeed
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    first = None
    for name in ("3", "0", "1", "2", "2-offload", "3-offload"):
        stage, offload = int(name[0]), {"2-offload": "optimizer", "3-offload": "all"}.get(name, "none")
        (folder / name).mkdir(exist_ok=True)
        torch.distributed.barrier()
        made = trained(engine(stage, offload), range(3))
        save_state(made, folder / name)
        straight = weights(trained(made, range(3, 6)))
        first = first or straight
        assert straight == first, f"stage {name} learns other weights"
        for source in ("plain", "3"):
            again = engine(stage, offload)
            load_state(again, folder / source)
            assert weights(trained(again, range(3, 6))) == straight, f"stage {name} from {source}"
            with again.whole() as model:
                values = model(ROWS[0])
            assert torch.equal(values, again(ROWS[0])), f"stage {name} samples from other weights"
            trained(again, [0])                     # and the hooks are back
    torch.distributed.barrier()
    os._exit(0)                 # a thread of gloo's that is still there when Python ends aborts the process now and then


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
