"""MMLU: 57 subjects in English, four choices, five dev rows a subject as shots.

The template is the 2023 kit's, its full-width colon after Answer included, so that the letter follows without a space
as in C-Eval; the instruction stands before zero-shot questions too. Categories are the kit's and lm-eval's: the authors'
own table has anatomy under Other.
"""
from rlhfkit.tasks.exam import LETTERS, ask_exam, load_exam
from rlhfkit.tasks.task import Task, template

CATEGORIES = {
    "Humanities": (
        "moral_scenarios jurisprudence international_law prehistory formal_logic high_school_us_history moral_disputes "
        "high_school_european_history world_religions professional_law logical_fallacies high_school_world_history "
        "philosophy"),
    "Social Sciences": (
        "us_foreign_policy public_relations professional_psychology high_school_macroeconomics econometrics "
        "high_school_microeconomics high_school_geography high_school_government_and_politics sociology "
        "human_sexuality security_studies high_school_psychology"),
    "Other": (
        "global_facts business_ethics marketing management virology college_medicine clinical_knowledge human_aging "
        "medical_genetics miscellaneous professional_medicine nutrition professional_accounting"),
    "STEM": (
        "electrical_engineering astronomy high_school_chemistry college_physics abstract_algebra high_school_physics "
        "anatomy high_school_computer_science high_school_biology high_school_statistics college_chemistry "
        "elementary_mathematics college_biology college_computer_science machine_learning college_mathematics "
        "high_school_mathematics conceptual_physics computer_security"),
}
SUBJECTS = {subject: category for category, subjects in CATEGORIES.items() for subject in subjects.split()}
LAYOUT = "mmlu/{dev,val,test}/<subject>_<split>.csv without a header: question, A, B, C, D, answer"


def load(folder, split):
    return load_exam(folder, split, SUBJECTS, ("question", *LETTERS, "answer"), False, LAYOUT)


def intro(example):
    title = example["subject"].replace("_", " ").title().replace(" And ", " and ").replace("Us ", "US ")
    return f"The following are multiple choice questions (with answers) about {title}."


TASK = Task("mmlu", load, template(ask_exam("Answer："), "\n\n", intro), "letters", split="test", shot_splits=("dev",))
