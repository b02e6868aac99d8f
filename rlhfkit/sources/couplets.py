"""Couplets: first line → second line, score 1; others of the same length score 0, of other lengths −1.

`couplets.txt` wins over `couplets/**/in.txt` with `out.txt`, which hold the same pairs: never both. The 2023 kit could
not finish this source, and its negatives hung on the answers of another row.
"""
from rlhfkit.records import Answer, Record, check_text, open_bytes, set_aside, text_lines
from rlhfkit.sources.raw import NOWHERE, TEMPLATES, Draws, Pool, files, first_share, share

LAYOUT = ("couplets.txt", "couplets/**/in.txt", "couplets/**/out.txt")


def read(folder, rejected, seed=0, template=TEMPLATES["HEAD"], part=(0, 1)):
    """`first<tab>second` lines, or lines of in.txt beside those of out.txt → Records. Reads twice, for the index of second lines."""
    pool = Pool(((len(second),), second) for _, second in _pairs(folder, first_share(rejected, part)))
    for first, second in share(_pairs(folder, NOWHERE), part):
        draws = Draws(seed, "couplets", first, second)
        same = pool.draw(draws, (len(second),), 1, [second], 2)
        other = pool.draw(draws, (len(second),), 0, [second, *same], 2)
        answers = [Answer(second, 1), *(Answer(text, 0) for text in same), *(Answer(text, -1) for text in other)]
        yield Record(f"上联：{first}", answers, "下联：", source="couplets")


def _pairs(folder, rejected):
    try:
        lines = _one_file(files(folder, LAYOUT[:1]), rejected)
    except FileNotFoundError:
        lines = _two_files(files(folder, LAYOUT[1:2]), rejected)
    for path, line, *sides in lines:
        first, second = ("".join(side.split()) for side in sides)
        if first and len(first) == len(second):
            try:
                check_text("the first line", first), check_text("the second line", second)
            except ValueError as error:                 # control characters
                set_aside(rejected, path, line, error, "\t".join(sides))
                continue
            yield first, second
        elif first or second:
            reason = f"the sides have {len(first)} and {len(second)} characters; they must have the same number"
            set_aside(rejected, path, line, reason, "\t".join(sides))


def _one_file(paths, rejected):
    """Without a tab the separator is the character in the middle, when it is no word character."""
    for path in paths:
        for line, text in text_lines(path, rejected):
            first, tab, second = text.partition("\t")
            if not tab:
                text = text.strip()
                middle = len(text) // 2
                if text and not text[middle].isalnum():
                    first, second = text[:middle], text[middle + 1:]
            yield path, line, first, second


def _two_files(paths, rejected):
    """Lines of two files side by side; where a line of one was set aside the other's goes too."""
    for path in paths:
        beside = path.with_name(path.name.replace("in.txt", "out.txt"))
        counts = [_last_line(file) if file.is_file() else 0 for file in (path, beside)]
        if counts[0] != counts[1]:
            reason = f"{counts[0]} lines, and {counts[1]} in out.txt beside it; they must be as many; file left out"
            set_aside(rejected, path, 1, reason, "")
            continue
        seconds = text_lines(beside, rejected)
        line, second = next(seconds, (0, ""))
        for at, first in text_lines(path, rejected):
            while 0 < line < at:
                line, second = next(seconds, (0, ""))
            if line == at:
                yield path, at, first, second


def _last_line(path):
    """The number of the last line that is not blank."""
    with open_bytes(path) as file:
        return max((number for number, raw in enumerate(file, 1) if raw.strip()), default=0)
