"""Which details of PPO matter on the tiny couplet task: the full recipe, one detail left out at a time, RLOO, GRPO and DPO.

    python tests/benchmarks/ablation.py [--seeds 0 1 2 3 4] [--jobs 2] [--folder runs/ablation]

All variants of a seed start from its SFT and reward model, those of `notebooks/run.py seeds` (trained where they are not there),
with the sizes of notebooks 05 and 06. A finished run is only read; a job is one seed on one thread. Intervals are 95 %, Student's
t over the seeds: of the mean gold score of sampled answers to the held-out prompts, and of its distance from SFT's and the full
recipe's, seed by seed. KL: of these answers to the SFT model, nats an answer. Writes notebooks/records/ablation.json.
"""
import argparse
import contextlib
import dataclasses
import functools
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT / "notebooks"))

# The scores have a standard deviation of about 4, so the notebook's price of a nat is four times that of normalised scores.
FULL = dict(normalize_scores="reference", kl_coefficient=0.05, ptx_coefficient=0.05, ptx_batch_size=16)
RAW = dict(normalize_scores="none", kl_coefficient=0.2)
GROUP = dict(critic="none", answers_per_prompt=4, batch_size=32)            # as many answers a step
VARIANTS = {
    "full": {}, "no whitening": dict(whiten_advantages=False), "no KL": dict(kl_coefficient=0.0),
    "no PTX": dict(ptx_coefficient=0.0), "no value clip": dict(value_clip=0.0), "no score normalisation": RAW,
    "frozen critic": dict(critic="frozen"),
    "RLOO": dict(advantage="rloo", **GROUP), "GRPO": dict(advantage="grpo", kl_in="loss", loss_mean="answers", **GROUP),
    "DPO": {}}
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}      # 97.5 %, n seeds
ANSWERS = 4                                                 # to a held-out prompt
COLUMNS = (("gold", "gold"), ("gain", "over SFT"), ("difference", "against full"))


