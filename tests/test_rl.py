"""rl.py against numbers worked by hand and against properties."""
import math

import pytest
import torch

from rlhfkit import rl


def row(*numbers):
    return torch.tensor([numbers], dtype=torch.float64)


def close(a, b, **tolerance):
    torch.testing.assert_close(a, b, **tolerance)


def pad(x, left, right, filler):
    return torch.nn.functional.pad(x, (left, right), value=filler)


def test_a_tokens_log_prob_is_that_of_the_temperature_scaled_softmax():
    logits = torch.tensor([[[0.0, math.log(3.0)]]])
    # T = 1: weights 1 and 3, so 1/4 and 3/4; T = 0.5 squares the weights, so 1/10 and 9/10
    close(rl.token_logps(logits, torch.tensor([[1]])), torch.tensor([[math.log(0.75)]]))
    close(rl.token_logps(logits, torch.tensor([[1]]), 0.5), torch.tensor([[math.log(0.9)]]))
    close(rl.entropy(logits, 0.5), torch.tensor([[-0.9 * math.log(0.9) - 0.1 * math.log(0.1)]]))


def test_log_probs_of_half_precision_logits_are_taken_in_float32():
    """P22: float16 is spaced 0.0625 at 90, so a log-sum-exp taken there loses the log-prob."""
    logits = torch.full((1, 1, 40000), 90.0, dtype=torch.float16)
    logps = rl.token_logps(logits, torch.tensor([[7]]))
    assert logps.dtype == torch.float32
    close(logps, torch.tensor([[-math.log(40000)]]), atol=1e-4, rtol=0)
    assert rl.token_logps(logits.double(), torch.tensor([[7]])).dtype == torch.float64


def test_k1_and_k3_are_unbiased_and_k3_is_never_negative():
    """P8, I13: by enumeration of a vocabulary of five, no sampling."""
    policy = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05], dtype=torch.float64)
    reference = torch.tensor([0.1, 0.3, 0.2, 0.25, 0.15], dtype=torch.float64)
    exact = (0.5 * math.log(5) + 0.2 * math.log(2 / 3) + 0.15 * math.log(3 / 4) + 0.1 * math.log(2 / 5)
             + 0.05 * math.log(1 / 3))
    k1, k2, k3 = rl.kl_estimates(policy.log()[None], reference.log()[None], torch.ones(1, 5))
    assert (policy * k1).sum().item() == pytest.approx(exact, abs=1e-12)
    assert (policy * k3).sum().item() == pytest.approx(exact, abs=1e-12)
    assert (policy * k2).sum().item() != pytest.approx(exact, abs=1e-2)
    assert (k1 < 0).any() and (k3 >= 0).all()


def test_as_a_loss_k2_has_the_gradient_of_the_kl_and_k3_has_not():
    """I13: on-policy, E[grad k2] is the gradient of KL(policy || reference); k3's leads elsewhere."""
    logits = torch.tensor([1.0, 0.0, -0.5, 0.3, 0.2], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.1, 0.3, 0.2, 0.25, 0.15], dtype=torch.float64).log()

    def gradient(loss):
        return torch.autograd.grad(loss(logits.log_softmax(0)), logits)[0]

    def expected(estimate):                             # over the sampler, which is not differentiated
        on = torch.ones(1, 5)
        return lambda logps: (logps.detach().exp() * rl.kl_estimates(logps[None], reference[None], on)[estimate]).sum()

    true = gradient(lambda logps: (logps.exp() * (logps - reference)).sum())
    close(gradient(expected(1)), true)
    assert (gradient(expected(2)) - true).abs().max() > 0.05


def test_the_kl_off_the_answer_is_zero_whatever_stands_there():
    answer = torch.tensor([[0, 1, 0]])
    for k in rl.kl_estimates(row(-1e4, -1.0, 1e4), row(0.0, -1.0, 0.0), answer):
        close(k, row(0.0, 0.0, 0.0))


def test_the_score_is_added_at_the_last_answer_token():
    """P7: the 2023 kit and others index -1, which in a padded row is a pad; an empty answer crashed it."""
    answer = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    logps = torch.tensor([[-9.0, -1.0, -2.0, -9.0], [-1.0, -1.0, -1.0, -1.0], [-1.0, -1.0, -1.0, -1.0]])
    ref_logps = torch.tensor([[-1.0, -1.5, -1.0, -1.0], [-1.0, -1.0, -1.0, -1.0], [-2.0, -2.0, -2.0, -2.0]])
    score, finished = torch.tensor([3.0, -2.0, 5.0]), torch.ones(3)
    rewards = rl.shaped_rewards(score, logps, ref_logps, answer, 0.1, finished)
    # row 1: token 1 pays 0.1 * (-1 + 1.5) = 0.05, token 2 gets 0.1 * (2 - 1) = 0.1 back, and the score 3
    close(rewards, torch.tensor([[0.0, -0.05, 3.1, 0.0], [0.0, 0.0, 0.0, -2.0], [0.0, 0.0, 0.0, 0.0]]))
    close(rl.shaped_rewards(score, logps, ref_logps, answer.bool(), 0.1, finished), rewards)


