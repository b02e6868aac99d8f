"""Which beginnings of rows are run once: rows become a tree of segments, and batches of segments continue a cache.

The 2023 kit ran few-shot examples and contexts anew for every question and choice. Here a shared beginning is a segment of
its own where it saves a twentieth of the tokens behind it. Pads of what is continued stand on its left, as in generation.
"""
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

WORTH = 0.05                    # of the tokens: a split that saves less costs more in copied keys and values
POSITIONS = 8192                # of a batch on a CPU, what is attended to included
SHARE = 0.2                     # of a GPU's free memory, for the keys and values of a batch's positions
TOKENS = {"cpu": (256, 1024), "cuda": (12288, 32768)}    # newly computed in a batch: so many before pads count, and at most
PADS = 0.05                     # of a batch with more than that
HEAD = {"cpu": 128, "cuda": 2048}       # positions that go through the head at once; more would fall out of a CPU's caches


@dataclass(eq=False)
class Segment:
    """Tokens row[start:end], run behind its parent's. `wanted`: (owner, first, tokens), scored from position `first` on."""

    row: tuple
    start: int
    end: int
    parent: "Segment | None" = None
    wanted: list = field(default_factory=list)
    children: list = field(default_factory=list)
    place: tuple = ()                       # its row in the cache of its batch, and the column behind its end there


def plan(depths, worth=WORTH):
    """{row of ids: the depth before which it may not be split} -> (roots, {row: its last segment})."""
    rows = sorted(depths)
    least = np.array([depths[row] for row in rows])
    shared = np.array([_common(a, b) for a, b in zip(rows, rows[1:])], dtype=int)
    until = np.cumsum([0, *map(len, rows)])
    roots, leaves, stack = [], {}, [(0, len(rows), 0, None)]
    while stack:
        low, high, start, parent = stack.pop()
        between = shared[low:high - 1]
        depth = int(between.min()) if high - low > 1 else len(rows[low])
        cuts = [low, *(low + 1 + np.flatnonzero(between == depth)), high]
        saved, tokens = (len(cuts) - 2) * (depth - start), until[high] - until[low] - (high - low) * start
        if high - low == 1 or saved > worth * tokens and depth >= least[low:high].max():
            segment = Segment(rows[low], start, depth, parent)
            (parent.children if parent else roots).append(segment)
            parent, start = segment, depth
        for a, b in zip(cuts, cuts[1:]):
            if len(rows[a]) == start:
                leaves[rows[a]] = parent
            else:
                stack.append((a, b, start, parent))
    return roots, leaves


def want(leaf, owner, first, tokens):
    """Have `tokens` scored for `owner`, the first from the logits at position `first` of the row that ends with `leaf`."""
    last = first + len(tokens)
    while last > first:
        begin = max(first, leaf.start)
        if begin < last:
            leaf.wanted.append((owner, begin, tokens[begin - first:last - first]))
        leaf, last = leaf.parent, min(last, begin)


@torch.no_grad()
def reads_ahead(model, row):
    """Whether hidden states depend on later tokens, as GLM's do in a prompt: measured on the beginning of a row."""
    ids = list(row[:8])
    other = next((i for i in ids if i != ids[1]), ids[1] - 1 if ids[1] else 1)
    rows = torch.tensor([ids, [ids[0], other, *ids[2:]]], device=next(model.parameters()).device)
    one, two = model.base_model(input_ids=rows, use_cache=False).last_hidden_state[:, 0].float()                # (H,) each
    return not torch.allclose(one, two, rtol=0, atol=1e-3 * float(one.abs().max()))


