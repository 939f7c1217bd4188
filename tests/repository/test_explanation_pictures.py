"""The pictures of docs/explanation show what the shipped student computes."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from d2llm import Index, Student
from repository_scripts import load_script

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pictures() -> Any:
    return load_script("explanation_pictures")


@pytest.fixture(scope="module")
def student(pictures: Any) -> Student:
    return Student.load(pictures.STUDENT, dtype="float32")


def texts(path: Path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text(encoding="utf-8"))


def numbers(path: Path) -> list[float]:
    return [float(text) for text in texts(path) if re.fullmatch(r"[+-]?\d+\.\d+", text)]


def test_the_parts_of_scores_are_as_in_the_picture(pictures: Any, student: Student, tmp_path: Path):
    made, shown = tmp_path / "score.svg", ROOT / "docs" / "images" / "score.svg"
    pictures.draw_score(student, tmp_path / "five").write(made)
    assert [text for text in texts(made) if "." not in text[-4:-1]] == [
        text for text in texts(shown) if "." not in text[-4:-1]
    ]
    assert len(numbers(shown)) > 15
    assert numbers(made) == pytest.approx(numbers(shown), abs=0.15)
    first = numbers(shown)[:4]
    assert sum(first[:3]) == pytest.approx(first[3], abs=0.15)


def test_the_picture_of_distillation_is_as_the_script_draws_it(pictures: Any, tmp_path: Path):
    pictures.draw_distillation().write(tmp_path / "made.svg")
    shown = ROOT / "docs" / "images" / "distillation.svg"
    assert (tmp_path / "made.svg").read_text(encoding="utf-8") == shown.read_text(encoding="utf-8")


def test_no_score_of_the_certificate_is_below_the_bound_of_the_others(pictures: Any, student: Student, tmp_path: Path):
    passages = list(itertools.islice(pictures.docstrings(), 200))
    with Index.create(tmp_path / "docs", student) as index:
        index.upsert(passages)
        pictures.draw_certificate(index).write(tmp_path / "certificate.svg")
        pictures.draw_storage(tmp_path / "docs", len(passages)).write(tmp_path / "storage.svg")
    for drawn, shown in ((tmp_path, 200), (ROOT / "docs" / "images", 1_000)):
        scores = numbers(drawn / "certificate.svg")
        (bound,) = re.findall(r"([\d.]+): no score of the other", " ".join(texts(drawn / "certificate.svg")))
        assert len(scores) == 10
        assert scores == sorted(scores, reverse=True)
        assert float(bound) < scores[-1]
        (total,) = re.findall(r"among ([\d,]+) passages: 128 were scored", texts(drawn / "certificate.svg")[0])
        assert int(total.replace(",", "")) >= shown
    assert any("token embeddings" in text for text in texts(tmp_path / "storage.svg"))
