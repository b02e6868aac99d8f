"""One small face for a plain module in this kernel and a DeepSpeed engine in a worker: forward, backward, step, weights; and who we are.

Losses are sums divided by a global count, so batch, accumulation and world size give one gradient: gradients are summed over micro-batches
and processes, never averaged (DeepSpeed averages; the engine multiplies by the world size before).
"""
import math
import os
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import get_scheduler

from rlhfkit.zero import deepspeed_config

UNSAID = {"kl_k2", "kl_k3", "kl_coefficient", "repetition", "score_std", "score_spread", "reward", "sampler_gap", "value_std", "approx_kl",
          "critic_grad_norm", "updates", "eval_finished", "eval_score_gold"}
SCHEDULES = {"constant": "constant_with_warmup"}        # what transformers calls ours


class Engine:
    """A trainable model with its AdamW and a schedule over `total_steps` calls of `advance`, of which neither the first nor the last has rate
    0; under a launcher, a DeepSpeed engine (ZeRO 0 to 3). `average`: the running average of its weights, where the loop keeps one (states.py)."""

    def __init__(self, model, config, learning_rate, total_steps):
        self.config, self.deepspeed, self.average = config, None, None
        self.model = model.to(device())
        trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.95),
                                           fused=True if device().type == "cuda" and config.offload == "none" else None)
        rises = bool(config.warmup_ratio)       # transformers' schedules then begin with a step at 0
        self.scheduler = get_scheduler(SCHEDULES.get(config.lr_scheduler_type, config.lr_scheduler_type), self.optimizer,
                                       math.ceil(config.warmup_ratio * total_steps) + rises, total_steps + rises)
        if rises:
            with warnings.catch_warnings(action="ignore"):          # that no update came before
                self.advance()
        if world_size() > 1 or config.zero_stage:
            import deepspeed
            self.deepspeed, _, _, _ = deepspeed.initialize(
                model=model, optimizer=self.optimizer, config=deepspeed_config(config, trainer=False))

    def __call__(self, *args, **kwargs):
        return (self.deepspeed or self.model)(*args, **kwargs)

    def backward(self, loss, last=True):
        """Add the gradient of `loss`; `last`: the last micro-batch before `step`."""
        if self.deepspeed:
            self.deepspeed.set_gradient_accumulation_boundary(last)
            self.deepspeed.backward(loss * world_size())
        else:
            loss.backward()

    def step(self):
        """Clip and update -> norm of the gradient before clipping. Raises FloatingPointError where it is no finite number (float16 skips such
        a step instead, and lowers its loss scale)."""
        if self.deepspeed:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])   # stage 0 keeps none
            self.deepspeed.step()
            norm = float(self.deepspeed.get_global_grad_norm() or norm)
            self._check(norm)
        else:
            norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm))
            self._check(norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            self.average.update()
        return norm

    def _check(self, norm):
        if not math.isfinite(norm) and self.config.dtype != "float16":
            raise FloatingPointError(f"the gradient's norm is {norm}; it must be finite: lower learning_rate, or look for a score or a row that "
                                     "is not; the last checkpoint is whole, and the same run goes on from it")

    def advance(self):
        """The next step of the learning rate's schedule: once a rollout in PPO, however many updates it took."""
        self.scheduler.step()

    @property
    def loss_scale(self):
        """What float16's losses are multiplied by, None for other types."""
        return float(self.deepspeed.optimizer.cur_scale) if self.deepspeed and self.config.dtype == "float16" else None

    @property
    def learning_rate(self):
        return self.scheduler.get_last_lr()[0]

    @contextmanager
    def whole(self):
        """The model with all its weights on this process, to sample from: under ZeRO-3 gathered once, not layer by layer and token by token."""
        if not self.deepspeed or self.config.zero_stage < 3:
            yield self.model
            return
        import deepspeed
        shards = self.deepspeed.optimizer.parameter_offload
        with deepspeed.zero.GatheredParameters(list(self.model.parameters())):
            for p in self.model.parameters():
                p.ds_active_sub_modules.clear()
            for hook in shards.forward_hooks + shards.backward_hooks:       # or each layer's weights go back as soon as it has run
                hook.remove()
            shards.forward_hooks, shards.backward_hooks = [], []
            try:
                yield self.model
            finally:
                if not shards.get_param_coordinator().is_invalid_trace():
                    shards.get_param_coordinator()._invalidate_trace()
                shards._register_deepspeed_module(shards.module)

    def weights(self):
        """All weights on the CPU under their plain names, gathered from every process under ZeRO-3 (call it on all)."""
        if self.deepspeed and self.config.zero_stage == 3:
            return self.deepspeed._zero3_consolidated_16bit_state_dict()
        return {name: t.detach().cpu() for name, t in self.model.state_dict().items()}


def device():
    """The one place that chooses: this process's GPU, or the CPU."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def all_sum(values):
    """Sum of a tensor (or list of numbers) over the processes, float64."""
    total = torch.as_tensor(values, dtype=torch.float64, device=device())
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def gather_list(items):
    """The items of all processes, in the order of ranks."""
    if world_size() == 1:
        return list(items)
    parts = [None] * world_size()
    dist.all_gather_object(parts, list(items))
    return [x for part in parts for x in part]


def set_dropout(model, p):
    """Dropout p everywhere in the model, whatever its config calls it (the 2023 kit set a field that Pangu and GLM do not read)."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = p
        for name, value in vars(module).items():
            if type(value) is float and ("dropout" in name or name.endswith("pdrop")):
                setattr(module, name, p)
    return model


def mean_over(rows, batch_size, measure):
    """Means of held-out figures: `measure(batch of rows) -> {name: (sum, count)}`, each process a share of the rows.
    Every process takes as many batches, as sharded weights require; a batch past the end is measured and not counted."""
    world, totals = world_size(), {}
    with torch.no_grad():
        for start in range(0, len(rows), batch_size * world):
            mine = rows[start + rank() * batch_size:start + (rank() + 1) * batch_size]
            for name, (total, count) in measure(mine or rows[:1]).items():
                old = totals.get(name, (0.0, 0.0))
                totals[name] = (old[0] + float(total) * bool(mine), old[1] + float(count) * bool(mine))
    names = sorted(totals)
    sums = all_sum([x for name in names for x in totals[name]]).tolist()
    return {name: sums[2 * i] / max(sums[2 * i + 1], 1e-12) for i, name in enumerate(names)}


def say(output_dir, line):
    """One line to the cell and to log.txt of the run, from rank 0 only."""
    if rank() == 0:
        print(line, flush=True)
        with open(Path(output_dir) / "log.txt", "a", encoding="utf-8") as f:
            f.write(line + "\n")


def log_line(row):
    """`step 20  loss 2.143  lr 8.0e-06  1.2 s` from a row of the history, which has more than a line should."""
    parts = [f"step {row['step']}"]
    for name, value in row.items():
        if name in UNSAID:
            continue
        if name == "learning_rate":
            parts.append(f"lr {value:.1e}")
        elif name == "seconds":
            parts.append(f"{value:.1f} s")
        elif name != "step" and not name.startswith("seconds_"):
            parts.append(f"{name} {value:.3f}")
    return "  ".join(parts)
