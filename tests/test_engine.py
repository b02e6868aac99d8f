"""One process: gradients of split batches, clipping, schedule, dropout, means, log lines, the DeepSpeed dict."""
import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

import rlhfkit as rk
from rlhfkit.engine import Engine, all_sum, gather_list, log_line, mean_over, say, set_dropout
from rlhfkit.models.pangu import PanguConfig, PanguForCausalLM
from rlhfkit.trainer import arguments
from rlhfkit.zero import deepspeed_config

CONFIG = rk.SFT("model", "data", "out", lr_scheduler_type="linear", warmup_ratio=0.2)
IDS = torch.tensor([[1, 20, 21, 22, 23, 24], [1, 30, 31, 32, 9, 6], [1, 40, 9, 6, 6, 6], [1, 50, 51, 52, 53, 9]])
MASK = torch.tensor([[1] * 6, [1] * 5 + [0], [1] * 3 + [0] * 3, [1] * 6])


def pangu(**changes):
    torch.manual_seed(0)
    return PanguForCausalLM(PanguConfig(**{"vocab_size": 60, "hidden_size": 16, "num_layers": 2, "num_heads": 2,
                                           "max_position_embeddings": 16} | changes))


def gradient(engine, micro_batches):
    """The gradient, as one vector, of the summed loss over all tokens, given in micro-batches of these sizes."""
    tokens, start = int(MASK[:, 1:].sum()), 0
    for i, size in enumerate(micro_batches):
        ids, mask = IDS[start:start + size], MASK[start:start + size]
        logits = engine(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none") * mask[:, 1:]
        engine.backward(losses.sum() / tokens, last=i == len(micro_batches) - 1)
        start += size
    return torch.cat([p.grad.flatten() for p in engine.model.parameters()])


@pytest.mark.parametrize("micro_batches", [(1, 1, 1, 1), (2, 2), (3, 1)])
def test_four_micro_batches_of_one_give_the_gradient_of_one_of_four(micro_batches):
    """The rows have 5, 4, 2 and 5 tokens: averages of averages would weigh the short one double."""
    made = [Engine(set_dropout(pangu(), 0.0), CONFIG, 1e-3, 10) for _ in range(2)]
    whole, split = gradient(made[0], (4,)), gradient(made[1], micro_batches)
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-6)
    assert whole.norm() > 0.1
    norms = [engine.step() for engine in made]
    assert norms[0] == pytest.approx(norms[1], abs=1e-5)


def linear(config=CONFIG, rate=0.1, steps=10, weight=(1.0, 1.0)):
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([weight])
    return Engine(model, config, rate, steps)


def test_a_step_gives_the_norm_before_clipping_and_clears_the_gradient():
    made = linear()
    made.backward(made(torch.tensor([[3.0, 4.0]])).sum())
    assert made.step() == 5.0 and made.model.weight.grad is None


def test_the_first_update_of_adamw_is_the_learning_rate_in_each_weight():
    made = linear(dataclasses.replace(CONFIG, warmup_ratio=0.0))
    made.backward(made(torch.tensor([[3.0, -4.0]])).sum())
    made.step()
    torch.testing.assert_close(made.model.weight.data, torch.tensor([[0.9, 1.1]]), rtol=0, atol=1e-5)


def rates(config, steps=10):
    made, found = linear(config), []
    for _ in range(steps):
        found.append(made.learning_rate)
        made.backward(made(torch.ones(1, 2)).sum())
        made.step()
        made.advance()
    return found


def test_the_linear_schedule_by_hand():
    """Two steps of warm-up in ten: thirds up, eighths down, and no step is lost at either end."""
    assert rates(CONFIG) == pytest.approx([0.1 / 3, 0.2 / 3, 0.1, *(0.1 * n / 8 for n in range(7, 0, -1))])


def test_a_constant_schedule_warms_up_as_it_does_on_hf_s_trainer():
    """trainer.arguments makes `constant` HF's constant_with_warmup; one name must not be two schedules."""
    assert rates(dataclasses.replace(CONFIG, lr_scheduler_type="constant"), 4) == pytest.approx([0.1 / 3, 0.2 / 3, 0.1, 0.1])


def test_frozen_parameters_stay_and_get_no_gradient():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    made = Engine(model, dataclasses.replace(CONFIG, warmup_ratio=0.0, weight_decay=0.1), 0.1, 10)
    made.backward(made(torch.ones(1, 2)).sum())
    made.step()
    assert torch.equal(model[0].weight, before)


