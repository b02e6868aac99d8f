"""Baichuan's and Baichuan2's tokenizer: `tokenizer.model`, a byte-fallback sentencepiece BPE in Llama's format.

As in the 2023 kit `<s>` stands before each text, unless the folder's tokenizer_config.json says `add_bos_token: false` as some
published ones do; `</s>` is never added. Where the folder names no pad token it is `</s>`. Text comes back as it was.
"""
from rlhfkit.tokenizers.pieces import LLAMA_FORMAT, SentencePieceTokenizer


class BaichuanTokenizer(SentencePieceTokenizer):
    """Layouts: `<s> a` and, for a pair, `<s> a <s> b`."""

    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    parsed = ("<unk>", "<s>", "</s>")
    training = LLAMA_FORMAT

    def __init__(self, vocab_file, pad_token=None, special_tokens_pattern="bos", **kwargs):
        self.named = self.named | {"pad_token": str(pad_token or "</s>")}
        pattern = special_tokens_pattern if kwargs.pop("add_bos_token", True) else "none"
        super().__init__(vocab_file, special_tokens_pattern=pattern, **kwargs)
        self.init_kwargs["special_tokens_pattern"] = pattern        # transformers saves no add_bos_token

    def _frame(self, token_ids_0, pair):
        bos = [self.bos_token_id] if self.special_tokens_pattern == "bos" else []
        return bos, bos if pair else [], []
