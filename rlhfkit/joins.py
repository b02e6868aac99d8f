"""The loops of duplicates.py: texts as sets of numbered bigrams, near pairs of sets, hashes of all windows of texts. No torch.

Loops are numba's, one thread, compiled at their first call; without numba they run as plain Python, a hundred times slower.
"""
import functools
import unicodedata
from itertools import islice

import numpy as np

LIMIT = 128             # bigrams that stand for a longer text: those with the lowest hash (bottom-k sketch, Broder 1997)
LENGTH_BITS = 63        # of a window's hash: where its length stands
BASE = -7046029254386353131                                     # of the rolling hash, modulo 2^64; odd
_AT_ONCE = 4096         # texts
_TABLE = 0x20000        # code points with an entry in the table of letters
_NEWLINE = ord("\n")


def letters(text):
    """The letters and digits of a text after NFKC (full-width forms become plain), in lower case."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).lower() if c.isalnum())


def codes_of(texts):
    """List of str -> code points of all their `letters`, end to end (C,) int32, and where those of each start (N + 1,)."""
    texts = [text.replace("\n", " ") for text in texts]
    table, codes = _table(), _encoded(texts)
    found = table.take(codes, mode="clip")
    odd = np.flatnonzero(found < 0)
    if len(odd):
        for i in np.unique(np.searchsorted(np.flatnonzero(codes == _NEWLINE), odd)):
            texts[i] = letters(texts[i])
        codes = _encoded(texts)
        found = table.take(codes, mode="clip")
        found = np.where(found < 0, codes, found)
    return found[found > 0], np.append(0, np.cumsum(found > 0)[codes == _NEWLINE][:len(texts)])


def _encoded(texts):
    return np.frombuffer(("\n".join(texts) + "\n").encode("utf-32-le", "surrogatepass"), np.int32)


@functools.cache
def _table():
    """`letters` of each code point by itself: 0 for none, -1 where it can be more than one or depends on its neighbours."""
    pairs = [unicodedata.decomposition(chr(i)).split() for i in range(_TABLE)]
    joining = {chr(int(pair[1], 16)) for pair in pairs if len(pair) == 2 and pair[0][0] != "<"}
    joining |= set(map(chr, range(0x1160, 0x1200)))             # parts of Korean syllables
    table = np.zeros(_TABLE, np.int32)
    for i in range(_TABLE):
        first, found = unicodedata.normalize("NFKD", chr(i))[0], letters(chr(i))
        alone = first not in joining and not unicodedata.combining(first) and "Σ" not in unicodedata.normalize("NFKC", chr(i))
        table[i] = (ord(found) if found else 0) if alone and len(found) < 2 else -1
    table[-1] = -1                                              # stands for all beyond
    return table


def mixed(values):
    """Integers -> uint64, one to one, every bit depending on all (the end of splitmix64, Steele 2014)."""
    values = values.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        values ^= values >> np.uint64(shift)
        values *= np.uint64(factor)
    return values


def sets_of(texts):
    """-> tokens (T,) int32: each text's set, rarest first; starts (N + 1,); sums (N,), equal for equal sets; how many tokens."""
    texts, table = iter(texts), (np.full(1 << 12, -1, np.int32), np.empty(1 << 11, np.int64), np.zeros(1 << 11, np.int32), 0)
    tokens, filled, sizes, sums = np.empty(0, np.int32), 0, [np.zeros(1, np.int64)], [np.zeros(0, np.int64)]
    while chunk := list(islice(texts, _AT_ONCE)):
        keys, starts = _bigrams(chunk)
        table, (found, size, total) = _number(keys, starts, *table)
        if filled + len(found) > len(tokens):
            tokens.resize(max(filled + len(found), 5 * len(tokens) // 4), refcheck=False)       # grows in place
        tokens[filled:filled + len(found)] = found
        filled, sizes, sums = filled + len(found), sizes + [size], sums + [total]
    _, _, counts, known = table
    rank = np.empty(known, np.int32)
    rank[np.argsort(counts[:known], kind="stable")] = np.arange(known, dtype=np.int32)
    starts = np.cumsum(np.concatenate(sizes))
    _rank(tokens, starts, rank)
    return tokens[:filled], starts, np.concatenate(sums), known


def _bigrams(texts):
    """-> hashes of all bigrams of each text's normal form, one to one (B,) int64, and where each text's start (N + 1,)."""
    codes, starts = codes_of(texts)
    bare = np.flatnonzero(starts[1:] == starts[:-1])
    if len(bare):                                               # no letter: the text itself
        raw = [_encoded([texts[i]])[:-1] for i in bare]
        codes = np.insert(codes, np.repeat(starts[bare], [len(part) for part in raw]), np.concatenate(raw))
        starts = starts + np.append(0, np.cumsum(np.bincount(bare, [len(part) for part in raw], len(texts)))).astype(np.int64)
    pairs = codes.astype(np.int64) << 21                        # a code point has 21 bits
    pairs[:-1] |= codes[1:]
    sizes = np.diff(starts)
    last = starts[1:][sizes > 0] - 1
    pairs[last] |= (1 << 21) - 1                                # a text of one character is that and nothing
    kept = np.ones(len(codes), bool)
    kept[last] = sizes[sizes > 0] == 1
    return mixed(pairs[kept]).view(np.int64), np.append(0, np.cumsum(np.maximum(sizes - 1, np.minimum(sizes, 1))))


def compiled(function):
    """numba's from the first call on, kept on disk where a folder can be written; plain Python without numba."""
    @functools.wraps(function)
    def run(*arguments):
        return _machine(function)(*arguments)
    return run


@functools.cache
def _machine(function):
    try:
        import numba
    except ImportError:
        return np.errstate(over="ignore")(function)             # hashes wrap
    try:
        return numba.njit(function, cache=True)
    except RuntimeError:                                        # numba found no folder for its machine code
        return numba.njit(function)


@compiled
def _number(keys, starts, slots, known, counts, used):
    """Number bigrams in the order in which they come, at most LIMIT of a text, by a hash table that grows.

    slots (2 K,): a number or -1; known, counts (K,): a number's key and in how many texts it was; used: how many there are.
    -> ((slots, known, counts, used), (numbers, sizes (N,), sums of keys (N,))).
    """
    tokens, filled = np.empty(len(keys), np.int32), 0
    sizes, sums = np.zeros(len(starts) - 1, np.int64), np.zeros(len(starts) - 1, np.int64)
    for text in range(len(sizes)):
        if used + LIMIT > len(known):
            slots = np.full(4 * len(known), -1, np.int32)
            known, counts = np.append(known, np.empty_like(known)), np.append(counts, np.zeros_like(counts))
            for number in range(used):
                slot = known[number] & (len(slots) - 1)
                while slots[slot] >= 0:
                    slot = (slot + 1) & (len(slots) - 1)
                slots[slot] = number
        before = np.int64(0)
        for key in np.sort(keys[starts[text]:starts[text + 1]]):
            if sizes[text] == LIMIT:
                break
            if sizes[text] and key == before:
                continue
            before = key
            slot = key & (len(slots) - 1)
            while slots[slot] >= 0 and known[slots[slot]] != key:
                slot = (slot + 1) & (len(slots) - 1)
            if slots[slot] < 0:
                slots[slot], known[used] = used, key
                used += 1
            tokens[filled] = slots[slot]
            counts[slots[slot]] += 1
            filled, sizes[text], sums[text] = filled + 1, sizes[text] + 1, sums[text] + key
    return (slots, known, counts, used), (tokens[:filled], sizes, sums)


@compiled
def _rank(tokens, starts, rank):
    """Numbers become ranks, in place; each set ascends."""
    for text in range(len(starts) - 1):
        part = tokens[starts[text]:starts[text + 1]]
        for i in range(len(part)):
            part[i] = rank[part[i]]
        part.sort()


@compiled
def repeats_in(tokens, starts, sums, order):
    """(N,) bool, in order: whether a set equals the last one that does not repeat."""
    repeats = np.zeros(len(order), np.bool_)
    kept = 0
    for k in range(1, len(order)):
        a, b = order[kept], order[k]
        if sums[a] == sums[b] and np.array_equal(tokens[starts[a]:starts[a + 1]], tokens[starts[b]:starts[b + 1]]):
            repeats[k] = True
        else:
            kept = k
    return repeats


def join(tokens, starts, order, need, least, known):
    """tokens, starts, known: `sets_of`; order (M,): distinct sets by size -> labels (M,), equal where near pairs connect them.

    Sets of a and b tokens are near when they share need[a + b]; least[a]: the fewest tokens of a set near one of a. A set is
    looked up by its rarest tokens among smaller ones, which stand in a posting for each of their rarest. Members of its own
    component are jumped over: a posting remembers runs of them (ahead), so that a component of a million is cheap. Most pairs
    that share a rare token and no more fall by their signs: 64 parities of hashed tokens, of which no more can differ than
    tokens do (Sandes 2020).
    """
    begins, sizes = starts[order], np.diff(starts)[order]
    heads, signs = _outline(tokens, begins, sizes, need, known)
    return _connect(tokens, begins, sizes, need, least, heads, signs)


@compiled
def _outline(tokens, begins, sizes, need, known):
    """-> where each token's posting begins (known + 1,), and the sign of each set (M,) int64."""
    heads, signs = np.zeros(known + 1, np.int64), np.zeros(len(begins), np.int64)
    for x in range(len(begins)):
        for i in range(sizes[x]):
            token = tokens[begins[x] + i]
            signs[x] ^= np.int64(1) << (np.int64(token) * BASE >> 40 & 63)
            heads[token + 1] += i <= sizes[x] - need[2 * sizes[x]]
    return np.cumsum(heads), signs


@compiled
def _connect(tokens, begins, sizes, need, least, heads, signs):
    tails, total = heads[:-1].copy(), heads[-1]
    sets, places, ahead = np.empty(total, np.int32), np.empty(total, np.uint8), np.empty(total, np.int32)
    labels, after = np.arange(len(begins)), np.arange(len(begins))          # after: a component's next member, round and round
    weights, asked = np.ones(len(begins), np.int32), np.full(len(begins), -1, np.int32)
    for x in range(len(begins)):
        first, size = begins[x], sizes[x]
        for i in range(size - need[size + least[size]] + 1):
            token = tokens[first + i]
            while heads[token] < tails[token] and sizes[sets[heads[token]]] < least[size]:
                heads[token] += 1                               # too small for all that follow, too
            at = heads[token]
            while at < tails[token]:
                here, y = at, sets[at]
                at += 1
                if labels[y] == labels[x]:
                    at = ahead[here]
                    while at < tails[token] and labels[sets[at]] == labels[x]:
                        at = ahead[at]
                    ahead[here] = at
                    continue
                wanted, bits = need[size + sizes[y]], signs[x] ^ signs[y]
                bits -= bits >> 1 & 0x5555555555555555          # counts the bits that are set
                bits = (bits & 0x3333333333333333) + (bits >> 2 & 0x3333333333333333)
                bits = ((bits + (bits >> 4)) & 0x0F0F0F0F0F0F0F0F) * 0x0101010101010101 >> 56
                if bits > size + sizes[y] - 2 * wanted or asked[y] == x:
                    continue
                asked[y] = x                                    # both at their first shared token: none comes before it
                mine, other, stop, end = first + i, begins[y] + places[here], first + size, begins[y] + sizes[y]
                while wanted > 0 and min(stop - mine, end - other) >= wanted:
                    a, b = tokens[mine], tokens[other]
                    wanted -= a == b
                    mine += a <= b
                    other += b <= a
                if wanted > 0:
                    continue
                pair = labels[x], labels[y]
                keep, gone = pair if weights[pair[0]] >= weights[pair[1]] else pair[::-1]
                weights[keep] += weights[gone]
                member = gone
                for _ in range(weights[gone]):
                    labels[member] = keep
                    member = after[member]
                after[keep], after[gone] = after[gone], after[keep]
        for i in range(size - need[2 * size] + 1):
            token = tokens[first + i]
            sets[tails[token]], places[tails[token]], ahead[tails[token]] = x, i, tails[token] + 1
            tails[token] += 1
    return labels


@compiled
def windows(values, starts, lengths, powers, places, bits):
    """Hashes of all windows of each text that pass the filter -> index of the text (W,) int32, gram (W,) int64.

    values (C,) int64: of each character; powers: BASE to the lengths; places, bits: `EvalGrams._sieve`. A gram ends in its
    length.
    """
    texts, grams, found = np.empty(len(values) * len(lengths), np.int32), np.empty(len(values) * len(lengths), np.int64), 0
    sums = np.zeros(len(values) + 1, np.int64)                  # hash of all characters before
    for text in range(len(starts) - 1):
        for end in range(starts[text] + 1, starts[text + 1] + 1):
            sums[end] = sums[end - 1] * BASE + values[end - 1]
            for j in range(min(len(lengths), end - starts[text] - lengths[0] + 1)):
                gram = sums[end] - sums[end - lengths[j]] * powers[j]
                bit = places[0, j] + (gram >> 6 & places[1, j])
                if bits[bit >> 3] >> (bit & 7) & 1:
                    bit = places[0, j] + (gram >> 34 & places[1, j])
                    if bits[bit >> 3] >> (bit & 7) & 1:
                        texts[found], grams[found] = text, gram & ~LENGTH_BITS | lengths[j]
                        found += 1
    return texts[:found], grams[:found]
