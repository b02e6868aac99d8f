"""TNEWS (CLUE): which of fifteen topics does a headline have? PanGu-α's template, `这是关于{topic}的文章:{sentence}`.

All fifteen labels are ranked; the 2023 kit drew three wrong ones at random, others in every process. The topic stands
before the headline, so the topic *and the text behind it* are scored, given 这是关于.
"""
from rlhfkit.tasks.task import Task, index_of, lines_loader, template

LABELS = {"100": "故事", "101": "文化", "102": "娱乐", "103": "体育", "104": "财经", "106": "房产", "107": "汽车",
          "108": "教育", "109": "科技", "110": "军事", "112": "旅游", "113": "世界", "114": "股票", "115": "农业",
          "116": "游戏"}
LAYOUT = 'tnews/{train,dev}.json, JSON lines with "label" (100 to 116) and "sentence"'
load = lines_loader(LAYOUT, ("sentence",), lambda row, where: {
    "sentence": row["sentence"], "gold": index_of(row.get("label"), LABELS, where)})


def ask(example):
    return "这是关于", "", tuple(f"{topic}的文章:{example['sentence']}" for topic in LABELS.values())


TASK = Task("tnews", load, template(ask))