def run_seed(seed, folder, steps):
    """All variants of a seed -> {variant: {"gold", "kl", "seconds"}}, SFT among them, in a file of the folder."""
    planned = shared_stages(seed)
    done = {"SFT": figures(planned["05_ppo"]["model_path"], planned["05_ppo"]) | {"seconds": 0.0}}
    for name, changes in VARIANTS.items():
        output_dir = folder / str(seed) / name.replace(" ", "-")
        output_dir.mkdir(parents=True, exist_ok=True)
        with open(folder / f"{seed}.log", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            result = run_variant(planned, name, changes, output_dir, steps)
        done[name] = figures(result.output_dir, planned["05_ppo"]) | {"seconds": result.metrics["seconds"]}
    (folder / f"{seed}.json").write_text(json.dumps(done), encoding="utf-8")


def shared_stages(seed):
    """Run notebooks 01 to 04 into runs/seeds/<seed> where they have not run -> {notebook: its parameters}."""
    import papermill
    import run
    os.chdir(run.HERE)                          # the notebooks' paths are relative to them
    planned, target = run.planned(f"seeds/{seed}"), run.RUNS / "seeds" / str(seed)
    target.mkdir(parents=True, exist_ok=True)
    for name, parameters in list(planned.items())[:4]:
        output_dir = Path(parameters["output_dir"])
        if not (output_dir / "result.json").is_file() and not (output_dir / "sft/train.jsonl").is_file():
            papermill.execute_notebook(f"{name}.ipynb", target / f"{name}.ipynb", parameters | {"seed": seed}, cwd=run.HERE,
                                       progress_bar=False, extra_arguments=run.QUIET)
    return {name: parameters | {"seed": seed} for name, parameters in planned.items()}


def run_variant(planned, name, changes, output_dir, steps):
    import rlhfkit as rk
    cls, values = (rk.DPO, planned["06_dpo"]) if name == "DPO" else (
        rk.PPO, planned["05_ppo"] | FULL | {"ptx_path": planned["03_sft"]["data_path"]} | changes)
    known = {f.name for f in dataclasses.fields(cls)}
    values = {key: value for key, value in values.items() if key in known}
    values |= dict(output_dir=output_dir / "run", report_to="none", samples=0, eval_steps=0, keep_rollouts=False, best_by="")
    return rk.launch(cls(**values | ({"max_steps": steps} if steps else {})))


def figures(path, planned):
    """{"gold", "kl"} of sampled answers to all held-out prompts, ANSWERS each, the same noise for every model. The ids are
    scored that were sampled: their text, encoded again, is often cut into other pieces."""
    import rlhfkit as rk
    from rlhfkit.evaluation.scorers import loglikelihoods
    from rlhfkit.rollout import sample
    model, tokenizer, family = rk.load_model(path), rk.load_tokenizer(path), rk.family_of(path)
    records = [record for record in rk.read_data(planned["data_path"])[1] if rk.applies(record.prompt)] * ANSWERS
    prompts, ends = [family.encode(tokenizer, record)[0] for record in records], family.end_ids(tokenizer)
    answers = sample(model, prompts, planned["max_new_tokens"], ends, tokenizer.pad_token_id, planned["temperature"])
    pairs = [(prompt, answer + ends[:1]) for prompt, answer in zip(prompts, answers)]
    policy, sft = (loglikelihoods(each, pairs) for each in (model, rk.load_model(planned["model_path"])))
    return {"gold": statistics.fmean(rk.gold(r.prompt, tokenizer.decode(a)) for r, a in zip(records, answers)),
            "kl": statistics.fmean(a - b for a, b in zip(policy, sft))}


def interval(values):
    """-> mean, lower and upper end."""
    half = STUDENT[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return [round(statistics.fmean(values) + sign * half, 4) for sign in (0, -1, 1)]


def rows_of(found):
    """[{variant: figures} of each seed] -> a row for each variant."""
    rows = []
    for name in found[0]:
        golds = [seed[name]["gold"] for seed in found]
        row = {"variant": name, "golds": [round(g, 4) for g in golds], "gold": interval(golds)}
        for key, other in (("gain", "SFT"), ("difference", "full")):
            row[key] = interval([g - seed[other]["gold"] for g, seed in zip(golds, found)])
        row |= {key: round(statistics.fmean(seed[name][key] for seed in found), 3) for key in ("kl", "seconds")}
        rows.append(row)
    return rows


def table(rows):
    lines = [f"{'variant':<24}" + "".join(f"{title:>24}" for _, title in COLUMNS) + f"{'KL':>7}{'seconds':>9}"]
    for row in rows:
        cells = "".join("{:>8.3f} [{:>6.3f},{:>6.3f}]".format(*row[key]) for key, _ in COLUMNS)
        lines.append(f"{row['variant']:<24}{cells}{row['kl']:>7.2f}{row['seconds']:>9.0f}")
    return "\n".join(lines)


def start(seed, options):
    command = [sys.executable, __file__, "--one", str(seed), "--folder", str(options.folder), "--steps", str(options.steps)]
    with open(options.folder / f"{seed}.err", "w", encoding="utf-8") as errors:
        failed = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=errors, stdout=errors).returncode
    if failed:
        raise RuntimeError(f"seed {seed} failed: " + (options.folder / f"{seed}.err").read_text(encoding="utf-8")[-2000:])
    return json.loads((options.folder / f"{seed}.json").read_text(encoding="utf-8"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=PROJECT / "runs/ablation")
    parser.add_argument("--record", type=Path, default=PROJECT / "notebooks/records/ablation.json")
    parser.add_argument("--steps", type=int, default=0, help="of each variant, for a trial; 0: as in the notebooks")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.one is not None:
        return run_seed(options.one, options.folder, options.steps)
    if not 2 <= len(options.seeds) <= 10:
        parser.error(f"--seeds are {options.seeds}; an interval takes 2 to 10 of them")
    begin = time.perf_counter()
    with ThreadPoolExecutor(options.jobs) as jobs:
        found = list(jobs.map(functools.partial(start, options=options), options.seeds))
    import rlhfkit as rk
    rows = rows_of(found)
    record = {"command": shlex.join(["python", "tests/benchmarks/ablation.py", *sys.argv[1:]]), "versions": rk.versions(),
              "seeds": options.seeds, "seconds": round(time.perf_counter() - begin), "rows": rows}
    options.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
