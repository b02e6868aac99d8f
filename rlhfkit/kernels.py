"""Attention of one new token a row over the filled part of a static cache, in Triton; imported only where there is a GPU.

One program takes a row and a key head (with all query heads that share it) and reads each key and value once; where these are too few to fill
the GPU the positions are split among several (flash decoding). Softmax in float32. The new key and value are written in passing.
"""
import torch
import triton
import triton.language as tl

# By query heads a key head: one, or several. `splits` 0: as many as fill the GPU. tests/benchmarks/rollout.py tries others.
TUNED = {False: dict(block=16, warps=1, stages=3, splits=0), True: dict(block=64, warps=2, stages=3, splits=0)}
PROGRAMS = 264              # two for each of an H100's 132 multiprocessors


def attend(query, key, value, keys, values, starts, slot, scale):
    """query (B, H, 1, D), key, value (B, K, 1, D), keys, values (B, K, L, D), starts (B,), slot (1,) int64 -> (B, 1, H, D).

    Writes key and value at `slot`, then attends over positions starts[b] .. slot of each row; K divides H."""
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    rows, heads, _, size = query.shape
    key_heads = key.shape[1]
    tuned = TUNED[heads > key_heads]
    splits = tuned["splits"] or min(16, triton.next_power_of_2(max(1, PROGRAMS // (rows * key_heads))))
    out = torch.empty(rows, 1, heads, size, dtype=query.dtype, device=query.device)
    parts, sums = out, out
    if splits > 1:
        parts = torch.empty(rows, heads, splits, size, dtype=torch.float32, device=query.device)
        sums = torch.empty(rows, heads, splits, 2, dtype=torch.float32, device=query.device)
    shape = dict(SIZE=size, WIDTH=max(16, triton.next_power_of_2(size)), SPLITS=splits)
    (_attend_group if heads > key_heads else _attend_one)[(key_heads, rows, splits)](
        query, key, value, keys, values, out, parts, sums, starts, slot, scale * 1.4426950408889634,           # exp2 is the faster one
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1), keys.stride(0), keys.stride(1),
        heads, GROUP=heads // key_heads, PADDED=max(16, triton.next_power_of_2(heads // key_heads)),
        BLOCK=max(16, 2 * tuned["block"] // max(2, keys.element_size())),            # float32 takes the shared memory of twice as many
        STAGES=tuned["stages"], num_warps=tuned["warps"], **shape)
    if splits > 1:
        _join[(heads, rows)](parts, sums, out, heads, num_warps=1, **shape)
    return out


@triton.jit
def _range(starts, slot, row, split, BLOCK: tl.constexpr, SPLITS: tl.constexpr):
    """(first, behind the last) filled position that this program reads, and the new one, which it does not: no program waits for a write."""
    end, start = tl.load(slot).to(tl.int32), tl.load(starts + row).to(tl.int32)
    share = tl.cdiv(tl.cdiv(tl.maximum(end - start, 0), SPLITS), BLOCK) * BLOCK
    low = start + split * share
    return low, tl.minimum(low + share, end), end


@triton.jit
def _attend_one(query, key, value, keys, values, out, parts, sums, starts, slot, scale, qb, qh, kb, kh, vb, vh, cb, ch, heads,
                GROUP: tl.constexpr, PADDED: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
                STAGES: tl.constexpr):
    """A query head with a key head of its own. Its products are no work for tensor cores: each of BLOCK lanes keeps a softmax of its own over
    every BLOCK-th position, so that the loop needs no exchange between warps; they are joined after it."""
    head, row, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    low, high, end = _range(starts, slot, row, split, BLOCK, SPLITS)
    d, position = tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    real, cache = d < SIZE, row * cb + head * ch
    new_key = tl.load(key + row * kb + head * kh + d, mask=real, other=0.0)
    new_value = tl.load(value + row * vb + head * vh + d, mask=real, other=0.0)
    if split == 0:
        tl.store(keys + cache + end * SIZE + d, new_key, mask=real)
        tl.store(values + cache + end * SIZE + d, new_value, mask=real)
    q = tl.load(query + row * qb + head * qh + d, mask=real, other=0.0).to(tl.float32) * scale
    mine = (split == 0) & (position == 0)
    peak = tl.where(mine, tl.sum(q * new_key.to(tl.float32), 0), -1e30)
    total = tl.where(mine, 1.0, 0.0)
    sum_ = tl.where(mine[:, None], new_value.to(tl.float32)[None, :], 0.0)
    for at in tl.range(low, high, BLOCK, num_stages=STAGES):
        there = at + position < high
        place = cache + (at + position)[:, None] * SIZE + d[None, :]
        k = tl.load(keys + place, mask=there[:, None] & real[None, :], other=0.0).to(tl.float32)
        v = tl.load(values + place, mask=there[:, None] & real[None, :], other=0.0).to(tl.float32)
        score = tl.where(there, tl.sum(k * q[None, :], 1), -float("inf"))
        top = tl.maximum(peak, score)
        old, weight = tl.exp2(peak - top), tl.exp2(score - top)
        total, sum_, peak = total * old + weight, sum_ * old[:, None] + weight[:, None] * v, top
    top = tl.max(peak, 0)
    weight = tl.exp2(peak - top)
    total, sum_ = tl.sum(total * weight, 0), tl.sum(sum_ * weight[:, None], 0)
    if SPLITS == 1:
        tl.store(out + (row * heads + head) * SIZE + d, sum_ / total, mask=real)
    else:
        part = (row * heads + head) * SPLITS + split
        tl.store(parts + part * SIZE + d, sum_, mask=real)
        tl.store(sums + part * 2, top)
        tl.store(sums + part * 2 + 1, total)


@triton.jit
def _attend_group(query, key, value, keys, values, out, parts, sums, starts, slot, scale, qb, qh, kb, kh, vb, vh, cb, ch, heads,
                  GROUP: tl.constexpr, PADDED: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
                  SPLITS: tl.constexpr, STAGES: tl.constexpr):
    """All query heads that share a key head, on tensor cores."""
    head, row, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    low, high, end = _range(starts, slot, row, split, BLOCK, SPLITS)
    d, position, g, first = tl.arange(0, WIDTH), tl.arange(0, BLOCK), tl.arange(0, PADDED), split == 0
    real, cache = d < SIZE, row * cb + head * ch
    new_key = tl.load(key + row * kb + head * kh + d, mask=real, other=0.0)
    new_value = tl.load(value + row * vb + head * vh + d, mask=real, other=0.0)
    if first:
        tl.store(keys + cache + end * SIZE + d, new_key, mask=real)
        tl.store(values + cache + end * SIZE + d, new_value, mask=real)
    inside = (g < GROUP)[:, None] & real[None, :]
    q = tl.load(query + row * qb + (head * GROUP + g)[:, None] * qh + d[None, :], mask=inside, other=0.0)             # (PADDED, WIDTH)
    peak = tl.where(first, tl.sum(q.to(tl.float32) * new_key.to(tl.float32)[None, :], 1) * scale, -1e30)
    total = tl.where(first, tl.full([PADDED], 1.0, tl.float32), 0.0)
    sum_ = tl.where(first, tl.zeros([PADDED, WIDTH], tl.float32) + new_value.to(tl.float32)[None, :], 0.0)
    for at in tl.range(low, high, BLOCK, num_stages=STAGES):
        there = at + position < high
        place = cache + (at + position)[:, None] * SIZE + d[None, :]
        k = tl.load(keys + place, mask=there[:, None] & real[None, :], other=0.0)
        v = tl.load(values + place, mask=there[:, None] & real[None, :], other=0.0)
        score = tl.where(there[None, :], tl.dot(q, tl.trans(k), input_precision="ieee") * scale, -float("inf"))
        top = tl.maximum(peak, tl.max(score, 1))
        old, weight = tl.exp2(peak - top), tl.exp2(score - top[:, None])
        total = total * old + tl.sum(weight, 1)
        sum_ = sum_ * old[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        peak = top
    part = row * heads + head * GROUP + g
    if SPLITS == 1:
        tl.store(out + part[:, None] * SIZE + d[None, :], sum_ / total[:, None], mask=inside)
    else:
        part = part * SPLITS + split
        tl.store(parts + part[:, None] * SIZE + d[None, :], sum_, mask=inside)
        tl.store(sums + part * 2, peak, mask=g < GROUP)
        tl.store(sums + part * 2 + 1, total, mask=g < GROUP)


@triton.jit
def _join(parts, sums, out, heads, SIZE: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    place = tl.program_id(1).to(tl.int64) * heads + tl.program_id(0)
    d, split = tl.arange(0, WIDTH), tl.arange(0, SPLITS)
    part = place * SPLITS + split
    peak, total = tl.load(sums + part * 2), tl.load(sums + part * 2 + 1)
    weight = tl.exp2(peak - tl.max(peak, 0))
    sum_ = tl.load(parts + part[:, None] * SIZE + d[None, :], mask=(d < SIZE)[None, :], other=0.0)
    result = tl.sum(sum_ * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out + place * SIZE + d, result, mask=d < SIZE)