def test_an_answer_without_its_end_token_is_scored_lower():
    """P16: without it, length grows to the cap."""
    zeros, answer = torch.zeros(2, 2), torch.ones(2, 2)
    rewards = rl.shaped_rewards(torch.tensor([1.0, 1.0]), zeros, zeros, answer, 0.1, torch.tensor([True, False]), -1.5)
    close(rewards, torch.tensor([[0.0, 1.0], [0.0, -0.5]]))


def test_gae_of_a_finished_answer_by_hand():
    # gamma 0.9, lambda 0.5, values 1 2 3, rewards 0 0 4, finished (nothing comes after):
    # d3 = 4 - 3 = 1            A3 = 1
    # d2 = 0.9 * 3 - 2 = 0.7    A2 = 0.7 + 0.45 * 1 = 1.15
    # d1 = 0.9 * 2 - 1 = 0.8    A1 = 0.8 + 0.45 * 1.15 = 1.3175
    advantages, returns = rl.gae(row(0, 0, 4), row(1, 2, 3), row(1, 1, 1), torch.tensor([True]), 0.9, 0.5)
    close(advantages, row(1.3175, 1.15, 1.0))
    close(returns, row(2.3175, 3.15, 4.0))


def test_a_cut_answer_is_bootstrapped_and_a_finished_one_is_not():
    """P6: the state after the end token is worth 0, the state after a cut is worth what the critic says."""
    batch = [x.repeat(2, 1) for x in (row(0, 0, 4), row(1, 2, 3), row(1, 1, 1))]
    advantages, _ = rl.gae(*batch, torch.tensor([True, False]), 0.9, 0.5, bootstrap=torch.tensor([10.0, 10.0]).double())
    # row 2: d3 = 4 + 0.9 * 10 - 3 = 10; A2 = 0.7 + 4.5 = 5.2; A1 = 0.8 + 0.45 * 5.2 = 3.14
    close(advantages, torch.tensor([[1.3175, 1.15, 1.0], [3.14, 5.2, 10.0]], dtype=torch.float64))
    without, _ = rl.gae(*batch, torch.tensor([True, False]), 0.9, 0.5)
    close(without[1], without[0])


