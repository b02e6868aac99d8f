"""A whole PPO step beside TRL's last PPO in one run: seconds of each phase, ratio, peak memory, share of the floor.

    python tests/benchmarks/ppo.py --vocab vocab.model [--size 350m] [--lora 8] [--zero 2] [--peer-site folder]

Actor, critic, reference and reward model with random weights, ours of Pangu's shape, the peer's of Llama's (TRL takes no Pangu),
as wide and deep; same prompts and lengths, one epoch, one update; medians after warm-up; each side in a process of its own.
--peer-site: a folder with trl 1.12.0 (`pip download --no-deps trl==1.12.0`, unpacked); without it ours runs alone.
Floor: decode reads weights and cache once a step at 3.0 TB/s; four scoring passes take 2 and training 6 (LoRA 4) operations a
weight and token, at half of 795 TFLOP/s. With the sampler's log-probs, TRL's way and ours without --rescore, three passes do.
"""
import argparse
import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


@dataclasses.dataclass
class Shape:
    layers: int
    width: int
    heads: int

    def weights(self, vocab):
        return 12 * self.layers * self.width ** 2 + vocab * self.width

    def cache(self):
        """Bytes a position."""
        return 4 * self.layers * self.width


BASE = Shape(24, 1024, 16)                                          # Pangu-350M
# actor, the other models, rows, prompt and answer tokens, rows of a forward and backward pass
SIZES = {"tiny": (Shape(2, 64, 4), Shape(2, 64, 4), 4, 24, 12, 4), "350m": (BASE, BASE, 64, 256, 256, 64),
         "2.6b": (Shape(32, 2560, 32), BASE, 64, 256, 256, 16)}
BANDWIDTH, COMPUTE = 3.0e12, 0.5 * 795e12                           # bytes and operations a second, as measured on an H100
PHASES = ("rollout", "scoring", "update", "step")


def floor(actor, other, rows, prompt, answer, vocab, lora):
    """-> seconds {phase: of the least that an H100 needs}, answers of full length, one epoch."""
    weights, others, tokens = actor.weights(vocab), other.weights(vocab), rows * (prompt + answer)
    read = 2 * weights + rows * actor.cache() * (prompt + answer / 2)
    seconds = {"rollout": answer * read / BANDWIDTH + 2 * weights * rows * prompt / COMPUTE,
               "scoring": 2 * (2 * weights + 2 * others) * tokens / COMPUTE,
               "update": (4 if lora else 6) * (weights + others) * tokens / COMPUTE}
    return seconds | {"step": sum(seconds.values())}


