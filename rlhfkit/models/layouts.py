"""Published folders read as they are: tensors by shard, without copying, and the tables from their names and fused matrices to our classes'.

Nothing is executed: pickles are read with weights_only, remote code never. A tensor that no table names passes under its own name, so folders
that are in our layout already go the same way. `to_original` is the inverse of `to_ours`, bit by bit, but for Baichuan2's folded head.
"""
import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open

LAYER = "model.layers.{}."
QKV = tuple(f"self_attn.{part}_proj" for part in "qkv")
# original name -> ours, {} being the layer's number; several names: cut along the rows into query, key and value
BAICHUAN = {f"{LAYER}self_attn.W_pack.weight": tuple(f"{LAYER}{part}.weight" for part in QKV)}
QWEN = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "transformer.h.{}.ln_1.weight": f"{LAYER}input_layernorm.weight",
    "transformer.h.{}.ln_2.weight": f"{LAYER}post_attention_layernorm.weight",
    "transformer.h.{}.attn.c_proj.weight": f"{LAYER}self_attn.o_proj.weight",
    "transformer.h.{}.mlp.w2.weight": f"{LAYER}mlp.gate_proj.weight",           # w2 is the one that SiLU is applied to
    "transformer.h.{}.mlp.w1.weight": f"{LAYER}mlp.up_proj.weight",
    "transformer.h.{}.mlp.c_proj.weight": f"{LAYER}mlp.down_proj.weight",
} | {f"transformer.h.{{}}.attn.c_attn.{kind}": tuple(f"{LAYER}{part}.{kind}" for part in QKV) for kind in ("weight", "bias")}
CHATGLM2 = {
    "transformer.embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "transformer.encoder.final_layernorm.weight": "model.norm.weight",
    "transformer.output_layer.weight": "lm_head.weight",
} | {f"transformer.encoder.layers.{{}}.{theirs}.weight": f"{LAYER}{ours}.weight" for theirs, ours in (
    ("input_layernorm", "input_layernorm"), ("post_attention_layernorm", "post_attention_layernorm"),
    ("self_attention.dense", "self_attn.o_proj"), ("mlp.dense_h_to_4h", "mlp.gate_up_proj"), ("mlp.dense_4h_to_h", "mlp.down_proj"))} | {
    f"transformer.encoder.layers.{{}}.self_attention.query_key_value.{kind}": tuple(f"{LAYER}{part}.{kind}" for part in QKV)
    for kind in ("weight", "bias")}
CONSTANTS = re.compile(r"(rotary_emb|rotary_pos_emb)\.inv_freq$|\.attn\.(masked_)?bias$")     # buffers of the originals that we compute


def read_weights(folder):
    """{name: tensor} of all shards of a folder, safetensors before pickles; backed by the files, so that nothing is read before it is used.
    Raises ValueError for a shard that is missing, damaged, or that holds anything but tensors."""
    weights = {}
    for file in _shards(Path(folder)):
        if not file.is_file():
            raise ValueError(f"{file} is missing; the index of {folder} names it: copy the folder again")
        try:
            weights |= _mapped(file) if file.suffix == ".safetensors" else _unpickled(file)
        except Exception as error:
            if "Weights only load failed" in str(error) or "Unsupported" in str(error):
                raise ValueError(f"{file} holds more than tensors and is refused, since reading it could run code; ask its publisher for "
                                 "safetensors") from error
            raise ValueError(f"{file} cannot be read, it is damaged or cut short ({str(error)[:200]}); copy it again") from error
    return weights


def to_ours(weights, table, config, normed_head=False):
    """Tensors under the original names -> under ours; normed_head: fold Baichuan2's normalisation of the head's rows into the weights."""
    found = {}
    for name, tensor in weights.items():
        if CONSTANTS.search(name):
            continue
        ours = _renamed(name, table)
        if isinstance(ours, str):
            found[ours] = tensor
        else:
            found |= zip(ours, tensor.split(_rows(config), 0))
    if normed_head:
        head = found["lm_head.weight"]
        found["lm_head.weight"] = F.normalize(head.float(), dim=-1).to(head.dtype)
    return found


def to_original(weights, table):
    """The inverse of `to_ours`: a model's state_dict under the published names, its parts joined."""
    inverse = {(ours,) if isinstance(ours, str) else ours: theirs for theirs, ours in table.items()}
    whole = {parts[0]: (parts, theirs) for parts, theirs in inverse.items()}
    joined = {part for parts in inverse for part in parts[1:]}
    found = {}
    for name, tensor in weights.items():
        template, layer = _template(name)
        if template in joined:
            continue
        parts, theirs = whole.get(template, ((template,), template))
        rows = [weights[part.format(layer)] for part in parts]
        found[theirs.format(layer)] = tensor if len(rows) == 1 else torch.cat(rows)
    return found


def _shards(folder):
    """The weight files of a folder: those of an index, the one of a whole model, or all shards of one kind."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            return [folder / name for name in sorted(set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()))]
    for pattern in ("model.safetensors", "pytorch_model.bin", "model*.safetensors", "pytorch_model*.bin"):
        if any(folder.glob(pattern)):
            return sorted(folder.glob(pattern))
    return []


def _mapped(file):
    """The tensors of a safetensors file, backed by it. The library's own reader copies, which for a converted layout would be once too often."""
    with safe_open(file, "pt") as opened:           # checks the header against the file's size
        kinds = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}
    with open(file, "rb") as f:
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(size))
    storage = torch.UntypedStorage.from_file(str(file), shared=False, nbytes=file.stat().st_size)
    data, found = torch.tensor([], dtype=torch.uint8).set_(storage), {}
    for name, kind in kinds.items():
        start, end = (8 + size + offset for offset in header[name]["data_offsets"])
        found[name] = data[start:end].view(DTYPES[kind]).view(header[name]["shape"])
    return found


def _unpickled(file):
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return torch.load(file, map_location="cpu", weights_only=True)      # a file of before 2020 is no archive


def _renamed(name, table):
    template, layer = _template(name)
    ours = table.get(template, template)
    return ours.format(layer) if isinstance(ours, str) else [part.format(layer) for part in ours]


def _template(name):
    layer = re.search(r"\.(\d+)\.", name)
    return (name.replace(layer[0], ".{}.", 1), layer[1]) if layer else (name, "")


def _rows(config):
    """Rows of query, key and value in a fused matrix."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    key_value = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * size
    return [config.num_attention_heads * size, key_value, key_value]


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
          "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
