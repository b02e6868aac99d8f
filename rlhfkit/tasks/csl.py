"""CSL (CLUE): are these the authors' keywords? PanGu-α's template, `摘要:{abst}，关键词:{a+b+c}{不是|是}真实关键词`.

What decides stands at the end, and a long prompt is cut at its left; the 2023 kit cut it at its right, which left the two
candidates of a long abstract the same.
"""
from rlhfkit.tasks.task import Task, index_of, lines_loader, template, texts_of

LABELS = {"0": "不是", "1": "是"}
LAYOUT = 'csl/{train,dev}.json, JSON lines with "abst", "keyword" (a list) and "label", 0 or 1'
load = lines_loader(LAYOUT, ("abst",), lambda row, where: {
    "abstract": row["abst"], "keywords": texts_of(row, "keyword", where),
    "gold": index_of(row.get("label"), LABELS, where)})


def ask(example):
    prompt = f"摘要:{example['abstract']}，关键词:{'+'.join(example['keywords'])}"
    return prompt, "", tuple(f"{word}真实关键词" for word in LABELS.values())


TASK = Task("csl", load, template(ask))
