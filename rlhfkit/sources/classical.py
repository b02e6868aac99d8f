"""Classical and modern Chinese: one into the other, direction by chance, score 1; same book 0, other books −1.

The 2023 kit wrote the prefix as the prompt, so that the text to translate was lost, stopped at a blank first line and
lost a pair at the end of a file.
"""
from rlhfkit.records import Answer, Record, check_text, set_aside, text_lines
from rlhfkit.sources.raw import NOWHERE, TEMPLATES, Draws, Pool, files, first_share, share

LAYOUT = ("Classical-Modern/bitext/*",)
CLASSICAL, MODERN = "古文：", "现代文："


def read(folder, rejected, seed=0, template=TEMPLATES["HEAD"], part=(0, 1)):
    """A file a book: a line `古文：…`, a line `现代文：…`, a blank line → Records. Reads three times, for an index of each side."""
    pools = {CLASSICAL: Pool(((book,), classical) for book, classical, _ in _pairs(folder, first_share(rejected, part))),
             MODERN: Pool(((book,), modern) for book, _, modern in _pairs(folder, NOWHERE))}
    for book, classical, modern in share(_pairs(folder, NOWHERE), part):
        draws = Draws(seed, "classical", book, classical, modern)
        sides = [(CLASSICAL, classical), (MODERN, modern)]
        (given, known), (wanted, gold) = sides if draws.below(2) else sides[::-1]
        same = pools[wanted].draw(draws, (book,), 1, [gold], 2)
        other = pools[wanted].draw(draws, (book,), 0, [gold, *same], 2)
        answers = [Answer(gold, 1), *(Answer(text, 0) for text in same), *(Answer(text, -1) for text in other)]
        yield Record(given + known, answers, wanted, source="classical")


def _pairs(folder, rejected):
    """(book, classical, modern) of each pair; the book is the file's name."""
    for path in files(folder, LAYOUT):
        waiting = None                                 # (line, 古文 line) that has no 现代文 line yet
        for line, text in _with_end(text_lines(path, rejected)):
            classical, modern = text.startswith(CLASSICAL), text.startswith(MODERN)
            if modern and waiting and text[len(MODERN):].strip() and waiting[1][len(CLASSICAL):].strip():
                pair = waiting[1][len(CLASSICAL):], text[len(MODERN):]
                waiting = None
                try:
                    check_text(CLASSICAL, pair[0]), check_text(MODERN, pair[1])
                    yield path.name, *pair
                except ValueError as error:            # control characters
                    set_aside(rejected, path, line, error, "\n".join(pair))
                continue
            if waiting:
                set_aside(rejected, path, waiting[0], f"no {MODERN} line with text follows, or it has no text", waiting[1])
            waiting = (line, text) if classical else None
            if text.strip() and not classical:
                set_aside(rejected, path, line, f"no {CLASSICAL} line with text stands before it", text)


def _with_end(lines):
    yield from lines
    yield 0, ""                                        # the pair at the end of a file needs no blank line
