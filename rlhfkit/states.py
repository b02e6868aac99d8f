"""An engine's training state as plain named tensors, the same for a module in this kernel and for DeepSpeed at any ZeRO stage, so that a
checkpoint goes on under another number of processes or another stage (DeepSpeed's own checkpoints refuse that).

For each trained parameter: its float32 value, Adam's two moments, and, when there is one, its running average; whole, in their own shapes.
Rank 0 writes them in files of SHARD bytes; every process reads what is its share.
"""
import json
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

SHARD = 2 << 30
MOMENTS = ("exp_avg", "exp_avg_sq")


def save_state(engine, folder):
    """Write the engine's state into a folder (call it on all processes)."""
    folder, first, held, size, count = Path(folder), not dist.is_initialized() or dist.get_rank() == 0, {}, 0, 0
    for name, tensor in _tensors(engine):
        if first:
            held[name] = tensor.detach().to("cpu", copy=True).contiguous()
            size += held[name].nbytes
            if size > SHARD:
                save_file(held, folder / f"state-{count}.safetensors")
                held, size, count = {}, 0, count + 1
    if first:
        save_file(held, folder / f"state-{count}.safetensors")
        (folder / "state.json").write_text(json.dumps({
            "steps": _steps(engine), "schedule": engine.scheduler.state_dict(), "scaler": _scaler(engine)}))


def load_state(engine, folder):
    """Put what `save_state` wrote into an engine of any kind with the same parameters."""
    facts = json.loads((Path(folder) / "state.json").read_text())
    parameters, device = dict(_trained(engine)), next(engine.model.parameters()).device
    if facts["steps"]:
        _make_moments(engine, facts["steps"])
    for file in sorted(Path(folder).glob("state-*.safetensors")):
        for name, value in load_file(file).items():
            kind, _, parameter = name.partition("/")
            _put(engine, parameter, parameters[parameter], kind, value.to(device))
    engine.scheduler.load_state_dict(facts["schedule"])
    if facts["scaler"] and _scaler(engine):
        vars(engine.deepspeed.optimizer.loss_scaler).update(facts["scaler"])
    for group, rate in zip(engine.optimizer.param_groups, engine.scheduler.get_last_lr()):
        group["lr"] = rate


class Average:
    """Exponential moving average of the trained weights, in float32 (of this process's share under ZeRO-3)."""

    def __init__(self, engine, decay):
        self.engine, self.decay = engine, decay
        self.shares = {name: _share(p).detach().float().clone() for name, p in _trained(engine)}

    @torch.no_grad()
    def update(self):
        for name, p in _trained(self.engine):
            self.shares[name].lerp_(_share(p).float(), 1 - self.decay)

    @contextmanager
    def in_place(self):
        """The averaged weights stand in the model, to be saved or judged; the trained ones come back after."""
        own = {name: _share(p).detach().clone() for name, p in _trained(self.engine)}
        self._write(self.shares)
        try:
            yield
        finally:
            self._write(own)

    def _write(self, shares):
        with torch.no_grad():
            for name, p in _trained(self.engine):
                _share(p).copy_(shares[name])


def _trained(engine):
    return [(name, p) for name, p in engine.model.named_parameters() if p.requires_grad]


def _share(p):
    """What this process holds of a parameter."""
    return p.ds_tensor if hasattr(p, "ds_tensor") else p.data


def _tensors(engine):
    """(kind/name, whole tensor) of all that training changes."""
    inner, sharded = engine.optimizer, _sharded(engine)
    moments = MOMENTS if _steps(engine) else ()
    for name, p in _trained(engine):
        if sharded:
            from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
            yield f"weight/{name}", safe_get_full_fp32_param(p)
        else:
            yield f"weight/{name}", p
        for kind in moments:
            yield f"{kind}/{name}", safe_get_full_optimizer_state(p, kind) if sharded else inner.state[p][kind]
        if engine.average:
            yield f"average/{name}", _whole(p, engine.average.shares[name])


@torch.no_grad()
def _put(engine, name, p, kind, value):
    """Write a whole tensor's share of this process where `_tensors` read it."""
    if kind == "average":
        engine.average.shares[name].copy_(_part(p, value))
    elif not _sharded(engine):
        (p if kind == "weight" else engine.optimizer.state[p][kind]).copy_(value)
    else:
        from deepspeed import utils
        local = hasattr(p, "ds_tensor")             # stage 3; its setter of whole tensors fails where the last share is padded
        share = _part(p, value)
        if kind == "weight":
            (utils.safe_set_local_fp32_param if local else utils.safe_set_full_fp32_param)(p, share)
            _share(p).copy_(_part(p, value))
        else:
            (utils.safe_set_local_optimizer_state if local else utils.safe_set_full_optimizer_state)(p, share, kind)


def _whole(p, share):
    """A parameter's share of this process, and of all others, as one tensor of its shape."""
    if not hasattr(p, "ds_tensor"):
        return share
    parts = [torch.empty_like(share) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, share)
    return torch.cat(parts)[:p.ds_numel].view(p.ds_shape)


def _part(p, whole):
    """This process's share of a whole tensor."""
    if not hasattr(p, "ds_tensor"):
        return whole
    size = p.ds_tensor.numel()
    flat = torch.nn.functional.pad(whole.flatten(), (0, size * dist.get_world_size() - whole.numel()))
    return flat.narrow(0, size * dist.get_rank(), size)


def _sharded(engine):
    return engine.deepspeed is not None and hasattr(engine.deepspeed.optimizer, "optimizer")


def _flat(engine):
    """The tensors that the inner optimiser steps on."""
    if not _sharded(engine):
        return [p for _, p in _trained(engine)]
    outer = engine.deepspeed.optimizer
    names = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition")     # stages 1 and 2; 3; bf16
    return next(getattr(outer, name) for name in names if hasattr(outer, name))


def _steps(engine):
    """Adam's count of steps, 0 before the first."""
    states = engine.optimizer.state
    return int(next((states[t]["step"] for t in _flat(engine) if states.get(t)), 0))


def _make_moments(engine, steps):
    for tensor in _flat(engine):
        place = tensor.device if engine.optimizer.defaults["fused"] else "cpu"
        engine.optimizer.state[tensor] = {
            "step": torch.tensor(float(steps), device=place), **{kind: torch.zeros_like(tensor) for kind in MOMENTS}}
    link = getattr(engine.deepspeed and engine.deepspeed.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link:
        link()


def _scaler(engine):
    """The numbers of float16's loss scaler."""
    scaler = getattr(engine.deepspeed.optimizer, "loss_scaler", None) if engine.config.dtype == "float16" and engine.deepspeed else None
    return {name: value for name, value in vars(scaler).items() if type(value) in (int, float, bool)} if scaler else {}
