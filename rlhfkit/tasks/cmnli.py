"""CMNLI (CLUE): OCNLI's question, files and prompt, on larger and translated data."""
from rlhfkit.tasks import ocnli
from rlhfkit.tasks.task import Task, template

TASK = Task("cmnli", ocnli.loader("cmnli"), template(ocnli.ask))
