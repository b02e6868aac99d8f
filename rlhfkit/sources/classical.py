"""Classical and modern Chinese: one into the other, direction by chance, score 1; same book 0, other books −1.

The 2023 kit wrote the prefix as the prompt, so that the text to translate was lost, stopped at a blank first line and
lost a pair at the end of a file.
"""
from rlhfkit.records import Answer, Record, set_aside, text_lines
from rlhfkit.sources.raw import Pool, files

LAYOUT = ("Classical-Modern/bitext/*",)
CLASSICAL, MODERN = "古文：", "现代文："


def read(folder, rng, rejected):
    """A file a book: a line `古文：…`, a line `现代文：…`, a blank line → Records."""
    pairs = [(path.name, *pair) for path in files(folder, LAYOUT) for pair in _pairs(path, rejected)]
    pools = {CLASSICAL: Pool((book, classical) for book, classical, _ in pairs),
             MODERN: Pool((book, modern) for book, _, modern in pairs)}
    for book, classical, modern in pairs:
        sides = [(CLASSICAL, classical), (MODERN, modern)]
        (given, known), (wanted, gold) = sides if rng.random() < 0.5 else sides[::-1]
        same = pools[wanted].inside(rng, book, [gold], 2)
        other = pools[wanted].outside(rng, book, [gold, *same], 2)
        answers = [Answer(gold, 1), *(Answer(text, 0) for text in same), *(Answer(text, -1) for text in other)]
        yield Record(given + known, answers, wanted, source="classical")


def _pairs(path, rejected):
    waiting = None                                     # (line, 古文 line) that has no 现代文 line yet
    for line, text in [*text_lines(path, rejected), (0, "")]:
        classical, modern = text.startswith(CLASSICAL), text.startswith(MODERN)
        if modern and waiting and text[len(MODERN):].strip() and waiting[1][len(CLASSICAL):].strip():
            yield waiting[1][len(CLASSICAL):], text[len(MODERN):]
            waiting = None
            continue
        if waiting:
            set_aside(rejected, path, waiting[0], f"no {MODERN} line with text follows, or it has no text", waiting[1])
        waiting = (line, text) if classical else None
        if text.strip() and not classical:
            set_aside(rejected, path, line, f"no {CLASSICAL} line with text stands before it", text)
