"""GLM-chinese's tokenizer (`cog-pretrain.model`), with the ids of the 2023 original, and its rows for blank infilling.

The published file makes full-width signs half-width and a newline a space; a text that spells `<n>`, its line sign, keeps it.
`eos_token` is `<|endoftext|>`, which ends a source and pads it; an answer ends with `eop_token`.
"""
import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchEncoding

from rlhfkit.tokenizers.pieces import SentencePieceTokenizer

_TO_SPACE = str.maketrans("\t\n\r", "   ")        # the published file does it itself, one that we learn does not


class GLMChineseTokenizer(SentencePieceTokenizer):
    """Layouts: `[CLS] a <|endoftext|>` and, for a pair, `[CLS] a [SEP] b <|endoftext|>`. Truncates left, pads right."""

    vocab_files_names = {"vocab_file": "cog-pretrain.model"}
    appended = ("<|endoftext|>", "[SEP]", "[CLS]", "[MASK]", "[UNUSED1]", "[UNUSED2]", "<|startofpiece|>", "<|endofpiece|>",
                "[sMASK]", "[gMASK]")                               # 50000 to 50009 with the published file
    named = {"unk_token": "<unk>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "cls_token": "[CLS]",
             "sep_token": "[SEP]", "mask_token": "[MASK]", "sop_token": "<|startofpiece|>", "eop_token": "<|endofpiece|>",
             "smask_token": "[sMASK]", "gmask_token": "[gMASK]"}
    parsed = (*appended, "[UNK]")                                   # 2023's name for the unknown token, whose piece is `<unk>`
    training = {"model_type": "bpe", "normalization_rule_name": "identity", "user_defined_symbols": ["<n>"]}
    truncation_side = "left"

    def build_inputs_for_generation(self, encoding, max_gen_length=512, targets=None, padding=False):
        """Sources with a mask token each, their answers behind them -> BatchEncoding; G answer places follow S source places.

        encoding: `input_ids`, `attention_mask` (B, S). G is `max_gen_length`, or the longest target with its end when `targets`
        (str or list of str) come without `padding`. input_ids (B, S+G), or (B, S+1) without targets; position_ids (B, 2, S+G):
        the place, for answers that of the source's first mask token, and the place within the answer from 1; mask
        (B, 1, S+G, S+G), 1 is attend: all see the source, an answer what precedes in it; labels (B, S+G): aligned with the
        logits that predict them, not shifted, `pad_token_id` is ignored. Without targets no labels, and the mask is
        `generation_attention_mask`.
        """
        ids, seen = (torch.as_tensor(encoding[name]) for name in ("input_ids", "attention_mask"))
        B, S = ids.shape
        places = torch.isin(ids, ids.new_tensor([self.mask_token_id, self.smask_token_id, self.gmask_token_id]))
        if not bool(places.any(1).all()):
            raise ValueError(f"row {int(places.any(1).int().argmin())} has no [MASK], [sMASK] or [gMASK]; an answer needs one in "
                             "its source: append one, and truncate on the left")
        answers = None if targets is None else self._answers(targets, ids, max_gen_length)             # (B, longest)
        G = max_gen_length if answers is None or padding else answers.shape[1]
        first, steps = places.int().argmax(1, keepdim=True), torch.arange(S + G, device=ids.device)
        position = torch.cat([steps[:S].expand(B, S), first.expand(B, G)], 1)
        positions = torch.stack([position, (steps - (S - 1)).clamp(0).expand(B, S + G)], 1).to(ids.dtype)
        causal = pad(seen.new_ones(G, G).tril(), (0, 0, S, 0)).expand(B, S + G, G)
        mask = torch.cat([seen[:, None].expand(B, S + G, S), causal], 2)[:, None]
        start = ids.new_full((B, 1), self.sop_token_id)
        if answers is None:
            ids = torch.cat([ids, start], 1)
            return BatchEncoding({"input_ids": ids, "position_ids": positions, "generation_attention_mask": mask})
        answers = pad(answers, (0, G - answers.shape[1]), value=self.pad_token_id)                     # (B, G)
        labels = torch.cat([torch.full_like(ids, self.pad_token_id), answers], 1)
        ids = torch.cat([ids, start, answers[:, :-1]], 1)
        return BatchEncoding({"input_ids": ids, "position_ids": positions, "attention_mask": mask, "labels": labels})

    def _answers(self, targets, ids, longest):
        """Target texts -> ids (B, T), T <= longest, each with its end token whatever is cut, padded right."""
        rows = self.encode_texts([targets] if isinstance(targets, str) else list(targets))
        if len(rows) != len(ids) or longest < 1:
            raise ValueError(f"{len(rows)} targets of at most {longest} tokens for {len(ids)} sources; give each one, and "
                             "max_gen_length 1 or more")
        rows = [ids.new_tensor(row[:longest - 1] + [self.eop_token_id]) for row in rows]
        return pad_sequence(rows, batch_first=True, padding_value=self.pad_token_id)

    def _prepare(self, text):
        return text.translate(_TO_SPACE)

    def _frame(self, token_ids_0, pair):
        return [self.cls_token_id], [self.sep_token_id] if pair else [], [self.eos_token_id]
