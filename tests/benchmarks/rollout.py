"""Captured decoding on one GPU: milliseconds a step, tokens a second, share of the bandwidth floor, beside transformers' `generate`.

    python tests/benchmarks/rollout.py [--profile] [--families pangu,glm,llama] [--rows 64,256] [--minutes 8]

Random weights, 24 layers of 1024, vocabulary 40,000, bfloat16, prompts and answers of 256, sampling from the whole softmax. First the kernel
alone with several settings, the best of which the models then use. A variant that fails is printed and passed over.
"""
import argparse
import statistics
import time
import traceback

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

from rlhfkit import kernels
from rlhfkit.decode import Decoder, supported
from rlhfkit.models.glm import GlmV1Config
from rlhfkit.models.pangu import PanguConfig
from rlhfkit.rollout import rollout

VOCAB, PROMPT, ANSWER = 40000, 256, 256
GLM = dict(pad_token_id=VOCAB - 6, eos_token_id=VOCAB - 5, sop_token_id=VOCAB - 4, mask_token_id=VOCAB - 3, smask_token_id=VOCAB - 2,
           gmask_token_id=VOCAB - 1)
SETTINGS = [(16, 1, 2), (16, 1, 3), (16, 1, 4), (16, 2, 3), (16, 2, 4), (32, 1, 3), (32, 2, 3), (32, 4, 3), (64, 4, 3)]    # block, warps, stages
GROUPED = [(32, 2, 3), (32, 4, 3), (64, 2, 3), (64, 4, 2), (64, 4, 3), (128, 4, 2)]
DEVICE, START = "cuda", time.time()


def main():
    parser = argparse.ArgumentParser()
    for name, default in (("families", "pangu,llama,glm"), ("rows", "64,256"), ("minutes", "8"), ("layers", "24"), ("hidden", "1024")):
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows = [int(n) for n in args.rows.split(",")]
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "transformers", transformers.__version__, flush=True)
    bandwidth = measured(copy_bandwidth) or 3.0e12
    measured(correctness)
    best = {n: measured(sweep, n, args) for n in rows}
    measured(grouped, rows[0])
    plans = [(dict(compiled=True), {}), (dict(compiled=False), {}), (dict(compiled=True), dict(top_k=50)), (dict(compiled=True), dict(first=8))]
    for family in args.families.split(","):
        model = measured(build, family, args)
        if model is None:
            continue
        for n in rows:
            if best[n]:
                kernels.TUNED[False].update(zip(("block", "warps", "stages"), best[n]))
            peer = measured(generate, family, model, n)
            for options, more in plans if family == args.families.split(",")[0] else plans[:2]:
                if time.time() - START > 60 * float(args.minutes) - 30:
                    print("no time left:", family, n, options, more, flush=True)
                    continue
                torch._dynamo.reset()           # or the second number of rows would run with the batch left open
                measured(time_decoder, family, model, n, bandwidth, peer, args, options, **more)
        del model
        torch.cuda.empty_cache()


def measured(function, *args, **kwargs):
    """The function's result; None, and the error printed, where it fails."""
    try:
        return function(*args, **kwargs)
    except Exception:
        print("FAILED", function.__name__, args[:1], kwargs, traceback.format_exc()[-1500:], flush=True)
        return None


