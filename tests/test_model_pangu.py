"""Pangu against the logits of the 2023 original, and the properties any causal model must have."""
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from rlhfkit.models.pangu import PanguConfig, PanguForCausalLM, PanguModel

PAD = 6


def make(**changes):
    """A small model whose weights are large enough that every position matters."""
    sizes = {"vocab_size": 90, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "max_position_embeddings": 48}
    torch.manual_seed(0)
    return PanguForCausalLM(PanguConfig(**({"initializer_range": 0.2} | sizes | changes))).eval()


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(10, 90, (2, 12), generator=torch.Generator().manual_seed(1))


def logits(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs).logits


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def padded(rows, side, width):
    """Rows of ids -> ids and mask, padded to width on one side."""
    pads = [torch.full((width - len(row),), PAD) for row in rows]
    ids = torch.stack([torch.cat([pad, row] if side == "left" else [row, pad]) for pad, row in zip(pads, rows)])
    return ids, (ids != PAD).long()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_logits_of_the_2023_model_are_reproduced(shared, attention):
    folder = shared / "fixtures/models/pangu"
    cases = load_file(folder / "cases.safetensors")
    model, info = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, output_loading_info=True)
    assert type(model) is PanguForCausalLM and not any(info.values())
    close(logits(model, cases["plain.input_ids"]), cases["plain.logits"])
    mask = cases["right_padded.attention_mask"]       # at pads the original had a bug: an integer mask added to scores
    found = logits(model, cases["right_padded.input_ids"], attention_mask=mask)
    close(found[mask == 1], cases["right_padded.logits"][mask == 1])


def test_a_published_folder_without_an_end_token_still_stops_at_it(shared):
    model = AutoModelForCausalLM.from_pretrained(shared / "fixtures/models/pangu")
    assert (model.config.eos_token_id, model.generation_config.eos_token_id) == (9, 9)


@pytest.mark.parametrize(("sizes", "count"), [
    (dict(num_layers=24, num_heads=16, hidden_size=1024, vocab_size=40000), 345_368_576),
    (dict(num_layers=32, num_heads=32, hidden_size=2560, vocab_size=40000), 2_625_295_360),
    (dict(num_layers=40, num_heads=40, hidden_size=5120, vocab_size=40064), 12_801_198_080)])
def test_the_published_sizes_have_the_published_parameter_counts(sizes, count):
    with torch.device("meta"):
        assert PanguForCausalLM(PanguConfig(**sizes)).num_parameters() == count


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_future_does_not_leak_through_any_layer(model, ids, attention):
    model = make(attn_implementation=attention)
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] - 9) % 80 + 10
    before, after = logits(model, ids), logits(model, changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert ((before - after)[:, 7:].abs().amax(-1) > 1e-3).all()        # and all that follows does see it


def test_the_query_layer_asks_by_position_and_not_by_word(model, ids):
    seen = []
    hook = model.transformer.h[-1].attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(model, ids)
    hook.remove()
    close(seen[0], model.transformer.wqe.weight[:12].expand(2, 12, 32), atol=0)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cached_and_uncached_logits_are_equal(ids, kind, attention):
    model = make(attn_implementation=attention)
    config = model.config
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=16)
    pieces = [logits(model, ids[:, a:b], past_key_values=cache, use_cache=True) for a, b in ((0, 7), (7, 8), (8, 12))]
    close(torch.cat(pieces, 1), logits(model, ids))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
def test_padding_on_either_side_changes_nothing(ids, side, attention, dtype):
    model = make(attn_implementation=attention)
    rows = [ids[0], ids[1, :5]]
    batch, mask = padded(rows, side, 15)
    found = logits(model, batch, attention_mask=mask.to(dtype))
    for row, single, kept in zip(found, rows, mask):
        close(row[kept == 1], logits(model, single[None])[0])
    assert found.isfinite().all()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_is_equal_with_any_cache_and_with_left_padding(model, ids, cache):
    rows = [ids[0], ids[1, :5]]
    batch, mask = padded(rows, "left", 14)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "disable_compile": True}
    together = model.generate(batch, attention_mask=mask, cache_implementation=cache, **options)[:, 14:]
    assert torch.equal(together, model.generate(batch, attention_mask=mask, use_cache=False, **options)[:, 14:])
    for row, answer in zip(rows, together):
        alone = row[None]
        for _ in range(8):
            alone = torch.cat([alone, logits(model, alone)[:, -1:].argmax(-1)], 1)
        assert torch.equal(alone[0, len(row):], answer)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("use_cache", [False, None])
