"""F4: malformed files of every kind that d2llm reads, mutated from whole ones.

Each is read, or refused by an error of d2llm's that says what is wrong. What happens beyond that is a fault: another
exception, a crash, over 30 seconds, 2 GiB more than before. Files of JSON are also changed in their structure, with
checksums made right again, as an attacker could.
"""

from __future__ import annotations

import json
import os
import random
import resource
import select
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from campaign.frame import Outcome, Row, main, used_memory
from campaign.histories import fork
from campaign.mutations import mutated, restructured
from d2llm.core.errors import D2LLMError
from d2llm.core.shipped import shipped_recipes
from d2llm.data.beir import read_beir
from d2llm.data.documents import find_documents
from d2llm.data.labels import LabelStore, QueryLabels
from d2llm.data.pairs import read_pairs
from d2llm.models.student import Student
from d2llm.recipe.recipe import load_recipe
from d2llm.retrieval.index import Index
from d2llm.server.keys import add_key, read_keys
from d2llm.server.settings import load_settings
from d2llm.store.checksums import write_checked
from file_cases.docx_cases import docx_cases
from file_cases.epub_cases import epub_cases
from file_cases.odt_cases import odt_cases
from file_cases.pdf_cases import pdf_cases
from file_cases.pptx_cases import pptx_cases
from file_cases.xlsx_cases import xlsx_cases
from tiny_server import tiny_passages, write_tiny_student

SECONDS, BYTES = 30, 2 << 30
MAX_ERROR = 9_000  # characters
FILES = Path(__file__).parents[1] / "data" / "files"
_DOCUMENTS_AT_ONCE = 25
TEXTS = {
    "a.md": "---\ntitle: A\ndate: 2024-01-01\n---\n# One\n\nText [link](b.md) `code`\n\n"
    "| a | b |\n|---|---|\n| 1 | 2 |\n",
    "a.rst": "Title\n=====\n\n.. note:: Text\n\n:ref:`x` and *more*\n\n.. code-block:: python\n\n   a = 1\n",
    "a.html": '<!doctype html><html><head><title>T</title><meta charset="utf-8"></head><body><h1>A</h1><p>Text</p>'
    "<table><tr><td colspan=2>1</td></tr></table><pre>x</pre><svg><text>y</text></svg></body></html>",
    "a.csv": "id,title,text,year\n1,A,the cat,2001\n2,B,the dog,2002\n",
    "a.jsonl": '{"_id": "1", "title": "A", "text": "the cat", "metadata": {"year": 1}}\n{"_id": "2", "text": "dog"}\n',
    "a.py": 'def f(x):\n    """Says x."""\n    return x\n\n\nclass A:\n    def g(self):\n        return 1\n',
    "a.js": "export function f(x) { return x }\nclass A { g() { return 1 } }\n",
    "a.txt": "The cat sat on the mat.\n\nIt slept in the sun. Ünïcödé.\n",
}


class Kind(NamedTuple):
    """A kind of input: a whole one, and how it is read."""

    folder: Path
    read: Callable[[Path], object]


def _search(folder: Path) -> None:
    with Index.open(folder) as index:
        index.search("the cat", top_k=3)
        index.verify()


def _document(path: Path) -> None:
    documents = find_documents([path], seconds_per_file=SECONDS / 2, ocr="none")
    read = [of_file.file.id for of_file in documents.by_file()]
    skipped = {file.id for file in documents.skipped}
    assert {file.id for file in documents.files} <= {*read, *skipped}, "a file is neither read nor named as skipped"
    for file in documents.skipped:
        assert len(file.reason) < MAX_ERROR, f"{file.id}: {len(file.reason):,} characters are no reason"


def _encode(folder: Path) -> None:
    Student.load(folder, device="cpu", dtype="float32").encode_queries(["the cat"])


def _write_labels(folder: Path) -> None:
    store = LabelStore(folder, teacher="T", prompt="P", dataset="D")
    gram = np.eye(2, dtype=np.float32)
    store.write([QueryLabels(f"q{n}", ("p1", "p2"), np.array([n, -1.0], np.float32), gram) for n in range(8)])


