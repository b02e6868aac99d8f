"""Sampling in the training process on the training weights: no copy of them, no server, one captured CUDA graph a step, for any family.

Rows are padded on the left, so that all write the same slot of a static cache; attention reads a row's filled slots only (kernels.py), layers
are compiled once for all of them. Rows that have ended leave at the next smaller batch. The 2023 code called `generate`.
"""
import torch

from rlhfkit.models.prefix import PrefixPreTrainedModel
from rlhfkit.rows import pad
from rlhfkit.sampling import choose
from rlhfkit.slots import Slots, attending, attentions, compiled, evaluating, laid_together, plain, supported  # noqa: F401

BUCKETS = (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)      # rows of a captured step
EVERY = 16                                  # steps between two looks at which rows have ended, each of which waits for the device


class Decoder:
    """Samples from a causal language model, PEFT adapters included; captured steps and cache are kept while the weights stay where they are.

    compiled: layers through torch.compile, some seconds at the first call of a shape. length: slots to reserve, so that longer rows do not
    capture anew. capture False: each step from Python."""

    def __init__(self, model, compiled=True, length=0, capture=True, backend="inductor"):
        self.model, self.length, self.capture = plain(model), length, capture
        self.backend = backend if compiled else ""
        self.attentions = attentions(self.model)
        self.prefix = isinstance(self.model, PrefixPreTrainedModel)
        self.free()

    @torch.no_grad()
    def __call__(self, prompts, max_new_tokens, end_ids, pad_id, seeds, temperature, top_k=0, top_p=1.0):
        """Lists of ids, seeds: an int a row -> answers, lists of ids up to and with the end token, and log-probs, a float for each id.

        Raises ValueError where a row would be longer than the model's tables of positions."""
        answers, logps = [], []
        kind = next(self.model.parameters()).device.type
        with torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False):     # no stale casts
            for start in range(0, len(prompts), BUCKETS[-1]):
                part = slice(start, start + BUCKETS[-1])
                made = self._sample(prompts[part], max_new_tokens, end_ids, pad_id, seeds[part], (float(temperature), top_k, float(top_p)))
                for ids, scores in made:
                    kept = next((i + 1 for i, token in enumerate(ids) if token in end_ids), len(ids))
                    answers.append(ids[:kept])
                    logps.append(scores[:kept])
        return answers, logps

    def free(self):
        """Give the memory of cache and graphs back."""
        self.graphs, self.caches, self.rows, self.carried, self.shape, self.weights, self.pool = {}, {}, {}, {}, (0, 0), None, None
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _sample(self, prompts, new, end_ids, pad_id, seeds, options):
        """-> a pair (ids, log-probs) a prompt, of `new` tokens or fewer where all rows ended."""
        width, bucket, order, found = max(map(len, prompts)), _bucket(len(prompts)), list(range(len(prompts))), {}
        ends = torch.tensor(sorted(end_ids), device=self._room(bucket, width + new))

        def keep(steps):
            ids, logps = (self.rows[name][:len(order), width:width + steps].tolist() for name in ("tokens", "logps"))
            found.update(zip(order, zip(ids, logps)))

        with evaluating(self.model):
            self._prefill(prompts, width, new, pad_id, seeds, options, bucket)
            for step in range(1, new):
                self._run(bucket, options)
                if step % EVERY and step < new - 1:
                    continue
                ended = torch.isin(self.rows["tokens"][:len(order), width:width + step + 1], ends).any(1).tolist()
                if all(ended):
                    new = step + 1
                    break
                smaller = _bucket(len(order) - sum(ended))
                if smaller < bucket and step < new - 1:
                    keep(step + 1)
                    stay = sorted(range(len(order)), key=ended.__getitem__)[:smaller]       # some that have ended may fill up the batch
                    order, bucket = [order[i] for i in stay], smaller
                    self._compact(stay)
            keep(new)
        return [found[i] for i in range(len(prompts))]

    def _room(self, rows, length):
        """See that the buffers hold `rows` rows of `length` slots and that the graphs are of these weights -> the device."""
        place = next(self.model.parameters()).device
        self.together = laid_together(self.model) if self.backend else ()
        weights = [(t.data_ptr(), t.shape, t.dtype) for t in (*self.model.parameters(), *self.model.buffers())]
        weights += [(m.merged, m.disable_adapters) for m in self.model.modules() if hasattr(m, "merged")]        # adapters, as captured
        autocast = torch.is_autocast_enabled(place.type) and torch.get_autocast_dtype(place.type)
        if self.weights != (weights, autocast):
            self.graphs, self.pool, self.caches, self.carried, self.weights = {}, None, {}, {}, (weights, autocast)
        if rows > self.shape[0] or length > self.shape[1]:
            rows, length = max(rows, self.shape[0]), -(-max(length, self.shape[1], self.length) // 64) * 64
            self.graphs, self.pool, self.caches, self.carried, self.shape = {}, None, {}, {}, (rows, length)
            self.rows = dict(tokens=(rows, length), logps=(rows, length), positions=(rows, *([2] if self.prefix else []), length),
                             starts=(rows,), seeds=(rows,), seen=(rows, 1, 1, 1))
            self.rows = {name: torch.zeros(shape, device=place, dtype=dict(logps=torch.float32, seen=torch.bool).get(name, torch.long))
                         for name, shape in self.rows.items()}
            self.slot, self.width = (torch.zeros(1, dtype=torch.long, device=place) for _ in range(2))
        return place

    def _prefill(self, prompts, width, new, pad_id, seeds, options, bucket):
        """The prompts through the model as it is, their keys and values into the cache, and the first tokens."""
        rows, count, place = self.rows, len(prompts), self.slot.device
        ids, mask = (pad(x, filler, side="left").to(place) for x, filler in ((prompts, pad_id), ([[1] * len(p) for p in prompts], 0)))
        starts, more = width - mask.sum(1), {}
        if self.prefix:                     # as they will be, whatever the answer: the start token stands in the prompt
            whole = torch.nn.functional.pad(ids, (0, new), value=pad_id), torch.nn.functional.pad(mask, (0, new), value=1)
            positions = self.model.base_model.layout(*whole, queries=new)[0]                                  # (B, 2, new)
        else:
            every = (torch.arange(width + new, device=place) - starts[:, None]).clamp(min=0)
            positions, more["position_ids"] = every[:, width:], every[:, :width]
        self._check_positions(positions, width, new)
        cache = Slots(self._fill)
        logits = self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1, **more).logits[:, -1]
        rows["positions"][:count, ..., width:width + new] = positions
        rows["starts"][:count], rows["starts"][count:bucket] = starts, width
        rows["seeds"][:count] = torch.tensor([(s + 2 ** 63) % 2 ** 64 - 2 ** 63 for s in seeds], device=place)
        self.slot.fill_(width)
        self.width.fill_(width)
        rows["tokens"][:count, width], rows["logps"][:count, width] = choose(logits, rows["seeds"][:count], 0, *options)
        for name, value in vars(cache).items():         # what a model leaves on the cache for its later tokens, a row each: Qwen-1's base
            if isinstance(value, torch.Tensor):
                if name not in self.carried:
                    self.carried[name] = value.new_zeros(self.shape[0], *value.shape[1:])
                self.carried[name][:count] = value

    def _fill(self, key, value, layer):
        if layer not in self.caches:
            shape = self.shape[0], key.shape[1], self.shape[1]
            self.caches[layer] = value.new_zeros(*shape, key.shape[3]), value.new_zeros(*shape, value.shape[3])
        for buffer, part in zip(self.caches[layer], (key, value)):
            buffer[:part.shape[0], :, :part.shape[2]] = part

    def _check_positions(self, positions, width, new):
        """An index past a table of positions would kill the process on a GPU."""
        tables = [m.num_embeddings for m in self.model.modules()
                  if isinstance(m, torch.nn.Embedding) and m is not self.model.get_input_embeddings()]
        if tables and int(positions.max()) >= min(tables):
            raise ValueError(f"the row has {width + new} tokens; this model has {min(tables)} positions; shorten the prompt or lower "
                             "max_new_tokens")

    def _compact(self, stay):
        """The rows `stay` become the first ones."""
        index = torch.tensor(stay, device=self.slot.device)
        for buffer in (*self.rows.values(), *self.carried.values(), *(x for pair in self.caches.values() for x in pair)):
            buffer[:len(stay)] = buffer[index]

    def _run(self, bucket, options):
        if not self.capture:
            with attending(self.model), compiled(self.model, self.backend, self.together):
                return self._step(bucket, options)
        if (bucket, options) not in self.graphs:
            self.graphs[bucket, options] = self._captured(bucket, options)
        self.graphs[bucket, options].replay()

    def _captured(self, bucket, options):
        """The step as a graph. Warming it up writes what the first replay will write again, so only the slot is put back."""
        slot, graph, side = self.slot.clone(), torch.cuda.CUDAGraph(), torch.cuda.Stream(self.slot.device)
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        with attending(self.model), compiled(self.model, self.backend, self.together):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self._step(bucket, options)
                    self.slot.copy_(slot)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                self._step(bucket, options)
        return graph

    def _step(self, bucket, options):
        """The first `bucket` rows' tokens at the slot through the model, the next ones into the slot behind it."""
        rows = slice(0, bucket)
        for attention in self.attentions:
            attention.slots = *(buffer[rows] for buffer in self.caches[attention.layer_idx]), self.rows["starts"][rows], self.slot
        cache, part = Slots(), {name: buffer[rows] for name, buffer in self.rows.items()}
        for name, value in self.carried.items():
            setattr(cache, name, value[rows])
        out = self.model(input_ids=part["tokens"].index_select(1, self.slot), position_ids=part["positions"].index_select(-1, self.slot),
                         attention_mask=part["seen"] if self.prefix else None, past_key_values=cache, use_cache=True)
        finish = torch.compile(_finish, backend=self.backend) if self.backend else _finish
        finish(out.logits[:, -1], part["seeds"], self.slot, self.width, part["tokens"], part["logps"], options)
        self.slot += 1


def _finish(logits, seeds, slot, width, tokens, logps, options):
    """Choose and write at slot + 1; tokens, logps (B, slots)."""
    token, logp = choose(logits, seeds, (slot + 1 - width)[0], *options)
    tokens.index_copy_(1, slot + 1, token[:, None])
    logps.index_copy_(1, slot + 1, logp.float()[:, None])


def _bucket(rows):
    return next((b for b in BUCKETS if b >= rows), BUCKETS[-1])
