"""The choice of a token: noise that is a function of (seed, step, token), the distribution, the filters, the log-probs."""
import math

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rlhfkit.sampling import choose, gumbel

SEEDS = torch.tensor([hash((0, i)) for i in range(256)])


def test_noise_depends_on_seed_step_and_token_alone():
    whole = gumbel(SEEDS, 3, 500)
    assert torch.equal(gumbel(SEEDS[[7, 2]], 3, 500), whole[[7, 2]])                        # neither batch nor order
    assert torch.equal(gumbel(SEEDS, 3, 100), whole[:, :100]) and torch.equal(gumbel(SEEDS, torch.tensor(3), 500), whole)
    torch.manual_seed(1)
    assert torch.equal(gumbel(SEEDS, 3, 500), whole)
    assert whole.dtype == torch.float32 and torch.isfinite(whole).all()


def test_noise_has_these_values():
    """Worked on a CPU; a change here changes every sampled answer."""
    assert gumbel(torch.tensor([0, -1, 1 << 40]), 5, 2).flatten().tolist() == pytest.approx(
        [2.71687, -1.1279, -1.40045, 1.4367, 1.57869, 0.77137], abs=2e-5)


def test_noise_is_gumbel_distributed():
    """65,536 numbers in 64 equally likely classes: chi-square of 63 degrees of freedom, deviation 11.2; mean 0.5772, variance 1.6449."""
    noise = gumbel(SEEDS, 0, 256).double().flatten()
    counts = torch.bincount((torch.exp(-torch.exp(-noise)) * 64).long(), minlength=64)
    assert float(((counts - 1024.0) ** 2 / 1024).sum()) < 63 + 5 * 11.2
    assert abs(float(noise.mean()) - 0.5772) < 5 * math.sqrt(1.6449 / 65536) and abs(float(noise.var()) - 1.6449) < 0.05


def test_the_large_noise_is_fine_grained_and_as_rare_as_it_should_be():
    """Of 4 million numbers e^-10 are above 10; a float32 uniform near 1 would have given a few dozen distinct values."""
    noise = gumbel(torch.arange(100), 0, 40000).flatten()
    large = noise[noise > 10]
    assert abs(len(large) - 4e6 * math.exp(-10)) < 5 * math.sqrt(4e6 * math.exp(-10)) and len(large.unique()) == len(large)


@pytest.mark.parametrize("seeds, steps", [
    (torch.arange(64), [0]), (torch.arange(64) << 32, [0]), (torch.tensor([5]), range(64)),
    (torch.tensor([1 << 62]), range(0, 64 << 20, 1 << 20)), (2 ** torch.arange(62), [7]), (-torch.arange(64), [2 ** 31 - 1])])
def test_neighbouring_seeds_and_steps_are_independent(seeds, steps):
    """Correlations of 4,096 tokens' uniforms, at the same token and at the next: none above 5.5 / sqrt(4096)."""
    noise = torch.cat([gumbel(seeds, t, 4096) for t in steps]).double()
    uniform = torch.exp(-torch.exp(-noise)) - 0.5
    uniform = torch.cat([uniform, uniform.roll(1, 1)])
    uniform = uniform / uniform.norm(dim=1, keepdim=True)
    assert float((uniform @ uniform.T - torch.eye(len(uniform))).abs().max()) < 5.5 / 64
    assert len({tuple(sorted(row.tolist())[:4]) for row in noise}) == len(noise)            # and no row is another's, permuted


def test_tokens_are_drawn_from_the_tempered_softmax():
    """4,000 draws from 0.5, 0.3, 0.15, 0.05 (given at temperature 2, halved), each within four standard errors."""
    wanted = torch.tensor([0.5, 0.3, 0.15, 0.05])
    tokens, logps = choose(2 * wanted.log().expand(4000, 4), torch.arange(4000), 0, 2.0)
    assert torch.all((torch.bincount(tokens, minlength=4) / 4000 - wanted).abs() < 4 * (wanted * (1 - wanted) / 4000).sqrt())
    torch.testing.assert_close(logps, wanted.log()[tokens])


@pytest.mark.parametrize("top_k, top_p", [(5, 1.0), (0, 0.7), (20, 0.5), (0, 1e-6), (1, 1.0), (1000, 1.0)])
def test_filters_keep_what_transformers_keep_and_log_probs_are_of_the_whole(top_k, top_p):
    torch.manual_seed(0)
    logits = torch.randn(1, 48) * 2
    kept = TemperatureLogitsWarper(0.7)(None, logits)
    kept = TopKLogitsWarper(top_k)(None, kept) if top_k else kept
    kept = TopPLogitsWarper(top_p)(None, kept) if top_p < 1 else kept
    tokens, logps = choose(logits.expand(20000, 48), torch.arange(20000), 1, 0.7, top_k, top_p)
    likely = (kept.softmax(-1)[0] > 1e-3).nonzero()[:, 0].tolist()
    allowed = torch.isfinite(kept[0]).nonzero()[:, 0].tolist()
    assert set(likely) <= set(tokens.tolist()) <= set(allowed)
    torch.testing.assert_close(logps, (logits / 0.7).log_softmax(-1)[0, tokens], atol=1e-5, rtol=0)


@pytest.mark.parametrize("vocab", [48, 50])         # in parts, and whole
def test_temperature_0_is_the_likeliest_with_its_plain_log_prob(vocab):
    torch.manual_seed(0)
    logits = torch.randn(7, vocab)
    tokens, logps = choose(logits, torch.arange(7), 0, 0.0)
    assert torch.equal(tokens, logits.argmax(-1))
    torch.testing.assert_close(logps, logits.log_softmax(-1).amax(-1))


def test_float64_stays_and_half_precision_is_summed_in_float32():
    logits = torch.randn(3, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert choose(logits, torch.arange(3), 0, 1.0)[1].dtype == torch.float64
    half = choose(logits.bfloat16(), torch.arange(3), 0, 1.0)[1]
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), choose(logits.bfloat16().double(), torch.arange(3), 0, 1.0)[1], atol=1e-5, rtol=0)


def test_a_compiled_choice_is_the_plain_one():
    logits, seeds = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)), torch.arange(5)
    compiled = torch.compile(choose, backend="aot_eager", fullgraph=True)                   # one graph: nothing in it waits for the device
    for options in ((1.0,), (0.0,), (0.7, 5, 0.9)):
        for got, wanted in zip(compiled(logits, seeds, torch.tensor(4), *options), choose(logits, seeds, 4, *options)):
            torch.testing.assert_close(got, wanted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here to compare with")
def test_a_gpu_draws_the_same_noise():
    torch.testing.assert_close(gumbel(SEEDS.cuda(), 9, 5000).cpu(), gumbel(SEEDS, 9, 5000), atol=1e-5, rtol=1e-5)
