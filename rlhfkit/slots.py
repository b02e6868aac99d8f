"""What makes any model run one token at a time over a static cache: a cache without a past, our attention in transformers' interface.

An operator writes the new key and value at the slot and reads a row's filled slots: on a GPU in Triton (kernels.py), else in plain torch. Models
and configs are switched over for as long as a context lasts, and put back also after an error.
"""
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlhfkit.models.prefix import PrefixPreTrainedModel

NAME = "rlhfkit_slots"                      # of our attention in transformers' interface
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))        # layers that read the same input, where a model has them apart


class Slots(Cache):
    """What a model takes for its cache: no past, so that it attends to what it has just made, or to what our attention finds in the slots."""

    def __init__(self, fill=None):
        super().__init__(layers=[])
        self.fill = fill

    def update(self, key, value, layer_idx, *args, **kwargs):
        if self.fill is not None:
            self.fill(key, value, layer_idx)
        return key, value


def supported(model, device):
    """"" where a Decoder can capture this model on the device, else the reason, from what its config and its classes say of themselves."""
    model = plain(model)
    config, parameters = model.config, list(model.parameters())
    rope = str(getattr(config, "rope_parameters", None))
    reasons = {
        "the device is no CUDA GPU": torch.device(device).type != "cuda",
        "weights are sharded, or on several devices": any(not p.numel() for p in parameters) or len({p.device for p in parameters}) > 1,
        "weights are float64": any(p.dtype == torch.float64 for p in parameters),
        "it is no decoder of text alone": bool(config.is_encoder_decoder or config.sub_configs),
        "its attention is not exchangeable": not model._supports_attention_backend,
        "some layers do not attend to all that came before": any(getattr(config, name, None) for name in (
            "sliding_window", "attention_chunk_size")) or bool(set(getattr(config, "layer_types", None) or ()) - {"full_attention"}),
        "attention scores are capped": bool(getattr(config, "attn_logit_softcapping", None)),
        "keys and values differ in size": getattr(config, "v_head_dim", None) is not None,
        "layers keep another state than keys and values":
            bool(getattr(model, "_is_stateful", False)) or len(attentions(model)) != config.num_hidden_layers,
        "rotary angles depend on the longest row": "'dynamic'" in rope or "'longrope'" in rope,
        "attention has a bias": not model._supports_flash_attn and not isinstance(model, PrefixPreTrainedModel),     # flash takes none either
        "its step cannot be captured": not model._can_compile_fullgraph,
        "triton is not installed": find_spec("triton") is None,
    }
    return next((reason for reason, found in reasons.items() if found), "")


@torch.library.custom_op("rlhfkit::attend", mutates_args=())
def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, starts: torch.Tensor,
           slot: torch.Tensor, scale: float) -> torch.Tensor:
    """query (B, H, 1, D), key, value (B, K, 1, D), keys, values (B, K, L, D), starts (B,), slot (1,) -> (B, 1, H, D): attention over the slots
    starts[b] .. slot, after key and value are written at `slot`.

    The writing is not declared: only this operator ever touches the buffers, and a declared one makes the compiler copy them."""
    if query.is_cuda:
        from rlhfkit import kernels
        return kernels.attend(query, key, value, keys, values, starts, slot, scale)
    keys.index_copy_(2, slot, key)
    values.index_copy_(2, slot, value)
    place, end = torch.arange(keys.shape[2], device=slot.device), int(slot) + 1
    keep = (place >= starts.minimum(slot)[:, None])[:, None, None, :end]                                     # (B, 1, 1, slots)
    return torch.nn.functional.scaled_dot_product_attention(query, keys[:, :, :end], values[:, :, :end], keep, scale=scale,
                                                            enable_gqa=True).transpose(1, 2).contiguous()


@attend.register_fake
def _(query, key, value, keys, values, starts, slot, scale):
    return query.new_empty(query.shape[0], 1, query.shape[1], query.shape[3])


def _attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Transformers' interface: the slots are those that the module was given; casts are for autocast, under which keys may be float32."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query.to(value.dtype), key.to(value.dtype), value, *module.slots, scale), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, lambda *args, **kwargs: None)


class Part(torch.nn.Linear):
    """A layer as one of several that make one product; its class for a while, since a method of one object would be compiled for each."""

    def forward(self, x):
        weight, bias, start, end = self.joined
        return torch.nn.functional.linear(x, weight, bias)[..., start:end]


