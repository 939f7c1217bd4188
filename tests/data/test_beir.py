"""Reading BEIR folders: contents, counted issues, and errors with their file and line."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import pytest

from d2llm.core.errors import DataFormatError, DuplicateIdError
from d2llm.core.types import Passage, Query
from d2llm.data.beir import Dataset, read_beir
from d2llm.data.indexed_corpus import check_corpus

CORPUS = [
    {"_id": "p2", "title": "Cats", "text": "Cats sleep."},
    {"_id": "p1", "title": "", "text": "Dogs bark."},
    {"_id": "p3", "text": "Birds sing."},
]
QUERIES = [{"_id": "q1", "text": "Who barks?"}, {"_id": "q2", "text": "Who sleeps?"}]
HEADER = "query-id\tcorpus-id\tscore\n"


def write_jsonl(path: Path, records: list[dict[str, object]]) -> None:
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "pets"
    (folder / "qrels").mkdir(parents=True)
    write_jsonl(folder / "corpus.jsonl", CORPUS)
    write_jsonl(folder / "queries.jsonl.gz", QUERIES)
    (folder / "qrels" / "train.tsv").write_text(HEADER + "q1\tp1\t2\nq1\tp2\t0\nq2\tp3\t-1\n")
    (folder / "qrels" / "dev.tsv").write_text(HEADER)
    return folder


def test_reads_everything_in_file_order(folder: Path) -> None:
    dataset = read_beir(folder)
    assert dataset.name == "pets"
    assert list(dataset.passages) == ["p2", "p1", "p3"]
    assert dataset.passages["p2"].full_text == "Cats\nCats sleep."
    assert dataset.passages["p3"].title == ""
    assert dataset.queries["q2"].text == "Who sleeps?"
    assert dataset.qrels == {"dev": {}, "train": {"q1": {"p1": 2, "p2": 0}, "q2": {"p3": -1}}}
    assert dataset.issues == ()


def test_grades_of_zero_and_below_are_not_positive(folder: Path) -> None:
    dataset = read_beir(folder)
    assert dataset.positives("train") == {"q1": ("p1",), "q2": ()}
    assert dataset.positives("dev") == {}
    assert dataset.relevant_passages(["train", "dev"]) == {"p1"}
    with pytest.raises(DataFormatError, match="split 'test' was not read; read: dev, train"):
        dataset.positives("test")


def test_queries_that_share_a_relevant_passage_with_another_split_are_left_out(tmp_path: Path) -> None:
    grades = {
        "train": {"own": {"a": 1, "b": 0}, "shared": {"a": 1, "b": 1}, "none": {"c": 0}},
        "dev": {"d": {"b": 1, "a": 0}},
        "test": {"t": {"a": 1}},
    }
    queries = {name: Query(name, name) for judged in grades.values() for name in judged}
    passages = {name: Passage(name, name) for name in "abc"}
    dataset = Dataset("sayings", tmp_path, passages, queries, grades)
    assert dataset.unshared_positives("train", ["dev"]) == {"own": ("a",)}
    assert dataset.unshared_positives("train", ["dev", "test"]) == {}
    assert dataset.unshared_positives("train", []) == {"own": ("a",), "shared": ("a", "b")}


def test_reads_only_the_requested_splits(folder: Path) -> None:
    assert list(read_beir(folder, splits=["dev"]).qrels) == ["dev"]
    with pytest.raises(DataFormatError, match=r"test\.tsv: no such file; .*dev\.tsv, train\.tsv"):
        read_beir(folder, splits=["test"])


def test_blank_lines_crlf_and_byte_order_mark_are_accepted(folder: Path) -> None:
    (folder / "corpus.jsonl").write_bytes(
        b'\xef\xbb\xbf{"_id": "p1", "text": "a"}\r\n\r\n{"_id": "p2", "text": "b"}\r\n'
    )
    (folder / "qrels" / "train.tsv").write_bytes(b"query-id\tcorpus-id\tscore\r\nq1\tp1\t1\r\n\r\n")
    dataset = read_beir(folder)
    assert [passage.text for passage in dataset.passages.values()] == ["a", "b"]
    assert dataset.qrels["train"] == {"q1": {"p1": 1}}


def test_judgements_of_unknown_ids_are_counted_and_logged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [f"q1\tlost{number}\t1" for number in range(7)] + ["nobody\tp1\t1", "q1\tp1\t1"]
    (folder / "qrels" / "train.tsv").write_text(HEADER + "\n".join(lines) + "\n")
    with caplog.at_level(logging.WARNING):
        dataset = read_beir(folder)
    assert dataset.issues == (
        "train: 1 judgement of unknown queries not counted, first 1: nobody",
        "train: 7 judgements of unknown passages not counted, first 5: lost0, lost1, lost2, lost3, lost4",
    )
    assert [issue in caplog.text for issue in dataset.issues] == [True, True]
    assert dataset.positives("train") == {"q1": ("p1",)}
    assert "lost6" in dataset.qrels["train"]["q1"]


def test_empty_passage_texts_are_counted(folder: Path) -> None:
    write_jsonl(folder / "corpus.jsonl", [*CORPUS, {"_id": "p4", "title": "Fish", "text": " "}])
    assert read_beir(folder).issues == ("1 passage without text, first 1: p4",)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"_id": "p9", "text": "x"', "not valid JSON"),
        ('["p9", "x"]', "must be a JSON object, found a list"),
        ('{"text": "x"}', "field 'id' is missing; fields found: 'text'"),
        ('{"_id": "p9", "body": "x"}', "field 'text' is missing; fields found: '_id', 'body'"),
        ('{"_id": 9.5, "text": "x"}', "field '_id' must be a string, found a number"),
        ('{"_id": "", "text": "x"}', "field '_id' is empty"),
        ('{"_id": "p9", "text": null}', "field 'text' must be a string, found null"),
        ('{"_id": "p9", "text": ["x"]}', "field 'text' must be a string, found a list"),
        ('{"_id": "p9", "text": "x", "title": {}}', "field 'title' must be a string, found an object"),
        ('{"_id": "p9", "text": "\\ud800"}', "field 'text' has an unpaired surrogate"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_malformed_line_is_reported_with_its_number(tmp_path: Path, line: str, problem: str, suffix: str) -> None:
    path = tmp_path / f"corpus{suffix}"
    content = f'{{"_id": "p1", "text": "fine"}}\n\n{line}\n'.encode()
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    with pytest.raises(DataFormatError) as caught:
        check_corpus(path)
    assert caught.value.line == 3
    assert str(caught.value).startswith(f"{path}:3: ")
    assert problem in str(caught.value)


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl"])
def test_duplicate_id_names_both_lines(folder: Path, name: str) -> None:
    (folder / "queries.jsonl.gz").unlink()
    write_jsonl(folder / "queries.jsonl", QUERIES)
    with (folder / name).open("a") as file:
        file.write((folder / name).read_text().splitlines()[1] + "\n")
    lines = len((folder / name).read_text().splitlines())
    with pytest.raises(DuplicateIdError, match="was already used in line 2") as caught:
        read_beir(folder)
    assert caught.value.line == lines
    assert caught.value.path == folder / name


def test_invalid_utf8_is_reported_with_its_line(folder: Path) -> None:
    with (folder / "corpus.jsonl").open("ab") as file:
        file.write('{"_id": "p9", "text": "café"}\n'.encode("latin-1"))
    with pytest.raises(DataFormatError, match="not valid UTF-8") as caught:
        read_beir(folder)
    assert caught.value.line == 4


@pytest.mark.parametrize("damage", ["truncated", "not gzip"])
def test_damaged_gzip_is_refused(folder: Path, damage: str) -> None:
    path = folder / "queries.jsonl.gz"
    many = [{"_id": f"q{number}", "text": f"question {number * 7919}"} for number in range(3000)]
    write_jsonl(path, many)
    path.write_bytes(path.read_bytes()[:-2000] if damage == "truncated" else b"plain text")
    with pytest.raises(DataFormatError, match="damaged or truncated gzip") as caught:
        read_beir(folder)
    assert caught.value.path == path
    assert caught.value.line is not None


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl.gz"])
def test_missing_file_error_names_the_expected_files(folder: Path, name: str) -> None:
    (folder / name).unlink()
    stem = name.removesuffix(".gz")
    with pytest.raises(DataFormatError, match=rf"looked for {stem} or {stem}\.gz and found neither"):
        read_beir(folder)


@pytest.mark.parametrize(("name", "kind"), [("corpus.jsonl", "passages"), ("queries.jsonl.gz", "queries")])
def test_file_without_records_is_refused(folder: Path, name: str, kind: str) -> None:
    write_jsonl(folder / name, [])
    with pytest.raises(DataFormatError, match=f"holds no {kind}"):
        read_beir(folder)


def test_missing_folder_and_missing_qrels_are_rejected(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataFormatError, match="no such folder; looked for corpus"):
        read_beir(tmp_path / "nowhere")
    with pytest.raises(DataFormatError, match="no such file"):
        check_corpus(tmp_path / "corpus.jsonl")
    for path in (folder / "qrels").iterdir():
        path.unlink()
    with pytest.raises(DataFormatError, match=r"looked for qrels/\*\.tsv"):
        read_beir(folder)


@pytest.mark.parametrize(
    ("content", "line", "problem"),
    [
        ("", None, "is empty; even without judgements it needs the header"),
        ("q1\tp1\t1\n", 1, "the first line must be the header"),
        (HEADER + "q1\tp1\t1\nq1 p2 1\n", 3, "expected 3 columns separated by tabs"),
        (HEADER + "q1\t0\tp1\t1\n", 2, "found 4"),
        ("query-id\tcorpus-id\tscore\tby\n", 1, "the first line must be the header"),
        ("q1 0 p1 1\nq1\tp2\t1\n", 2, "expected 4 columns of TREC, found 3"),
        (HEADER + "q1\tp1\t0.5\n", 2, "must be a whole number, found '0.5'"),
        (HEADER + "q1\tp1\tyes\n", 2, "must be a whole number, found 'yes'"),
    ],
)
def test_malformed_qrels_are_reported_with_their_line(folder, content: str, line: int | None, problem: str):
    (folder / "qrels" / "train.tsv").write_text(content)
    with pytest.raises(DataFormatError) as caught:
        read_beir(folder)
    assert caught.value.path == folder / "qrels" / "train.tsv"
    assert caught.value.line == line
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    "lines",
    [
        "q1 0 p1 2\nq1 0 p2 0\n",
        "q1\t0\tp1\t2\nq1\t0\tp2\t0\n",
        "q1 0 p1 2.0\nq1 0 p2 0.0\n",
        HEADER + "q1\tp1\t2.0\nq1\tp2\t0\n",
    ],
)
def test_judgements_with_grades_as_decimals_and_of_trec_are_read(folder: Path, lines: str) -> None:
    (folder / "qrels" / "train.tsv").write_text(lines)
    assert read_beir(folder).qrels["train"] == {"q1": {"p1": 2, "p2": 0}}


def test_pair_judged_twice_is_refused(folder: Path) -> None:
    (folder / "qrels" / "train.tsv").write_text(HEADER + "q1\tp1\t1\nq1\tp1\t0\n")
    with pytest.raises(DuplicateIdError, match="passage 'p1' is judged twice for query 'q1'"):
        read_beir(folder)