class Runner:
    """Runs segments in batches and adds the log-probabilities that are wanted of them to `totals` (owners,), float64.

    longest: the longest row, which no batch exceeds with its pads. batch_tokens: positions of a batch, pads and what is
    attended to included; None: what memory allows, halved when it runs out."""

    def __init__(self, model, owners, longest, batch_tokens=None, batch_size=None, side="right", ahead=False):
        self.model, self.side, self.ahead = model, side, ahead
        self.longest, self.batch_size = longest, batch_size or 10 ** 9
        self.device = next(model.parameters()).device
        self.totals = torch.zeros(owners, dtype=torch.float64, device=self.device)
        self.tokens = (batch_tokens, batch_tokens) if batch_tokens else TOKENS[self.device.type]
        self.positions = batch_tokens or self._room()

    def run(self, segments, parents=None):
        """Segments whose parents stand in the cache `parents`, or that have none; then what stands behind each batch of them."""
        queue, done = sorted(segments, key=self._likeness, reverse=True), 0
        while done < len(queue):
            batch, cost = self._next(queue, done)
            try:
                cache = self._forward(batch, parents)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                self.positions = cost // 2
            else:
                done += len(batch)
                self.run([child for segment in batch for child in segment.children], cache)
                continue
            torch.cuda.empty_cache()        # not in the handler, whose traceback holds the tensors

    def _room(self):
        """Positions whose keys and values may be held for one batch."""
        if self.device.type == "cpu":
            return POSITIONS
        config = self.model.config.get_text_config()
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        free = torch.cuda.mem_get_info(self.device)[0] + cached
        return int(free * SHARE) // (2 * config.num_hidden_layers * config.hidden_size * self.model.dtype.itemsize)

    @staticmethod
    def _likeness(segment):
        return bool(segment.children), round(2 * np.log2(1 + segment.start)), segment.end - segment.start

    def _next(self, queue, done):
        """The next batch of the queue, one segment at least, and its positions."""
        past = new = count = real = 0
        for segment in queue[done:done + self.batch_size]:
            size = segment.end - segment.start
            wider, longer, more = max(past, segment.start), max(new, size), real + size
            tokens = (count + 1) * longer
            if count and (wider + longer > self.longest or tokens + (count + 1) * wider > self.positions
                          or tokens > self.tokens[1] or tokens > self.tokens[0] and more < (1 - PADS) * tokens):
                break
            past, new, count, real = wider, longer, count + 1, more
        return queue[done:done + count], count * (past + new)

    def _forward(self, batch, parents):
        """Score one batch of segments -> the cache of their keys and values, where any of them has children."""
        past, new = max(s.start for s in batch), max(s.end - s.start for s in batch)
        ids, mask = np.zeros((2, len(batch), past + new), dtype=np.int64)                                       # (B, past + new)
        pads = [past - s.start if parents or self.side == "right" else new - s.end for s in batch]
        for i, (s, before) in enumerate(zip(batch, pads)):
            first = 0 if self.ahead else s.start            # a causal model reads no ids but the new ones
            ids[i, before + first:before + s.end] = s.row[first:s.end]
            mask[i, before:before + s.end] = 1
        keep, cache = any(s.children for s in batch), None
        if parents:
            cache = _fork(parents, [s.parent.place for s in batch], past, keep)
        elif keep:
            cache = DynamicCache()
        inputs = {"input_ids": self._tensor(ids), "past_key_values": cache}
        if parents or not mask.all():
            mask = self._tensor(mask)
            inputs = self.model.prepare_inputs_for_generation(
                **inputs, next_sequence_length=new, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
        hidden = self.model.base_model(**inputs, use_cache=cache is not None).last_hidden_state                 # (B, new, H)
        self._score(hidden, batch, [before - past for before in pads])
        for i, (s, before) in enumerate(zip(batch, pads)):
            s.place = (i, before + s.end)
        return cache if keep else None

    def _score(self, hidden, batch, shifts):
        """shifts: what to add to a position of a segment's row to find it in hidden (B, new, H)."""
        wanted = [(owner, i * hidden.shape[1] + shift + first, tokens)
                  for i, (s, shift) in enumerate(zip(batch, shifts)) for owner, first, tokens in s.wanted]
        if not wanted:
            return
        sizes = [len(tokens) for _, _, tokens in wanted]
        owners = np.repeat([owner for owner, _, _ in wanted], sizes)
        places = np.concatenate([np.arange(place, place + size) for (_, place, _), size in zip(wanted, sizes)])
        places, which = np.unique(places, return_inverse=True)          # the four letters of an item are read from one position
        order = np.argsort(which, kind="stable")
        owners, tokens, which = owners[order], np.concatenate([tokens for _, _, tokens in wanted])[order], which[order]
        head, rows, found = self.model.get_output_embeddings(), HEAD[self.device.type], []
        for start in range(0, len(places), rows):
            chosen = hidden.flatten(0, 1)[self._tensor(places[start:start + rows])]                             # (N, H)
            logps = head(chosen).float().log_softmax(-1)                                                        # (N, V)
            a, b = np.searchsorted(which, (start, start + rows))
            found.append(logps[self._tensor(which[a:b] - start), self._tensor(tokens[a:b])])
        self.totals.index_add_(0, self._tensor(owners), torch.cat(found).double())

    def _tensor(self, array):
        return torch.from_numpy(array).to(self.device, non_blocking=True)


class Fork(DynamicLayer):
    """One layer of a cache whose rows continue rows of another: their past is copied where it is used, kept only if asked."""

    def __init__(self, layer, take, past, keep):
        super().__init__()
        self.layer, self.take, self.past, self.keep, self.is_initialized = layer, take, past, keep, True

    def update(self, key_states, value_states, *args, **kwargs):
        keys = torch.cat([self.take(self.layer.keys), key_states], dim=-2)
        values = torch.cat([self.take(self.layer.values), value_states], dim=-2)
        if self.keep:
            self.keys, self.values = keys, values
        return keys, values

    def get_seq_length(self):
        return self.past


def _fork(parents, places, past, keep):
    """A cache of rows that continue those at `places` (row, column behind its end) of another: their last `past` columns."""
    (row, end), device = places[0], parents.layers[0].keys.device
    rows, ends = (torch.tensor(x, device=device)[:, None] for x in zip(*places))                                # (B, 1)
    columns = (ends - past + torch.arange(past, device=device)).clamp(min=0)                                    # (B, past)
    alike = len(set(places)) == 1

    def take(states):
        """(parents, heads, T, size) -> (B, heads, past, size)"""
        if alike:
            return states[row:row + 1, :, end - past:end].expand(len(places), -1, -1, -1)
        return states[rows, :, columns].transpose(1, 2)
    return Cache([Fork(layer, take, past, keep) for layer in parents.layers])


def _common(a, b):
    """The number of ids that two rows have in common at their beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
