"""PPO against a reference written apart from it (ppo_reference.py), and the invariants of its update, for a family of each kind.

`PITFALLS` below says of each of the 22 known ways in which PPO goes wrong which test holds it, or why it cannot occur.
"""
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ppo_reference import Reference

import rlhfkit as rk
from rlhfkit import rl
from rlhfkit.models.value import RewardModel
from rlhfkit.rollout import rollouts
from rlhfkit.rows import collate, sft_rows
from rlhfkit.samples.couplets import held_out
from rlhfkit.stages.ppo import PPOTrainer

FAMILIES = ("pangu", "glm", "chatglm", "llama")             # llama: transformers' own in all respects


def short_couplets(count):
    """Prompts of several lengths whose answers have one to four characters."""
    return [rk.Record(f"上联：{a}", (rk.Answer(b[:i % 4 + 1], 1),), "下联：") for i, (a, b) in enumerate(held_out(count))]


def taught(path, records, steps=12):
    """The tiny model of a folder after some steps on the records, so that it ends its answers; its config asks for dropout."""
    torch.manual_seed(0)
    model, tokenizer, family = rk.load_model(path), rk.load_tokenizer(path), rk.family_of(path)
    rows, _ = sft_rows(records, family, tokenizer, 96)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for i in range(steps):
        model(**collate(rows[i % 8 * 8:][:8], tokenizer.pad_token_id), use_cache=False).loss.backward()
        optimizer.step(), optimizer.zero_grad()
    model.save_pretrained(path)
    file = Path(path, "config.json")
    file.write_text(file.read_text(encoding="utf-8").replace('"attention_dropout": 0.0', '"attention_dropout": 0.1'), encoding="utf-8")


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """name -> folders of a tiny policy that ends its answers, of two reward models, and of data."""
    made, records = {}, short_couplets(64)

    def folders(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            path = rk.tiny(folder / "policy", family=name, hidden_size=32, num_layers=2)
            taught(path, records)
            rewards = []
            for seed in (1, 2):
                RewardModel.from_causal(rk.load_model(path), seed=seed).save_pretrained(folder / f"reward{seed}")
                rk.load_tokenizer(path).save_pretrained(folder / f"reward{seed}")
                rewards.append(str(folder / f"reward{seed}"))
            (folder / "data").mkdir()
            rk.write_records(records[:16], folder / "data/train.jsonl")
            made[name] = SimpleNamespace(policy=path, reward=rewards[0], rewards=",".join(rewards), data=str(folder / "data"))
        return made[name]
    return folders


def ppo(found, folder, **more):
    return rk.PPO(found.policy, found.data, folder, **dict(
        max_length=64, max_new_tokens=4, batch_size=6, max_steps=2, temperature=0.7, learning_rate=1e-3, lr_scheduler_type="linear",
        warmup_ratio=0.0, reward_path=found.reward, logging_steps=1, samples=0, report_to="none") | more)


def trainer_of(config):
    Path(config.output_dir).mkdir()
    return PPOTrainer(config)


def in_float64(trainer, monkeypatch):
    """The run computes in float64: its models do, and `float()` leaves float64 as it is."""
    plain = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x, *args, **kwargs: x if x.dtype == torch.float64 else plain(x, *args, **kwargs))
    experience = trainer.experience
    for model in (trainer.actor.model, trainer.critic and trainer.critic.model, experience.reference, *experience.rewards.models):
        model and model.double()


def weights(model):
    return {name: p.detach().double().clone() for name, p in model.named_parameters()}


def moved(before, model):
    return max(float((before[name] - p).abs().max()) for name, p in weights(model).items())


WHOLE = dict(
    ensemble="spread", critic_learning_rate=2e-3, mini_batch_size=4, gradient_accumulation_steps=2, ppo_epochs=2, clip=0.01, value_clip=0.05,
    max_grad_norm=0.5, weight_decay=0.1, kl_coefficient=0.3, kl_target=0.5, kl_horizon=20, gamma=0.97, lam=0.9, entropy_coefficient=0.02,
    normalize_scores="running", score_clip=1.0, unfinished_score=-0.7, ptx_coefficient=0.4, ptx_batch_size=3)
