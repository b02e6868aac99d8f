"""The forms of rows that people bring, and what is wrong with those that fit none. test_formats.py reads them from files."""
import json

import pytest

from rlhfkit.forms import to_record
from rlhfkit.records import Answer, Record

ASKED, BEST, WORSE = "把“早”说成一句话，\n用逗号", "早上好，\t朋友", "{\"早\": [1]}"
GOOD, BAD = Answer(BEST, 1), Answer(WORSE, 0)
TALK = [("human", "在吗"), ("gpt", "在"), ("human", ASKED)]
EARLIER = (("在吗", "在"),)


def shares(turns, answer=None):
    return [{"from": who, "value": text} for who, text in turns + ([("gpt", answer)] if answer else [])]


def chats(turns, answer=None):
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    return [{"role": roles[who], "content": text} for who, text in turns + ([("gpt", answer)] if answer else [])]


def transcript(answer):
    return f"\n\nHuman: 在吗\n\nAssistant: 在\n\nHuman: {ASKED}\n\nAssistant: {answer}"


FORMS = {
    "published": ({"prompt": ASKED, "answers": [{"answer": BEST, "score": 1}, {"answer": WORSE, "score": 0}],
                   "prefix": "答：", "data_type": "human", "history": [["在吗", "在"]]},
                  Record(ASKED, (GOOD, BAD), "答：", history=EARLIER)),
    "preference": ({"prompt": ASKED, "chosen": BEST, "rejected": WORSE, "source": "我们"},
                   Record(ASKED, (GOOD, BAD), source="我们")),
    "preference after a conversation": ({"conversations": shares([("system", "助手")] + TALK),
                                         "chosen": {"from": "gpt", "value": BEST}, "rejected": {"from": "gpt", "value": WORSE}},
                                        Record(ASKED, (GOOD, BAD), system="助手", history=EARLIER)),
    "preference of whole message lists": ({"prompt": "在吗", "chosen": chats(TALK, BEST), "rejected": chats(TALK, WORSE),
                                           "messages": chats(TALK, BEST)}, Record(ASKED, (GOOD, BAD), history=EARLIER)),
    "preference of an instruction": ({"instruction": "翻译", "input": "早", "chosen": BEST, "rejected": WORSE},
                                     Record("翻译\n早", (GOOD, BAD))),
    "transcripts": ({"chosen": transcript(BEST), "rejected": transcript(WORSE)}, Record(ASKED, (GOOD, BAD), history=EARLIER)),
    "transcript as the prompt": ({"prompt": transcript("").rstrip(), "chosen": " " + BEST, "rejected": " " + WORSE},
                                 Record(ASKED, (GOOD, BAD), history=EARLIER)),
    "ShareGPT": ({"id": "7", "conversations": shares(TALK, BEST), "system": "助手"},
                 Record(ASKED, (GOOD,), system="助手", history=EARLIER)),
    "messages": ({"messages": chats([("system", "助手")] + TALK, BEST)}, Record(ASKED, (GOOD,), system="助手", history=EARLIER)),
    "a conversation without its answer": ({"conversations": shares(TALK)}, Record(ASKED, history=EARLIER)),
    "Alpaca": ({"instruction": "翻译", "input": "早", "output": BEST, "history": [["在吗", "在"]]},
               Record("翻译\n早", (GOOD,), history=EARLIER)),
    "Alpaca without input": ({"instruction": ASKED, "input": "", "output": BEST}, Record(ASKED, (GOOD,))),
    "question and answer": ({"question": ASKED, "answer": BEST}, Record(ASKED, (GOOD,))),
    "query and response": ({"query": ASKED, "response": BEST, "note": None}, Record(ASKED, (GOOD,))),
    "prompt and completion": ({"prompt": ASKED, "completion": BEST}, Record(ASKED, (GOOD,))),
    "text": ({"text": ASKED}, Record(ASKED)),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_row_of_each_form_is_its_record(form):
    row, record = FORMS[form]
    assert to_record(row) == record
    cells = {name: json.dumps(value) if isinstance(value, (dict, list)) else value for name, value in row.items()}
    assert to_record(cells) == record


def test_an_answer_that_is_json_stays_a_text():
    assert to_record({"prompt": "问", "chosen": '[{"a": 1}]', "rejected": '{"role": "x"}'}).answers[0].text == '[{"a": 1}]'


@pytest.mark.parametrize("row, reason", [
    ({"name": "甲", "age": 3}, r"the fields are \['name', 'age'\].*prompt \+ answers; chosen \+ rejected"),
    ({"prompt": "问", "chosen": "答", "rejected": "答"}, "the same"),
    ({"chosen": "答", "rejected": "否"}, "no prompt, and chosen is '答'"),
    ({"chosen": transcript("答"), "rejected": "\n\nHuman: 别的\n\nAssistant: 否"}, "part before their last turn"),
    ({"chosen": "\n\nHuman: 问", "rejected": "\n\nHuman: 别的"}, "ends with the user's turn"),
    ({"prompt": "问", "chosen": 3, "rejected": "否"}, "answer is 3; it must be a text"),
    ({"conversations": shares([("gpt", "好"), ("human", "问")])}, "turn 1 is the assistant's"),
    ({"conversations": shares([("human", "问"), ("human", "问")])}, "turn 2 is the user's"),
    ({"messages": chats([("human", "问"), ("system", "助手")])}, "turn 2 is the system's"),
    ({"messages": [{"role": "tool", "content": "好"}]}, "a turn of messages is .*'tool'.* the roles are human, user"),
    ({"messages": [{"role": "user", "content": None}]}, "both texts"), ({"messages": ["问"]}, "a turn of messages"),
    ({"messages": "问"}, "messages is '问'; it must be a list of turns"), ({"conversations": []}, "there is no turn"),
    ({"instruction": "译", "output": ""}, "answer is ''; it must not be empty"),
    ({"instruction": 3, "output": "好"}, "instruction or input is 3"),
    ({"question": "问", "answer": "答\0"}, r"'\\x00', a control character"), ({"text": " "}, "must not be empty"),
    ({"prompt": "问", "answers": [], "history": "早"}, "history is '早'; it must be a list")])
def test_a_row_that_fits_no_form_or_breaks_its_rule_is_an_error_with_the_reason(row, reason):
    with pytest.raises(ValueError, match=reason):
        to_record(row)
