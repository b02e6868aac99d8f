"""Poetry: author, genre and title → the text, score 1; same author 0, another author −1, another genre −2, one of each.

Files are told apart by their place under `chinese-poetry/`; the 2023 kit looked for "shi" and "ci" in the whole path,
the user's folders included, and never matched `huajianji`. Tang and Song poems become simplified, a file at once.
"""
from itertools import chain, islice

from opencc import OpenCC

from rlhfkit.formats import json_rows
from rlhfkit.records import Answer, Record, check_text, set_aside
from rlhfkit.sources.raw import NOWHERE, TEMPLATES, Draws, Pool, files, first_share, share

# pattern under chinese-poetry/, author ("" : the row's), genre ("": from the length of the first line), fields of the
# title, field of the text, written in traditional characters
KINDS = (
    ("lunyu/lunyu.json", "孔子", "经书", ("chapter",), "paragraphs", False),
    ("sishuwujing/daxue.json", "曾子", "经书", ("chapter",), "paragraphs", True),
    ("sishuwujing/mengzi.json", "孟子", "经书", ("chapter",), "paragraphs", True),
    ("sishuwujing/zhongyong.json", "孔伋", "经书", ("chapter",), "paragraphs", True),
    ("caocaoshiji/caocao.json", "曹操", "古体诗", ("title",), "paragraphs", False),
    ("shijing/shijing.json", "诗经", "古体诗", ("chapter", "section", "title"), "content", False),
    ("chuci/chuci.json", "", "楚辞", ("section", "title"), "content", False),
    ("shi/poet*.json", "", "", ("title",), "paragraphs", True),
    ("ci/ci*.json", "", "词", ("rhythmic",), "paragraphs", False),
    ("nalanxingde/*.json", "", "词", ("title",), "para", False),
    ("wudai/huajianji/*juan.json", "", "词", ("title",), "paragraphs", False),
    ("wudai/nantang/poetrys.json", "", "词", ("title",), "paragraphs", False),
    ("yuanqu/yuanqu.json", "", "曲", ("title",), "paragraphs", False),
)
LAYOUT = tuple(f"chinese-poetry/{kind[0]}" for kind in KINDS)


def read(folder, rejected, seed=0, template=TEMPLATES["HEAD"], part=(0, 1)):
    """JSON files, a list of poems or one poem each, or one a line → Records. Reads twice, for the index of all poems."""
    pool = Pool(((genre, author, title), text) for author, genre, title, text in _all(folder, first_share(rejected, part)))
    for author, genre, title, gold in share(_all(folder, NOWHERE), part):
        draws = Draws(seed, "poetry", author, genre, title, gold)
        answers = [Answer(gold, 1)]
        for score, level in ((0, 2), (-1, 1), (-2, 0)):         # another title of the author, author of the genre, genre
            drawn = pool.draw(draws, (genre, author, title), level, [answer.text for answer in answers], 1)
            answers += [Answer(text, score) for text in drawn]
        measure = "篇" if genre in ("经书", "楚辞") else "首"
        yield Record(f"以{author}的风格，写一{measure}{genre}，题为{title}", answers, source="poetry")


def _all(folder, rejected):
    kinds = {path: kind for kind in KINDS for end in ("", ".gz", ".xz") for path in folder.glob(f"chinese-poetry/{kind[0]}{end}")}
    return chain.from_iterable(_poems(path, kinds[path], rejected) for path in files(folder, LAYOUT))


def _poems(path, kind, rejected):
    """(author, genre, title, text) of each poem in the file; the `line` of one set aside is its number in the list."""
    _, author, genre, titles, field, traditional = kind
    rows = json_rows(path, rejected)
    while some := list(islice(rows, 1000)):
        found = []
        for number, row in some:
            try:
                found.append(_poem(row, author, genre, titles, field))
            except ValueError as error:
                set_aside(rejected, path, number, error, row)
        yield from _simplified(found) if traditional else found


def _poem(row, author, genre, titles, field):
    names = titles if author else ("author", *titles)
    if not isinstance(row, dict):
        raise ValueError(f"a poem is {row!r:.80}; it must be an object with fields")
    for name in names:
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise ValueError(f"{name} is {row.get(name)!r:.80}; it must be a text that is not empty")
    lines = row.get(field)
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines) or not "".join(lines).strip():
        raise ValueError(f"{field} is {lines!r:.80}; it must be a list of lines that are not empty")
    author = author or row["author"]
    genre = genre or ("五言诗" if len(lines[0]) == 12 else "七言诗")     # two times five characters with their marks
    poem = author, genre, "-".join(row[name] for name in titles), "".join(lines)
    check_text("a poem", "".join(poem))
    return poem


def _simplified(poems):
    """All at once: a call of the converter costs more than a poem."""
    text = _CONVERTER.convert("\0".join("\1".join(poem) for poem in poems))
    return [tuple(poem.split("\1")) for poem in text.translate(str.maketrans("「」『』", "“”‘’")).split("\0")] if poems else []


_CONVERTER = OpenCC("t2s")
