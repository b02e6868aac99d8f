"""ChatGLM-6B against the logits of the 2023 original; its places, rotary and residual; what any prefix model must hold."""
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

import rlhfkit.models.chatglm as module
from rlhfkit.models.chatglm import ChatGLMConfig, ChatGLMForCausalLM, ChatGLMModel, rotary_tables
from rlhfkit.models.prefix import prefix_layout

MASK, GMASK, SOP, EOP, PAD = 83, 84, 85, 86, 87
SPECIALS = dict(mask_token_id=MASK, gmask_token_id=GMASK, bos_token_id=SOP, eos_token_id=EOP, pad_token_id=PAD)
ROWS = [torch.tensor([5, 6, 7, 8, GMASK, SOP, 9, 10, 11, 12, 13]), torch.tensor([20, MASK, 23, SOP, 21, 22])]
PACKED, RESTARTS = torch.cat(ROWS)[None], torch.cat([torch.arange(11), torch.arange(6)])[None]
PLACES = pytest.mark.parametrize("places", ["arange", "collapse"])
ATTENTION = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def make(**changes):
    """A small model whose weights are large enough that every position matters."""
    sizes = dict(vocab_size=90, hidden_size=32, num_layers=3, num_attention_heads=2, inner_hidden_size=64, initializer_range=0.4,
                 tie_word_embeddings=False)
    torch.manual_seed(0)
    return ChatGLMForCausalLM(ChatGLMConfig(**(sizes | SPECIALS | changes))).eval()


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
    folder = shared / "fixtures/models/chatglm"
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert type(model) is ChatGLMForCausalLM and not any(info.values())
    return model, {name.removeprefix("gmask."): tensor for name, tensor in load_file(folder / "cases.safetensors").items()}


@ATTENTION
def test_the_logits_of_the_2023_model_are_reproduced_given_and_derived(shared, attention):
    model, case = original(shared, attn_implementation=attention)
    given = logits(model, case["input_ids"], attention_mask=case["attention_mask"], position_ids=case["position_ids"])
    close(given, case["logits"])
    close(logits(model, case["input_ids"]), case["logits"])
    close(logits(model, case["input_ids"], attention_mask=torch.ones(2, 20)), case["logits"])
    positions, keep = model.transformer.layout(case["input_ids"])
    assert torch.equal(positions, case["position_ids"]) and torch.equal(~keep, case["attention_mask"])


def test_each_wrong_reading_of_the_original_would_be_noticed(shared, monkeypatch):
    for change, least in ((dict(alpha_layers=3), 0.3), (dict(gmask_positions="collapse"), 5e-3)):      # 3 layers deep
        model, case = original(shared, **change)
        assert (logits(model, case["input_ids"]) - case["logits"]).abs().max() > least
    model, case = original(shared)
    gelu = torch.nn.functional.gelu
    monkeypatch.setattr(torch.nn.functional, "gelu", lambda x, approximate: gelu(x))
    assert 3e-5 < (logits(model, case["input_ids"]) - case["logits"]).abs().max() < 1e-4          # erf: seen at 1e-5, not at 1e-4


def test_a_published_folder_is_saved_back_bit_equal_but_for_the_constant_frequencies(shared, tmp_path):
    model, _ = original(shared)
    model.save_pretrained(tmp_path)
    saved, tensors = load_file(tmp_path / "model.safetensors"), load_file(shared / "fixtures/models/chatglm/model.safetensors")
    assert saved.keys() == {name for name in tensors if not name.endswith("rotary_emb.inv_freq")}
    assert all(torch.equal(saved[name], tensors[name]) for name in saved)
    assert not json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"]
    assert model.generation_config.eos_token_id == 321


@pytest.mark.parametrize("head", ["equal", "absent"])
def test_the_head_is_tied_where_the_file_says_the_same_twice_or_once(shared, tmp_path, head):
    folder = shared / "fixtures/models/chatglm"
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.word_embeddings.weight"].clone()
    if head == "absent":
        del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(folder / "config.json", tmp_path / "config.json")
    model, info = ChatGLMForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert model.config.tie_word_embeddings and not any(info.values())


