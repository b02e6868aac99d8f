"""GLM v1 against the logits of the 2023 original; positions and mask from the ids alone; what any prefix model must hold."""
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from rlhfkit.models.glm import GlmV1Config, GlmV1ForCausalLM, GlmV1Model
from rlhfkit.models.prefix import prefix_layout

MASK, SMASK, GMASK, SOP, EOP, PAD = 83, 84, 85, 86, 87, 88
SPECIALS = dict(mask_token_id=MASK, smask_token_id=SMASK, gmask_token_id=GMASK, sop_token_id=SOP, eos_token_id=EOP,
                pad_token_id=PAD)
ROWS = [torch.tensor([5, 6, MASK, 7, 8, SOP, 9, 10, 11, 12, 13]), torch.tensor([20, GMASK, SOP, 21, 22])]
PACKED, RESTARTS = torch.cat(ROWS)[None], torch.cat([torch.arange(11), torch.arange(5)])[None]


def make(**changes):
    """A small model whose weights are large enough that every position matters."""
    sizes = dict(vocab_size=90, hidden_size=32, num_layers=3, num_attention_heads=4, max_sequence_length=48,
                 initializer_range=0.2)
    torch.manual_seed(0)
    return GlmV1ForCausalLM(GlmV1Config(**(sizes | SPECIALS | changes))).eval()


@pytest.fixture(scope="module")
def model():
    return make()


def logits(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs).logits


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def padded(rows, side, width):
    pads = [torch.full((width - len(row),), PAD) for row in rows]
    ids = torch.stack([torch.cat([pad, row] if side == "left" else [row, pad]) for pad, row in zip(pads, rows)])
    return ids, (ids != PAD).long()


def original(shared, **options):
    folder = shared / "fixtures/models/glm"
    config = GlmV1Config.from_pretrained(folder)
    model, info = GlmV1ForCausalLM.from_pretrained(folder, config=config, output_loading_info=True, **options)
    assert not any(info.values())
    return model, load_file(folder / "cases.safetensors"), load_file(folder / "model.safetensors")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_logits_of_the_2023_model_are_reproduced(shared, attention):
    model, cases, _ = original(shared, attn_implementation=attention)
    found = logits(model, cases["prefix_lm.input_ids"], attention_mask=cases["prefix_lm.attention_mask"],
                   position_ids=cases["prefix_lm.position_ids"])
    close(found, cases["prefix_lm.logits"])


def test_another_gelu_or_a_causal_prefix_would_be_noticed(shared, monkeypatch):
    model, cases, _ = original(shared)
    ids, positions, mask = (cases[f"prefix_lm.{name}"] for name in ("input_ids", "position_ids", "attention_mask"))
    assert (logits(model, ids, mask.tril(), positions) - cases["prefix_lm.logits"]).abs().max() > 1e-2
    erf = torch.nn.functional.gelu
    monkeypatch.setattr(torch.nn.functional, "gelu", lambda x: erf(x, approximate="tanh"))
    assert (logits(model, ids, mask, positions) - cases["prefix_lm.logits"]).abs().max() > 1e-4


def test_a_published_folder_is_saved_back_bit_equal_and_under_the_same_names(shared, tmp_path):
    model, _, tensors = original(shared)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == tensors.keys() and all(torch.equal(saved[name], tensors[name]) for name in saved)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "glm_v1" and model.generation_config.eos_token_id == 50007
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is GlmV1ForCausalLM


def test_glm_remains_the_type_of_glm_4():
    assert AutoConfig.for_model("glm").__class__.__name__ == "GlmConfig"


@pytest.mark.parametrize(("sizes", "without_words", "words"), [
    (dict(), 304_410_624, 51_249_152),
    (dict(hidden_size=4096, num_layers=48, num_attention_heads=64), 9_674_637_312, 204_996_608)])
def test_word_embeddings_are_trained_beside_the_published_counts(sizes, without_words, words):
    with torch.device("meta"):
        model = GlmV1ForCausalLM(GlmV1Config(**sizes))
    assert model.num_parameters(only_trainable=True) == without_words + words
    assert model.glm.word_embeddings.weight.requires_grad and model.lm_head.weight is model.glm.word_embeddings.weight


@pytest.mark.parametrize(("ids", "mask", "position", "block"), [
    ([5, MASK, 6, SOP, 7, 8], None, [0, 1, 2, 1, 1, 1], [0, 0, 0, 1, 2, 3]),
    ([PAD, PAD, 5, MASK, 6, SOP, 7, PAD], [0, 0, 1, 1, 1, 1, 1, 0], [0, 0, 0, 1, 2, 1, 1, 1], [0, 0, 0, 0, 0, 1, 2, 2]),
    ([5, GMASK, MASK, SOP, SOP, MASK], None, [0, 1, 2, 1, 1, 1], [0, 0, 0, 1, 2, 3]),       # later ones change nothing
    ([5, 6, 7, SOP, SMASK], None, [0, 1, 2, 2, 2], [0, 0, 0, 1, 2]),          # no mask token: the last of the context
    ([5, 6, MASK], None, [0, 1, 2], [0, 0, 0]),
    ([SOP, 5], None, [0, 0], [1, 2])])
