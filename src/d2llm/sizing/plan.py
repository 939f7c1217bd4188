"""What is to be sized, and numbers as people write them: 50M passages, 64 GiB."""

from __future__ import annotations

import math
import re
from typing import ClassVar

from d2llm.core.errors import InputError
from d2llm.core.settings import STUDENT_HELP, Settings, Shown, narrowed, setting
from d2llm.core.shipped import DEFAULT_STUDENT
from d2llm.core.types import Task
from d2llm.retrieval.settings import SearchSettings
from d2llm.store.index_spec import IndexSpec

_NUMBER = re.compile(r"([0-9][0-9_,]*(?:\.[0-9]+)?)\s*([a-z]*)", re.IGNORECASE)
_THOUSANDS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_BYTES = {
    "b": 1,
    **{f"{letter}{ending}": 1024**power for power, letter in enumerate("kmgt", 1) for ending in ("", "i", "ib")},
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)},
}


def parse_count(text: str, name: str = "the number") -> int:
    """A whole number above 0 such as ``50M``, ``10k``, ``2.5B`` or ``1_000``; ``name`` is its name in an error.

    Raises:
        InputError: it is not such a number.
    """
    value = _parse(text, _THOUSANDS)
    if value is None or value < 1 or value != int(value):
        raise InputError(
            f"{name} is {text!r}; give a whole number above 0, such as 20000, 10k (thousands), 50M (millions) or 2.5B "
            "(billions)"
        )
    return int(value)


def in_words(value: float) -> str:
    """A number with three digits and a word: 59.3 million."""
    words = ((1e12, " trillion"), (1e9, " billion"), (1e6, " million"), (1e3, " thousand"))
    unit, word = next(((unit, word) for unit, word in words if value >= unit), (1.0, ""))
    return f"{value / unit:.3g}{word}"


def parse_bytes(text: str, name: str = "the size") -> int:
    """A number of bytes such as ``64G`` or ``64GiB`` (times 1,024 cubed), or ``64GB`` (times 1,000 cubed).

    Raises:
        InputError: it is not such a number.
    """
    value = _parse(text, _BYTES)
    if value is None or value < 1:
        raise InputError(f"{name} is {text!r}; give bytes with a unit, such as 512MiB, 64GiB or 64GB")
    return int(value)


def _parse(text: str, units: dict[str, int]) -> float | None:
    match = _NUMBER.fullmatch(text.strip())
    if match is None or match[2].lower() not in units:
        return None
    value = round(float(re.sub("[_,]", "", match[1])) * units[match[2].lower()], 6)
    return value if math.isfinite(value) else None


_COUNT = Shown(metavar="N", parse=parse_count)
_PRICE = Shown(metavar="PRICE")


class SizePlan(Settings):
    """What is to be built and searched, and at which prices (in any currency)."""

    noun: ClassVar[str] = "setting of a plan"

    passages: int = setting(
        ..., "How many passages: 20000, 10k, 50M, 2.5B.", Shown(metavar="N", default="none", parse=parse_count), ge=1
    )
    tokens: int = setting(128, "Mean tokens of a passage, as the student counts them.", _COUNT, ge=1)
    student: str = setting(DEFAULT_STUDENT, STUDENT_HELP, Shown(metavar="NAME_OR_FOLDER"))
    task: Task | None = narrowed(IndexSpec, "task")
    vector_format: str = narrowed(IndexSpec, "vector_format")
    vector_copies: int = narrowed(IndexSpec, "vector_copies")
    window_vectors: str | None = narrowed(IndexSpec, "window_vectors")
    token_vectors: str | None = narrowed(IndexSpec, "token_vectors")
    qps: float | None = setting(
        None, "Queries a second, for the number of machines.", Shown(metavar="N", default="none"), gt=0
    )
    recall: float = setting(
        0.99,
        "Fraction of the exact first ten that a search must find; above what an approximate index was measured to "
        "find, the vectors are scanned.",
        Shown(metavar="FRACTION"),
        gt=0,
        le=1,
    )
    num_candidates: int = narrowed(SearchSettings, "num_candidates", _COUNT)
    shards: int = setting(
        1, "At least so many shards, even if fewer fit the memory; smaller ones answer sooner.", _COUNT, ge=1
    )
    machine_memory: int | None = setting(
        None,
        "Memory of one machine: 64GiB.",
        Shown(metavar="BYTES", default="what is free on this one", parse=parse_bytes),
        ge=1,
    )
    machine_cores: int | None = setting(
        None, "Cores of one machine.", Shown(metavar="N", default="those of this one", parse=parse_count), ge=1
    )
    teacher: str | None = setting(None, "Teacher that labels pairs.", Shown(metavar="MODEL", default="none"))
    queries: int = setting(10_000, "Queries whose candidates the teacher labels.", _COUNT, ge=1)
    candidates: int = setting(20, "Candidates that it labels for each.", _COUNT, ge=1)
    core_hour_price: float | None = setting(None, "Price of a core for an hour.", _PRICE, ge=0)
    memory_price: float | None = setting(None, "Price of a GiB of memory for a month.", _PRICE, ge=0)
    disk_price: float | None = setting(None, "Price of a GiB of disk for a month.", _PRICE, ge=0)

    def check(self) -> None:
        """Check the combination of the settings.

        Raises:
            InputError: there are more shards than passages, or a format is unknown.
        """
        from d2llm.store.vector_formats import make_format  # the command line, which imports this, does without NumPy

        if self.shards > self.passages:
            raise InputError(f"shards is {self.shards:,}, but there are only {self.passages:,} passages")
        make_format(self.vector_format, 8)
        for name in (self.window_vectors, self.token_vectors):
            if name not in ("auto", "none", None):
                make_format(name, 8)
