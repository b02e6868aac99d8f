"""Weibo news: article and abstract → comments, scored by their likes. Spaces between tokens are removed.

Unlike the 2023 kit a row or a comment that cannot be used is set aside and named instead of stopping the run.
"""
from rlhfkit.records import Answer, Record, json_lines, set_aside
from rlhfkit.sources.raw import TEMPLATES, files

LAYOUT = ("weibo_summary_comments_json.json", "weibo_summary_comments_json.jsonl")


def read(folder, rejected, seed=0, template=TEMPLATES["HEAD"], part=(0, 1)):
    """JSON lines `{"article", "abstract", "comments": [[text, likes], …]}` → Records; likes int or digits."""
    for path in files(folder, LAYOUT):
        for line, row in json_lines(path, rejected, part):
            try:
                prompt = f"新闻内容：{_field(row, 'article')}{template.between}摘要：{_field(row, 'abstract')}"
                answers = list(_answers(row, path, line, rejected))
                yield Record(prompt, answers, "评论：", source="weibo")
            except ValueError as error:
                set_aside(rejected, path, line, error, row)


def _field(row, name):
    text = row.get(name)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{name} is {text!r:.80}; it must be a text that is not empty")
    return text.replace(" ", "")


def _answers(row, path, line, rejected):
    """The comments as Answers, longest first: Record keeps that order among equal likes."""
    comments = row.get("comments")
    if not isinstance(comments, list) or not comments:
        raise ValueError(f"comments is {comments!r:.80}; it must be a list of [text, likes]")
    answers = []
    for comment in comments:
        try:
            answers.append(_answer(comment))
        except ValueError as error:
            set_aside(rejected, path, line, error, comment)
    if not answers:
        raise ValueError("no comment of this row can be used")
    return sorted(answers, key=lambda answer: -len(answer.text))


def _answer(comment):
    if not isinstance(comment, list) or len(comment) != 2 or not isinstance(comment[0], str):
        raise ValueError(f"a comment is {comment!r:.80}; it must be [text, likes]")
    text, likes = comment
    if isinstance(likes, str) and likes.isascii() and likes.isdigit():
        likes = int(likes)
    return Answer(text.replace(" ", ""), likes)