def test_weights_are_the_models_own_names_on_the_cpu():
    weights = linear().weights()
    assert list(weights) == ["weight"] and weights["weight"].tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("model", [
    lambda: pangu(attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3), lambda: LlamaForCausalLM(LlamaConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        attention_dropout=0.3))],
    ids=["pangu", "llama"])
def test_dropout_is_set_everywhere_whatever_the_config_calls_it(model):
    """The 2023 kit set a field that Pangu and GLM do not read: dropout stayed 0.1 in PPO."""
    torch.manual_seed(0)
    model = model().train()
    ids = torch.arange(10, 18)[None]

    def noise():
        with torch.no_grad():
            a, b = model(input_ids=ids).logits, model(input_ids=ids).logits
        return float((a - b).abs().max())
    assert noise() > 0
    assert set_dropout(model, 0.0) is model and noise() == 0
    set_dropout(model, 0.5)
    assert noise() > 0


def test_a_mean_counts_every_row_once_whatever_the_batch_size():
    rows = [1.0, 2.0, 3.0, 4.0, 10.0]

    def measure(batch):
        assert not torch.is_grad_enabled()
        return {"value": (torch.tensor(sum(batch)), len(batch)), "large": (sum(x > 3 for x in batch), len(batch))}
    for size in (1, 2, 3, 5, 8):
        assert mean_over(rows, size, measure) == {"large": 0.4, "value": 4.0}


def test_a_mean_weighs_by_the_count_not_by_the_batch():
    assert mean_over([(6.0, 3), (2.0, 1)], 1, lambda batch: {"loss": batch[0]}) == {"loss": 2.0}
    assert mean_over([], 4, lambda batch: {"loss": (1.0, 1)}) == {}
    assert mean_over([0], 4, lambda batch: {"loss": (0.0, 0)}) == {"loss": 0.0}


def test_sums_and_lists_of_one_process_are_its_own():
    assert all_sum([1, 2.5]).tolist() == [1.0, 2.5] and gather_list(range(3)) == [0, 1, 2]


def test_a_log_line_has_one_shape():
    assert log_line({"step": 20, "loss": 2.1434, "learning_rate": 8e-6,
                     "seconds": 1.24}) == "step 20  loss 2.143  lr 8.0e-06  1.2 s"
    assert log_line({"step": 0, "eval_loss": 2.0, "seconds_rollout": 3.0}) == "step 0  eval_loss 2.000"


def test_a_line_is_said_to_the_cell_and_kept_in_the_log(tmp_path, capsys):
    say(tmp_path, "step 1  损失 2.000")
    say(tmp_path, "step 2")
    assert capsys.readouterr().out == "step 1  损失 2.000\nstep 2\n" == (tmp_path / "log.txt").read_text("utf-8")


@pytest.mark.parametrize("dtype", ["float32", "mixed", "bfloat16", "float16"])
def test_deepspeed_s_dict_agrees_with_the_arguments_of_hf_s_trainer(dtype):
    """HF refuses to train where the two differ, which only shows once there are workers."""
    config = dataclasses.replace(CONFIG, dtype=dtype, zero_stage=2, max_grad_norm=0.5)
    rest = dict(world_size=2, adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8, save_on_each_node=False,
                fp16_full_eval=False,
                bf16_full_eval=False)
    try:
        theirs = HfTrainerDeepSpeedConfig(deepspeed_config(config, trainer=True))
        theirs.trainer_config_process(SimpleNamespace(**arguments(config, []), **rest))
    finally:
        unset_hf_deepspeed_config()                 # making one tells transformers that DeepSpeed is at work
    assert theirs.mismatches == []


def test_deepspeed_s_dict_has_the_stage_the_offload_and_the_buckets_of_the_run():
    config = dataclasses.replace(CONFIG, zero_stage=3, offload="all", bucket_size=1000, max_live_parameters=2000,
                                 pin_memory=False)
    zero = deepspeed_config(config, trainer=False)["zero_optimization"]
    assert zero["stage"] == 3 and zero["stage3_max_live_parameters"] == 2000 and zero["reduce_bucket_size"] == 1000
    assert zero["offload_param"] == zero["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert "offload_param" not in deepspeed_config(dataclasses.replace(config, offload="optimizer"),
                                                   False)["zero_optimization"]
