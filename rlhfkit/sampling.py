"""How the next token is chosen from logits: one rule for plain and captured decoding, on any device.

Noise is a hash of (row's seed, step, token), not a generator's stream as in the 2023 code: a token depends neither on the batch, nor on the
order, nor on what was drawn before. The likeliest of logits plus Gumbel noise is a sample of their softmax (Gumbel 1954).
"""
import torch


def choose(logits, seeds, t, temperature, top_k=0, top_p=1.0):
    """logits (B, V), seeds (B,) int64, t: the token's number in its answer, an int or a 0-d tensor -> tokens (B,), log-probs (B,).

    temperature 0: the likeliest. The log-probs, float32 or the logits' float64, are those of the tempered distribution before the filters
    (at temperature 0 of the plain one), which is what a scoring pass finds. Nothing waits for the device: it can be captured and compiled."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature:
        logits = logits / temperature
        tokens = _likeliest(_filtered(logits, top_k, top_p) + gumbel(seeds, t, logits.shape[1]))
    else:
        tokens = _likeliest(logits)
    return tokens, logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)


def gumbel(seeds, t, vocab):
    """seeds (B,) int64, t an int or a 0-d tensor -> standard Gumbel noise (B, vocab) in float32, from -2.8 to 22.2.

    The same on every device but for the last digit of a logarithm. 31 random bits a number, and all of them where the noise is large, which is
    where it decides."""
    low, high, t = seeds.int(), (seeds >> 32).int(), torch.as_tensor(t, device=seeds.device).int()
    one = _mix(_mix(_mix(low) ^ high) ^ t)[:, None]                             # (B, 1) two keys, 64 bits: no two steps of a run share them
    two = _mix(_mix(_mix(high + 0x3C6EF372) ^ low) + t)[:, None]
    token = torch.arange(vocab, dtype=torch.int32, device=seeds.device)
    bits = _mix(_mix(token ^ one) + two) & 0x7FFFFFFF
    uniform = ((bits.float() + 0.5) * 2.0 ** -31).clamp(max=1 - 2.0 ** -24)      # in (0, 1); small ones, the large noise, are exact
    return -torch.log(-torch.log1p(-uniform))


def _likeliest(x):
    """argmax of (B, V) -> (B,), of 16 parts where V divides and then of those: one program a row would leave most of a GPU idle."""
    best, token = x.unflatten(1, (16 if x.shape[1] % 16 == 0 else 1, -1)).max(-1)                            # (B, parts)
    part = best.argmax(-1, keepdim=True)
    return (token.gather(1, part) + part * (x.shape[1] // best.shape[1]))[:, 0]


def _mix(x):
    """A bijection of 32 bits in which each bit of x turns half of the result's ("lowbias32", Wellons 2018); int32, whose products wrap."""
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * (0x846CA68B - 2 ** 32)
    return x ^ (x >> 16 & 0xFFFF)


def _filtered(logits, top_k, top_p):
    """-inf outside the top_k likeliest (0: all), then outside the fewest that hold top_p of what is left; equals of the last one stay."""
    if top_k and top_k < logits.shape[1] or top_p < 1:
        ranked = logits.topk(min(top_k or logits.shape[1], logits.shape[1])).values                          # (B, k), falling
        before = ranked.softmax(-1).cumsum(-1) - ranked.softmax(-1)                                          # share of the likelier ones
        least = torch.where(before < top_p, ranked, torch.inf).amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits
