"""Rerankers that tests make in one call."""

from __future__ import annotations

from typing import Any

from d2llm.methods.rerankers.cascade import Cascade, OpenCascade
from d2llm.methods.rerankers.listwise import Listwise, OpenListwise
from d2llm.methods.rerankers.teacher import OpenTeacherReading, TeacherReading
from d2llm.models.listwise_reader import ListwiseReader


def cascade(
    teacher: Any, error: Any = None, num_passages: int | None = None, max_ms: float | None = None, **settings: Any
) -> OpenCascade:
    return Cascade(num_passages=num_passages, max_ms=max_ms, **settings).with_teacher(teacher, error)


def teacher_reading(teacher: Any, num_passages: int = 20, **settings: Any) -> OpenTeacherReading:
    return TeacherReading(num_passages=num_passages, **settings).with_teacher(teacher)


def listwise(reader: ListwiseReader, num_passages: int = 20) -> OpenListwise:
    return OpenListwise(Listwise(model="reader", num_passages=num_passages), reader)
