"""What C-Eval, CMMLU and MMLU share: one CSV file a subject, four choices, the next letter as the answer.

Subjects that have no file are left out, so that a part of the benchmark can be run; a file of no known subject raises.
"""
from rlhfkit.tasks.task import find_files, index_of, read_csv

LETTERS = ("A", "B", "C", "D")


def load_exam(folder, split, subjects, fields, header, layout, suffix="_{}.csv", groups=None, extra=()):
    """All examples of a split, in the order of `subjects` {key: category}; `fields`: the columns a file must have;
    suffix: how a file's name goes on behind the subject, {} the split; groups: {name: keys} of further groups; extra: columns
    to keep where the file has them."""
    suffix = suffix.format(split)
    files = {f.name.removesuffix(suffix): f for f in find_files(folder, [f"{split}/*{suffix}"], layout)}
    if unknown := sorted(set(files) - set(subjects)):
        raise ValueError(f"{files[unknown[0]]}: unknown subject {unknown[0]!r}; a file must bear a subject's name, "
                         f"such as {', '.join(list(subjects)[:3])}")
    examples = []
    for subject in (s for s in subjects if s in files):
        for i, row in enumerate(read_csv(files[subject], fields, header)):
            row, where = {name.lower(): value for name, value in row.items()}, f"{files[subject]}, row {i + 1}"
            examples.append({"id": f"{subject}/{row.get('id', i)}", "subject": subject, "category": subjects[subject],
                             "groups": tuple(name for name, keys in (groups or {}).items() if subject in keys),
                             "question": row["question"].strip(), "options": tuple(row[a.lower()] for a in LETTERS),
                             "gold": index_of(row.get("answer", "").strip(), LETTERS, where),
                             **{name: row.get(name, "").strip() for name in extra}})
    return examples


def ask_exam(answer_word):
    """The question, its choices a line each, and the word before the letter."""
    def ask(example):
        lines = [example["question"], *(f"{letter}. {option}" for letter, option in zip(LETTERS, example["options"]))]
        return "\n".join(lines) + "\n", answer_word, LETTERS
    return ask
