"""Will it fit? Peak memory of a run by part, from the shapes in a model folder's config.json; nothing is loaded.

Activations follow Korthikanti et al. 2022 (section 4), whose 34 bytes hold for pure half precision: autocast keeps
residuals in float32 and half copies of the weights, eager attention keeps its scores. Rows count at full max_length.
Checked on the 2023 kit's rows, but not on those of ZeRO-3, which did not shard its models (its issue 11).
"""
import copy
from dataclasses import dataclass
from itertools import product

import torch
from torch import nn

from rlhfkit.families import empty_model, family_of

GIB = 2 ** 30
FRAGMENTATION = (0.05, 0.25)    # of all else, held by the allocator unused: plain, and with DeepSpeed's flat buffers
CONTEXT = 0.8                   # GiB a process: CUDA context and libraries
PROCESS = 3.0                   # GiB of host memory a process
PINNED = 1.5                    # offloaded bytes are pinned, in blocks of powers of two
ANSWERS = 2                     # answers a prompt in a reward or DPO row
# bytes a parameter: weights (mixed: and half copies), gradients, Adam; DeepSpeed keeps float32 masters of half weights
STATES = {"float32": (4, 4, 8), "mixed": (6, 4, 8), "bfloat16": (2, 2, 4), "float16": (2, 2, 4)}
MASTERED = (2, 2, 12)
# bytes a token and hidden unit: of a layer, of the residual after it; bytes a score of eager attention; bytes a logit
HALF = (34, 2, 5, 10)
ACTIVATIONS = {"float32": (68, 4, 9, 12), "mixed": (38, 4, 9, 10), "bfloat16": HALF, "float16": HALF}


@dataclass(frozen=True)
class Estimate:
    """Needed: parts (name -> GiB a GPU), their sum gpu_gib, and host_gib. There: gpu_room, host_room (None: not asked).
    suggestion: the settings nearest to the config's that fit, "" when it fits as it is."""

    fits: bool
    parts: dict
    gpu_gib: float
    host_gib: float
    gpu_room: float
    host_room: float | None
    suggestion: str

    def __str__(self):
        lines = [f"{name:<15}{gib:8.2f} GiB" for name, gib in self.parts.items()]
        host = f" of {self.host_room:g}" if self.host_room else ""
        lines.append(f"{'a GPU':<15}{self.gpu_gib:8.2f} GiB of {self.gpu_room:g}")
        lines.append(f"{'host':<15}{self.host_gib:8.2f} GiB{host}")
        return "\n".join(lines + ["it fits" if self.fits else f"it does not fit; try {self.suggestion}"])


@dataclass(frozen=True)
class Shape:
    """What memory depends on in a model; `adapters`: LoRA parameters a rank."""

    parameters: int
    layers: int
    hidden: int
    heads: int
    cached: int                 # elements of the key and value cache a token
    vocab: int
    eager: bool
    adapters: int


def will_it_fit(config, gpu_gib, num_gpus, host_gib=None):
    """config: a run; gpu_gib: memory of one GPU; num_gpus: processes, all on one host of host_gib -> Estimate."""
    models = _models(config)

    def judge(config):
        parts, host = _gpu_parts(config, models, num_gpus), _host(config, models, num_gpus)
        return sum(parts.values()) <= gpu_gib and (host_gib is None or host <= host_gib), parts, host

    fits, parts, host = judge(config)
    fitting = (_say(changes) for changes in _changes(config, num_gpus) if judge(_with(config, changes))[0])
    suggestion = "" if fits else next(fitting, "more or larger GPUs, a shorter max_length, or a smaller model")
    return Estimate(fits, parts, sum(parts.values()), host, gpu_gib, host_gib, suggestion)


