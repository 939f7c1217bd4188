"""What is to be sized, and numbers as people write them: 50M passages, 64 GiB."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import get_args

from d2llm.core.errors import InputError
from d2llm.core.shipped import DEFAULT_STUDENT
from d2llm.core.types import DEFAULT_NUM_CANDIDATES, Task
from d2llm.store.index_manifest import VectorCopies
from d2llm.store.vector_formats import make_format

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
    return round(float(re.sub("[_,]", "", match[1])) * units[match[2].lower()], 6)


@dataclass(frozen=True, slots=True)
class SizePlan:
    """What is to be built and searched, and at which prices.

    Attributes:
        passages: number of passages.
        tokens: mean tokens of a passage, as the student counts them.
        qps: queries a second at which the load is steady; None asks for no machines.
        recall: share of the exact first ten results that the candidates of a search must hold; above what an
            approximate index was measured to find, the vectors are scanned.
        student: a folder, or the name of a shipped one.
        task: whether a passage answers a query (asymmetric) or means the same; None: what the student was trained for.
        vector_format: how the vectors are stored (``store.vector_formats.FORMATS``).
        vector_copies: number of copies of each vector.
        window_vectors: format of window vectors, "none", or "auto" as for a new index.
        token_vectors: the same for those of tokens.
        num_candidates: number of passages that get the full score in a search.
        teacher: the teacher that labels pairs; None labels none.
        queries: number of queries whose candidates the teacher labels.
        candidates: number of candidates that it labels for each.
        shards: at least so many shards, even if fewer fit the memory. One core searches a shard, so smaller ones
            answer sooner.
        machine_memory: bytes of memory of one machine that d2llm may use; None means what is available on this one.
        machine_cores: number of cores of one machine; None means those of this one.
        core_hour_price: price of a core for an hour.
        memory_price: price of a GiB of memory for a month.
        disk_price: price of a GiB of disk for a month.
    """

    passages: int
    tokens: int = 128
    qps: float | None = None
    recall: float = 0.99
    student: str = DEFAULT_STUDENT
    task: Task | None = None
    vector_format: str = "bfloat16"
    vector_copies: VectorCopies = 2
    window_vectors: str = "auto"
    token_vectors: str = "auto"
    num_candidates: int = DEFAULT_NUM_CANDIDATES
    teacher: str | None = None
    queries: int = 10_000
    candidates: int = 20
    shards: int = 1
    machine_memory: int | None = None
    machine_cores: int | None = None
    core_hour_price: float | None = None
    memory_price: float | None = None
    disk_price: float | None = None

    def check(self) -> None:
        """Check the plan before anything is loaded.

        Raises:
            InputError: a number is out of range, or a format is unknown.
        """
        counts = ("passages", "tokens", "num_candidates", "queries", "candidates", "shards")
        for name in (*counts, "machine_memory", "machine_cores"):
            value: int | None = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value:,}, but must be at least 1")
        if self.shards > self.passages:
            raise InputError(f"shards is {self.shards:,}, but there are only {self.passages:,} passages")
        if not 0 < self.recall <= 1:
            raise InputError(f"recall is {self.recall:g}; give a share above 0 and at most 1, such as 0.99")
        if self.qps is not None and not 0 < self.qps < math.inf:
            raise InputError(f"qps is {self.qps:g}; give queries a second above 0, or leave it out")
        for name in ("core_hour_price", "memory_price", "disk_price"):
            price: float | None = getattr(self, name)
            if price is not None and not 0 <= price < math.inf:
                raise InputError(f"{name} is {price:g}; give a price of at least 0, or leave it out")
        if self.vector_copies not in get_args(VectorCopies):
            raise InputError(f"{self.vector_copies!r} copies of the vectors are not supported; give 1 or 2")
        if self.task not in (None, *get_args(Task)):
            raise InputError(f"task is {self.task!r}; give {' or '.join(get_args(Task))}")
        make_format(self.vector_format, 8)
        for name in (self.window_vectors, self.token_vectors):
            if name not in ("auto", "none"):
                make_format(name, 8)
