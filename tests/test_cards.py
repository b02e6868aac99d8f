"""Data cards: one for each corpus, with front matter that tools read, seven headings, and a record that is one."""
from pathlib import Path

import pytest
import yaml

from rlhfkit.records import read_records
from rlhfkit.sources import SOURCES

FOLDER = Path(__file__).resolve().parents[1] / "data_cards"
CARDS = sorted(FOLDER.glob("*.md"))
HEADINGS = ["Summary", "Source and licence", "One record", "How it is built", "Sizes and splits", "Use it for, not for",
            "Known flaws"]
FIELDS = {"pretty_name", "language", "license", "size_categories", "source_datasets", "task_categories"}


def test_every_source_has_a_card():
    assert set(SOURCES) <= {card.stem for card in CARDS}


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_a_card_has_front_matter_the_seven_headings_and_forty_to_seventy_lines(card):
    text = card.read_text("utf-8")
    _, front, body = text.split("---\n", 2)
    fields = yaml.safe_load(front)
    assert FIELDS <= fields.keys() and all(fields[name] for name in FIELDS)
    assert [line[3:] for line in body.splitlines() if line.startswith("## ")] == HEADINGS
    assert all(section.split("\n", 1)[1].strip() for section in body.split("\n## ")[1:])
    assert 40 <= len(text.splitlines()) <= 70


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_the_record_of_a_corpus_card_is_a_record_of_that_source(name, tmp_path):
    example = (FOLDER / f"{name}.md").read_text("utf-8").split("```json\n")[1].split("```")[0]
    (tmp_path / "rows.jsonl").write_text(example, encoding="utf-8")
    (record,) = read_records(tmp_path / "rows.jsonl")
    assert record.source == name and record.answers
