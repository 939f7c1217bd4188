"""A server with a tiny student and a few passages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from d2llm import Index, Passage, Student
from tiny_models import TEXTS, randomise, tiny_student_config, write_tiny_model

WORDS = [
    *("cat", "dog", "rain", "bread", "ship", "book", "train", "snow", "sun", "field", "house", "salt", "sea"),
    *("star", "noon", "winter"),
]


def tiny_passages(number: int = 60) -> list[Passage]:
    """Texts of words known to the tiny tokenizer, with years and languages."""
    return [
        Passage(
            f"p{n}",
            f"{TEXTS[n % len(TEXTS)]} and the {WORDS[n % 16]} by the {WORDS[(7 * n + 3) % 16]} number {n}",
            title=f"about {WORDS[n % 16]}" if n % 3 else "",
            document_id=f"d{n // 4}",
            position=n % 4,
            metadata={"year": 2000 + n % 10, "language": "en" if n % 2 else "de"},
        )
        for n in range(number)
    ]


def write_tiny_student(folder: Path, *, seed: int = 0) -> Path:
    """Save a student with random heads; return its folder."""
    student = Student.create(tiny_student_config(write_tiny_model(folder / "bert", "bert")), dtype="float32")
    randomise(student.pooling, seed=seed)
    randomise(student.interaction, seed=seed)
    student.save(folder / f"student-{seed}")
    return folder / f"student-{seed}"


def write_tiny_index(folder: Path, number: int = 60, name: str = "index") -> Path:
    """Write an index of ``tiny_passages``, with its student in the same folder."""
    student = folder / "student-0"
    index = Index.create(folder / name, student if student.is_dir() else write_tiny_student(folder), dtype="float32")
    index.upsert(tiny_passages(number))
    return folder / name


def tiny_settings(index: Path | dict[str, Path] | None, **changes: Any) -> Any:
    """Server settings for a tiny index, or several by name."""
    from d2llm.server.settings import ServeSettings

    return ServeSettings(**({"index": index, "port": 0, "dtype": "float32", "reload_seconds": 0.1} | changes))
