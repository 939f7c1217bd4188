"""Data for tests of the page: sentences with metadata, function documentation, hostile texts, and a teacher."""

from __future__ import annotations

import inspect
import json
import shutil
import statistics
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d2llm import Index, Passage
from d2llm.core.types import Task
from d2llm.models.teachers.pair_teacher import PairTeacher, TeacherScores, TextPair, load_teacher
from d2llm.ops.rereading import StudentError
from d2llm.recipe import TeacherConfig
from d2llm.retrieval.calibrate import write_error
from d2llm.store.shards import Storage
from e2e.small_corpus import SENTENCES
from tiny_models import write_tiny_model
from tiny_server import write_tiny_index

PHONE = 360
"""Width in pixels."""
HOSTILE_QUERY = "hostile zebra"
HOSTILE = (
    "hostile zebra <script>alert('run')</script><script src='http://evil.example/a.js'></script>",
    'hostile zebra <img src=x onerror=alert(1)> <svg onload=alert(2)><a href="javascript:alert(3)">zebra</a>',
    "hostile zebra \u202eright to left\u202c \u2067\u05e9\u05dc\u05d5\u05dd zebra",
    "hostile zebra " + "endless" * 300,
    "hostile zebra 🦓🦓 \U00020000 zebra {{7*7}} ${alert(4)} ]]> <!-- zebra",
    "hostile zebra </p></article></main><iframe src='http://evil.example'></iframe><style>*{display:none}</style>",
)
SUBJECTS = ("kitchen", "trains", "garden", "sky", "health", "animals", "machines")


def page_passages() -> list[Passage]:
    """Sentences with subject, year and a flag; docstrings of the standard library; hostile texts."""
    sentences = [
        Passage(
            f"s{n}",
            text,
            metadata={
                "subject": SUBJECTS[min(n // 5, len(SUBJECTS) - 1)],
                "year": 2000 + n % 20,
                "checked": n % 2 == 0,
                "note": "it's <b>bold</b>" if n == 0 else None,
            },
        )
        for n, text in enumerate(SENTENCES)
    ]
    functions = [
        Passage(f"{module.__name__}.{name}", text, title=f"{module.__name__}.{name}")
        for module in (shutil, statistics)
        for name, value in sorted(vars(module).items())
        if not name.startswith("_") and inspect.isfunction(value) and (text := inspect.getdoc(value))
    ]
    hostile = [
        Passage(f'x{n}"><script>alert({n})</script>', text, title=f"<b onclick=alert(5)>zebra {n}</b>")
        for n, text in enumerate(HOSTILE)
    ]
    return [*sentences, *functions, *hostile]


def write_page_index(folder: Path) -> Path:
    """An index of ``page_passages`` with a shipped student."""
    index = Index.create(folder / "index", "d2llm-minilm")
    index.upsert(page_passages())
    return folder / "index"


def search(page: Any, text: str) -> None:
    """Type a query and wait for its results."""
    with page.expect_response(lambda response: asked(response.request).get("query") == text):
        page.locator("#query").fill(text)
    page.wait_for_selector("#results:not([aria-busy]) :is(.card, .message, .quiet)")


def asked(request: Any) -> dict[str, Any]:
    """The body of a search request; empty for other requests."""
    return json.loads(request.post_data) if request.url.endswith("/v1/search") else {}


def overflow(page: Any) -> int:
    """How many pixels the page is wider than the window."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def until(page: Any, expression: str, seconds: float = 20.0) -> None:
    """Wait until a JavaScript expression is true (Playwright's ``wait_for_function`` needs eval, which is blocked)."""
    deadline = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"{expression} did not become true"
        page.wait_for_timeout(30)


class WatchedTeacher:
    """A teacher that a test can block, slow down or make fail; ``queries`` are those of its calls, in their order."""

    def __init__(self, teacher: PairTeacher) -> None:
        self._teacher = teacher
        self.may_answer = threading.Event()
        self.reset()

    def reset(self) -> None:
        """Answer at once again, and forget the calls."""
        self.error: Exception | None = None
        self.queries: list[str] = []
        self.seconds = 0.0
        self.may_answer.set()

    @property
    def fingerprint(self) -> str:
        return self._teacher.fingerprint

    def prompt_fingerprint(self, task: Task) -> str:
        return self._teacher.prompt_fingerprint(task)

    def score_pairs(self, pairs: Sequence[TextPair], task: Task, **options: Any) -> TeacherScores:
        self.queries.append(pairs[0][0])
        assert self.may_answer.wait(30), "a test did not let the teacher answer"
        time.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        return self._teacher.score_pairs(pairs, task, **options)


def write_taught_index(folder: Path) -> dict[str, Any]:
    """Server settings for a tiny index with a tiny language model as teacher and a stored student error."""
    index, teacher = write_tiny_index(folder), str(write_tiny_model(folder / "teacher", "llama"))
    model = load_teacher(TeacherConfig(prompt="short").named(teacher), dtype="float32")
    write_error(
        Storage.open(index), model, "asymmetric", StudentError(0.1, 0.0, 0.5)
    )  # uncertain about some passages, not about all
    return {"index": index, "teacher": teacher, "prompt": "short", "teacher_ms": 60_000}
