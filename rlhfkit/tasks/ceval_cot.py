"""C-Eval by chain of thought: the model reasons, then says 所以答案是X; the letter is taken out of what it wrote.

The 2023 kit left the extraction undone and its run crashed. Rules, the first that finds a letter: the first 所以答案是X; the last
答案是X (为, 选, a colon); the last 选X; an answer of one line that begins with its letter. Two letters are none, and score 0.
"""
import re
import unicodedata
from pathlib import Path

from rlhfkit.tasks import ceval
from rlhfkit.tasks.exam import LETTERS, ask_exam
from rlhfkit.tasks.task import Task, template

LETTER = r"""[\s*_"'“”‘’(\[【{$:]*(?:\\\w+\{)*([A-D])(?![A-Za-z])(?!\W{0,3}[、,和与或及]\W{0,3}[A-D](?![A-Za-z]))"""
STATED = r"答案\s*(?:应该?|应当)?\s*(?:[是为选:]\s*)+(?:择|项)?"
RULES = ((r"所以(?:正确|最终)?" + STATED + LETTER, 0), (rf"(?:{STATED}|[Aa]nswer\s*(?:is|:)){LETTER}", -1),
         (r"(?<![不别勿误错])选择?" + LETTER, -1))
ask = ask_exam("答案：让我们一步一步思考，\n")


def load(folder, split):
    """C-Eval's own files, in the folder `ceval` beside `folder`; gold is the letter."""
    return [example | {"gold": None if example["gold"] is None else (LETTERS[example["gold"]],)}
            for example in ceval.load(Path(folder).with_name("ceval"), split, ("explanation",))]


def render(example, shots=()):
    """A shot is answered with the explanation that its file has, and its letter. One question of val is in dev too; its
    explanation hides that from whoever compares rows, so it is passed over here."""
    shown = [shot | {"gold": ("\n".join(filter(None, (shot["explanation"], f"所以答案是{shot['gold'][0]}。"))),)}
             for shot in shots if shot["question"] != example["question"]]
    return template(lambda e: (*ask(e)[:2], ()), "\n\n", intro)(example, shown)


def intro(example):
    return f"以下是中国关于{ceval.NAMES[example['subject']]}考试的单项选择题，请先一步一步推理，最后写出“所以答案是”和选项的字母。"


def find_letter(answer):
    """The letter that an answer settles on, by the rules above; None where it names none, or two at once."""
    text = unicodedata.normalize("NFKC", answer).strip()
    for pattern, place in RULES:
        if found := re.findall(pattern, text):
            return found[place]
    alone = re.fullmatch(r"\W*([A-D])(?:[\W_](?! ?[a-z]).*)?", text)
    return alone[1] if alone and len(set(re.findall("(?<![A-Za-z])[A-D](?![A-Za-z])", text))) == 1 else None


def score(answer, gold):
    letter = find_letter(answer)
    return {"accuracy": float(letter == gold[0]), "answered": float(letter is not None)}


TASK = Task("ceval_cot", load, render, "generation", "val", ("dev",), score, max_new_tokens=384)
