"""One row of the forms that people bring, told by its fields → a Record. No torch.

A dialogue ends in its last answer, the earlier turns become the history; a preferred answer has score 1, the other 0.
Texts are taken as they are. The 2023 kit knew the published form only.
"""
import json
import re
from functools import lru_cache

from rlhfkit.records import OPTIONAL, Answer, Record


def to_record(row):
    """dict → Record; fields that are None or NaN count as absent. Raises ValueError when no form fits, or a value is wrong.
    Whatever the form, `prefix system history source` are taken when the row has them."""
    row = {name: _unpacked(name, value) for name, value in row.items() if value is not None and value == value}
    made = {name: row[name] for name in OPTIONAL if row.get(name, "") != ""}
    return Record(**made | _form_of(tuple(row))(row))


@lru_cache(1000)
def _form_of(fields):
    """The function of the first form that a row with these fields has."""
    for needed, form in _FORMS:
        if all(not names.isdisjoint(fields) for names in needed):
            return form
    if {"prompt", "answers"} & set(fields):
        return _published                               # says which of its fields is missing
    forms = "; ".join(" + ".join("|".join(sorted(names)) for names in needed) for needed, _ in _FORMS)
    raise ValueError(f"the fields are {list(fields)!r:.200}; a row must have one of the forms {forms}")


# --- the forms: row → the arguments of Record ------------------------------------------------------------------------------

def _published(row):
    for field in ("prompt", "answers"):
        if field not in row:
            raise ValueError(f"no field {field!r}; a row must have 'prompt' and 'answers'")
    if not isinstance(row["answers"], list):
        raise ValueError(f"answers is {row['answers']!r:.80}; it must be a list")
    for answer in row["answers"]:
        if not isinstance(answer, dict) or not {"answer", "score"} <= answer.keys():
            raise ValueError(f"an answer is {answer!r:.80}; it must have the fields 'answer' and 'score'")
    return {"prompt": row["prompt"], "answers": [Answer(answer["answer"], answer["score"]) for answer in row["answers"]]}


def _preference(row):
    chosen, rejected = (_side(row, name) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same; they must differ")
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("chosen and rejected part before their last turn; only the last may differ")
    made, other = _dialogue(chosen), _dialogue(rejected)
    if not (made["answers"] and other["answers"]):
        raise ValueError("chosen or rejected ends with the user's turn; the last must be the assistant's")
    return made | {"answers": [*made["answers"], Answer(other["answers"][0].text, 0)]}


def _conversation(row):
    name = _first(row, ("conversations", "messages"))
    return _dialogue(_turns(name, row[name]))


# --- what they share; a turn is a pair (role, text) -----------------------------------------------------------------------

def _dialogue(turns):
    """Turns → system, history, prompt, answers. Without an answer to the last turn there are no answers: it can be rolled out."""
    system, turns = (turns[0][1], turns[1:]) if turns and turns[0][0] == "system" else ("", turns)
    for number, (role, _) in enumerate(turns, 1):
        if role != ("assistant", "user")[number % 2]:
            raise ValueError(f"turn {number} is the {role}'s; user and assistant must take turns, the user first")
    if not turns:
        raise ValueError("there is no turn; a conversation must have one of the user's")
    texts = [text for _, text in turns]
    answers = [Answer(texts.pop(), 1)] if len(texts) % 2 == 0 else []
    made = {"system": system, "history": list(zip(texts[:-1:2], texts[1::2])), "prompt": texts[-1], "answers": answers}
    return {name: value for name, value in made.items() if name in ("prompt", "answers") or value}


def _turns(name, messages):
    """[{"role", "content"} or {"from", "value"}, …] → turns."""
    if not isinstance(messages, list):
        raise ValueError(f"{name} is {messages!r:.80}; it must be a list of turns")
    turns = []
    for message in messages:
        message = message if isinstance(message, dict) else {}
        role = _ROLES.get(str(message.get(_first(message, ("role", "from")))).lower())
        text = message.get(_first(message, ("content", "value")))
        if not role or not isinstance(text, str):
            raise ValueError(f"a turn of {name} is {message!r:.80}; it must have role and content, or from and value, both "
                             f"texts; the roles are {', '.join(_ROLES)}")
        turns.append((role, text))
    return turns


def _side(row, name):
    """Turns up to and with the answer `row[name]`: a text after the prompt or a whole transcript, one message or a whole list."""
    value, prompt = row[name], _asked(row)
    if isinstance(value, (dict, list)):
        turns = _turns(name, value if isinstance(value, list) else [value])
        if not turns or turns[0][0] != "assistant":
            return turns
    elif isinstance(value, str) and isinstance(prompt, (str, type(None))) and _SPEAKER.match(prompt or value):
        _, *parts = _SPEAKER.split((prompt or "") + value)
        return [(_ROLES[who.lower()], text) for who, text in zip(parts[::2], parts[1::2])]
    else:
        turns = [("assistant", value)]
    if prompt is None:
        raise ValueError(f"no prompt, and {name} is {value!r:.80}; it must be a transcript, \\n\\nHuman: …\\n\\nAssistant: …")
    return (_turns("the prompt", prompt) if isinstance(prompt, list) else [("user", prompt)]) + turns


def _asked(row):
    """The prompt, a text or a list of messages; None without one. Two texts of an instruction are joined with a line end."""
    name = _first(row, ("conversations", *_PROMPTS))
    if name or "instruction" not in row:
        return row.get(name)
    parts = [row["instruction"], row.get("input", "")]
    for part in parts:
        if not isinstance(part, str):
            raise ValueError(f"instruction or input is {part!r:.80}; it must be a text")
    return "\n".join(part for part in parts if part.strip())


def _first(row, names):
    return next((name for name in names if row.get(name) is not None), None)


def _unpacked(name, value):
    """A cell of a table that holds JSON; an answer only when that is messages, for it may be about JSON."""
    if name not in _NESTED or not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    messages = found if isinstance(found, list) else [found]
    is_messages = all(isinstance(m, dict) and m.keys() in ({"from", "value"}, {"role", "content"}) for m in messages)
    return found if is_messages or name not in ("chosen", "rejected") else value


_PROMPTS = ("prompt", "question", "query")
_ANSWERS = ("answer", "response", "output", "completion")
_NESTED = {"answers", "history", "conversations", "messages", "chosen", "rejected"}
_ROLES = {"human": "user", "user": "user", "system": "system",
          "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bot": "assistant"}
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")
_FORMS = tuple((tuple(map(frozenset, needed)), form) for needed, form in (
    ((["prompt"], ["answers"]), _published),
    ((["chosen"], ["rejected"]), _preference),
    ((["conversations", "messages"],), _conversation),
    ((["instruction"], ["output"]), lambda row: {"prompt": _asked(row), "answers": [Answer(row["output"], 1)]}),
    ((_PROMPTS, _ANSWERS), lambda row: {"prompt": _asked(row), "answers": [Answer(row[_first(row, _ANSWERS)], 1)]}),
    ((["text"],), lambda row: {"prompt": row["text"]})))
