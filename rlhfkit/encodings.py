"""How each family writes a record: what the 2023 kit fed, with its faults fixed; each function names its own.

Common to all: answers end with the end token (LLaMA's and Baichuan's had none), system text, earlier turns and the prefix are written where the
2023 kit dropped them, a prompt for generation is the prompt of training, and only the user's text is shortened, never the template.
"""
import random


def encode_pangu(tokenizer, record, answer=None, max_length=None):
    """`<s> prompt <sep> prefix`, then `answer <eot>`; in the 2023 kit generation lacked the `<s>` that training had.
    System text and earlier turns, which it dropped, stand before the prompt, a line each."""
    before, user, prefix, *answers = tokenizer.encode_texts(_texts(_earlier(record), record.prompt, record.prefix, answer))
    answer_ids = answers[0] + [tokenizer.eos_token_id] if answers else []
    user = _shorten(user, 2 + len(before) + len(prefix) + len(answer_ids), len(answer_ids), max_length)
    return [tokenizer.bos_token_id] + before + user + [tokenizer.sep_token_id] + prefix, answer_ids


def text_pangu(tokenizer, text):
    """`<s>`, then `text <eot>`."""
    return [tokenizer.bos_token_id], tokenizer.encode_texts([text])[0] + [tokenizer.eos_token_id]


def encode_glm(tokenizer, record, answer=None, max_length=None):
    """`[CLS] prompt [SEP] prefix [MASK] <|endoftext|> <|startofpiece|>`, then `answer <|endofpiece|>`: the answer fills the blank.
    A long prompt is cut from its left, as the original tokenizer does."""
    before, user, prefix, *answers = tokenizer.encode_texts(_texts(_earlier(record), record.prompt, record.prefix, answer))
    start, part, mask, end, sop, eop = _ids(tokenizer, "[CLS]", "[SEP]", "[MASK]", "<|endoftext|>", "<|startofpiece|>", "<|endofpiece|>")
    answer_ids = answers[0] + [eop] if answers else []
    user = _shorten(user[::-1], 5 + len(before) + len(prefix) + len(answer_ids), len(answer_ids), max_length)[::-1]
    return [start, *before, *user, part, *prefix, mask, end, sop], answer_ids


def text_glm(tokenizer, text):
    """`[CLS] [gMASK] <|endoftext|> <|startofpiece|>`, then `text <|endofpiece|>`: a document written from nothing."""
    start, mask, end, sop, eop = _ids(tokenizer, "[CLS]", "[gMASK]", "<|endoftext|>", "<|startofpiece|>", "<|endofpiece|>")
    return [start, mask, end, sop], tokenizer.encode_texts([text])[0] + [eop]


def blank_glm(tokenizer, ids):
    """GLM's pre-training on a document's ids (Du et al. 2022, 2.1) -> (read, learned): by turns, drawn from the ids themselves, the whole
    document, its end behind `[gMASK]`, or a span of about 15 % behind `[MASK]`. Two tokens more than `text_glm` at most."""
    start, blank, rest, end, sop, eop = _ids(tokenizer, "[CLS]", "[MASK]", "[gMASK]", "<|endoftext|>", "<|startofpiece|>", "<|endofpiece|>")
    ids = ids[:-1] if ids[-1] == eop else ids
    draw = random.Random(str(ids))
    kind = draw.randrange(3) if len(ids) > 1 else 0
    if kind < 2:
        cut = draw.randrange(len(ids)) if kind else 0
        return [start, *ids[:cut], rest, end, sop], [*ids[cut:], eop]
    length = max(1, round(0.15 * len(ids)))
    at = draw.randrange(len(ids) - length + 1)
    return [start, *ids[:at], blank, *ids[at + length:], end, sop], [*ids[at:at + length], eop]


def encode_chatglm(tokenizer, record, answer=None, max_length=None):
    """`[Round 0]\\n问：prompt\\n答：prefix [gMASK] <sop>`, then `answer <eop>`. In 2023 the loss was on the prompt too."""
    mask, sop, eop = _ids(tokenizer, "[gMASK]", "<sop>", "<eop>")

    def prompt(text):
        head = record.system + "\n" if record.system else ""
        rounds = [*record.history, (text, record.prefix)]
        return tokenizer.encode_texts([head + "\n".join(f"[Round {i}]\n问：{q}\n答：{a}" for i, (q, a) in enumerate(rounds))])[0] + [mask, sop]
    return _joined(tokenizer, prompt, record, answer, [eop], max_length)


def text_chatglm(tokenizer, text):
    """`[gMASK] <sop>`, then `text <eop>`."""
    mask, sop, eop = _ids(tokenizer, "[gMASK]", "<sop>", "<eop>")
    return [mask, sop], tokenizer.encode_texts([text])[0] + [eop]


def encode_chatglm2(tokenizer, record, answer=None, max_length=None):
    """`[gMASK] sop [Round 1]\\n\\n问：system\\n\\nprompt\\n\\n答：prefix`, then `answer </s>`. In generation the 2023 kit wrote two newlines for
    a system text that was empty."""
    def prompt(text):
        rounds = [*record.history, ((record.system + "\n\n" if record.system else "") + text, record.prefix)]
        text = "\n\n".join(f"[Round {i}]\n\n问：{q}\n\n答：{a}" for i, (q, a) in enumerate(rounds, 1))
        return _ids(tokenizer, "[gMASK]", "sop") + tokenizer.encode_texts([text])[0]
    return _joined(tokenizer, prompt, record, answer, [tokenizer.eos_token_id], max_length)


def text_chatglm2(tokenizer, text):
    """`[gMASK] sop`, then `text </s>`; of ChatGLM3 too."""
    return _ids(tokenizer, "[gMASK]", "sop"), tokenizer.encode_texts([text])[0] + [tokenizer.eos_token_id]


