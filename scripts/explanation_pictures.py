"""Draw the pictures of docs/explanation, from searches of a shipped student.

    python scripts/explanation_pictures.py [--out docs/images]

The parts of a score come from five sentences, so they are the same wherever the student computes the same. The
certificate and the sizes of files come from an index of the docstrings of some modules of Python's standard library.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.sax.saxutils import escape

from d2llm import Index, Passage, Student

STUDENT = "d2llm-minilm"
QUERY = "how do I read a file line by line?"
PASSAGES = {
    "lines": "Iterating over an open file gives its lines, one at a time.",
    "readline": "The readline module edits command lines and keeps a history.",
    "path": "Path.read_text opens the file, reads its text and closes it.",
    "csv": "The csv module reads and writes tables as comma-separated values.",
    "gc": "The garbage collector finds reference cycles.",
}
MODULES = (
    *("argparse", "array", "ast", "asyncio", "base64", "calendar", "collections", "concurrent.futures", "configparser"),
    *(
        "csv",
        "datetime",
        "decimal",
        "difflib",
        "email.message",
        "enum",
        "fractions",
        "functools",
        "gzip",
        "http.client",
    ),
    *("inspect", "io", "ipaddress", "itertools", "json", "logging", "math", "os", "pathlib", "random", "re", "shutil"),
    *("socket", "sqlite3", "ssl", "statistics", "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading"),
    *("tokenize", "traceback", "typing", "unittest", "urllib.request", "uuid", "xml.dom.minidom", "zipfile", "zlib"),
)
GRADES = {"answers it": 3.1, "partly": 0.9, "same topic": -0.6, "other topic": -4.0}
"""Log-odds of a teacher in the picture of distillation: an example."""
SCORES = {"answers it": 1.9, "partly": 1.6, "same topic": 0.2, "other topic": -1.5}
"""Scores of a student before a step, for the same passages: an example."""
STYLE = """<style>
text { fill: #111; } .small { font-size: 12px; fill: #444; } .line { stroke: #555; stroke-width: 1.5; }
.a { fill: #2a9d8f; } .b { fill: #e9a23b; } .c { fill: #7a6fd0; } .d { fill: #c65f6a; }
@media (prefers-color-scheme: dark) { text { fill: #eee; } .small { fill: #bbb; } .line { stroke: #bbb; } }
</style>"""


class Picture:
    """An SVG that follows light and dark mode."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'font-family="system-ui, sans-serif" font-size="14" role="img" aria-label="{escape(title)}">'
        )
        self._elements: list[str] = []

    def text(self, x: float, y: float, text: str, *, small: bool = False, anchor: str = "start") -> None:
        """A line of text."""
        kind = ' class="small"' if small else ""
        self._elements.append(f'<text{kind} x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>')

    def bar(self, x: float, y: float, width: float, kind: str, height: float = 22) -> None:
        """A bar, or a box."""
        geometry = f'x="{x:.1f}" y="{y:g}" width="{max(width, 0):.1f}" height="{height:g}" rx="2"'
        self._elements.append(f'<rect class="{kind}" {geometry}/>')

    def line(self, x1: float, y1: float, x2: float, y2: float) -> None:
        """A straight line."""
        self._elements.append(f'<line class="line" x1="{x1:.1f}" y1="{y1:g}" x2="{x2:.1f}" y2="{y2:g}"/>')

    def write(self, path: Path) -> None:
        """Write the file."""
        path.write_text("\n".join([self._head, STYLE, *self._elements, "</svg>", ""]), encoding="utf-8")


def draw_score(student: Student, folder: Path) -> Picture:
    """What the score of each sentence is made of."""
    with Index.create(folder, student) as index:
        index.upsert([Passage(name, text) for name, text in PASSAGES.items()])
        ranking = index.search(QUERY, explain=True)
    picture = Picture(
        860, 90 + 64 * len(ranking), "Scores of five passages, each as a sum of vectors, words and tokens"
    )
    picture.text(10, 24, f"“{QUERY}”")
    for x, kind, name in (
        (10, "a", "inner product of vectors"),
        (210, "b", "words (BM25)"),
        (340, "c", "tokens (MaxSim)"),
    ):
        picture.bar(x, 40, 14, kind, 14)
        picture.text(x + 20, 52, name, small=True)
    scale = 560 / ranking[0].score
    for position, result in enumerate(ranking):
        why, y = result.explanation, 80 + 64 * position
        assert why is not None
        picture.text(10, y + 10, f"{result.rank}  {result.passage.text}")
        x = 24.0
        for kind, value in (("a", why.dot), ("b", why.lexical), ("c", why.tokens)):
            picture.bar(x, y + 17, (value or 0) * scale, kind)
            if (value or 0) * scale > 40:
                picture.text(x + (value or 0) * scale / 2, y + 33, f"{value:.1f}", small=True, anchor="middle")
            x += (value or 0) * scale
        picture.text(x + 8, y + 33, f"{result.score:.1f}")
    return picture


def docstrings() -> Iterator[Passage]:
    """The docstrings of functions, classes and methods of the modules, once each."""
    seen = set[str]()
    for module in map(importlib.import_module, MODULES):
        for name, value in sorted(vars(module).items()):
            if getattr(value, "__module__", None) != module.__name__:
                continue  # imported from another module
            members: list[tuple[str, Any]] = [(name, value)]
            if inspect.isclass(value):
                members += [(f"{name}.{each}", member) for each, member in sorted(vars(value).items())]
            for full_name, member in members:
                text = member.__doc__ if callable(member) and "._" not in f".{full_name}" else None
                if text and len(text) > 40 and text not in seen:
                    seen.add(text)
                    yield Passage(
                        f"{module.__name__}.{full_name}",
                        inspect.cleandoc(text)[:600],
                        title=f"{module.__name__}.{full_name}",
                    )


def draw_certificate(index: Index) -> Picture:
    """The first scores of an exact search, and the bound that no other passage exceeds."""
    ranking = index.search(QUERY, exact=True, top_k=10)
    certificate = ranking.certificate
    assert certificate is not None
    picture = Picture(
        860, 110 + 30 * len(ranking), "Ten scores, all above the bound of every passage that was not scored"
    )
    total = certificate.num_scored + certificate.num_left
    picture.text(10, 24, f"“{QUERY}”, among {total:,} passages: {certificate.num_scored:,} were scored")
    scale, left = 430 / ranking[0].score, 330
    bound = left + certificate.highest_bound_left * scale
    for position, result in enumerate(ranking):
        y = 44 + 30 * position
        picture.text(left - 10, y + 16, result.passage.id, anchor="end")
        picture.bar(left, y, result.score * scale, "a")
        picture.text(left + result.score * scale + 8, y + 16, f"{result.score:.1f}")
    bottom = 50 + 30 * len(ranking)
    picture.line(bound, 36, bound, bottom)
    note = f"{certificate.highest_bound_left:.1f}: no score of the other {certificate.num_left:,} passages is higher"
    picture.text(bound, bottom + 20, note, small=True, anchor="middle")
    return picture


def draw_storage(folder: Path, num_passages: int) -> Picture:
    """Bytes per passage of each kind of file."""
    sizes = defaultdict[str, int](int)
    for file in folder.rglob("*"):
        if file.is_file():
            sizes[file.name.partition("-0")[0].removesuffix("-wal").removesuffix("-shm")] += file.stat().st_size
    names = {
        "passages.db": "texts, metadata, second copy of vectors",
        "token-vectors": "token embeddings",
        "token-places": "where those of a passage begin",
        "words": "words with their counts, for BM25",
        "vectors": "one vector for each passage",
    }
    shown = sorted(((size, name) for name, size in sizes.items() if name in names), reverse=True)
    picture = Picture(860, 70 + 40 * len(shown), "Bytes of each kind of file for one passage")
    picture.text(
        10, 24, f"Bytes for each of {num_passages:,} passages, {sum(sizes.values()) / num_passages:,.0f} together"
    )
    scale = 330 / shown[0][0]
    for index, (size, name) in enumerate(shown):
        y = 48 + 40 * index
        picture.text(130, y + 16, name, anchor="end")
        picture.bar(140, y, size * scale, "abcd"[index % 4])
        picture.text(150 + size * scale, y + 16, f"{size / num_passages:,.0f}  {names[name]}", small=True)
    return picture


def softmax(values: Sequence[float]) -> list[float]:
    """The values as a distribution."""
    powers = [math.exp(value) for value in values]
    return [power / sum(powers) for power in powers]


def draw_distillation() -> Picture:
    """From a teacher's grades to a loss: two distributions over the passages of a query."""
    picture = Picture(860, 90 + 62 * len(GRADES), "A teacher's log-odds and a student's scores as two distributions")
    target, predicted = softmax([*GRADES.values()]), softmax([*SCORES.values()])
    for x, text in ((130, "teacher: log-odds of yes, and their softmax"), (500, "student: scores, and their softmax")):
        picture.text(x, 24, text)
    for index, (name, grade) in enumerate(GRADES.items()):
        y = 46 + 62 * index
        picture.text(110, y + 18, name, anchor="end")
        for x, value, part, kind in ((130, grade, target[index], "b"), (500, SCORES[name], predicted[index], "a")):
            picture.text(x, y + 18, f"{value:+.1f}")
            picture.bar(x + 45, y + 2, part * 220, kind)
            picture.text(x + 53 + part * 220, y + 18, f"{part:.2f}", small=True)
    loss = sum(p * math.log(p / q) for p, q in zip(target, predicted, strict=True))
    picture.text(
        130,
        68 + 62 * len(GRADES),
        f"loss of this query: Σ p log(p / q) = {loss:.3f}; its gradient moves the student's bars",
    )
    return picture


def main() -> None:
    """Draw all pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "images")
    arguments = parser.parse_args()
    student = Student.load(STUDENT, dtype="float32")
    draw_distillation().write(arguments.out / "distillation.svg")
    with TemporaryDirectory() as folder:
        draw_score(student, Path(folder, "five")).write(arguments.out / "score.svg")
        passages = list(docstrings())
        with Index.create(Path(folder, "docs"), student) as index:
            index.upsert(passages)
            draw_certificate(index).write(arguments.out / "certificate.svg")
            draw_storage(Path(folder, "docs"), len(passages)).write(arguments.out / "storage.svg")


if __name__ == "__main__":
    main()
