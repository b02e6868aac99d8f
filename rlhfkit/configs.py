"""What a run is: one dataclass a stage, its fields checked for type and range when it is made, and the Result that every stage returns.

A notebook's parameters become explicit keywords, the dataclass, and JSON for the workers; there are no nested configs, no pass-through
arguments and no environment variables. Field names are those that users of HF's TrainingArguments know.
"""
import ast
import dataclasses
import difflib
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

DTYPES = ("float32", "mixed", "bfloat16", "float16")
POSITIVE, NOT_NEGATIVE, FRACTION, SHARE, DISCOUNT = "> 0", ">= 0", "in [0, 1)", "in (0, 1]", "in [0, 1]"
CHECKS = {POSITIVE: lambda x: x > 0, NOT_NEGATIVE: lambda x: x >= 0, FRACTION: lambda x: 0 <= x < 1, SHARE: lambda x: 0 < x <= 1,
          DISCOUNT: lambda x: 0 <= x <= 1}
EXAMPLES = {int: "8", float: "1.0e-5", str: '"../runs/sft"', bool: "True"}


@dataclass
class Run:
    """What all stages share. `data_path` is a JSON-lines file of records, or a folder with train.jsonl and dev.jsonl (held out)."""

    model_path: str
    data_path: str
    output_dir: str
    seed: int = 0
    max_length: int = 512               # tokens, prompt and answer
    batch_size: int = 8                 # rows a process and step
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-5
    lr_scheduler_type: str = "cosine"   # or linear, constant
    num_epochs: int = 1
    max_steps: int = 0                  # wins over epochs when set
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    dropout: float = 0.0                # overrides the model's own
    dtype: str = "float32"              # mixed: float32 weights, bf16 compute; bfloat16, float16: weights and states
    lora_rank: int = 0                  # 0 trains all weights
    lora_alpha: int = 16
    lora_targets: str = ""              # comma list of module names; empty: the family's own
    gradient_checkpointing: bool = False
    zero_stage: int = 0
    offload: str = "none"               # optimizer, or all: parameters too (stage 3)
    bucket_size: int = 200_000_000      # elements a reduce or gather bucket
    max_live_parameters: int = 1_000_000_000
    overlap_comm: bool = True
    pin_memory: bool = True
    logging_steps: int = 10
    eval_steps: int = 0                 # 0: at the end only
    save_steps: int = 0                 # 0: at the end only
    save_total_limit: int = 2
    resume: bool = True                 # go on from the newest checkpoint of the same run
    report_to: str = "tensorboard"      # anything that HF's trainer knows, or none

    stage: ClassVar[str] = ""
    rules: ClassVar[dict] = dict(
        max_length=POSITIVE, batch_size=POSITIVE, gradient_accumulation_steps=POSITIVE, learning_rate=POSITIVE, num_epochs=POSITIVE,
        max_steps=NOT_NEGATIVE, warmup_ratio=FRACTION, weight_decay=NOT_NEGATIVE, max_grad_norm=POSITIVE, dropout=FRACTION,
        lora_rank=NOT_NEGATIVE, lora_alpha=POSITIVE, logging_steps=POSITIVE, eval_steps=NOT_NEGATIVE, save_steps=NOT_NEGATIVE,
        save_total_limit=POSITIVE, bucket_size=POSITIVE, max_live_parameters=POSITIVE, seed=NOT_NEGATIVE,
        dtype=DTYPES, zero_stage=(0, 1, 2, 3), offload=("none", "optimizer", "all"), lr_scheduler_type=("cosine", "linear", "constant"))

    def __post_init__(self):
        for f in dataclasses.fields(self):
            setattr(self, f.name, _typed(f.name, getattr(self, f.name), f.type))
        for name, rule in _rules(type(self)).items():
            value = getattr(self, name)
            if isinstance(rule, tuple):
                if value not in rule:
                    raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(str, rule))}")
            elif not CHECKS[rule](value):
                raise ValueError(f"{name} is {value}; it must be {rule}; try {getattr(type(self), name)}")
        if self.offload != "none" and self.zero_stage < 2 or self.offload == "all" and self.zero_stage < 3:
            raise ValueError(f"offload is {self.offload!r} with zero_stage {self.zero_stage}; optimizer needs stage 2 or 3, all needs 3")

    def _check_room(self):
        if self.max_new_tokens >= self.max_length:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must leave room for the prompt in max_length {self.max_length}")

    def to_dict(self):
        return {"stage": self.stage, **dataclasses.asdict(self)}


@dataclass
class Pretrain(Run):
    """Next-token loss on every token of packed text; a record's text is prompt, prefix and best answer."""

    stage: ClassVar[str] = "pretrain"


@dataclass
class SFT(Run):
    """Loss on the best answer and its end token."""

    packing: bool = False               # several records a row of max_length, none seen by another
    max_new_tokens: int = 64            # of the samples
    samples: int = 4                    # held-out prompts answered before and after; 0: none
    temperature: float = 1.0            # of the samples; 0 takes the likeliest token

    stage: ClassVar[str] = "sft"
    rules: ClassVar[dict] = dict(max_new_tokens=POSITIVE, samples=NOT_NEGATIVE, temperature=NOT_NEGATIVE)

    def __post_init__(self):
        super().__post_init__()
        if self.samples:
            self._check_room()


