"""Poetry: author, genre and title → the text, score 1; same author 0, another author −1, another genre −2, one of each.

Files are told apart by their place under `chinese-poetry/`; the 2023 kit looked for "shi" and "ci" in the whole path,
the user's folders included, and never matched `huajianji`. Tang and Song poems become simplified, a file at once.
"""
import json

from opencc import OpenCC

from rlhfkit.records import Answer, Record, set_aside
from rlhfkit.sources.raw import Pool, files

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


def read(folder, rng, rejected):
    """JSON files, a list of poems or one poem each → Records."""
    kinds = {path: kind for kind in KINDS for path in folder.glob(f"chinese-poetry/{kind[0]}")}
    poems = [poem for path in files(folder, LAYOUT) for poem in _poems(path, kinds[path], rejected)]
    by_author = {}                                     # (genre, author) -> (title, text) of each poem
    by_genre = {}                                      # genre -> (author, text)
    for author, genre, title, text in poems:
        by_author.setdefault((genre, author), []).append((title, text))
        by_genre.setdefault(genre, []).append((author, text))
    everything = Pool((genre, text) for genre, items in by_genre.items() for _, text in items)
    by_author, by_genre = ({key: Pool(items) for key, items in groups.items()} for groups in (by_author, by_genre))
    for author, genre, title, gold in poems:
        answers = [Answer(gold, 1)]
        draws = (by_author[genre, author], title), (by_genre[genre], author), (everything, genre)
        for score, (pool, group) in zip((0, -1, -2), draws):
            taken = [answer.text for answer in answers]
            answers += [Answer(text, score) for text in pool.outside(rng, group, taken, 1)]
        measure = "篇" if genre in ("经书", "楚辞") else "首"
        yield Record(f"以{author}的风格，写一{measure}{genre}，题为{title}", answers, source="poetry")


def _poems(path, kind, rejected):
    """(author, genre, title, text) of each poem in the file; the `line` of one set aside is its number in the list."""
    _, author, genre, titles, field, traditional = kind
    try:
        rows = json.loads(path.read_text("utf-8-sig", errors="surrogateescape"))
    except ValueError as error:
        set_aside(rejected, path, getattr(error, "lineno", 1), f"not JSON: {error}; file left out", "")
        return
    rows = rows if isinstance(rows, list) else [rows]
    if traditional:
        rows = json.loads(_simplified(json.dumps(rows, ensure_ascii=False)))
    for number, row in enumerate(rows, 1):
        try:
            yield _poem(row, author, genre, titles, field)
        except ValueError as error:
            set_aside(rejected, path, number, error, row)


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
    "".join(poem).encode()                             # UnicodeEncodeError, a ValueError, when the file was not UTF-8
    return poem


def _simplified(text):
    return _CONVERTER.convert(text).translate(str.maketrans("「」『』", "“”‘’"))


_CONVERTER = OpenCC("t2s")