def shape_of(path, lora_targets=""):
    """A model folder -> Shape, counted on the meta device; lora_targets: comma list, empty for the family's own."""
    model = empty_model(path)
    config = model.config
    targets = lora_targets.split(",") if lora_targets else family_of(path).lora_targets
    linears = [m for name, m in model.named_modules() if isinstance(m, nn.Linear)
               and (name.rpartition(".")[2] in targets if targets else m is not model.get_output_embeddings())]
    heads = config.num_attention_heads
    grouped = getattr(config, "num_key_value_heads", None) or heads
    return Shape(sum(p.numel() for p in model.parameters()), config.num_hidden_layers, config.hidden_size, heads,
                 2 * config.num_hidden_layers * config.hidden_size * grouped // heads, config.vocab_size,
                 config._attn_implementation == "eager", sum(m.in_features + m.out_features for m in linears))


def _models(config):
    """(trained Shapes, frozen Shapes by part). With LoRA the actor without its adapters is PPO's reference."""
    targets = getattr(config, "lora_targets", "")
    actor = shape_of(config.model_path, targets)
    trained, frozen = [actor], {}
    if config.stage == "ppo":
        rewards = [shape_of(path.strip(), targets) for path in config.reward_path.split(",") if path.strip()]
        trained += {"actor": [actor], "reward": rewards[:1]}.get(config.critic, [])
        shared = config.lora_rank and config.critic == "reward"             # the critic without its adapters is the reward model
        frozen = {"reference": [] if config.lora_rank else [actor], "reward model": rewards[1:] if shared else rewards}
    return trained, frozen


def _gpu_parts(config, models, num_gpus):
    """GiB a GPU by part, at the moment of the peak."""
    (trained, frozen), dtype = models, config.dtype
    weights, gradients, states = _state_bytes(config, trained, num_gpus)
    offload, stage = config.offload, config.zero_stage
    share = [num_gpus if stage >= needed else 1 for needed in (3, 2, 1)]
    parts = {"weights": 0 if offload == "all" else weights / share[0],
             "gradients": 0 if offload != "none" else gradients / share[1],
             "optimizer": 0 if offload != "none" else states / share[2]}
    for name, shapes in frozen.items():
        waits = config.stage == "ppo" and config.frozen_on == "host"         # lent while the update's activations are not there
        parts[name] = 0 if waits else sum(s.parameters for s in shapes) * _plain_bytes(dtype)
    if getattr(config, "ema_decay", 0):
        parts["average"] = 4 * (config.lora_rank * trained[0].adapters if config.lora_rank else trained[0].parameters) / share[0]
    if stage:
        parts["buckets"] = config.bucket_size * STATES[dtype][1] * (2 if config.overlap_comm else 1)
    if stage == 3:
        parts["gathered"] = min(config.max_live_parameters, trained[0].parameters) * _plain_bytes(dtype)
    parts |= _activations(config, trained)
    parts = {name: size / GIB for name, size in parts.items() if size} | {"context": CONTEXT}
    return parts | {"fragmentation": FRAGMENTATION[_deepspeed(config, num_gpus)] * sum(parts.values())}


def _state_bytes(config, trained, num_gpus):
    """Bytes of weights, gradients and optimiser states of all trained models, before ZeRO shares them out."""
    sizes = MASTERED if _deepspeed(config, num_gpus) and _plain_bytes(config.dtype) == 2 else STATES[config.dtype]
    parameters = sum(s.parameters for s in trained)
    if not config.lora_rank:
        return [parameters * size for size in sizes]
    adapters = config.lora_rank * sum(s.adapters for s in trained)              # in float32
    return parameters * STATES[config.dtype][0] + adapters * 4, adapters * 4, adapters * 8