GROUP = dict(critic="none", answers_per_prompt=3, batch_size=2, max_new_tokens=2, kl_in="loss", mini_batch_size=4, ppo_epochs=2, clip=0.01,
             kl_coefficient=0.3)


@pytest.mark.parametrize("exact", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("name, more", [
    *((name, WHOLE) for name in FAMILIES), ("pangu", dict(critic="frozen", value_clip=0.0, normalize_scores="reference", mini_batch_size=4)),
    ("pangu", GROUP | dict(advantage="rloo", kl_in="reward")), ("pangu", GROUP | dict(advantage="grpo", loss_mean="answers")),
    ("pangu", GROUP | dict(advantage="dr_grpo", loss_mean="constant", ensemble="min"))],
    ids=[*FAMILIES, "frozen critic", "rloo", "grpo", "dr_grpo"])
def test_steps_of_the_loop_are_those_of_the_reference(name, more, exact, family, tmp_path, monkeypatch):
    """I23: two steps, each of several epochs and mini-batches; all of the figures, and the weights of actor and critic."""
    found = family(name)
    config = ppo(found, tmp_path / "run", keep_rollouts=True, reward_path=found.rewards, ptx_path=found.data if more is WHOLE else "", **more)
    trainer, mixed = trainer_of(config), []
    in_float64(trainer, monkeypatch) if exact else None
    before, drawn = weights(trainer.actor.model), trainer._strided

    def spy(rows, *at):
        found = drawn(rows, *at)
        mixed.extend([found] if rows is trainer.ptx else [])
        return found
    monkeypatch.setattr(trainer, "_strided", spy)
    steps = [row for row in trainer.train().history if "score" in row]
    reference, kept = Reference(config), list(rollouts(config.output_dir))
    assert 0 < sum(row["finished"] for row in kept) < len(kept) and len({len(row["prompt_ids"]) for row in kept}) > 1
    for i, row in enumerate(steps):
        wanted = reference.step(kept[i * 6:(i + 1) * 6], mixed[i * len(mixed) // 2:(i + 1) * len(mixed) // 2])
        assert {key: row[key] for key in wanted} == pytest.approx(wanted, abs=1e-5, rel=1e-5 if exact else 5e-5)
        assert set(row) - set(wanted) <= {"step", "learning_rate", "first_ratio", "sampler_gap"} | {k for k in row if k.startswith("seconds")}
    assert steps[0]["clip_fraction"] > 0 and moved(before, trainer.actor.model) > 1e-3
    for model, ours in ((reference.actor, trainer.actor), (reference.critic, trainer.critic)):
        if model:
            apart = torch.cat([(p - q).abs().flatten() for p, q in zip(weights(model).values(), weights(ours.model).values(), strict=True)])
            # In float32, rounding where there is no gradient (the biases of keys) is a step of Adam's: few weights, and small ones.
            assert float(apart.mean()) < 1e-7 and float((apart > 1e-5).double().mean()) < (1e-12 if exact else 3e-4) and float(apart.max()) < 2e-4


def seen_by(model):
    """Ids without padding of every row that the model is differentiated on."""
    rows = []

    def spy(_, args, kwargs):
        if torch.is_grad_enabled():
            rows.extend(ids[mask.bool()].tolist() for ids, mask in zip(kwargs["input_ids"], kwargs["attention_mask"]))
    model.register_forward_pre_hook(spy, with_kwargs=True)
    return rows


@pytest.mark.parametrize("name", FAMILIES)
def test_the_first_ratio_is_1_the_sampler_agrees_and_the_ids_are_those_sampled(name, family, tmp_path):
    """I1, I2, I3; P2, P3, P4, P5: dropout in the model's config, temperature 0.7, prompts of several lengths padded left, micro-batches."""
    found = family(name)
    if name != "chatglm":                                                   # which has none
        model = rk.load_model(found.policy).train()
        ids = torch.arange(10, 40)[None]
        assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    trainer = trainer_of(ppo(found, tmp_path / "run", keep_rollouts=True, gradient_accumulation_steps=2))
    seen = seen_by(trainer.actor.model)
    steps = [row for row in trainer.train().history if "score" in row]
    kept = list(rollouts(tmp_path / "run"))
    assert len({len(row["prompt_ids"]) for row in kept}) > 1
    assert max(row["first_ratio"] for row in steps) <= 1e-6 and max(abs(row["approx_kl"]) for row in steps) <= 1e-12
    assert max(row["sampler_gap"] for row in steps) <= 1e-5
    assert seen == [row["prompt_ids"] + row["ids"] for row in kept]


@pytest.mark.parametrize("mini", [0, 4])
def test_any_split_into_micro_batches_gives_the_same_weights(mini, family, tmp_path, monkeypatch):
    """I5, P12: six answers of several lengths; minis of four leave a partial last one, micros of two and of one."""
    after = []
    for pieces in (1, 2, 3, 4):
        trainer = trainer_of(ppo(family("glm"), tmp_path / str(pieces), mini_batch_size=mini, gradient_accumulation_steps=pieces, max_steps=1,
                                 keep_rollouts=True, entropy_coefficient=0.01))
        in_float64(trainer, monkeypatch)
        before = weights(trainer.actor.model)
        trainer.train()
        after.append((weights(trainer.actor.model), weights(trainer.critic.model)))
    assert len({len(row["ids"]) for row in rollouts(tmp_path / "1")}) > 1 and moved(before, trainer.actor.model) > 3e-4
    for split in after[1:]:
        for ours, theirs in zip(split, after[0]):
            apart = torch.cat([(ours[key] - theirs[key]).flatten() for key in theirs])
            assert float(apart.abs().max()) < 1e-9 and abs(float(apart.mean())) < 1e-12, "a drift to one side"


def test_a_split_leaves_no_drift_in_float32(family, tmp_path):
    """I5: the mean residual shows what a tolerance for each weight hides, such as a micro-batch that is left out."""
    after = []
    for pieces in (1, 3):
        trainer = trainer_of(ppo(family("glm"), tmp_path / str(pieces), gradient_accumulation_steps=pieces, max_steps=1))
        trainer.train()
        after.append(torch.cat([p.flatten() for p in weights(trainer.actor.model).values()]))
    apart = after[1] - after[0]
    assert abs(float(apart.mean())) < 1e-9 and float(apart.abs().mean()) < 1e-7


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_and_what_stands_there_change_no_advantage(name, family, tmp_path):
    """I12, P6, P7: each answer scored alone, and among longer prompts and answers; and other ids under the padding."""
    trainer = trainer_of(ppo(family(name), tmp_path / "run", whiten_advantages=False))
    rows = sorted(trainer.rows, key=lambda row: len(row["prompt_ids"]))[::4]
    answers = [[20, 30, *trainer.experience.end_ids], [40], [50, 60, 70, 80], [21, 22, 23]]
    sampled = [[0.0] * len(answer) for answer in answers]
    together = trainer.experience.score(rows, answers, sampled)
    advantages, returns, _ = trainer._advantages(together)
    for i, (row, answer) in enumerate(zip(rows, answers)):
        alone = trainer._advantages(trainer.experience.score([row], [answer], sampled[i:i + 1]))
        for one, all_ in zip(alone, (advantages, returns)):
            torch.testing.assert_close(one[0], all_[i, :len(answer)], atol=1e-5, rtol=0)
        assert not advantages[i, len(answer):].any() and not returns[i, len(answer):].any()
    trainer.experience.pad_id = 77
    other = trainer.experience.score(rows, answers, sampled)
    assert not torch.equal(other.ids, together.ids)
    torch.testing.assert_close(trainer._advantages(other)[0], advantages, atol=1e-6, rtol=0)


def test_the_pad_may_be_the_end_token(family, tmp_path, monkeypatch):
    """P1: masks come from lengths, not from ids, so the end token is trained on and nothing else changes."""
    found, after = family("llama"), []
    for name in ("own", "end"):
        trainer = trainer_of(ppo(found, tmp_path / name, keep_rollouts=True, max_steps=1, batch_size=12))
        if name == "end":
            trainer.pad_id = trainer.experience.pad_id = trainer.experience.end_ids[0]
        in_float64(trainer, monkeypatch)
        seen = seen_by(trainer.actor.model)
        trainer.train()
        after.append(weights(trainer.actor.model))
    assert any(row[-1] == trainer.pad_id for row in seen) and len({len(row["ids"]) for row in rollouts(tmp_path / "end")}) > 1
    assert all(float((after[0][key] - after[1][key]).abs().max()) < 1e-5 for key in after[0])


def sequences(logits, reference, draws):
    """`draws` answers of two tokens from a table of logits (1 + V, V), row 0 for the first token -> log-probs and the reference's, (draws, 2)."""
    generator = torch.Generator().manual_seed(0)
    first = torch.multinomial(logits[0].softmax(0), draws, True, generator=generator)
    second = torch.multinomial(logits[1 + first].softmax(1), 1, generator=generator)[:, 0]
    states, tokens = torch.stack([torch.zeros_like(first), 1 + first], 1), torch.stack([first, second], 1)
    return states, tokens, [rl.token_logps(table[states], tokens) for table in (logits, reference)]


def test_kl_estimates_and_gradients_by_sampling_agree_with_the_exact_ones():
    """I13, P8: answers of two tokens of a vocabulary of six, 200,000 of them; five standard errors.

    k1 in the reward has the gradient of the answers' KL; k2 in the loss that of the KL at each state, the states held as they are;
    k3 in the loss has another one."""
    generator, draws = torch.Generator().manual_seed(3), 200_000
    logits, reference = torch.randn(2, 7, 6, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    states, tokens, (logps, ref) = sequences(logits.detach(), reference, draws)
    first, rest = logits.log_softmax(-1)[0], logits.log_softmax(-1)[1:]
    others = reference.log_softmax(-1)
    at = [(row.exp() * (row - other)).sum(-1) for row, other in ((first, others[0]), (rest, others[1:]))]
    exact, fixed = at[0] + (first.exp() * at[1]).sum(), at[0] + (first.exp().detach() * at[1]).sum()
    k1, k2, k3 = (k.sum(1) for k in rl.kl_estimates(logps, ref, torch.ones(draws, 2)))

    def off(found, wanted):                                     # in standard errors
        return (found.mean(0) - wanted).abs() / found.std(0).clamp(min=1e-9) * draws ** 0.5
    assert off(k1, exact.detach()) < 5 and off(k3, exact.detach()) < 5 and off(k2, exact.detach()) > 5 and (k3 >= 0).all() and (k1 < 0).any()
    true, held = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (exact, fixed))
    score = torch.nn.functional.one_hot(tokens, 6) - logits.detach().softmax(-1)[states]                # (draws, 2, 6) of a log-prob
    on = torch.nn.functional.one_hot(states, 7).double()                                                # (draws, 2, 7)
    ones, finished = torch.ones(draws, 2, dtype=torch.float64), torch.ones(draws)
    rewards = rl.shaped_rewards(torch.zeros(draws), logps, ref, ones, 1.0, finished)
    advantages, _ = rl.gae(rewards, torch.zeros_like(rewards), ones, finished, 1.0, 1.0)
    slopes = {}
    for name, weigh in dict(k1=lambda x: rl.policy_loss(x, logps, advantages, ones, 0.2),
                            k2=lambda x: rl.kl_estimates(x, ref, ones)[1].sum(), k3=lambda x: rl.kl_estimates(x, ref, ones)[2].sum()).items():
        leaf = logps.clone().requires_grad_()
        slopes[name] = torch.einsum("d t, d t s, d t v -> d s v", torch.autograd.grad(weigh(leaf), leaf)[0], on, score)
    assert off(slopes["k1"], true).max() < 5 and off(slopes["k2"], held).max() < 5 and off(slopes["k2"], true).max() > 5
    assert off(slopes["k3"], held).max() > 20 and off(slopes["k3"], true).max() > 20


PITFALLS = {                            # of PPO, as commonly met: the test that holds each, or why it cannot occur here
    "P1 the end token is the pad": "test_the_pad_may_be_the_end_token",
    "P2 left padding without positions": "test_the_first_ratio_is_1_the_sampler_agrees_and_the_ids_are_those_sampled",
    "P3 dropout left on": "test_the_first_ratio_is_1_the_sampler_agrees_and_the_ids_are_those_sampled",
    "P4 sampled and scored at different temperatures": "test_log_probs_are_those_of_the_tempered_distribution_without_filters",
    "P5 decoded and encoded again": "test_the_first_ratio_is_1_the_sampler_agrees_and_the_ids_are_those_sampled",
    "P6 padding in the advantages": "test_padding_and_what_stands_there_change_no_advantage",
    "P6 a cut answer taken for a finished one": "test_an_answer_without_its_end_token_is_scored_lower",
    "P7 the reward at a pad, an empty answer": "test_an_empty_answer_is_scored_and_trained_on",
    "P8 the wrong estimate of the KL": "test_kl_estimates_and_gradients_by_sampling_agree_with_the_exact_ones",
    "P9 a KL that stays negative": "test_every_check_of_ppo_has_a_fault_planted_in_the_loop",            # sampler_gap, and the check of health.py
    "P10 whitening": "test_two_processes_whiten_as_one",
    "P11 old log-probs of other weights or shapes": "test_log_probs_of_the_sampler_serve_as_well_as_scored_ones",
    "P12 means of means, means over pads": "test_any_split_into_micro_batches_gives_the_same_weights",
    "P13 a critic that starts off the scale": "test_steps_of_the_loop_are_those_of_the_reference",          # its values are normalised as scores are
    "P13 values clipped around 0": "test_the_clipped_value_loss_by_hand",                                   # around the old values; 0 turns it off
    "P14 Adam's epsilon": "test_steps_of_the_loop_are_those_of_the_reference",                              # PyTorch's place, 1e-8
    "P15 scores of no scale": "test_running_moments_are_those_of_all_scores_and_reference_ones_of_the_first",
    "P16 no penalty for a missing end": "test_an_answer_without_its_end_token_is_scored_lower",
    "P17 rows mixed in by batches, or by a second step": "test_rows_mixed_in_change_the_actor_by_a_mean_over_their_tokens_in_the_same_step",
    "P18 an average of shards or of the base": "test_every_stage_goes_on_from_every_other_one_and_samples_from_whole_weights",
    "P19 no warm-up of the critic": "test_at_the_start_the_critic_alone_learns",
    "P20 a loop without end, losses swapped": "test_ppo_runs_to_its_end_with_a_first_ratio_of_one",         # one iterator, nothing is zipped
    "P21 a checkpoint without RL's state": "test_the_adaptive_coefficient_follows_its_closed_form_through_a_kill",
    "P22 log-sum-exp in half precision": "test_log_probs_of_half_precision_logits_are_taken_in_float32"}    # no -log(sigmoid) in PPO


def test_every_pitfall_has_a_test_that_there_is():
    assert {int(name[1:].split()[0]) for name in PITFALLS} == set(range(1, 23))
    texts = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    assert [test for test in PITFALLS.values() if f"def {test}(" not in texts] == []
