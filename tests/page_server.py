"""What the tests of the page search: sentences with metadata, documentation of functions, and hostile texts."""

from __future__ import annotations

import inspect
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from d2llm import Index, Passage
from e2e.small_corpus import SENTENCES

PHONE = 360
"""Pixels."""
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
    """Sentences with subject, year and a flag; documentation of the standard library; hostile texts."""
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
    """An index of them by a student that ships."""
    index = Index.create(folder / "index", "d2llm-minilm")
    index.upsert(page_passages())
    return folder / "index"


def search(page: Any, text: str) -> None:
    """Type, and wait for the ranking of what was typed."""
    with page.expect_response(lambda answer: asked(answer.request).get("query") == text):
        page.locator("#query").fill(text)
    page.wait_for_selector("#results:not([aria-busy]) :is(.card, .message, .quiet)")


def asked(request: Any) -> dict[str, Any]:
    """The body of a search."""
    return json.loads(request.post_data) if request.url.endswith("/v1/search") else {}


def overflow(page: Any) -> int:
    """Pixels that a page is too wide."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def until(page: Any, expression: str, seconds: float = 20.0) -> None:
    """Wait until JavaScript is true. (Playwright's own ``wait_for_function`` needs eval, which the page forbids.)"""
    deadline = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"{expression} did not become true"
        page.wait_for_timeout(30)