def test_positions_follow_from_mask_and_start_tokens(model, ids, mask, position, block):
    found, _ = prefix_layout(torch.tensor([ids]), None if mask is None else torch.tensor([mask]), None, **model.glm.rule)
    assert found.tolist() == [[position, block]]


def test_the_context_is_seen_whole_and_the_answer_causally_within_each_document(model):
    ids = torch.tensor([[5, MASK, SOP, 6, 7, MASK, SOP, PAD]])
    _, keep = prefix_layout(ids, None, torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0]]), **model.glm.rule)
    assert keep[0, 0].long().tolist() == [
        [1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0, 1]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_explicit_positions_and_mask_equal_derived_ones_and_win_over_them(attention):
    model = make(attn_implementation=attention)
    ids = torch.tensor([[5, 6, MASK, 7, SOP, 8, 9]])
    positions = torch.tensor([[[0, 1, 2, 3, 2, 2, 2], [0, 0, 0, 0, 1, 2, 3]]])
    mask = torch.ones(7, 7, dtype=torch.long).tril()
    mask[:, :4] = 1
    derived = logits(model, ids, attention_mask=torch.ones(1, 7))
    close(logits(model, ids, attention_mask=mask[None, None], position_ids=positions), derived, atol=1e-6)
    close(logits(model, ids, position_ids=positions), derived, atol=1e-6)
    assert (logits(model, ids, position_ids=positions.flip(-1)) - derived).abs().max() > 1e-2
    assert (logits(model, ids, attention_mask=mask.tril()[None, None]) - derived).abs().max() > 1e-2


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_padding_on_either_side_changes_nothing(side, attention, dtype):
    model = make(attn_implementation=attention)
    ids, mask = padded(ROWS, side, 15)
    found = logits(model, ids, attention_mask=mask.to(dtype))
    for row, single, kept in zip(found, ROWS, mask):
        close(row[kept == 1], logits(model, single[None])[0])
    assert found.isfinite().all()


def test_a_row_of_pads_and_an_answer_without_context_stay_finite(model):
    ids, mask = padded([torch.tensor([SOP, 5]), torch.tensor([], dtype=torch.long)], "left", 6)
    assert logits(model, ids, attention_mask=mask).isfinite().all()


def test_the_future_leaks_only_inside_the_context(model):
    before = logits(model, ROWS[0][None])[0]
    for t, first_changed in ((1, 0), (4, 0), (8, 8)):
        changed = ROWS[0].clone()
        changed[t] = 40
        after = logits(model, changed[None])[0]
        assert torch.equal(before[:first_changed], after[:first_changed])
        assert ((before - after)[first_changed:].abs().amax(-1) > 1e-3).all()
    without_start = torch.where(ROWS[0] == SOP, 40, ROWS[0])        # the whole row is context then
    assert ((logits(model, without_start[None])[0] - before).abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_equal_separate_rows(attention):
    model = make(attn_implementation=attention)
    found = logits(model, PACKED, position_ids=RESTARTS, use_cache=False)[0]
    close(found[:11], logits(model, ROWS[0][None])[0])
    close(found[11:], logits(model, ROWS[1][None])[0])


def test_a_packed_document_cannot_influence_another(model):
    embeds = []
    hook = model.glm.word_embeddings.register_forward_hook(lambda _, args, output: embeds.append(output))
    found = model(PACKED, position_ids=RESTARTS, use_cache=False).logits[0]
    hook.remove()
    for mine, other in ((slice(11, None), slice(0, 11)), (slice(0, 11), slice(11, None))):
        gradient, = torch.autograd.grad(found[mine].square().sum(), embeds, retain_graph=True)
        assert (gradient[0, other] == 0).all() and (gradient[0, mine].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generation_is_equal_with_any_cache_and_with_left_padding(cache, attention):
    model = make(attn_implementation=attention)
    rows = [ROWS[0][:6], ROWS[1][:3]]
    ids, mask = padded(rows, "left", 9)
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=PAD, disable_compile=True)
    for _ in range(2):          # a static cache is kept and used again
        together = model.generate(ids, attention_mask=mask, cache_implementation=cache, **options)[:, 9:]
    assert torch.equal(together, model.generate(ids, attention_mask=mask, use_cache=False, **options)[:, 9:])
    for row, answer in zip(rows, together):
        for _ in range(8):
            row = torch.cat([row, logits(model, row[None])[0, -1:].argmax(-1)])
        assert torch.equal(row[-8:], answer)
        alone = model.generate(row[None, :-8], cache_implementation=cache, **options)        # generate drops a mask without pads
        assert torch.equal(alone[0], row)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cached_steps_have_the_logits_of_the_whole_row(model, kind):
    ids, mask = padded(ROWS, "left", 12)
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=16)
    found = []
    for end, new in ((9, 9), (10, 1), (12, 2)):
        inputs = model.prepare_inputs_for_generation(ids[:, :end], next_sequence_length=new, past_key_values=cache,
                                                     attention_mask=mask[:, :end], use_cache=True)
        assert inputs["attention_mask"].shape == (2, 1, new, 16 if kind == "static" else end)
        found.append(logits(model, **inputs))
    close(torch.cat(found, 1)[mask == 1], logits(model, ids, attention_mask=mask)[mask == 1])


def test_beams_are_equal_with_and_without_a_cache(model):
    ids, mask = padded([ROWS[0][:6], ROWS[1][:3]], "left", 9)
    options = dict(max_new_tokens=6, num_beams=3, num_return_sequences=2, do_sample=False, pad_token_id=PAD, disable_compile=True)
    found = [model.generate(ids, attention_mask=mask, **kind, **options)
             for kind in (dict(use_cache=False), dict(use_cache=True), dict(cache_implementation="static"))]
    assert found[0].shape[0] == 4 and torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_row_whose_beginning_is_only_in_the_cache_is_refused(model):
    cache = model(ROWS[0][None, :6], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="of a longer row only 1 tokens were given"):
        model(torch.tensor([[9]]), past_key_values=cache)
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(ROWS[0][None], prefill_chunk_size=4, max_new_tokens=2)


def test_context_and_answer_may_each_fill_the_table_and_no_more():
    model = make(max_sequence_length=8)
    context, answer = torch.arange(9), torch.tensor([SOP] + [9] * 7)
    assert logits(model, torch.cat([context, answer])[None]).shape == (1, 17, 90)
    with pytest.raises(RuntimeError, match="longer than this model's 9 positions"):
        model(torch.cat([context, answer, answer[1:]])[None])
    with pytest.raises(RuntimeError, match="longer than this model's 9 positions"):
        model(torch.arange(10)[None])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = make(embedding_dropout_prob=0.2, attention_dropout_prob=0.2, output_dropout_prob=0.2).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(5)
        model(PACKED, labels=PACKED, position_ids=RESTARTS, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert "glm.word_embeddings.weight" in gradients[0]
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient, atol=1e-6)


def test_dropout_acts_in_training_only_and_where_the_config_says():
    places, ids = ("embedding_dropout_prob", "attention_dropout_prob", "output_dropout_prob"), ROWS[0][None]
    off = make(**dict.fromkeys(places, 0.0))
    close(logits(off.train(), ids), logits(off.eval(), ids), atol=0)
    for place in places:
        on = make(**(dict.fromkeys(places, 0.0) | {place: 0.5}))
        close(logits(on, ids), logits(off, ids), atol=0)
        assert not torch.allclose(logits(on.train(), ids), logits(off, ids), atol=1e-2)


def test_labels_are_unshifted_and_minus_100_is_ignored(model):
    ids, mask = padded(ROWS, "right", 11)
    labels = torch.full_like(ids, -100)
    labels[0, 6:], labels[1, 3:5] = ids[0, 6:], ids[1, 3:5]
    logps = logits(model, ids, attention_mask=mask).log_softmax(-1)
    by_hand = -sum(logps[b, t - 1, ids[b, t]] for b, t in [(0, 6), (0, 7), (0, 8), (0, 9), (0, 10), (1, 3), (1, 4)])
    close(model(ids, attention_mask=mask, labels=labels).loss, by_hand / 7)
    close(model(ids, attention_mask=mask, labels=labels, num_items_in_batch=torch.tensor(10)).loss, by_hand / 10)


def test_saving_and_loading_keeps_all_and_the_head_tied(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.glm.word_embeddings.weight and loaded.generation_config.eos_token_id == EOP
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == loaded.config.to_dict()
    assert (loaded.config.eop_token_id, loaded.config.num_hidden_layers, loaded.config.max_position_embeddings) == (EOP, 3, 48)


def test_hidden_states_come_out_and_the_base_model_ends_in_its_norm(model):
    with torch.no_grad():
        output = model(PACKED, output_hidden_states=True, logits_to_keep=2)
        base = model.base_model(PACKED)
    assert isinstance(model.base_model, GlmV1Model) and len(output.hidden_states) == 4
    assert torch.equal(output.hidden_states[-1], base.last_hidden_state) and output.logits.shape == (1, 2, 90)
    close(base.last_hidden_state @ model.glm.word_embeddings.weight.T, logits(model, PACKED))


def test_the_forward_is_one_graph_without_a_read_of_the_device():
    model = make()
    ids, mask = padded(ROWS, "left", 12)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(logits(compiled, ids, attention_mask=mask), logits(model, ids, attention_mask=mask))


def test_variants_that_the_model_is_not_written_for_are_refused():
    for change, words in ((dict(relative_encoding=True), "relative_encoding is"), (dict(hidden_size=30), "hidden_size is 30")):
        with pytest.raises(ValueError, match=words):
            make(**change)