def laid_together(model):
    """Let each group of JOINED layers make one product -> [(layer, (weights, biases, its first row, its last))]. Their weights are laid behind
    one another in memory, not copied: each parameter stays what it was, as a view."""
    joined = []
    for module in model.modules():
        for names in JOINED:
            linears = [getattr(module, name, None) for name in names]
            if not all(type(x) is torch.nn.Linear for x in linears) or len({x.in_features for x in linears}) > 1:
                continue
            weight, bias = (_one_behind_another([getattr(x, kind) for x in linears]) for kind in ("weight", "bias"))
            if weight is not None and (bias is not None or all(x.bias is None for x in linears)):
                ends = torch.tensor([x.out_features for x in linears]).cumsum(0).tolist()
                joined += [(x, (weight, bias, end - x.out_features, end)) for x, end in zip(linears, ends)]
    return joined


@contextmanager
def evaluating(model):
    """Evaluation mode; each module's own is put back."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def attending(model):
    """Attention reads the slots that each attending module has in its attribute `slots`."""
    modules = attentions(model)
    before = [(c, c._attn_implementation) for c in {id(m.config): m.config for m in (model, *modules)}.values()]
    try:
        for config, _ in before:
            config._attn_implementation = NAME
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name
        for module in modules:
            module.__dict__.pop("slots", None)


@contextmanager
def compiled(model, backend, together=()):
    """Layers, by the class names that a model says are not to be split, run compiled: one program for all, whatever their number.

    `layer_idx` is left open, since it would make each layer a program of its own; a second batch size leaves the batch open. backend "":
    layers stay as they are. together: what `laid_together` returned."""
    if not backend:
        yield
        return
    program, before = torch.compile(_forward, backend=_once(backend)), []
    with torch._dynamo.config.patch(recompile_limit=64, allow_unspec_int_on_nn_module=True, specialize_float=True), \
            torch.compiler.config.patch(dynamic_sources=r".*layer_idx.*"):
        for layer in (m for m in model.modules() if type(m).__name__ in set(model._no_split_modules or ())):
            before.append((layer, {name: layer.__dict__[name] for name in ("forward", "_compiled_call_impl") if name in layer.__dict__}))
            layer.forward, layer._compiled_call_impl = partial(program, layer), None                # not the one that training compiled
        for linear, joined in together:
            linear.joined, linear.__class__ = joined, Part
        try:
            yield
        finally:
            for linear, _ in together:
                del linear.joined
                linear.__class__ = torch.nn.Linear
            for layer, own in before:
                del layer.forward, layer._compiled_call_impl
                layer.__dict__.update(own)


def _forward(layer, *args, **kwargs):
    return type(layer).forward(layer, *args, **kwargs)


@cache
def _once(backend):
    """A compiler that makes a product only once where several joined layers take their part of it; the same object for the same backend."""
    def compiler(module, inputs):
        seen = {}
        for node in list(module.graph.nodes):
            if node.target is torch._C._nn.linear and seen.setdefault(node.args, node) is not node:
                node.replace_all_uses_with(seen[node.args])
                module.graph.erase_node(node)
        module.recompile()
        return (torch._dynamo.lookup_backend(backend) if type(backend) is str else backend)(module, inputs)
    return compiler


def plain(model):
    """The model inside PEFT's, which shares its layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def attentions(model):
    """The modules that attend, by what transformers' attention functions ask of one, in the order of their layers."""
    return sorted((m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")), key=lambda m: m.layer_idx)


def _one_behind_another(tensors):
    """Parameters -> one tensor of all their rows that shares their memory, which they are moved into where they lie apart; None where they may
    not move (DeepSpeed's lie in buffers of its own) or there are none."""
    if any(t is None or t.dtype != tensors[0].dtype or not t.is_contiguous() for t in tensors):
        return None
    ends = [t.data_ptr() + t.nbytes for t in tensors]
    if [t.data_ptr() for t in tensors[1:]] != ends[:-1] or len({t.untyped_storage().data_ptr() for t in tensors}) > 1:
        if any(hasattr(t, "ds_id") or hasattr(t, "_hp_mapping") for t in tensors):
            return None
        whole = torch.cat([t.detach() for t in tensors])
        for t, part in zip(tensors, whole.split([len(t) for t in tensors])):
            t.data = part
        return whole
    first = tensors[0].detach()
    return first.as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride())