def _write_data(folder: Path) -> None:
    (folder / "qrels").mkdir(parents=True)
    lines = [json.dumps({"_id": f"p{n}", "title": "A", "text": f"the cat {n}"}) for n in range(9)]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    (folder / "queries.jsonl").write_text("\n".join(json.dumps({"_id": f"q{n}", "text": "cat"}) for n in range(3)))
    (folder / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq0\tp0\t1\nq1\tp1\t2\n")


def make_kinds(folder: Path) -> dict[str, Kind]:
    """Whole inputs, one of each kind."""
    student = write_tiny_student(folder)
    index = Index.create(folder / "index", student, dtype="float32", metadata={"year": "integer", "language": "string"})
    index.upsert(tiny_passages(20))
    index.upsert_documents([{"id": "long", "text": "the cat sat on the mat " * 90}])
    index.close()
    for name in ("recipes", "documents", "keys", "settings", "pairs"):
        (folder / name).mkdir()
    for recipe in shipped_recipes().values():
        shutil.copy(recipe, folder / "recipes")
    add_key(folder / "keys" / "keys.json", "page", "write", 7, indexes=["docs"])
    settings = 'host = "127.0.0.1"\nport = 0\nallowed_hosts = ["a", "b"]\nrequests_per_minute = 5\nstudent = "x"\n'
    (folder / "settings" / "serve.toml").write_text(settings)
    lines = [json.dumps({"sentence1": f"a cat {n}", "sentence2": "a dog", "label": n % 2}) for n in range(9)]
    (folder / "pairs" / "dev.jsonl").write_text("\n".join(lines))
    (folder / "pairs" / "train.tsv").write_text("sentence1\tsentence2\tlabel\na\tb\t1\nc\td\t0\n")
    _write_labels(folder / "labels")
    _write_data(folder / "data")
    for case in (*docx_cases(), *odt_cases(), *epub_cases(), *pdf_cases(), *xlsx_cases(), *pptx_cases()):
        (folder / "documents" / case.name).write_bytes(case.data)
    for path in FILES.iterdir():
        shutil.copy(path, folder / "documents")
    for name, text in TEXTS.items():
        (folder / "documents" / name).write_text(text)
    readers: dict[str, Callable[[Path], object]] = {
        "index": _search,
        student.name: _encode,
        "recipes": lambda root: [load_recipe(path) for path in root.iterdir()],
        "keys": lambda root: read_keys(root / "keys.json"),
        "settings": lambda root: load_settings(file=root / "serve.toml"),
        "labels": lambda root: LabelStore.open_for_reading(root, teacher="T", prompt="P", dataset="D"),
        "data": read_beir,
        "pairs": read_pairs,
        "documents": _document,
    }
    return {name: Kind(folder / name, read) for name, read in readers.items()}


def mutate(path: Path, others: list[Path], chance: random.Random) -> None:
    content = path.read_bytes()
    if path.suffix == ".json" and chance.random() < 0.6:
        text = json.dumps(restructured(json.loads(content), chance)).replace("\\ud800", "")
        value = json.loads(text)
        path.unlink()
        if isinstance(value, dict) and "own_checksum" in value:
            write_checked(path, {name: part for name, part in value.items() if name != "own_checksum"})
        else:
            path.write_text(json.dumps(value))
        return
    other = chance.choice(others).read_bytes()
    path.unlink()  # it may be a link
    path.write_bytes(mutated(content, other, chance))


# Reading in a process that may die


def outcome_of(read: Callable[[], object], seconds: float = SECONDS) -> tuple[str, str]:
    """What reading came to, and what must not have happened."""
    reader, writer = os.pipe()

    def work() -> None:
        os.setsid()  # what it starts ends with it
        resource.setrlimit(resource.RLIMIT_DATA, (used_memory() + BYTES,) * 2)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        try:
            read()
            said = "read\n"
        except D2LLMError as error:
            text = str(error)
            kind = "refused" if 20 < len(text) < MAX_ERROR else f"fault\n{len(text):,} characters are no error"
            said = f"{kind}\n{text[:2_000]}"
        except BaseException:  # noqa: BLE001
            said = f"fault\n{traceback.format_exc()[-4_000:]}"
        os.write(writer, said.encode(errors="replace"))

    pid = fork(work)
    os.close(writer)
    ready, *_ = select.select([reader], [], [], seconds)
    said = os.read(reader, 32_768).decode(errors="replace") if ready else ""
    os.close(reader)
    if not ready:
        os.killpg(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if not ready:
        return "fault", f"over {seconds} s"
    if not said:
        return "fault", f"ended with status {status}"
    kind, _, detail = said.partition("\n")
    return kind, detail if kind == "fault" else ""


@contextmanager
def prepare(folder: Path) -> Iterator[Callable[[random.Random], Outcome]]:
    torch.set_num_threads(1)  # its threads would not be there in a fork
    kinds = make_kinds(folder)
    _search(kinds["index"].folder)  # compiled once

    def case(chance: random.Random) -> Outcome:
        name = chance.choice(sorted(kinds) if chance.random() < 0.5 else sorted({*kinds} - {"documents"}))
        kind = kinds[name]
        files = sorted(path for path in kind.folder.rglob("*") if path.is_file() and path.name != "write.lock")
        copy = folder / f"copy-{chance.getrandbits(64):x}" / name
        chosen = chance.sample(files, min(_DOCUMENTS_AT_ONCE, len(files))) if name == "documents" else files
        for path in chosen:
            (target := copy / path.relative_to(kind.folder)).parent.mkdir(parents=True, exist_ok=True)
            target.hardlink_to(path)
        for path in chosen if name == "documents" else [chance.choice(files)]:
            mutate(copy / path.relative_to(kind.folder), files, chance)
        said, fault = outcome_of(lambda: kind.read(copy))
        shutil.rmtree(copy.parent)
        return Outcome(f"{name}: {said}", fault, _DOCUMENTS_AT_ONCE if name == "documents" else 1)

    yield case


ROW = Row("malformed_files", "F4", 10_000, prepare)

if __name__ == "__main__":
    main(ROW)