def build(family, args):
    """A random model of the benchmark's size in bfloat16."""
    layers, size = int(args.layers), int(args.hidden)
    heads = size // 64
    config = {"pangu": lambda: PanguConfig(vocab_size=VOCAB, num_layers=layers, hidden_size=size, num_heads=heads),
              "glm": lambda: GlmV1Config(vocab_size=VOCAB, num_layers=layers, hidden_size=size, num_attention_heads=heads, **GLM),
              "llama": lambda: LlamaConfig(vocab_size=VOCAB, num_hidden_layers=layers, hidden_size=size, num_attention_heads=heads,
                                           intermediate_size=8 * size // 3 // 64 * 64, max_position_embeddings=1024)}[family]()
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    reason = supported(model, DEVICE)
    if reason:
        raise ValueError(f"{family} cannot be captured: {reason}")
    return model


def ask(family, rows, seed=0):
    """Random prompts of PROMPT ids; GLM's end with a mask and the start token."""
    ids = torch.randint(10, VOCAB - 10, (rows, PROMPT), generator=torch.Generator().manual_seed(seed)).tolist()
    return [row[:-2] + [GLM["gmask_token_id"], GLM["sop_token_id"]] for row in ids] if family == "glm" else ids


def time_decoder(family, model, rows, bandwidth, peer, args, options, first=0, top_k=0):
    """Print a line of one decoder. first: rows of a call before, after which the layers are compiled again, with the batch left open."""
    decoder, seeds = Decoder(model, **options), list(range(rows))

    def call(new, prompts, n=rows):
        torch.cuda.synchronize()
        start = time.perf_counter()
        decoder(prompts[:n], new, [-1], 6, seeds[:n], 1.0, top_k)
        torch.cuda.synchronize()
        return time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    if first:
        call(ANSWER, ask(family, rows), first)
    begun = call(ANSWER, ask(family, rows))
    prefill = statistics.median(call(1, ask(family, rows, seed)) for seed in range(3))
    whole = statistics.median(call(ANSWER, ask(family, rows, seed)) for seed in range(3 if rows > 100 else 5))
    step = (whole - prefill) / (ANSWER - 1)
    floor = floor_seconds(model, rows, bandwidth)
    print(f"{family:6} rows {rows:4} {'compiled' if options['compiled'] else 'plain':8}"
          f"{f' top_k {top_k}' if top_k else ''}{' batch left open' if first else ''}: {step * 1e3:.3f} ms a step, {rows / step:,.0f} tok/s, "
          f"{floor / step:.0%} of the floor {floor * 1e3:.2f} ms; with prefill ({prefill * 1e3:.0f} ms) {rows * ANSWER / whole:,.0f} tok/s; "
          f"first call {begun - whole:.1f} s more; {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB"
          + (f"; {peer / step:.1f} x generate" if peer else ""), flush=True)
    if args.profile and not first and not top_k:
        profile(decoder)
    decoder.free()


def generate(family, model, rows, new=64):
    """Seconds a step of transformers' generate, dynamic cache, sampling."""
    ids = torch.tensor(ask(family, rows), device=DEVICE)

    def call(count):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=True, top_k=0, eos_token_id=-1,
                       pad_token_id=6)
        torch.cuda.synchronize()
        return time.perf_counter() - start
    call(4)
    step = (call(new) - call(1)) / (new - 1)
    print(f"{family:6} rows {rows:4} transformers' generate: {step * 1e3:.2f} ms a step, {rows / step:,.0f} tok/s", flush=True)
    return step


def floor_seconds(model, rows, bandwidth):
    """Weights and the mean step's filled cache, read once."""
    tied = model.get_output_embeddings().weight
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)} - {id(tied)}
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in tables)
    cache = rows * (PROMPT + ANSWER / 2) * 2 * model.config.hidden_size * 2 * model.config.num_hidden_layers
    return (weights + cache) / bandwidth


def copy_bandwidth(size=2 ** 30):
    """Bytes a second, read and written, of a copy."""
    x = torch.randint(0, 255, (size,), dtype=torch.uint8, device=DEVICE)
    y = torch.empty_like(x)
    found = 2 * size / graph_seconds(lambda: y.copy_(x), 5)
    print(f"copy bandwidth {found / 1e12:.2f} TB/s", flush=True)
    return found


