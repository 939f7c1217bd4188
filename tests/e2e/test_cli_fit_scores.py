"""``d2llm fit-scores`` with quality of passages, weights of words and words that passages lack; ``encode --prune``;
soups of students, and smaller vocabularies.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from d2llm.models.student import Student
from e2e.command_line import fail, succeed_with_report, write_lines
from tiny_models import TEXTS, randomise, tiny_student_config, word_tokenizer, write_tiny_model

NUM = 64


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, and a data set of which the first half of the passages answers queries of all splits."""
    folder = tmp_path_factory.mktemp("fit-scores")
    model = write_tiny_model(folder / "model", "modernbert", initializer_range=0.1)
    Student.create(tiny_student_config(model), device="cpu", dtype="float32").save(folder / "student")
    data = folder / "data"
    (data / "qrels").mkdir(parents=True)
    texts = [f"{TEXTS[n % 8]} {n}" for n in range(NUM)]
    write_lines(data / "corpus.jsonl", [{"_id": f"p{n}", "text": text} for n, text in enumerate(texts)])
    write_lines(data / "queries.jsonl", [{"_id": f"q{n}", "text": text} for n, text in enumerate(texts)])
    for split, first in (("train", 0), ("dev", 1), ("test", 2)):
        rows = [f"q{n}\tp{(n - first) % (NUM // 2)}\t1" for n in range(first, NUM, 3)]
        (data / "qrels" / f"{split}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]) + "\n")
    half = shutil.copytree(data, folder / "half")  # each passage is relevant in one split
    for split, numbers in (("train", range(32)), ("dev", range(32, NUM))):
        rows = [f"q{n}\tp{n}\t1" for n in numbers]
        (half / "qrels" / f"{split}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]) + "\n")
    (half / "qrels" / "test.tsv").unlink()
    write_lines(folder / "more.jsonl", [{"_id": "new", "text": "one more"}])
    return folder


def test_quality_and_term_weights_from_the_command_line(workspace: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    options = ("--no-window-vectors", "--queries", "24", "--quality", "--term-weights", "--device", "cpu")
    result, written = succeed_with_report(
        "fit-scores", workspace / "student", workspace / "data", "--out", new, *options, folder=tmp_path
    )
    report = written["result"]
    assert report["quality"]["num_relevant"] == {"data": 22}
    assert report["term_weights"]["num_words"]["data"] > 22
    assert f"quality: auc {report['quality']['auc']['data']:.3f} on data" in " ".join(result.stderr.split())
    fitted = Student.load(new, device="cpu", dtype="float32")
    assert fitted.quality is not None
    assert fitted.term_weights is not None
    arguments = ("--student", new, "--out", tmp_path / "i", "--prune", "0.25")
    _, encoded = succeed_with_report("encode", workspace / "data", *arguments, folder=tmp_path)
    assert encoded["result"]["num_pruned"] == NUM // 4


def test_a_soup_from_the_command_line(workspace: Path, tmp_path: Path) -> None:
    other = Student.load(workspace / "student", device="cpu", dtype="float32")
    other.prepare_training()
    randomise(other.backbone, scale=0.02)
    other.eval()
    other.save(tmp_path / "other")
    students = (workspace / "student", tmp_path / "other")
    options = ("--device", "cpu", "--out", tmp_path / "soup")
    _, written = succeed_with_report("soup", *students, *options, "--dev", workspace / "half", folder=tmp_path)
    report = written["result"]
    assert report["value"] >= max(report["values"]) > 0.5
    assert Student.load(tmp_path / "soup", device="cpu").fingerprint == report["fingerprint"]
    result, _ = succeed_with_report("soup", *students, *options, "--weight", "2", "--weight", "1", folder=tmp_path)
    assert "2 students in" in result.stderr
    fail(
        "soup", *students, *options, "--weight", "2", "--dev", workspace / "half", containing=["leave one of them out"]
    )


def test_document_expansion_from_the_command_line(workspace: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    options = ("--no-window-vectors", "--queries", "24", "--document-expansion", "--device", "cpu")
    result, written = succeed_with_report(
        "fit-scores", workspace / "student", workspace / "half", "--out", new, *options, folder=tmp_path
    )
    report = written["result"]["document_expansion"]
    assert report["num_passages"] == {"half": 32}
    assert f"document expansion: explained {report['explained']['half']:.3f} on half" in " ".join(result.stderr.split())
    succeed_with_report("encode", workspace / "half", "--student", new, "--out", tmp_path / "i", folder=tmp_path)
    _, found = succeed_with_report("search", tmp_path / "i", "the cat", folder=tmp_path)
    assert found["result"]
    message = ["words added by document expansion", "has none", "use the student that made the index"]
    fail(
        "index", tmp_path / "i", "add", workspace / "more.jsonl", "--student", workspace / "student", containing=message
    )


def test_a_student_without_quality_cannot_prune(workspace: Path, tmp_path: Path) -> None:
    arguments = ("--student", workspace / "student", "--out", tmp_path / "i", "--prune", "0.2")
    fail("encode", workspace / "data", *arguments, containing=["this student does not have", "fit-scores --quality"])


def test_students_are_pruned_from_the_command_line(workspace: Path, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", "bert", pad_token_id=word_tokenizer().pad_token_id)
    word_tokenizer().save_pretrained(model)
    student = Student.create(tiny_student_config(model), device="cpu", dtype="float32")
    student.save(tmp_path / "student")
    write_lines(tmp_path / "few.jsonl", [{"_id": "1", "text": TEXTS[0]}])
    write_lines(tmp_path / "others.jsonl", [{"_id": "1", "text": TEXTS[1]}, {"_id": "2", "text": TEXTS[0]}])
    arguments = (tmp_path / "few.jsonl", "--out", tmp_path / "new", "--check", tmp_path / "others.jsonl")
    result, written = succeed_with_report("prune-vocabulary", tmp_path / "student", *arguments, folder=tmp_path)
    assert written["result"]["kept"] < written["result"]["tokens"] == len(word_tokenizer())
    assert written["result"]["check"]["num_changed"] == 1
    assert "of 2 texts to check, 1 have other tokens now" in " ".join(result.stderr.split())
    pruned = Student.load(tmp_path / "new", device="cpu", dtype="float32")
    assert (pruned.encode_document(TEXTS[0]) == student.encode_document(TEXTS[0])).all()
    arguments = (tmp_path / "few.jsonl", "--out", tmp_path / "narrow", "--keep", "0.25")
    _, written = succeed_with_report("prune-neurons", tmp_path / "student", *arguments, folder=tmp_path)
    assert (written["result"]["neurons"], written["result"]["kept"]) == (48, 12)