def test_the_published_size_has_the_published_parameter_count():
    with torch.device("meta"):
        assert ChatGLMForCausalLM(ChatGLMConfig(vocab_size=130528)).num_parameters() == 6_173_286_400


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frequencies_are_rounded_to_float16_whatever_dtype_the_model_is_loaded_in(shared, dtype, monkeypatch):
    """10000 ** (-2 / 6) is 0.0464159, in float16 0.0464172: at place 2000 an angle of 2.7e-3; the fixture is too short for it."""
    seen, tables = [], rotary_tables
    monkeypatch.setattr(module, "rotary_tables", lambda *args: seen.append(args[1:]) or tables(*args))
    model, _ = original(shared, dtype=dtype)
    logits(model, torch.tensor([[5]]))
    assert seen == [(6, dtype)]
    cos, sin = tables(torch.tensor([[[2000], [7]]]), 6, torch.float32)                          # (1, 1, 1, 2, 6)
    frequencies = torch.tensor([1.0, 0.046417236328125, 0.002155303955078125], dtype=torch.float64).repeat(2)
    close(cos[0, 0, 0, 0].double(), (2000 * frequencies).cos())
    close(sin[0, 0, 0, 1].double(), (7 * frequencies).sin())


@pytest.mark.parametrize(("ids", "mask", "counted", "collapsed", "block"), [
    ([5, 6, GMASK, SOP, 7, 8], None, [0, 1, 2, 3, 4, 5], [0, 1, 2, 2, 2, 2], [0, 0, 0, 1, 2, 3]),
    ([5, MASK, 6, SOP, 7, 8], None, [0, 1, 2, 1, 1, 1], [0, 1, 2, 1, 1, 1], [0, 0, 0, 1, 2, 3]),
    ([5, MASK, GMASK, SOP, 7], None, [0, 1, 2, 3, 4], [0, 1, 2, 2, 2], [0, 0, 0, 1, 2]),          # [gMASK] goes before [MASK]
    ([PAD, 5, GMASK, SOP, GMASK, SOP], [0, 1, 1, 1, 1, 1], [0, 0, 1, 2, 3, 4], [0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 2, 3])])
def test_places_are_counted_on_after_gmask_or_collapse_as_the_config_says(ids, mask, counted, collapsed, block):
    for places, expected in (("arange", counted), ("collapse", collapsed)):
        rule = make(gmask_positions=places).transformer.rule
        found, _ = prefix_layout(torch.tensor([ids]), None if mask is None else torch.tensor([mask]), None, **rule)
        assert found.tolist() == [[expected, block]]


@ATTENTION
def test_explicit_positions_and_mask_equal_derived_ones_and_win_over_them(attention):
    model = make(attn_implementation=attention)
    ids = torch.tensor([[5, 6, 7, GMASK, SOP, 8, 9]])
    positions = torch.tensor([[[0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 1, 2, 3]]])
    masked = torch.ones(7, 7, dtype=torch.bool).triu(1)
    masked[:, :4] = False
    derived = logits(model, ids)
    close(logits(model, ids, attention_mask=masked[None, None], position_ids=positions), derived, atol=1e-6)
    assert (logits(model, ids, position_ids=positions.flip(1)) - derived).abs().max() > 1e-2
    assert (logits(model, ids, attention_mask=torch.ones(1, 1, 7, 7).triu(1).bool()) - derived).abs().max() > 1e-2


@PLACES
@ATTENTION
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(side, attention, places):
    model = make(attn_implementation=attention, gmask_positions=places)
    ids, mask = padded(ROWS, side, 15)
    found = logits(model, ids, attention_mask=mask)
    for row, single, kept in zip(found, ROWS, mask):
        close(row[kept == 1], logits(model, single[None])[0])
    assert found.isfinite().all()


def test_the_future_leaks_only_inside_the_context(model):
    before = logits(model, ROWS[0][None])[0]
    for t, first_changed in ((1, 0), (3, 0), (8, 8)):
        changed = ROWS[0].clone()
        changed[t] = 40
        after = logits(model, changed[None])[0]
        assert torch.equal(before[:first_changed], after[:first_changed])
        assert ((before - after)[first_changed:].abs().amax(-1) > 1e-3).all()


@PLACES
@ATTENTION
def test_packed_rows_equal_separate_rows_and_documents_do_not_touch(attention, places):
    model, embeds = make(attn_implementation=attention, gmask_positions=places), []
    hook = model.transformer.word_embeddings.register_forward_hook(lambda _, args, output: embeds.append(output))
    found = model(PACKED, position_ids=RESTARTS, use_cache=False).logits[0]
    hook.remove()
    for row, mine, other in ((ROWS[0], slice(0, 11), slice(11, None)), (ROWS[1], slice(11, None), slice(0, 11))):
        close(found[mine], logits(model, row[None])[0])
        gradient, = torch.autograd.grad(found[mine].square().sum(), embeds, retain_graph=True)
        assert (gradient[0, other] == 0).all() and (gradient[0, mine].abs().sum(-1) > 0).all()


