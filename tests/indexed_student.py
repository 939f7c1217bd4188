"""A student with random weights and an index of passages, for tests of adapters to other libraries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2llm.core.types import Passage, Task
from d2llm.models.student import Student
from d2llm.retrieval.index import Index
from tiny_models import TEXTS, write_trained_student

PASSAGES = [
    Passage(
        f"p{n}",
        text,
        title=f"the {text.split()[1]}" if n % 2 else "",
        document_id=f"d{n // 4}" if n >= 4 else "",
        position=n % 4,
        metadata={"year": 2000 + n, "language": "en"} if n else {"language": "de"},
    )
    for n, text in enumerate(TEXTS)
]
QUERIES = ["the cat reads a book", "snow falls on the train", "bread and salt"]


@dataclass(frozen=True)
class Indexed:
    """A student and its index, with the student's folder."""

    student_folder: Path
    student: Student
    index: Index

    def scores(self, query: str, task: Task = "asymmetric") -> dict[str, float]:
        """The full score of every passage, computed by the student."""
        vector = self.student.encode_queries([query]).vectors[0]
        vectors = self.student.encode_passages([passage.full_text for passage in PASSAGES]).vectors
        scores = self.student.score(vector, vectors, task)
        return {passage.id: float(score) for passage, score in zip(PASSAGES, scores, strict=True)}

    def dots(self, query: str, texts: list[str]) -> list[float]:
        """Inner products of the query's vector with the passages' vectors."""
        vector = self.student.query_vectors(self.student.encode_queries([query]).vectors)[0]
        return (self.student.encode_passages(texts).vectors @ vector).tolist()

    def found(self, query: str, **settings: Any) -> list[tuple[str, float]]:
        """Ids and scores of the search results."""
        ranking = self.index.search(query, **settings)
        return [(result.passage.id, result.score) for result in ranking.passages]


def make_indexed(root: Path) -> Indexed:
    """Write a student and an index under ``root``."""
    folder = write_trained_student(root, query_prefix="rain ")
    student = Student.load(folder, device="cpu", dtype="float32")
    index = Index.create(root / "index", student, student_source=str(folder), vector_format="float32")
    index.upsert(PASSAGES)
    return Indexed(folder, student, index)
