"""Loading a published Pangu folder: random weights of the real sizes in shards, as the 2023 files are, against reading those files.

    python tests/benchmarks/loading.py --shape 2.6B --stored float16 --dtype bfloat16 --folder runs/loading

Each measurement has a process of its own. Seconds are by the clock with the files in the page cache, since a disk would be what is measured;
memory is the process's peak, once with and once without the pages of the files, which the system takes back when it needs them.
"""
import argparse
import json
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

SHAPES = {"350M": (24, 1024, 16), "2.6B": (32, 2560, 32), "13B": (40, 5120, 40)}


def write(folder, shape, stored, shards):
    import torch

    layers, size, heads = SHAPES[shape]
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(model_type="pangu", vocab_size=40064 if shape == "13B" else 40000, hidden_size=size, num_layers=layers, num_heads=heads)
    (folder / "config.json").write_text(json.dumps(config))
    names = {f"transformer.{name}.weight": (rows, size) for name, rows in (("wte", config["vocab_size"]), ("wpe", 1024), ("wqe", 1024))}
    for i in range(layers):
        block = {f"attn.{part}_proj": (size, size) for part in "qkvc"} | {"mlp.c_fc": (4 * size, size), "mlp.c_proj": (size, 4 * size)}
        block = {f"{name}.weight": dims for name, dims in block.items()} | {f"{name}.bias": dims[:1] for name, dims in block.items()}
        block |= {f"{norm}.{kind}": (size,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")}
        names |= {f"transformer.h.{i}.{name}": dims for name, dims in block.items()}
    names |= {f"transformer.ln_f.{kind}": (size,) for kind in ("weight", "bias")}
    keys, index, made = list(names), {}, {}
    for number in range(shards):
        part = keys[number * len(keys) // shards:(number + 1) * len(keys) // shards]
        file = f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
        for dims in {names[key] for key in part} - made.keys():         # drawn once a shape, which is what takes time
            made[dims] = (0.02 * torch.randn(dims)).to(getattr(torch, stored))
        weights = {key: made[names[key]].clone() for key in part}
        weights |= {f"{key.rsplit('.attn', 1)[0]}.attn.bias": torch.ones(1, 1, 1024, 1024, dtype=torch.uint8).tril() for key in part
                    if key.endswith("attn.q_proj.weight")}
        index |= dict.fromkeys(weights, file)
        torch.save(weights, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))


def own_memory():
    """GiB of this process without pages of files."""
    lines = dict(line.split(":", 1) for line in open("/proc/self/status", encoding="ascii"))
    return int(lines["RssAnon"].split()[0]) / 2 ** 20


def measure(kind, folder, dtype):
    """One measurement, in the process that runs it -> dict of seconds and GiB."""
    if kind == "read":
        start = time.perf_counter()
        buffer = bytearray(1 << 26)
        for file in sorted(folder.glob("*.bin")):
            with open(file, "rb") as f:
                while f.readinto(buffer):
                    pass
        return {"seconds": time.perf_counter() - start}
    import torch

    import rlhfkit as rk
    from rlhfkit.engine import device
    rk.load_model, device(), torch.zeros(1, device=device())           # imports and the accelerator's context are not the loading
    peak, done = [own_memory()], threading.Event()
    before = peak[0]

    def watch():
        while not done.wait(0.02):
            peak.append(own_memory())
    threading.Thread(target=watch, daemon=True).start()
    start = time.perf_counter()
    model = rk.load_model(folder, dtype=dtype, device=device())
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    done.set()
    return {"seconds": seconds, "own GiB": max(peak) - before, "peak GiB with files": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20 - before,
            "model GiB": sum(p.numel() * p.element_size() for p in model.parameters()) / 2 ** 30, "device": str(device()),
            "device GiB": torch.cuda.memory_allocated() / 2 ** 30 if torch.cuda.is_available() else 0}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="2.6B")
    parser.add_argument("--stored", default="float16")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=Path("runs/loading"))
    parser.add_argument("--measure", choices=("read", "load"))
    options = parser.parse_args()
    if options.measure:
        return print(json.dumps(measure(options.measure, options.folder, options.dtype)))
    if not (options.folder / "pytorch_model.bin.index.json").is_file():
        write(options.folder, options.shape, options.stored, options.shards)
    files = [file.stat().st_size / 2 ** 30 for file in options.folder.glob("*.bin")]
    print(f"Pangu-{options.shape}, {len(files)} shards, {sum(files):.2f} GiB, the largest {max(files):.2f} GiB, loaded as {options.dtype}")
    found = {"read": [], "load": []}
    for _ in range(3):
        for kind, rows in found.items():
            command = [sys.executable, __file__, "--measure", kind, "--folder", str(options.folder), "--dtype", options.dtype]
            rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))
            print(kind, rows[-1], flush=True)
    read, load = (sorted(row["seconds"] for row in found[kind])[1] for kind in ("read", "load"))
    model, own = found["load"][0]["model GiB"], max(row["own GiB"] for row in found["load"])
    print(f"load {load:.2f} s, read {read:.2f} s, ratio {load / read:.2f}; own memory {own:.2f} GiB, "
          f"{(own - model) / max(files):.2f} of the largest shard beside the model")


if __name__ == "__main__":
    main()