@PLACES
@ATTENTION
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_is_equal_with_any_cache_and_with_left_padding(cache, attention, places):
    model = make(attn_implementation=attention, gmask_positions=places)
    rows = [ROWS[0][:6], ROWS[1][:4]]
    ids, mask = padded(rows, "left", 9)
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=PAD, disable_compile=True)
    together = model.generate(ids, attention_mask=mask, cache_implementation=cache, **options)[:, 9:]
    assert torch.equal(together, model.generate(ids, attention_mask=mask, use_cache=False, **options)[:, 9:])
    for row, answer in zip(rows, together):
        for _ in range(8):
            row = torch.cat([row, logits(model, row[None])[0, -1:].argmax(-1)])
        assert torch.equal(row[-8:], answer)


@PLACES
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cached_steps_have_the_logits_of_the_whole_row(kind, places):
    model = make(gmask_positions=places)
    ids, mask = padded(ROWS, "left", 12)
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=16)
    found = []
    for end, new in ((10, 10), (11, 1), (12, 1)):
        inputs = model.prepare_inputs_for_generation(ids[:, :end], next_sequence_length=new, past_key_values=cache,
                                                     attention_mask=mask[:, :end], use_cache=True)
        found.append(logits(model, **inputs))
    close(torch.cat(found, 1)[mask == 1], logits(model, ids, attention_mask=mask)[mask == 1])


@PLACES
def test_beams_are_equal_with_and_without_a_cache(places):
    model = make(gmask_positions=places)
    ids, mask = padded([ROWS[0][:6], ROWS[1][:4]], "left", 9)
    options = dict(max_new_tokens=6, num_beams=3, num_return_sequences=2, do_sample=False, pad_token_id=PAD, disable_compile=True)
    found = [model.generate(ids, attention_mask=mask, **kind, **options)
             for kind in (dict(use_cache=False), dict(use_cache=True), dict(cache_implementation="static"))]
    assert found[0].shape[0] == 4 and torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = make().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(PACKED, labels=PACKED, position_ids=RESTARTS, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient, atol=1e-6)


def test_labels_are_unshifted_and_minus_100_is_ignored(model):
    ids, mask = padded(ROWS, "right", 11)
    labels = torch.full_like(ids, -100)
    labels[0, 9:], labels[1, 4:6] = ids[0, 9:], ids[1, 4:6]
    logps = logits(model, ids, attention_mask=mask).log_softmax(-1)
    by_hand = -sum(logps[b, t - 1, ids[b, t]] for b, t in [(0, 9), (0, 10), (1, 4), (1, 5)])
    close(model(ids, attention_mask=mask, labels=labels).loss, by_hand / 4)
    close(model(ids, attention_mask=mask, labels=labels, num_items_in_batch=torch.tensor(10)).loss, by_hand / 10)


@pytest.mark.parametrize("tied", [False, True])
def test_saving_and_loading_keeps_all(tmp_path, tied):
    model = make(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.transformer.word_embeddings.weight) == tied == loaded.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == loaded.config.to_dict() and loaded.config.num_hidden_layers == 3


def test_hidden_states_come_out_and_the_base_model_ends_in_its_norm(model):
    with torch.no_grad():
        output = model(PACKED, output_hidden_states=True, logits_to_keep=2)
        base = model.base_model(PACKED)
    assert isinstance(model.base_model, ChatGLMModel) and len(output.hidden_states) == 4
    assert torch.equal(output.hidden_states[-1], base.last_hidden_state) and output.logits.shape == (1, 2, 90)


def test_the_forward_is_one_graph_without_a_read_of_the_device():
    model = make()
    ids, mask = padded(ROWS, "left", 12)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(logits(compiled, ids, attention_mask=mask), logits(model, ids, attention_mask=mask))


def test_variants_that_the_model_is_not_written_for_are_refused():
    for change, words in ((dict(quantization_bit=4), "quantization_bit is 4"), (dict(gmask_positions="both"), "'arange' or"),
                          (dict(position_encoding_2d=False), "position_encoding_2d is False")):
        with pytest.raises(ValueError, match=words):
            make(**change)