@dataclass
class Reward(Run):
    """Pair loss on all strictly ordered answers of a prompt, each prompt weighing the same."""

    max_answers: int = 9                # a prompt, of more the best, the worst and some between (InstructGPT: 4 to 9); 0: all

    stage: ClassVar[str] = "reward"
    rules: ClassVar[dict] = dict(max_answers=NOT_NEGATIVE)

    def __post_init__(self):
        super().__post_init__()
        if self.max_answers == 1:
            raise ValueError("max_answers is 1; a pair takes two: give 2 or more, or 0 for all")


@dataclass
class DPO(Run):
    """Direct preference optimisation (Rafailov et al. 2023, eq. 7) on pairs of a better and a worse answer."""

    beta: float = 0.1
    pairs_per_prompt: int = 1           # drawn by seed
    pair_rule: str = "all"              # all strictly ordered pairs, or neighbours: those of the 2023 kit
    max_new_tokens: int = 64
    samples: int = 4
    temperature: float = 1.0            # of the samples

    stage: ClassVar[str] = "dpo"
    rules: ClassVar[dict] = dict(beta=POSITIVE, pairs_per_prompt=POSITIVE, pair_rule=("all", "neighbours"), max_new_tokens=POSITIVE,
                                 samples=NOT_NEGATIVE, temperature=NOT_NEGATIVE)

    def __post_init__(self):
        super().__post_init__()
        if self.samples:
            self._check_room()


@dataclass
class PPO(Run):
    """Reinforcement learning from a reward model or a function; without a critic it is RLOO or GRPO."""

    reward_path: str = ""               # folder of a reward model; a comma list of folders: an ensemble
    reward_function: str = ""           # package.module:function of (prompts, answers) -> scores, instead of or on top of the model
    ensemble: str = "mean"              # of several reward models: mean, min, or spread (mean less their standard deviation)
    critic: str = "reward"              # reward, actor: a critic started from that model is trained; frozen: the reward model's values; none
    advantage: str = "gae"              # rloo, grpo, dr_grpo: no critic, several answers a prompt
    kl_in: str = "reward"               # or loss
    answers_per_prompt: int = 1
    mini_batch_size: int = 0            # answers a process and inner step; 0: all at once
    ppo_epochs: int = 1
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0                      # 0: off; a filter samples from another distribution than the one that is trained
    top_p: float = 1.0
    kl_coefficient: float = 0.05
    kl_target: float = 0.0              # nats an answer; 0: the coefficient stays fixed
    kl_horizon: int = 10_000            # answers
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    value_clip: float = 0.2             # 0: off
    critic_learning_rate: float = 0.0   # 0: as learning_rate
    critic_warmup_steps: int = 0        # steps at the start in which the critic alone learns
    max_update_kl: float = 0.0          # nats a token that a rollout's updates may move the policy, then they stop; 0: no limit
    entropy_coefficient: float = 0.0    # bonus a nat of entropy
    loss_mean: str = "tokens"           # over the batch's tokens; answers: of each answer's mean (GRPO); constant: Dr. GRPO
    whiten_advantages: bool = True
    normalize_scores: str = "none"      # by mean and deviation of the first rollout (reference), or of all (running)
    score_clip: float = 10.0
    unfinished_score: float = -1.0      # added to the score of an answer cut by length
    ptx_path: str = ""                  # records whose loss is mixed in (InstructGPT's PPO-ptx)
    ptx_coefficient: float = 0.0        # of that loss, a mean over its tokens; 0: off
    ptx_batch_size: int = 8             # its rows a process and update
    ptx_rows: str = "sft"               # or pretrain
    ema_decay: float = 0.0              # an update; the averaged actor is saved in ema/; 0: none is kept
    rescore: bool = True                # the old log-probs come from the training module; False: from the sampler
    frozen_on: str = "device"           # where reference and reward models wait, or host
    keep_rollouts: bool = False         # rollouts/step-*.jsonl with all tokens' figures
    best_by: str = ""                   # an eval figure, such as eval_gold; the actor where it was largest is kept in best/
    samples: int = 4

    stage: ClassVar[str] = "ppo"
    rules: ClassVar[dict] = dict(
        critic=("reward", "actor", "frozen", "none"), advantage=("gae", "rloo", "grpo", "dr_grpo"), kl_in=("reward", "loss"),
        ensemble=("mean", "min", "spread"), loss_mean=("tokens", "answers", "constant"), normalize_scores=("none", "reference", "running"),
        ptx_rows=("sft", "pretrain"), frozen_on=("device", "host"), critic_warmup_steps=NOT_NEGATIVE, max_update_kl=NOT_NEGATIVE,
        entropy_coefficient=NOT_NEGATIVE, ptx_coefficient=NOT_NEGATIVE, ptx_batch_size=POSITIVE, ema_decay=FRACTION,
        answers_per_prompt=POSITIVE, mini_batch_size=NOT_NEGATIVE, ppo_epochs=POSITIVE, max_new_tokens=POSITIVE, temperature=POSITIVE,
        top_k=NOT_NEGATIVE, top_p=SHARE, kl_coefficient=NOT_NEGATIVE, kl_target=NOT_NEGATIVE, kl_horizon=POSITIVE, gamma=DISCOUNT,
        lam=DISCOUNT, clip=POSITIVE, value_clip=NOT_NEGATIVE, critic_learning_rate=NOT_NEGATIVE, score_clip=POSITIVE,
        samples=NOT_NEGATIVE)

    def __post_init__(self):
        super().__post_init__()
        if self.dropout:
            raise ValueError(f"dropout is {self.dropout}; PPO compares log-probs of the same ids, and dropout moves them: set it to 0.0")
        if not self.reward_path and not self.reward_function:
            raise ValueError("neither reward_path nor reward_function is set; PPO needs the folder of a reward model or a function")
        if self.critic in ("reward", "frozen") and self.advantage == "gae" and not self.reward_path:
            raise ValueError(f"critic is {self.critic!r} without a reward_path; set reward_path, or critic to 'actor'")
        if (self.advantage == "gae") == (self.critic == "none"):
            raise ValueError(f"advantage {self.advantage!r} does not go with critic {self.critic!r}; gae needs one, the others need none")
        if self.advantage != "gae" and self.answers_per_prompt < 2:
            raise ValueError(f"answers_per_prompt is {self.answers_per_prompt}; {self.advantage} compares answers of one prompt: 2 or more")
        if self.critic_warmup_steps and self.critic not in ("reward", "actor"):
            raise ValueError(f"critic_warmup_steps is {self.critic_warmup_steps} with critic {self.critic!r}, which is not trained: set it to 0")
        if self.ptx_coefficient and not self.ptx_path:
            raise ValueError(f"ptx_coefficient is {self.ptx_coefficient} without a ptx_path; give the records to mix in, or set it to 0.0")
        if self.best_by and not self.best_by.startswith("eval_"):
            raise ValueError(f"best_by is {self.best_by!r}; it names a held-out figure of the history: eval_score, eval_gold, eval_kl, …")
        self._check_room()