def encode_chatglm3(tokenizer, record, answer=None, max_length=None):
    """`[gMASK] sop <|user|>\\nprompt <|assistant|>\\nprefix`, then `answer </s>`. The 2023 kit had no newline behind `<|assistant|>`, unlike the
    model's own chat, and put the system text into the user's turn."""
    turns = [("<|system|>", record.system)] * bool(record.system)
    turns += [turn for user, assistant in record.history for turn in (("<|user|>", user), ("<|assistant|>", assistant))]
    newline, user, prefix, *others = tokenizer.encode_texts(["\n", record.prompt, record.prefix] + [text for _, text in turns]
                                                            + [answer] * (answer is not None))
    answer_ids = others.pop() + [tokenizer.eos_token_id] if answer is not None else []
    before = [i for (role, _), ids in zip(turns, others) for i in (*_ids(tokenizer, role), *newline, *ids)]
    before = _ids(tokenizer, "[gMASK]", "sop") + before + _ids(tokenizer, "<|user|>") + newline
    after = _ids(tokenizer, "<|assistant|>") + newline + prefix
    user = _shorten(user, len(before) + len(after) + len(answer_ids), len(answer_ids), max_length)
    return before + user + after, answer_ids


def encode_qwen(tokenizer, record, answer=None, max_length=None):
    """`<|im_start|>user\\nprompt<|im_end|>\\n<|im_start|>assistant\\nprefix`, then `answer <|im_end|>`; the 2023 kit left out the roles."""
    start, end = _ids(tokenizer, "<|im_start|>", "<|im_end|>")

    def prompt(text):
        turns = [("system", record.system)] * bool(record.system)
        turns += [turn for user, assistant in record.history for turn in (("user", user), ("assistant", assistant))] + [("user", text)]
        newline, *rest = _plain(tokenizer, ["\n", *(f"{role}\n{text}" for role, text in turns), f"assistant\n{record.prefix}"])
        return [i for ids in rest[:-1] for i in (start, *ids, end, *newline)] + [start, *rest[-1]]
    return _joined(tokenizer, prompt, record, answer, [end], max_length)


def text_qwen(tokenizer, text):
    """`text <|endoftext|>`."""
    return [], _plain(tokenizer, [text])[0] + _ids(tokenizer, "<|endoftext|>")


def encode_plain(tokenizer, record, answer=None, max_length=None):
    """LLaMA and Baichuan: `<s> prompt prefix`, then `answer </s>`; the 2023 kit wrote `<s>prompt<s>answer` and no end."""
    def prompt(text):
        return [tokenizer.bos_token_id] + _plain(tokenizer, [_earlier(record) + text + record.prefix])[0]
    return _joined(tokenizer, prompt, record, answer, [tokenizer.eos_token_id], max_length)


def text_bos(tokenizer, text):
    """`<s>`, then `text </s>`."""
    return [tokenizer.bos_token_id], _plain(tokenizer, [text])[0] + [tokenizer.eos_token_id]


def encode_chat(tokenizer, record, answer=None, max_length=None):
    """The chat template that ships with the tokenizer, or, where there is none, system, earlier turns, `prompt` and
    `prefix` as they stand; end: eos."""
    def prompt(text):
        if not tokenizer.chat_template:
            return tokenizer.encode(_earlier(record) + text + record.prefix)
        messages = [{"role": "system", "content": record.system}] if record.system else []
        for user, assistant in record.history:
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        messages.append({"role": "user", "content": text})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        return list(ids) + tokenizer.encode(record.prefix, add_special_tokens=False)
    return _joined(tokenizer, prompt, record, answer, [tokenizer.eos_token_id], max_length)


def text_plain(tokenizer, text):
    """The tokenizer's own beginning, if it has one, the text, and eos."""
    ids = tokenizer.encode(text)
    head = ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []
    return head, ids[len(head):] + [tokenizer.eos_token_id]


def _joined(tokenizer, prompt, record, answer, end, max_length):
    """Where text and template are tokenised as one string, `prompt(text) -> ids`: a text too long is cut by tokens and written anew."""
    answer_ids = _plain(tokenizer, [answer])[0] + end if answer is not None else []
    ids = prompt(record.prompt)
    if max_length and len(ids) + len(answer_ids) > max_length:
        user = _plain(tokenizer, [record.prompt])[0]
        user = _shorten(user, len(prompt("")) + len(answer_ids), len(answer_ids), max_length)
        while len(ids) + len(answer_ids) > max_length:      # a cut inside a character can make it longer
            ids = prompt(tokenizer.decode(user).rstrip("\ufffd"))
            user = user[:-1]
    return ids, answer_ids


def _shorten(user, template, answer, max_length):
    """The user's ids cut at their end so that all fits; ValueError when template and answer alone do not."""
    if not max_length or len(user) + template <= max_length:
        return user
    room = max_length - template
    if room < 1:
        raise ValueError(f"an answer of {answer} tokens and its template do not fit into max_length {max_length} with a prompt; "
                         f"set max_length to {template + 1} or more")
    return user[:room]


def _plain(tokenizer, texts):
    """Ids of texts without special tokens."""
    if hasattr(tokenizer, "encode_texts"):
        return tokenizer.encode_texts(texts)
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def _ids(tokenizer, *tokens):
    return tokenizer.convert_tokens_to_ids(list(tokens))


def _texts(*parts):
    return [part for part in parts if part is not None]


def _earlier(record):
    """System text and earlier turns, a line each."""
    return "".join(line + "\n" for line in (record.system, *(t for turn in record.history for t in turn)) if line)
