"""Long tables, of which each passage names the columns of its values."""

from __future__ import annotations

import pytest

from d2llm.core.types import LateChunk, Passage, Section, SectionedPassage
from d2llm.models.student import Student
from d2llm.retrieval.chunking import Chunker, TableSplitter
from d2llm.store.index_manifest import Chunking

HEADER = "| Fruit | Price |\n| --- | --- |"


def split(text: str, room: int) -> list[str]:
    """Pieces by words; plain text is cut after every ``room`` words of it."""

    def by_words(part: str, size: int) -> list[tuple[int, str]]:
        import re

        words = list(re.finditer(r"\S+", part))
        groups = [words[n : n + size] for n in range(0, len(words), size)]
        return [(group[0].start(), part[group[0].start() : group[-1].end()]) for group in groups]

    pieces = TableSplitter(room, by_words, lambda texts: [len(each.split()) for each in texts]).split(text)
    for piece in pieces:
        start, end = piece.span
        assert 0 <= start < end <= len(text)
    return [piece.text for piece in pieces]


def rows(count: int, start: int = 0) -> str:
    return "\n".join(f"| f{n} | {n} |" for n in range(start, start + count))


def test_each_piece_repeats_the_header():
    """Header 10 words, a row 5: two rows in 20 words."""
    assert split(f"{HEADER}\n{rows(5)}", 20) == [
        f"{HEADER}\n{rows(2)}",
        f"{HEADER}\n{rows(2, 2)}",
        f"{HEADER}\n{rows(1, 4)}",
    ]


def test_a_table_that_fits_is_left_as_it_is():
    text = f"Before it.\n\n{HEADER}\n{rows(1)}"
    assert split(text, 17) == [text]
    assert split(f"{HEADER}\n{rows(1)}\n\n{'word ' * 40}", 15)[0] == f"{HEADER}\n{rows(1)}"


def test_text_around_tables_is_kept():
    """A short text before a table begins its first piece; a long one stands alone."""
    text = f"Prices of May.\n\n{HEADER}\n{rows(4)}\n\nThe end of it."
    assert split(text, 20) == [
        f"Prices of May.\n\n{HEADER}\n{rows(1)}",
        f"{HEADER}\n{rows(2, 1)}",
        f"{HEADER}\n{rows(1, 3)}",
        "The end of it.",
    ]
    long = " ".join(f"w{n}" for n in range(8))
    assert split(f"{long}\n\n{HEADER}\n{rows(3)}", 20)[0] == long


def test_a_header_without_outer_pipes_and_one_of_two_rows():
    plain = "Fruit | Price\n---|---"
    assert split(f"{plain}\na | 1\nb | 2\nc | 3\nd | 4\ne | 5", 10)[1].startswith(f"{plain}\n")
    double = "| Fruit | Price | |\n| | net | gross |\n| --- | --- | --- |"
    pieces = split(f"{double}\n" + "\n".join(f"| f{n} | {n} | {n}.5 |" for n in range(9)), 44)
    assert len(pieces) > 1
    assert all(piece.startswith(double) for piece in pieces)


def test_a_wide_table_becomes_lines_of_names_and_values():
    """Each piece of a row has the row's first value."""
    names = [f"n{n}" for n in range(12)]
    table = f"| {' | '.join(names)} |\n|{' --- |' * 12}\n| {' | '.join('v' + name for name in names)} |"
    first, *others = split(table, 16)
    assert first.startswith("n0: vn0\nn1: vn1\n")
    assert all(piece.startswith("n0: vn0\n") for piece in others)
    assert [f"{name}: v{name}" in "\n".join((first, *others)) for name in names] == [True] * 12


def test_a_long_row_says_which_column_goes_on():
    care = " ".join(f"w{n}" for n in range(60))
    pieces = split(f"| Kind | Care |\n| --- | --- |\n| Oak | {care} |\n| Elm | none |", 24)
    assert pieces[0].startswith("Kind: Oak\nCare: w0 w1")
    assert all(piece.startswith("Kind: Oak\nCare: w") for piece in pieces[:-1])
    assert " ".join(piece.removeprefix("Kind: Oak\nCare: ") for piece in pieces[:-1]) == care
    assert pieces[-1] == "| Kind | Care |\n| --- | --- |\n| Elm | none |"


def test_a_text_of_at_most_a_quarter_of_a_piece_begins_the_table_after_it():
    table = f"{HEADER}\n{rows(12)}"
    assert split(f"One two three four five.\n\n{table}", 20)[0].startswith(f"One two three four five.\n\n{HEADER}\n")
    alone, first, *_ = split(f"One two three four five six.\n\n{table}", 20)
    assert alone == "One two three four five six."
    assert first.startswith(HEADER)


def test_text_with_bars_is_no_table():
    text = "cat a | sort\n" * 30 + "---\n" + "cat a | sort\n" * 30
    assert " ".join(split(text, 20)).split() == text.split()


@pytest.fixture(scope="module")
def student() -> Student:
    return Student.load("d2llm-minilm")


@pytest.mark.parametrize("late", [False, True])
def test_passages_of_a_document(student, late):
    """No passage is longer than the student's limit, and none lacks the names of the columns."""
    table = "| Fruit | Price in euro |\n| --- | --- |\n" + "\n".join(f"| fruit{n} | {n}.50 |" for n in range(100))
    document = SectionedPassage("d", table, "Prices", sections=(Section(table, ("May",), 3),))
    chunker = Chunker(student, Chunking(64, late=late))
    passages = chunker.split(document)
    assert len(passages) > 10
    assert all(passage.text.startswith("| Fruit | Price in euro |\n| --- | --- |\n| fruit") for passage in passages)
    assert all(passage.title == "Prices > May" for passage in passages)
    values = [line for passage in passages for line in passage.text.split("\n")[2:]]
    assert values == table.split("\n")[2:]
    lengths = [len(student.backbone.tokenizer(p.full_text)["input_ids"]) for p in passages]
    assert max(lengths) <= 64
    if late:
        for passage in passages:
            assert isinstance(passage, LateChunk)
            assert passage.text.endswith(table[passage.start : passage.end].split("\n")[-1])


def test_a_plain_passage_with_a_table_is_split_alike(student):
    table = f"{HEADER}\n{rows(200)}"
    passages = Chunker(student, Chunking(32)).split(Passage("d", table))
    assert all(passage.text.startswith(HEADER) for passage in passages)