def _activations(config, trained):
    """Bytes of activations and logits of an update, and of the key and value cache of a rollout."""
    layer, residual, score, logit = ACTIVATIONS[config.dtype]
    rows, length, costs = _rows(config), config.max_length, []
    for shape in trained:
        whole = layer + (score * shape.heads * length / shape.hidden if shape.eager else 0)
        layers = residual * shape.layers + whole if config.gradient_checkpointing else whole * shape.layers
        costs.append(layers * rows * length * shape.hidden)
    predicted = config.max_new_tokens if config.stage == "ppo" else length
    parts = {"activations": max(costs), "logits": 0 if config.stage == "reward" else logit * rows * predicted * trained[0].vocab}
    if config.stage == "ppo":           # kept between rollouts, together with the captured steps
        parts["cache"] = config.batch_size * config.answers_per_prompt * length * trained[0].cached * (4 if config.dtype == "float32" else 2)
    return parts


def _host(config, models, num_gpus):
    """GiB on the host: every process loads the whole model at first; later it holds what is offloaded."""
    trained, frozen = models
    shapes = trained + sum(frozen.values(), [])
    loading = num_gpus * sum(s.parameters for s in shapes) * _plain_bytes(config.dtype)
    weights, gradients, states = _state_bytes(config, trained, num_gpus)
    offloaded = (config.offload != "none") * (2 * gradients + states) + (config.offload == "all") * weights
    return max(loading, PINNED * offloaded) / GIB + PROCESS * num_gpus


def _rows(config):
    if config.stage == "ppo":
        mini = config.mini_batch_size or config.batch_size * config.answers_per_prompt
        return -(-mini // config.gradient_accumulation_steps)
    return config.batch_size * (ANSWERS if config.stage in ("reward", "dpo") else 1)


def _deepspeed(config, num_gpus):
    return num_gpus > 1 or config.zero_stage > 0


def _plain_bytes(dtype):
    return 2 if dtype in ("bfloat16", "float16") else 4


def _changes(config, num_gpus):
    """Settings to try, the least painful first: what costs little time, then the host's memory, last LoRA."""
    smaller, rows = [{}], _rows(config) if config.stage == "ppo" else config.batch_size
    for times in (n for n in range(2, rows + 1) if rows % n == 0):
        smaller.append({"mini_batch_size": rows // times} if config.stage == "ppo" else {
            "batch_size": rows // times, "gradient_accumulation_steps": config.gradient_accumulation_steps * times})
    stages = [{}] + [{"zero_stage": stage} for stage in (1, 2, 3) if stage > config.zero_stage and num_gpus > 1]
    stages += [{"zero_stage": max(2, config.zero_stage), "offload": "optimizer"}] * (config.offload == "none")
    stages += [{"zero_stage": 3, "offload": "all"}] * (config.offload != "all")
    checkpointing = [{}] + [{"gradient_checkpointing": True}] * (not config.gradient_checkpointing)
    lora = [{}] + [{"lora_rank": 16}] * (not config.lora_rank)
    options = product(enumerate(smaller), enumerate(checkpointing), enumerate(stages), enumerate(lora))
    ordered = sorted(options, key=lambda o: (o[3][0], "offload" in o[2][1], o[0][0] + 2 * o[1][0] + 2 * o[2][0]))
    return [batch | check | stage | adapt for (_, batch), (_, check), (_, stage), (_, adapt) in ordered]


def _with(config, changes):
    changed = copy.copy(config)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


def _say(changes):
    return ", ".join(f"{name}={value!r}" for name, value in changes.items())


def too_little(config, phase, num_gpus, error):
    """The error to raise where a run met the end of its GPU's memory in `phase`: the estimate by part, and the settings to change."""
    total = torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else 0.0
    estimate = will_it_fit(config, total, max(1, num_gpus))
    advice = estimate.suggestion or "mini_batch_size or max_length by half, gradient_checkpointing=True"
    parts = ", ".join(f"{name} {gib:.1f}" for name, gib in estimate.parts.items())
    return MemoryError(f"the GPU's {total:.1f} GiB were too little in {phase} ({str(error).splitlines()[0][:120]}); estimated need: "
                       f"{estimate.gpu_gib:.1f} GiB ({parts}); change {advice}; the last checkpoint is whole, and the same call goes on from it")
