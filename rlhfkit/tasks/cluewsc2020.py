"""CLUEWSC2020 (CLUE): does this pronoun stand for that noun? Asked of each item by itself, answered 是 or 否.

The pronoun is marked 【】, since every fourth text has it more than once. PanGu-α's text, the noun in the pronoun's place, has
one candidate an item and nothing to rank it against; the 2023 kit took two items for the two candidates of one.
"""
from rlhfkit.tasks.task import Task, check_fields, index_of, lines_loader, template

LABELS = {"false": "否", "true": "是"}
LAYOUT = ('cluewsc2020/{train,dev}.json, JSON lines with "text", "label" (true or false) and "target", '
          '{"span1_text", "span2_text", "span2_index"}')


def _example(row, where):
    target, text = row.get("target"), row["text"]
    check_fields(target, ("span1_text", "span2_text", "span2_index"), f"{where}, target")
    pronoun, start = target["span2_text"], target["span2_index"]
    if type(start) is not int or not pronoun or text[start:start + len(pronoun)] != pronoun:
        raise ValueError(f"{where}: span2_index is {start!r}, but {pronoun!r} does not stand there; fetch the file again")
    return {"marked": f"{text[:start]}【{pronoun}】{text[start + len(pronoun):]}", "noun": target["span1_text"],
            "pronoun": pronoun, "gold": index_of(row.get("label"), LABELS, where)}


load = lines_loader(LAYOUT, ("text",), _example)


def ask(example):
    return f"{example['marked']}\n问：【{example['pronoun']}】指的是“{example['noun']}”吗？\n", "答：", tuple(LABELS.values())


TASK = Task("cluewsc2020", load, template(ask))
