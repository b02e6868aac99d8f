"""The tokenizers of ChatGLM-6B (`ice_text.model`), ChatGLM2-6B and ChatGLM3-6B (`tokenizer.model`), with the originals' ids.

The pad token is the originals' own, never the 2023 kit's -100 (ChatGLM3) or `</s>` (ChatGLM2): `<pad>` for 1, `<unk>`, id 0, for
2 and 3. No text can spell a special token of those two. ChatGLM-6B's `eos_token` is `<eop>`, the end of its answers.
Text comes back as it was, but ChatGLM-6B's published file makes full-width signs half-width.
"""
import json
import re
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2

from rlhfkit.tokenizers.pieces import LLAMA_FORMAT, SentencePieceTokenizer

IMAGE_TOKENS = 20000                # ids before the text's in ChatGLM-6B as first published; the 1.1 slim version has none
LONGEST_BLANK = 80
_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6            # sentencepiece's piece types


class ChatGLMTokenizer(SentencePieceTokenizer):
    """Layouts: `a [gMASK] <sop>` and, for a pair, `a [gMASK] <sop> b <eop>`; where a holds [MASK] or [gMASK] none is added, and
    `</s>` stands before `<sop>` unless a ends with it. The number of image tokens before the text's ids follows from config.json
    beside the file: its `<sop>` less the file's; without it, 20000."""

    vocab_files_names = {"vocab_file": "ice_text.model"}
    named = {"unk_token": "<unk>", "bos_token": "<sop>", "eos_token": "<eop>", "pad_token": "<pad>", "mask_token": "[MASK]",
             "gmask_token": "[gMASK]", "smask_token": "[sMASK]", "end_token": "</s>"}
    parsed = ("<unk>", "<sop>", "<eop>", "<pad>", "[MASK]")         # what transformers knew; the file decides on the others
    training = {"model_type": "unigram", "normalization_rule_name": "identity", "hard_vocab_limit": False, "pad_id": 3,
                "user_defined_symbols": ["<n>"]}

    def __init__(self, vocab_file, num_image_tokens=None, **kwargs):
        self.num_image_tokens = num_image_tokens
        super().__init__(vocab_file, **kwargs)
        self.init_kwargs["num_image_tokens"] = self.num_image_tokens

    def convert_tokens_to_string(self, tokens):
        """As the original: image tokens have no text; `<n>`, `<|tab|>` and `<|blank_k|>` are a newline, a tab and k spaces."""
        text = super().convert_tokens_to_string([t for t in tokens if not re.fullmatch(r"<image_\d+>", t)])
        text = text.replace("<n>", "\n").replace("<|tab|>", "\t")
        return re.sub(r"<\|blank_(\d+)\|>", lambda match: " " * int(match[1]), text)

    def _leading(self, vocab_file):
        if self.num_image_tokens is None:
            config, place = Path(vocab_file).with_name("config.json"), self.sp.piece_to_id("<sop>")
            bos = json.loads(config.read_text(encoding="utf-8")).get("bos_token_id") if config.is_file() else None
            self.num_image_tokens = IMAGE_TOKENS if bos is None else bos - place
            if self.num_image_tokens < 0:
                raise ValueError(f"{config} has bos_token_id {bos}, but <sop> is piece {place} of {vocab_file}; it must not be "
                                 "less: they do not belong together, copy the folder again")
        return tuple(f"<image_{i}>" for i in range(self.num_image_tokens))

    def _complete(self, model):
        """The file as first published lacks the special, blank and byte pieces that the code of then appended; append them."""
        proto = sentencepiece_model_pb2.ModelProto.FromString(model)
        if any(piece.piece == "[gMASK]" for piece in proto.pieces):
            return model
        specials = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
        blanks = ("<|tab|>", *(f"<|blank_{n}|>" for n in range(2, LONGEST_BLANK + 1)))
        for tokens, kind in ((specials, _CONTROL), (blanks, _USER_DEFINED), ([f"<0x{i:02X}>" for i in range(256)], _BYTE)):
            for token in tokens:
                proto.pieces.add(piece=token, score=0.0, type=kind)
        proto.trainer_spec.byte_fallback = True
        return proto.SerializeToString(deterministic=True)

    def _prepare(self, text):
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        return re.sub(f" {{2,{LONGEST_BLANK}}}", lambda match: f"<|blank_{len(match[0])}|>", text)

    def _frame(self, token_ids_0, pair):
        masks = self.mask_token_id, self.gmask_token_id
        if not any(i in masks for i in token_ids_0):
            between = [self.gmask_token_id]
        else:
            between = [] if token_ids_0[-1] in masks else [self.end_token_id]
        return [], [*between, self.bos_token_id], [self.eos_token_id] if pair else []


class ChatGLM2Tokenizer(SentencePieceTokenizer):
    """Layouts: `[gMASK] sop a` and, for a pair, `[gMASK] sop a b eop`. Pads on the right, as in the 2023 kit."""

    appended = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
    named = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<unk>", "mask_token": "[MASK]", "gmask_token": "[gMASK]",
             "smask_token": "[sMASK]", "sop_token": "sop", "eop_token": "eop"}
    training = LLAMA_FORMAT

    def get_command(self, token):
        """The id of a special token by the original's name for it: `<bos>`, `<eos>`, `<pad>`, or one of `appended`."""
        ids = {"<bos>": self.sp.bos_id(), "<eos>": self.sp.eos_id(), "<pad>": self.pad_token_id}
        ids |= {name: self._ids[name] for name in self.appended}
        if token not in ids:
            raise ValueError(f"{token!r} is no special token of {type(self).__name__}; known: {', '.join(ids)}")
        return ids[token]

    def _frame(self, token_ids_0, pair):
        return [self.gmask_token_id, self.sop_token_id], [], [self.eop_token_id] if pair else []


class ChatGLM3Tokenizer(ChatGLM2Tokenizer):
    """ChatGLM2's with four roles; a pair ends with `</s>`. Pads on the left, as the original insists."""

    appended = (*ChatGLM2Tokenizer.appended, "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
    padding_side = "left"

    def _frame(self, token_ids_0, pair):
        return [self.gmask_token_id, self.sop_token_id], [], [self.eos_token_id] if pair else []