def test_packed_rows_equal_separate_rows(ids, attention, use_cache):
    model = make(attn_implementation=attention)
    packed, positions = torch.cat([ids[0, :7], ids[1, :9]])[None], torch.cat([torch.arange(7), torch.arange(9)])[None]
    found = logits(model, packed, position_ids=positions, use_cache=use_cache)[0]
    close(found[:7], logits(model, ids[:1, :7])[0])
    close(found[7:], logits(model, ids[1:, :9])[0])


def test_a_packed_document_cannot_influence_the_next_one(model, ids):
    options = {"position_ids": torch.cat([torch.arange(7), torch.arange(5)])[None], "use_cache": False}
    changed = ids[:1].clone()
    changed[0, :7] = 11
    before, after = logits(model, ids[:1], **options)[0], logits(model, changed, **options)[0]
    assert torch.equal(before[7:], after[7:]) and not torch.equal(before[:7], after[:7])

    embeds = []
    hook = model.transformer.wte.register_forward_hook(lambda _, args, output: embeds.append(output))
    second = model(ids[:1], **options).logits[0, 7:].square().sum()
    hook.remove()
    gradient, = torch.autograd.grad(second, embeds)
    assert (gradient[0, :7] == 0).all() and (gradient[0, 7:].abs().sum(-1) > 0).all()


def test_a_packed_row_may_be_longer_than_the_position_table(model):
    row = torch.arange(90).remainder(80)[None] + 10
    assert logits(model, row, position_ids=torch.arange(45).repeat(2)[None], use_cache=False).shape == (1, 90, 90)


def test_a_row_longer_than_the_position_table_is_refused(model):
    with pytest.raises(ValueError, match="the row has 49 tokens; this model has 48 positions"):
        model(torch.full((1, 49), 11))
    with pytest.raises(ValueError, match="has 49 tokens"):
        model.generate(torch.full((1, 40), 11), attention_mask=torch.ones(1, 40), max_new_tokens=20, eos_token_id=None)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(ids, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = make(resid_pdrop=0.2, attn_pdrop=0.2, embd_pdrop=0.2).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            assert all(block.gradient_checkpointing for block in model.transformer.h)
        torch.manual_seed(5)
        model(ids, labels=ids).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient, atol=1e-6)


def test_dropout_acts_in_training_only_and_where_the_config_says(ids):
    off = make(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    close(logits(off.train(), ids), logits(off.eval(), ids), atol=0)
    for place in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        on = make(**({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} | {place: 0.5}))
        close(logits(on, ids), logits(off, ids), atol=0)
        assert not torch.allclose(logits(on.train(), ids), logits(off, ids), atol=1e-2)


def test_labels_of_minus_100_are_ignored_and_the_loss_is_a_mean_or_a_share_of_a_count(model, ids):
    labels = ids.clone()
    labels[:, :8] = -100
    logps = logits(model, ids).log_softmax(-1)
    by_hand = -sum(logps[b, t - 1, ids[b, t]] for b in range(2) for t in range(8, 12))        # 2 rows x 4 tokens
    close(model(ids, labels=labels).loss, by_hand / 8)
    close(model(ids, labels=labels, num_items_in_batch=torch.tensor(10)).loss, by_hand / 10)


def test_logits_to_keep_gives_the_last_positions(model, ids):
    close(logits(model, ids, logits_to_keep=3), logits(model, ids)[:, -3:])


def test_the_head_stays_tied_through_saving_and_loading(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == loaded.config.to_dict()
    assert loaded.generation_config.eos_token_id == 9


def test_hidden_states_and_tuples_come_out_as_from_any_transformers_model(model, ids):
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
        base = model.transformer(ids)
    assert len(output.hidden_states) == 4 and torch.equal(output.hidden_states[-1], base.last_hidden_state)
    assert isinstance(model.base_model, PanguModel) and isinstance(model(ids, return_dict=False), tuple)


def test_initial_weights_follow_gpt2(model):
    big = make(hidden_size=128, initializer_range=0.02)
    assert big.transformer.wte.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert big.transformer.h[0].mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 6 ** 0.5, rel=0.05)    # 3 layers
    assert big.transformer.h[0].attn.q_proj.bias.abs().max() == 0


def test_embeddings_are_found_and_resized_together_with_the_tied_head():
    model = make()
    assert model.get_input_embeddings() is model.transformer.wte and model.get_output_embeddings() is model.lm_head
    model.resize_token_embeddings(96)
    assert model.lm_head.weight is model.transformer.wte.weight and model.lm_head.weight.shape == (96, 32)
    assert logits(model, torch.tensor([[95]])).shape == (1, 1, 96)


def test_heads_must_divide_the_hidden_size():
    with pytest.raises(ValueError, match="hidden_size is 30 and num_heads is 4"):
        make(hidden_size=30)