def make(spec):
    """Model folders `actor` and `reward`, and records whose prompts have exactly as many tokens as asked -> vocabulary, ids."""
    import torch
    from transformers import AutoModelForCausalLM

    import rlhfkit as rk
    from rlhfkit.models.pangu import PanguConfig
    from rlhfkit.models.value import RewardModel
    from rlhfkit.samples.couplets import PARTS
    actor, other, rows, prompt, *_ = SIZES[spec["size"]]
    folder = Path(spec["folder"])
    rk.tiny(folder / "tokenizer", vocab_path=spec["vocab_path"])
    tokenizer, family, rng = rk.load_tokenizer(folder / "tokenizer"), rk.FAMILIES["pangu"], random.Random(0)
    for name, shape in (("actor", actor), ("reward", other)):
        torch.manual_seed(len(name))
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForCausalLM.from_config(PanguConfig(
                vocab_size=len(tokenizer), hidden_size=shape.width, num_layers=shape.layers, num_heads=shape.heads,
            ), dtype=torch.bfloat16)
        (model if name == "actor" else RewardModel.from_causal(model)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    words = [word for part in PARTS.values() for word in part]
    records = [rk.Record("".join(rng.choices(words, k=prompt)), (rk.Answer("春", 1.0),)) for _ in range(2 * rows)]
    rk.write_records(records, folder / "data.jsonl")
    made, _ = rk.prompt_rows(records, family, tokenizer, prompt)
    if {len(row["prompt_ids"]) for row in made} != {prompt}:
        raise ValueError(f"the prompts have {sorted({len(row['prompt_ids']) for row in made})} tokens, not all of them {prompt}")
    return {"vocab": len(tokenizer), "prompts": [row["prompt_ids"] for row in made]}


def ours(spec):
    import rlhfkit as rk
    folder, (_, _, rows, prompt, answer, micro) = Path(spec["folder"]), SIZES[spec["size"]]
    config = rk.PPO(
        folder / "actor", folder / "data.jsonl", folder / "run", reward_path=folder / "reward", max_length=prompt + answer,
        max_new_tokens=answer, batch_size=rows, gradient_accumulation_steps=rows // (spec["micro"] or micro),
        max_steps=spec["steps"], learning_rate=1e-6, dtype=spec["dtype"], lora_rank=spec["lora"], zero_stage=spec["zero"],
        rescore=spec["rescore"], logging_steps=1, samples=0, report_to="none")
    result = rk.launch(config, 1 if spec["zero"] else 0)
    names = {"tokens": "length", "step": "seconds", **{name: f"seconds_{name}" for name in PHASES[:3]}}
    steps = [{name: row[key] for name, key in names.items()} for row in result.history if "seconds" in row]
    return {"gib": result.metrics["memory_gib"], "steps": steps}


def peer(spec):
    """TRL's trainer, timed from outside: its generation, the whitening that closes its scoring, its callback at a step's end."""
    import torch
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import (LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast,
                              TrainerCallback)
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer
    actor, other, rows, _, answer, micro = SIZES[spec["size"]]
    cuda, marks, vocab = torch.cuda.is_available(), [], spec["vocab"]

    def mark(name):
        if cuda:
            torch.cuda.synchronize()
        marks.append((name, time.perf_counter()))

    def timed(name):
        real = getattr(ppo_trainer, name)

        def function(*args, **kwargs):
            mark(f"{name} begins")
            made = real(*args, **kwargs)
            mark(name)
            return made
        setattr(ppo_trainer, name, function)

    class Steps(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            mark("begin")

        def on_step_end(self, *args, **kwargs):
            mark("step")

    timed("batch_generation")
    timed("masked_whiten")
    torch.manual_seed(0)
    dtype = torch.bfloat16 if spec["dtype"] == "bfloat16" else torch.float32

    def model(cls, shape):
        config = LlamaConfig(
            vocab_size=vocab, hidden_size=shape.width, intermediate_size=11 * shape.width // 32 * 8,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads, max_position_embeddings=1024, num_labels=1,
            pad_token_id=vocab - 1, eos_token_id=vocab - 2)
        with torch.device("cuda" if cuda else "cpu"):
            return cls._from_config(config, dtype=dtype)

    words = Tokenizer(WordLevel({"<pad>": vocab - 1, "<end>": vocab - 2}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")
    lora, micro = LoraConfig(r=spec["lora"], target_modules="all-linear") if spec["lora"] else None, spec["micro"] or min(micro, 16)
    config = PPOConfig(
        output_dir=f"{spec['folder']}/peer", per_device_train_batch_size=micro, gradient_accumulation_steps=rows // micro,
        num_mini_batches=1, num_ppo_epochs=1, response_length=answer, local_rollout_forward_batch_size=micro,
        total_episodes=rows * spec["steps"], temperature=1.0, learning_rate=1e-6, bf16=spec["dtype"] == "mixed",
        num_sample_generations=0, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1, use_cpu=not cuda)
    data = Dataset.from_dict({"input_ids": spec["prompts"]})
    PPOTrainer(
        config, tokenizer, model(LlamaForCausalLM, actor), None if lora else model(LlamaForCausalLM, actor),
        model(LlamaForSequenceClassification, other), data, model(LlamaForSequenceClassification, other), eval_dataset=data,
        data_collator=lambda batch: {"input_ids": torch.tensor([row["input_ids"] for row in batch])}, callbacks=[Steps()],
        peft_config=lora).train()
    steps, start = [], dict(marks[:1])["begin"]
    for at in range(1, len(marks), 5):
        (_, begun), (_, sampled), _, (_, scored), (_, end) = marks[at:at + 5]
        steps.append({"rollout": sampled - begun, "scoring": scored - sampled, "update": end - scored, "step": end - start,
                      "tokens": answer})
        start = end
    return {"gib": torch.cuda.max_memory_allocated() / 2 ** 30 if cuda else 0.0, "steps": steps,
            "version": f"; trl {trl.__version__}"}


def apart(part, spec, path=""):
    """Run `make`, `ours` or `peer` in a process of its own, with `path` first on PYTHONPATH -> what it returned."""
    folder = Path(spec["folder"])
    file, out, log = (folder / f"{part}.{kind}" for kind in ("json", "out", "log"))
    file.write_text(json.dumps(spec), encoding="utf-8")
    paths = os.pathsep.join(p for p in (path, os.environ.get("PYTHONPATH", "")) if p)
    with open(log, "w", encoding="utf-8") as lines:
        failed = subprocess.run([sys.executable, __file__, part, str(file), str(out)], stdout=lines, stderr=lines,
                                env=os.environ | {"PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"}).returncode
    if failed:
        raise RuntimeError(f"{part} failed: " + log.read_text(encoding="utf-8")[-3000:])
    return json.loads(out.read_text(encoding="utf-8"))


def measured(side, spec, path=""):
    """-> {phase: median seconds, "gib"} of a side."""
    found = apart(side, spec, path)
    kept = found["steps"][spec["warm"]:]
    print(f"{side}: steps of {', '.join(format(row['step'], '.2f') for row in found['steps'])} s, {spec['warm']} to warm up; "
          f"{statistics.fmean(row['tokens'] for row in kept):.1f} tokens an answer{found.get('version', '')}", flush=True)
    return {name: statistics.median(row[name] for row in kept) for name in PHASES} | {"gib": found["gib"]}


def show(name, row):
    memory = f"{row['gib']:>8.1f}" if "gib" in row else ""
    print(f"{name:<16}" + "".join(f"{row[phase]:>10.3f}" for phase in PHASES) + memory, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", default="", help="a sentencepiece model of 40,000 pieces; --size tiny needs none")
    parser.add_argument("--size", choices=SIZES, default="350m")
    parser.add_argument("--dtype", choices=("bfloat16", "mixed", "float32"), default="bfloat16")
    parser.add_argument("--lora", type=int, default=0, help="rank, on both sides; 0 trains all weights")
    parser.add_argument("--zero", type=int, default=0, help="stage of ours, one process; 0: without DeepSpeed")
    parser.add_argument("--micro", type=int, default=0, help="rows of a pass of the update; 0: what fits 80 GB")
    parser.add_argument("--rescore", action="store_true", help="ours takes the old log-probs from a scoring pass")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--peer-steps", type=int, default=4)
    parser.add_argument("--warm", type=int, default=2, help="steps that are not counted")
    parser.add_argument("--peer-site", type=Path)
    options = parser.parse_args()
    if not options.vocab and options.size != "tiny":
        parser.error(f"--vocab is not set; size {options.size} has 40,000 ids, and the answers' text needs a piece for each")
    with tempfile.TemporaryDirectory() as folder:
        spec = vars(options) | {"folder": folder, "vocab_path": options.vocab, "peer_site": ""}
        spec |= apart("make", spec)
        mine = measured("ours", spec)
        theirs = options.peer_site and measured("peer", spec | {"steps": options.peer_steps}, str(options.peer_site.resolve()))
    actor, other, rows, prompt, answer, _ = SIZES[options.size]
    least = floor(actor, other, rows, prompt, answer, spec["vocab"], options.lora)
    print(f"\n{options.size}, {rows} x ({prompt} + {answer}), {options.dtype}, lora {options.lora}, zero {options.zero}, seconds")
    print(f"{'':<16}" + "".join(f"{phase:>10}" for phase in PHASES) + f"{'GiB':>8}")
    if theirs:
        show("TRL", theirs)
    show("ours", mine)
    show("floor", least)
    if theirs:
        show("TRL / ours", {phase: theirs[phase] / mine[phase] for phase in PHASES})
    show("floor / ours", {phase: least[phase] / mine[phase] for phase in PHASES})


if __name__ == "__main__":
    parts = {"make": make, "ours": ours, "peer": peer}
    if sys.argv[1:2] and sys.argv[1] in parts:
        given = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
        Path(sys.argv[3]).write_text(json.dumps(parts[sys.argv[1]](given)), encoding="utf-8")
    else:
        main()
