"""Couplets: first line → second line, score 1; others of the same length score 0, of other lengths −1.

`couplets.txt` wins over `couplets/**/in.txt` with `out.txt`, which hold the same pairs: never both. The 2023 kit could
not finish this source, and its negatives hung on the answers of another row.
"""
from rlhfkit.records import Answer, Record, set_aside, text_lines
from rlhfkit.sources.raw import Pool, files

LAYOUT = ("couplets.txt", "couplets/**/in.txt", "couplets/**/out.txt")


def read(folder, rng, rejected):
    """`first<tab>second` lines, or lines of in.txt beside those of out.txt → Records."""
    pairs = list(_pairs(folder, rejected))
    pool = Pool((len(second), second) for _, second in pairs)
    for first, second in pairs:
        same = pool.inside(rng, len(second), [second], 2)
        other = pool.outside(rng, len(second), [second, *same], 2)
        answers = [Answer(second, 1), *(Answer(text, 0) for text in same), *(Answer(text, -1) for text in other)]
        yield Record(f"上联：{first}", answers, "下联：", source="couplets")


def _pairs(folder, rejected):
    one_file = folder / LAYOUT[0]
    lines = _one_file(one_file, rejected) if one_file.is_file() else _two_files(folder, rejected)
    for path, line, *sides in lines:
        first, second = ("".join(side.split()) for side in sides)
        if first and len(first) == len(second):
            yield first, second
        elif first or second:
            reason = f"the sides have {len(first)} and {len(second)} characters; they must have the same number"
            set_aside(rejected, path, line, reason, "\t".join(sides))


def _one_file(path, rejected):
    """Without a tab the separator is the character in the middle, when it is no word character."""
    for line, text in text_lines(path, rejected):
        first, tab, second = text.partition("\t")
        if not tab:
            text = text.strip()
            middle = len(text) // 2
            if text and not text[middle].isalnum():
                first, second = text[:middle], text[middle + 1:]
        yield path, line, first, second


def _two_files(folder, rejected):
    for path in files(folder, LAYOUT[1:2]):
        beside = path.with_name("out.txt")
        # counted without the blank lines at the end
        counts = [file.read_bytes().rstrip().count(b"\n") + 1 if file.is_file() else 0 for file in (path, beside)]
        if counts[0] != counts[1]:
            reason = f"{counts[0]} lines, and {counts[1]} in out.txt beside it; they must be as many; file left out"
            set_aside(rejected, path, 1, reason, "")
            continue
        firsts, seconds = dict(text_lines(path, rejected)), dict(text_lines(beside, rejected))
        for line in sorted(firsts.keys() & seconds.keys()):
            yield path, line, firsts[line], seconds[line]
