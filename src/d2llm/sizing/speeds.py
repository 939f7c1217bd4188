"""How fast a machine encodes, scans and scores: measured on this one and kept, or shipped with d2llm."""

from __future__ import annotations

import platform
import re
from importlib.resources import files
from pathlib import Path

from platformdirs import user_cache_path
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from d2llm.core.fallbacks import fell_back
from d2llm.core.files import write_json
from d2llm.core.machine import cpu_fact
from d2llm.core.names import counted

GRAPH_ROWS = 16_384
"""Rows of the graph by which ``linked_rows`` is measured; linking a row takes longer among more, by the logarithm."""


class Speed(BaseModel):
    """A measured number and what it was measured by."""

    model_config = ConfigDict(frozen=True)

    value: float = Field(gt=0)
    source: str


class TeacherSpeed(Speed):
    """Pairs that a teacher scores, a second: with the prompt ``pair_tokens`` long, of which ``passage_tokens`` vary."""

    pair_tokens: float = Field(gt=0)
    passage_tokens: float = Field(ge=0)

    def pairs(self, passage_tokens: float) -> float:
        """Pairs a second with passages of so many tokens, if the time grows in proportion to the tokens of a pair."""
        return self.value * self.pair_tokens / (self.pair_tokens + passage_tokens - self.passage_tokens)


class Speeds(BaseModel):
    """The speeds of one machine with one student; None was not measured. All are of one core.

    Attributes:
        machine: its processor.
        threads: threads that encoded passages; their speed is divided by it.
        student: fingerprint of the student.
        passage_tokens: tokens of passages that are encoded, a second.
        query_ms: milliseconds to encode a query, with the vectors of its tokens if the score counts them.
        scan_bytes: bytes of vectors that the exact scan reads, a second, by format.
        products: dimensions of single vectors that are multiplied with a query, a second, by format.
        visited_rows: rows that a search of an approximate index visits, a second, to compare their neighbours.
        segment_ms: milliseconds of BM25 for each segment of words, however few they are.
        words_ms: milliseconds of what else a search does that counts words, also of windows, whatever the size.
        postings: postings that BM25 reads, a second.
        candidate_words: words of candidates in which BM25 looks for those of a query, a second.
        compared_tokens: dimensions of the vectors of candidates' tokens that are compared with all tokens of a query, a
            second, by format.
        interaction_pairs: pairs that the interaction scores, a second.
        result_ms: milliseconds to read the texts of ten results, and for all else that does not depend on the size.
        written_text_bytes: bytes of texts that are written to an index, with their words, a second.
        linked_rows: rows that are linked while an approximate index of ``GRAPH_ROWS`` is built, a second.
        teachers: pairs that a teacher scores, a second, by teacher.
        slow_ratio: p99 of the time of a search over its median.
        process_bytes: memory of a process that has loaded the student.
    """

    model_config = ConfigDict(frozen=True)

    machine: str
    threads: int
    student: str
    passage_tokens: Speed | None = None
    query_ms: Speed | None = None
    scan_bytes: dict[str, Speed] = Field(default_factory=dict[str, Speed])
    products: dict[str, Speed] = Field(default_factory=dict[str, Speed])
    visited_rows: Speed | None = None
    segment_ms: Speed | None = None
    words_ms: Speed | None = None
    postings: Speed | None = None
    candidate_words: Speed | None = None
    compared_tokens: dict[str, Speed] = Field(default_factory=dict[str, Speed])
    interaction_pairs: Speed | None = None
    result_ms: Speed | None = None
    written_text_bytes: Speed | None = None
    linked_rows: Speed | None = None
    teachers: dict[str, TeacherSpeed] = Field(default_factory=dict[str, TeacherSpeed])
    slow_ratio: Speed | None = None
    process_bytes: Speed | None = None

    def __str__(self) -> str:
        """The machine and its threads."""
        return f"{self.machine}, {counted(self.threads, 'thread')}"

    def without_student(self) -> Speeds:
        """Those that do not depend on the student, for another one."""
        student = ("passage_tokens", "query_ms", "interaction_pairs", "slow_ratio", "process_bytes")
        return self.model_copy(update=dict.fromkeys(student))


def processor_name() -> str:
    """The name of this machine's processor."""
    return cpu_fact("model name") or platform.processor() or platform.machine()


def speeds_path(student: str, threads: int) -> Path:
    """The file in the user's cache folder with this machine's speeds for a student's fingerprint."""
    machine = re.sub(r"[^A-Za-z0-9]+", "-", processor_name()).strip("-")
    return user_cache_path("d2llm") / "speeds" / f"{machine}-{student}-{threads}.json"


def keep_speeds(speeds: Speeds) -> Path:
    """Write speeds of this machine to its file, with those of teachers measured before; returns the file."""
    path = speeds_path(speeds.student, speeds.threads)
    kept = read_speeds(speeds.student, speeds.threads)
    teachers = {} if kept is None else kept.teachers
    path.parent.mkdir(parents=True, exist_ok=True)
    content = speeds.model_copy(update={"teachers": {**teachers, **speeds.teachers}})
    write_json(path, content.model_dump(mode="json"))
    return path


def read_speeds(student: str, threads: int) -> Speeds | None:
    """The kept speeds of this machine for a student's fingerprint; None if it was not measured."""
    path = speeds_path(student, threads)
    if not path.is_file():
        return None
    try:
        return Speeds.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, ValidationError) as error:
        fell_back("kept speeds", f"{path} cannot be used ({error}); measure again with `d2llm size --measure`")
        return None


def shipped_speeds(student: str) -> Speeds:
    """The speeds that ship with d2llm, from the benchmarks' results; without the student's own for another student."""
    speeds = Speeds.model_validate_json((files("d2llm.sizing") / "speeds.json").read_text(encoding="utf-8"))
    return speeds if student == speeds.student else speeds.without_student()