def graph_seconds(function, repeats=20):
    """Median seconds of a captured call."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def attention_seconds(rows, heads, key_heads, layers, size=64, slot=PROMPT + ANSWER // 2):
    """Seconds of all layers' attention of a step, each layer with buffers of its own."""
    query, key, value = (torch.randn(rows, h, 1, size, device=DEVICE, dtype=torch.bfloat16) for h in (heads, key_heads, key_heads))
    caches = [torch.randn(2, rows, key_heads, PROMPT + ANSWER, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(layers)]
    starts, slot = torch.zeros(rows, dtype=torch.long, device=DEVICE), torch.tensor([slot], device=DEVICE)
    return graph_seconds(lambda: [kernels.attend(query, key, value, *cache, starts, slot, size ** -0.5) for cache in caches])


def sweep(rows, args):
    """Print the attention kernel's settings for as many key heads as heads -> the best (block, warps, stages)."""
    layers, heads = int(args.layers), int(args.hidden) // 64
    least = 2 * 2 * rows * (PROMPT + ANSWER // 2) * 64 * heads * layers                                      # bytes
    found = {}
    for setting in SETTINGS:
        found[setting] = measured(timed_setting, False, setting, rows, heads, heads, layers) or float("inf")
    for setting, seconds in sorted(found.items(), key=lambda x: x[1]):
        print(f"kernel rows {rows:4} block, warps, stages {setting}: {seconds * 1e3:.3f} ms, {least / seconds / 1e12:.2f} TB/s", flush=True)
    return min(found, key=found.get)


def timed_setting(shared, setting, *shape):
    kernels.TUNED[shared].update(zip(("block", "warps", "stages"), setting))
    return attention_seconds(*shape)


def grouped(rows):
    """The same for 16 heads that share 4 key heads, and few rows with the positions split among programs."""
    before = dict(kernels.TUNED[True])
    for setting in GROUPED:
        seconds = measured(timed_setting, True, setting, rows, 16, 4, 24)
        if seconds:
            print(f"kernel rows {rows:4} 4 key heads {setting}: {seconds * 1e3:.3f} ms", flush=True)
    kernels.TUNED[True].update(before)
    for splits in (1, 2, 4, 8):
        for shared, key_heads in ((False, 16), (True, 4)):
            kernels.TUNED[shared]["splits"] = splits
            print(f"kernel rows 8, {key_heads} key heads, {splits} splits: {attention_seconds(8, 16, key_heads, 24) * 1e3:.3f} ms", flush=True)
            kernels.TUNED[shared]["splits"] = 0


def correctness():
    """Captured answers are plain ones in float32; sampled and scored log-probs are close in bfloat16."""
    torch.manual_seed(0)
    small = dict(vocab_size=2000, hidden_size=256, max_position_embeddings=512)
    made = {"pangu": PanguConfig(**small, num_layers=4, num_heads=4),
            "grouped": LlamaConfig(**small, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=512)}
    prompts = [torch.randint(10, 1990, (n,)).tolist() for n in range(20, 60)]
    for name, config in made.items():
        config.initializer_range = 0.06
        model = AutoModelForCausalLM.from_config(config).to(DEVICE).eval()
        for compiled in (False, True):
            equal = []
            for temperature in (0.0, 1.0):
                given = prompts, 64, list(range(0, 2000, 60)), 6, list(range(40)), temperature
                ours, theirs = (f(*given)[0] for f in (Decoder(model, compiled), lambda *a: rollout(model, *a)))
                equal.append(sum(a == b for a, b in zip(ours, theirs)))
            print(f"float32 {name} compiled {compiled}: of 40 answers equal to plain decoding's: greedy {equal[0]}, sampled {equal[1]}",
                  flush=True)
        model.bfloat16()
        answers, logps = Decoder(model)(prompts, 64, [-1], 6, list(range(40)), 1.0)
        gaps = []
        with torch.no_grad():
            for prompt, answer, logp in zip(prompts, answers, logps):
                ids = torch.tensor([prompt + answer], device=DEVICE)
                scores = model(ids).logits[0, len(prompt) - 1:-1].float().log_softmax(-1).gather(1, ids[0, len(prompt):, None])[:, 0]
                gaps.append((scores - torch.tensor(logp, device=DEVICE)).abs())
        gaps = torch.cat(gaps)
        print(f"bfloat16 {name}: |sampled - scored| log-prob: mean {float(gaps.mean()):.1e}, largest {float(gaps.max()):.1e}", flush=True)


def profile(decoder, replays=4):
    """Print the kernels of a replayed step that take longest."""
    graph, slot = next(iter(decoder.graphs.values())), decoder.slot.clone()
    decoder.slot.fill_(PROMPT + ANSWER // 2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(replays):
            graph.replay()
        torch.cuda.synchronize()
    decoder.slot.copy_(slot)
    events = sorted((e for e in found.key_averages() if e.self_device_time_total), key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in events)
    print(f"    {sum(e.count for e in events) // replays} kernels, {total / replays / 1e3:.3f} ms of device time a step")
    for e in events[:14]:
        print(f"    {e.self_device_time_total / replays:8.1f} us {e.count // replays:4} x {e.key[:110]}")
    print(end="", flush=True)


if __name__ == "__main__":
    main()
