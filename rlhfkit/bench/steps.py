"""Timed training steps of any model that loads, T5 included, on random ids: for tables of speed and memory, nothing is learnt."""
import statistics
import time

import torch

from rlhfkit.engine import device
from rlhfkit.families import load_model
from rlhfkit.trainer import peak_memory


def time_steps(model_path, batch_size=8, length=512, steps=5, dtype="mixed"):
    """AdamW steps on (batch_size, length) random ids, in this process -> dict: seconds_per_step (median, the first left out),
    tokens_per_second, memory_gib. An encoder-decoder gets `length` ids on each side, which count once.
    dtype: float32, mixed (bf16 compute), bfloat16, float16. Raises ValueError for fewer than 2 steps."""
    if steps < 2:
        raise ValueError(f"steps is {steps}; the first one warms up and is not counted: ask for 2 or more")
    model = load_model(model_path, dtype=dtype, device=device()).train()
    optimizer, seconds = torch.optim.AdamW(model.parameters(), lr=1e-5), []
    ids = torch.randint(0, model.config.vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(0)).to(device())
    for _ in range(steps):
        start = time.perf_counter()
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=dtype == "mixed"):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()                             # waits for the accelerator
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[1:])
    return {"seconds_per_step": median, "tokens_per_second": batch_size * length / median, "memory_gib": peak_memory()}
