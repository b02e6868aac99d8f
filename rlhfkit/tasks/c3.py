"""C3 (CLUE): questions on a dialogue or a text, two to four choices. Context, then question; the choice is scored.

The 2023 kit put the context behind the choice, and took rows four at a time whatever the number of choices, so that
after the first short question every group was made of parts of two.
"""
import json

from rlhfkit.tasks.task import Task, check_fields, find_files, read_text, template

LAYOUT = ('c3/{train,dev}.json (or the pair *d-dev.json, *m-dev.json), a list of [[sentences], '
          '[{"question", "choice", "answer"}], id]')


def load(folder, split):
    examples = []
    for file in find_files(folder, [f"{split}.json", f"*[dm]-{split}.json"], LAYOUT):
        try:
            documents = [(sentences, questions) for sentences, questions, *_ in json.loads(read_text(file))]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file} cannot be read ({error}); expected {LAYOUT}") from error
        for d, (sentences, questions) in enumerate(documents):
            for q, question in enumerate(questions):
                examples.append({"id": f"{file.stem}/{d}/{q}", "context": "\n".join(sentences),
                                 **_question(question, f"{file}, document {d}")})
    return examples


def ask(example):
    return f"{example['context']}\n问：{example['question']}\n", "答：", example["choices"]


def _question(question, where):
    check_fields(question, ("question", "choice"), where)
    choices = tuple(dict.fromkeys(question["choice"]))      # one real row gives the same choice twice
    answer = question.get("answer") or None
    if answer is not None and answer not in choices:
        raise ValueError(f"{where}: the answer {answer!r} is none of the choices {choices}")
    gold = None if answer is None else choices.index(answer)
    return {"question": question["question"], "choices": choices, "gold": gold}


TASK = Task("c3", load, template(ask))