STAGES = {c.stage: c for c in (Pretrain, SFT, Reward, DPO, PPO)}


def config_from(values):
    """The dataclass for a dict with the key `stage`, as `to_dict` writes it."""
    values = dict(values)
    return STAGES[values.pop("stage")](**values)


def check_parameters(scope):
    """Stop a notebook that papermill gave a parameter it does not have (papermill only warns): `rk.check_parameters(globals())` in the cell
    after the parameters. Reads the kernel's list of executed cells, where papermill's injected cell follows the parameters cell."""
    cells = [source for source in scope.get("In", ()) if source.strip()]
    for own, injected in zip(cells, cells[1:2]):
        known, given = _assigned(own), _assigned(injected) if injected.lstrip().startswith("# Parameters") else set()
        for name in sorted(given - known):
            near = difflib.get_close_matches(name, known, 1)
            raise ValueError(f"the notebook has no parameter {name!r}; " + (f"did you mean {near[0]!r}? " if near else "")
                             + f"it has: {', '.join(sorted(known))}")


@dataclass
class Result:
    """What a stage returns: figures at the end, one dict a logged step, samples (step, prompt, answer, and score or gold), the folder."""

    stage: str
    config: dict
    metrics: dict
    output_dir: str
    history: list = field(default_factory=list)
    samples: list = field(default_factory=list)

    def save(self):
        path = Path(self.output_dir) / "result.json"
        beside = path.with_suffix(".partial")
        values = {k: v for k, v in dataclasses.asdict(self).items() if k != "output_dir"}
        beside.write_text(json.dumps(values, ensure_ascii=False, indent=1), encoding="utf-8")
        os.replace(beside, path)
        return self

    @classmethod
    def load(cls, folder):
        path = Path(folder) / "result.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no finished run (no result.json); run its stage to the end first")
        return cls(**json.loads(path.read_text(encoding="utf-8")), output_dir=str(folder))


def _assigned(source):
    return {t.id for node in ast.parse(source).body for t in (node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)])
            if isinstance(t, ast.Name)}


def _rules(cls):
    return {name: rule for c in reversed(cls.__mro__) for name, rule in vars(c).get("rules", {}).items()}


def _typed(name, value, kind):
    """`value` as `kind`; a whole number is a float where one is asked for, a Path is a str; everything else must be it already."""
    if kind is float and type(value) is int:
        value = float(value)
    if kind is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if type(value) is not kind:
        word = "string" if type(value) is str else type(value).__name__
        raise TypeError(f"{name} is the {word} {value!r}; it must be of type {kind.__name__}; "
                        f"in a YAML parameter file write {EXAMPLES[kind]}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{name} is {value}; it must be a finite number")
    return value
