"""Prefix language models, GLM and ChatGLM: positions and the mask come from ids and a 2-D attention mask, on the device.

A document's tokens before its first start token are a context that all its tokens see; from there on it is causal. Counts
and carried maxima along the row replace the 2023 code's loops over `tolist()`, so nothing waits for the accelerator. New
here: padding on either side, packed documents, keys and values cached in any of transformers' caches.
"""
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple


def prefix_layout(input_ids, attention_mask, position_ids, start_id, mask_ids, counting=False, queries=None):
    """ids (B, L), mask (B, L) or None, position_ids (B, L) that restart at 0 or None -> positions (B, 2, Q), keep (B, 1, Q, L).

    positions[:, 0]: the token's count in the context, then the place of the mask token (without one, of the context's last
    token); positions[:, 1]: 0 in the context, then 1, 2, … from the start token on. `mask_ids`: groups, the preferred one
    first; the first token of the group counts. `counting`: a context without mask token, or with one of the first group, is
    simply counted on. `keep`: True where attended. Only the last `queries` tokens are returned.
    """
    index = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)                   # (B, L)
    attended = attention_mask.bool() if attention_mask is not None else torch.ones_like(input_ids, dtype=torch.bool)
    place = position_ids if position_ids is not None else (attended.long().cumsum(-1) - 1).clamp(min=0)
    place = place.expand_as(input_ids)
    starts = place == 0 if position_ids is not None else index == 0
    begin = torch.where(starts, index, 0).cummax(-1).values            # (B, L) index of the document's first token

    def first(found):
        """(B, L) bool -> index of the document's first find, from there on to its end; less than `begin` where there is none."""
        count = found.cumsum(-1)
        one = found & (count - (count - found.long()).gather(1, begin) == 1)
        return torch.where(one, index, -1).cummax(-1).values

    start = first(attended & (input_ids == start_id))
    context = start < begin                                            # (B, L) no start token so far
    anchor, counts = (start - 1).clamp(min=0).maximum(begin), torch.ones_like(context)
    for group in reversed(mask_ids):
        found = first(attended & context & torch.stack([input_ids == i for i in group]).any(0))
        anchor = torch.where(found >= begin, found, anchor)
        counts = torch.where(found >= begin, group == mask_ids[0], counts)
    position = torch.where(context | (counts & counting), place, place.gather(1, anchor))
    block = torch.where(context, 0, place - place.gather(1, start.clamp(min=0)) + 1)

    query = slice(-(queries or input_ids.shape[1]), None)
    keep = (index[:, None] <= index[:, query, None]) | context[:, None]                                      # (B, Q, L)
    if position_ids is not None:
        keep = keep & (begin[:, None] == begin[:, query, None])
    keep = keep & attended[:, None] | (index[:, None] == index[:, query, None])     # a pad sees itself: no empty row, no NaN
    return torch.stack([position[:, query], block[:, query]], 1), keep[:, None]


class PrefixPreTrainedModel(PreTrainedModel):
    """What GLM and ChatGLM share. A subclass says `rule`: start_id, mask_ids and counting, as in prefix_layout."""

    _input_embed_layer = "word_embeddings"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = _supports_attention_backend = _can_compile_fullgraph = True      # no flash: it takes no such mask
    mask_is_one_where_attended = True       # the original's 4-D mask; False: True is masked

    def layout(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, queries=None):
        """-> positions (B, 2, Q), keep (B, 1, Q, K), K being the cache's width; explicit ones win over derived ones.

        Raises ValueError where the beginning of the row, from which they follow, is only in the cache."""
        queries = queries or input_ids.shape[1]
        positions = position_ids if position_ids is not None and position_ids.ndim == 3 else None
        keep = attention_mask if attention_mask is not None and attention_mask.ndim == 4 else None
        if keep is not None:
            keep = keep.bool() if self.mask_is_one_where_attended else ~keep.bool()
        if positions is None or keep is None:
            mask = attention_mask if keep is None else None
            self._check_whole(input_ids, mask, past_key_values, queries)
            derived = prefix_layout(input_ids, mask, position_ids if positions is None else None, queries=queries, **self.rule)
            positions, keep = derived[0] if positions is None else positions, derived[1] if keep is None else keep
        keys = past_key_values.get_mask_sizes(queries, 0)[0] if past_key_values is not None else keep.shape[-1]
        return positions, nn.functional.pad(keep, (0, keys - keep.shape[-1]))

    @staticmethod
    def _check_whole(input_ids, mask, past_key_values, queries):
        length = input_ids.shape[1]
        if mask is not None and mask.shape[1] == length or mask is None and (
                length > queries or past_key_values is None or int(past_key_values.get_seq_length()) == 0):
            return
        raise ValueError(f"of a longer row only {length} tokens were given; positions and prefix follow from its beginning: use "
                         "generate without prefill_chunk_size, or give position_ids (B, 2, T) and a 4-D attention_mask")


class PrefixLM:
    """The forward and the generation of a PrefixPreTrainedModel with an `lm_head`; stands before it and GenerationMixin."""

    @can_return_tuple
    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None,
                labels=None, logits_to_keep=0, **kwargs):
        """As the base model -> logits (B, T or logits_to_keep, vocabulary); logits[t] predict ids[t + 1] as in any causal
        model: labels (B, T) are unshifted, -100 ignored (GLM's own were shifted and left out the pad id)."""
        outputs = self.base_model(input_ids, attention_mask=attention_mask, position_ids=position_ids,
                                  past_key_values=past_key_values, use_cache=use_cache, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values,
                                      hidden_states=outputs.hidden_states, attentions=outputs.attentions)

    def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, past_key_values=None, attention_mask=None,
                                      position_ids=None, **kwargs):
        """Derives from all ids, then hands on the new tokens' share; the counts that `generate` makes are no use here."""
        queries = int(next_sequence_length or input_ids.shape[1])
        base = self.base_model
        positions, keep = base.layout(input_ids, attention_mask, None, past_key_values, queries)
        return super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=queries, past_key_values=past_key_values, position_ids=positions,
            attention_mask=keep if base.mask_is_one_where_attended else ~keep, **kwargs)

    def adjust_generation_fn(self, *args, **kwargs):
        """A 2023 config.json may name no end token, and `generate` reads the file: without this it would never stop."""
        super().adjust_generation_fn(*args, **kwargs)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self.generation_config, name) is None:
                setattr(self.generation_config, name, getattr(self.config, name, None))


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention written out, mask bool, True where attended: (B, heads, T, head_dim) -> (B, T, heads, head_dim), weights."""
    scores = query @ key.transpose(-1, -2) * scaling
    scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (nn.functional.dropout(weights, dropout, module.training) @ value).transpose(1, 2), weights


def require(config, **values):
    """Raise ValueError where the config asks for a variant that the model is not written for."""
    for name, value in values.items():
        if getattr(config, name, value) != value:
            raise ValueError(f"{name} is {getattr(config, name)!r} in the config; this model is written for {value!r} only: "
                             "take a checkpoint without it")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(f"hidden_size is {config.hidden_size} and num_attention_heads {config.num_attention_heads}; the first "
                         "must be a multiple of the second")