@pytest.mark.parametrize("left, right", [(0, 3), (4, 0), (2, 5)])
def test_padding_to_any_length_leaves_advantages_and_returns_unchanged(left, right):
    """P6, I12: the 2023 kit ran GAE over the pads, so three pads moved the last advantage from 0.60 to 0.73."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 6, generator=generator)
    answer = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]])
    finished, bootstrap = torch.tensor([True, False, False]), torch.tensor([9.0, 2.0, -1.0])
    plain = rl.gae(rewards, values, answer, finished, 0.9, 0.8, bootstrap)
    padded = rl.gae(pad(rewards, left, right, 7.0), pad(values, left, right, -5.0), pad(answer, left, right, 0),
                    finished, 0.9, 0.8, bootstrap)
    for a, b in zip(plain, padded):
        assert torch.equal(pad(a, left, right, 0.0), b)
    alone, _ = rl.gae(rewards[1:2, 2:5], values[1:2, 2:5], torch.ones(1, 3), finished[1:2], 0.9, 0.8, bootstrap[1:2])
    assert torch.equal(alone[0], plain[0][1, 2:5])


def test_a_gap_inside_an_answer_is_stepped_over():
    whole = rl.gae(row(0, 0, 4), row(1, 2, 3), row(1, 1, 1), torch.tensor([True]), 0.9, 0.5)[0]
    gapped = rl.gae(row(0, 7, 0, 4), row(1, 9, 2, 3), row(1, 0, 1, 1), torch.tensor([True]), 0.9, 0.5)[0]
    close(gapped[:, [0, 2, 3]], whole)
    gapped = rl.gae(row(0, 0, 7, 4), row(1, 2, 9, 3), row(1, 1, 0, 1), torch.tensor([True]), 0.9, 0.5)[0]
    close(gapped[:, [0, 1, 3]], whole)


def test_with_gamma_and_lambda_1_the_return_is_the_sum_of_rewards_to_come():
    _, returns = rl.gae(row(1, -2, 4), row(5, 6, 7), row(1, 1, 1), torch.tensor([True]), 1.0, 1.0)
    close(returns, row(3, 2, 4))


def test_rloo_is_the_score_less_the_mean_of_the_others():
    # 1 - (2 + 6) / 2 = -3, 2 - (1 + 6) / 2 = -1.5, 6 - (1 + 2) / 2 = 4.5; equal answers get nothing
    close(rl.rloo(torch.tensor([1.0, 2, 6, 4, 4, 4]), 3), torch.tensor([-3.0, -1.5, 4.5, 0, 0, 0]))


def test_grpo_standardises_within_the_prompt():
    # 1 2 6 has mean 3 and variance (4 + 1 + 9) / 2 = 7; equal answers get nothing, not a division by 0
    expected = torch.tensor([-2.0, -1.0, 3.0, 0.0, 0.0, 0.0]) / math.sqrt(7)
    close(rl.grpo(torch.tensor([1.0, 2, 6, 4, 4, 4]), 3), expected, atol=1e-3, rtol=0)


def test_what_a_token_weighs_by_hand():
    """An answer of one token and one of three; at most 5 tokens are allowed."""
    answer = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 0]])
    close(rl.token_weights(answer, "tokens", 4, 2, 5), answer / 4)
    close(rl.token_weights(answer, "answers", 4, 2, 5), torch.tensor([[1 / 2, 0, 0, 0], [1 / 6, 1 / 6, 1 / 6, 0]]))
    close(rl.token_weights(answer, "constant", 4, 2, 5), answer / 10)


def test_an_ensemble_by_hand():
    scores = torch.tensor([[1.0, 4.0], [3.0, 4.0]])
    assert [rl.ensemble(scores, rule).tolist() for rule in ("mean", "min", "spread")] == [[2, 4], [1, 4], [1, 4]]


def test_dr_grpo_takes_the_mean_away_and_leaves_the_spread():
    close(rl.dr_grpo(torch.tensor([1.0, 3.0, 8.0, 0.0]), 2), torch.tensor([-1.0, 1.0, 4.0, -4.0]))


def test_running_moments_are_those_of_all_scores_and_reference_ones_of_the_first():
    running, reference = rl.Moments(), rl.Moments(running=False)
    for part in ([1.0, 2.0], [3.0], [4.0, 5.0, 6.0]):
        running.update(torch.tensor(part)), reference.update(torch.tensor(part))
    assert (running.count, running.mean, running.squares) == pytest.approx((6, 3.5, 17.5))             # 35 / 12 * 6
    assert (reference.count, reference.mean, reference.squares) == pytest.approx((2, 1.5, 0.5))
    close(reference.normalize(torch.tensor([1.5, 2.0])), torch.tensor([0.0, 1.0]), atol=1e-6, rtol=0)
    assert rl.Moments(*vars(running).values()) == running


def test_scores_that_are_all_the_same_normalise_to_nothing():
    moments = rl.Moments()
    moments.update(torch.full((4,), 7.0))
    assert moments.normalize(torch.full((4,), 7.0)).tolist() == [0.0] * 4


@pytest.mark.parametrize("estimate", [rl.rloo, rl.grpo, rl.dr_grpo])
@pytest.mark.parametrize("group", [1, 4])
def test_group_advantages_refuse_a_group_without_others(estimate, group):
    with pytest.raises(ValueError, match=f"answers_per_prompt is {group} for 6 scores.*try 4"):
        estimate(torch.arange(6.0), group)


def test_whitening_gives_mean_0_and_variance_1_over_the_mask_of_the_batch():
    """P10: the mask first, and the batch, not the row."""
    x = torch.tensor([[1.0, 2.0, 1e6], [5.0, 7.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    kept = rl.whiten(x, mask)[mask.bool()]
    assert kept.mean().item() == pytest.approx(0, abs=1e-12)
    assert kept.var(unbiased=False).item() == pytest.approx(1, abs=1e-8)
    assert rl.whiten(x, mask)[0, 2] == 0
    unmoved = rl.whiten(x, mask, shift_mean=False)[mask.bool()]
    assert unmoved.mean().item() == pytest.approx(4.8)           # (1 + 2 + 5 + 7 + 9) / 5 stays
    assert unmoved.var(unbiased=False).item() == pytest.approx(1, abs=1e-8)


def test_whitening_a_constant_gives_zero():
    """P10: a constant has no variance to divide by; rewards (shift_mean False) keep their value."""
    x = torch.full((2, 3), 0.3)
    close(rl.whiten(x, torch.ones(2, 3)), torch.zeros(2, 3), atol=1e-6, rtol=0)
    close(rl.whiten(x, torch.ones(2, 3), shift_mean=False), x)
    close(rl.whiten(x, torch.zeros(2, 3)), torch.zeros(2, 3))


def whiten_one_half(rank, store, expected):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    half = torch.arange(3.0)[None] + 3 * rank
    torch.testing.assert_close(rl.whiten(half, torch.ones(1, 3)), expected[rank:rank + 1])
    torch.distributed.destroy_process_group()


def test_two_processes_whiten_as_one(tmp_path):
    """P10: each process has half of 0 1 2 3 4 5, whose mean is 2.5 and whose variance is 35 / 12."""
    expected = ((torch.arange(6.0) - 2.5) / math.sqrt(35 / 12)).view(2, 3)
    torch.multiprocessing.spawn(whiten_one_half, (str(tmp_path / "store"), expected), nprocs=2)


def test_at_ratio_1_the_policy_loss_is_minus_the_mean_advantage():
    logps, answer = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[1, 1, 0]])
    loss = rl.policy_loss(logps, logps, torch.tensor([[2.0, -0.5, 100.0]]), answer / 2, 0.2)
    assert loss.item() == -0.75                                     # -(2 - 0.5) / 2
    assert set(rl.ratio_stats(logps, logps, answer, 0.2, tokens=2).values()) == {0}


def test_the_clipped_policy_loss_by_hand():
    old = torch.zeros(1, 4, dtype=torch.float64)
    logps = torch.tensor([[1.5, 1.5, 0.5, 0.5]], dtype=torch.float64).log()
    advantages = row(1, -1, 1, -1)
    # clip 0.2: min(1.5, 1.2) = 1.2; min(-1.5, -1.2) = -1.5; min(0.5, 0.8) = 0.5; min(-0.5, -0.8) = -0.8
    loss, stats = rl.policy_loss(logps, old, advantages, torch.ones(1, 4) / 4, 0.2), rl.ratio_stats(logps, old, torch.ones(1, 4), 0.2, tokens=4)
    assert loss.item() == pytest.approx(0.6 / 4)                    # -(1.2 - 1.5 + 0.5 - 0.8) / 4
    assert stats["clip_fraction"] == 1 and stats["ratio_deviation"] == pytest.approx(0.5)
    # k3: (0.5 - ln 1.5) twice, (-0.5 - ln 0.5) twice
    assert stats["approx_kl"] == pytest.approx((0.5 - math.log(1.5) - 0.5 - math.log(0.5)) / 2)


def test_a_good_token_becomes_likelier_and_a_clipped_one_is_left_alone():
    logps = torch.tensor([[0.0, 0.0, 0.5]], requires_grad=True)     # ratio e^0.5 > 1.2: enough
    advantages = torch.tensor([[1.0, -1.0, 1.0]])
    rl.policy_loss(logps, torch.zeros(1, 3), advantages, torch.ones(1, 3) / 3, 0.2).backward()
    close(logps.grad, torch.tensor([[-1 / 3, 1 / 3, 0.0]]))


def test_pads_do_not_enter_the_loss_the_clip_fraction_or_the_ratio():
    """P12: averages over pads hide a clip fraction, and a garbage pad makes the ratio infinite, the loss NaN."""
    logps = torch.tensor([[0.0, 0.5, 1e4, 1e4]], requires_grad=True)
    answer, advantages = torch.tensor([[1, 1, 0, 0]]), torch.ones(1, 4)
    loss, stats = rl.policy_loss(logps, torch.zeros(1, 4), advantages, answer / 2, 0.2), rl.ratio_stats(logps, torch.zeros(1, 4), answer, 0.2, 2)
    loss.backward()
    assert stats["clip_fraction"] == 0.5                            # 0.25 if the two pads were counted
    assert stats["ratio_deviation"] == pytest.approx(math.exp(0.5) - 1)
    assert loss.item() == pytest.approx(-(1 + 1.2) / 2)
    close(logps.grad, torch.tensor([[-0.5, 0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("loss_mean", ["tokens", "answers", "constant"])
def test_any_split_of_the_batch_gives_one_loss_and_one_gradient(loss_mean):
    """P12, I5: means of means across uneven micro-batches weigh the tokens of short answers more."""
    generator = torch.Generator().manual_seed(1)
    old, noise, advantages, values, returns = torch.randn(5, 4, 6, generator=generator, dtype=torch.float64)
    answer = (torch.arange(6) < torch.tensor([[6], [1], [3], [2]])).double()
    logps = (old + 0.3 * noise).requires_grad_()

    def parts(rows):
        weight = rl.token_weights(answer[rows], loss_mean, tokens=12, answers=4, max_new_tokens=6)
        policy = rl.policy_loss(logps[rows], old[rows], advantages[rows], weight, 0.2)
        value = rl.value_loss(logps[rows] + values[rows], values[rows], returns[rows], answer[rows] / 12, 0.2)
        return policy + value, rl.ratio_stats(logps[rows], old[rows], answer[rows], 0.2, tokens=12)

    whole, stats = parts(slice(0, 4))
    gradient, = torch.autograd.grad(whole, logps)
    for splits in ([[0], [1, 2, 3]], [[0, 2], [1, 3]], [[0], [1], [2], [3]]):
        pieces = [parts(rows) for rows in splits]
        close(sum(piece for piece, _ in pieces), whole)
        close(torch.autograd.grad(sum(piece for piece, _ in pieces), logps)[0], gradient)
        assert sum(s["clip_fraction"] for _, s in pieces) == pytest.approx(stats["clip_fraction"])


def test_the_clipped_value_loss_by_hand():
    # clip 0.2. token 1: value 1 is held at 0.2, return 1: errors 0 and 0.64, the larger counts (running ahead does not
    # pay). token 2: value 0.1 is within, return 0.5: 0.16. token 3 is a pad.
    loss = rl.value_loss(row(1.0, 0.1, 9.0), row(0, 0, 0), row(1.0, 0.5, 0.0), row(1, 1, 0) / 2, 0.2)
    assert loss.item() == pytest.approx(0.5 * (0.64 + 0.16) / 2)
    plain = rl.value_loss(row(1.0, 0.1, 9.0), row(0, 0, 0), row(1.0, 0.5, 0.0), row(1, 1, 0) / 2, 0)
    assert plain.item() == pytest.approx(0.5 * 0.16 / 2)


def test_explained_variance_of_a_perfect_an_ignorant_and_a_misleading_critic():
    returns, mask = row(1, 2, 3, 50), row(1, 1, 1, 0)
    assert rl.explained_variance(returns + 4, returns, mask).item() == pytest.approx(1)      # an offset is no variance
    assert rl.explained_variance(row(7, 7, 7, 7), returns, mask).item() == pytest.approx(0)
    assert rl.explained_variance(-returns, returns, mask).item() == pytest.approx(-3)        # residual 2R: 1 - 4
    assert rl.explained_variance(returns, torch.full((1, 4), 0.3), mask) == 0


def test_the_adaptive_coefficient_follows_its_closed_form():
    """I17: value * (1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon); saved and loaded it goes on from there."""
    controller = rl.AdaptiveKL(0.1, target=6.0, horizon=1000)
    controller.update(6.0, 100)
    assert controller.value == 0.1                                  # on target: stays
    controller.update(6.6, 100)
    assert controller.value == pytest.approx(0.1 * 1.01)            # 10 % over, a tenth of the horizon
    controller.update(600.0, 500)
    assert controller.value == pytest.approx(0.101 * 1.1)           # held at + 20 %, half the horizon
    controller.update(-3.0, 1000)
    assert controller.value == pytest.approx(0.1111 * 0.8)          # held at - 20 %
    resumed = rl.AdaptiveKL(**vars(controller))
    resumed.update(6.6, 100), controller.update(6.6, 100)
    assert resumed.value == controller.value


@pytest.mark.parametrize("estimate", [rl.rloo, rl.grpo, rl.dr_grpo])
def test_a_one_token_policy_finds_the_token_that_scores(estimate):
    logits, generator = torch.zeros(5, requires_grad=True), torch.Generator().manual_seed(0)
    optimizer, answer = torch.optim.Adam([logits], lr=0.1), torch.ones(16, 1)
    for _ in range(60):
        ids = torch.multinomial(logits.softmax(0).detach(), 16, replacement=True, generator=generator)[:, None]
        old = rl.token_logps(logits.expand(16, 1, 5), ids).detach()
        advantages = estimate((ids[:, 0] == 3).float(), 4)[:, None]
        loss = rl.policy_loss(rl.token_logps(logits.expand(16, 1, 5), ids), old, advantages, answer / 16, 0.2)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert logits.softmax(0)[3] > 0.9
