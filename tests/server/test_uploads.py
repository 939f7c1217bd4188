"""Documents from uploaded files."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra 'serve'")

from d2llm.core.types import Passage
from d2llm.data.documents import find_documents
from d2llm.server.errors import ServingError
from d2llm.server.settings import ServeSettings
from d2llm.server.uploads import documents_of


def upload(name: str, text: str) -> Passage:
    body = f'--b\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n{text}\r\n--b--\r\n'
    (document,) = documents_of(body.encode(), "multipart/form-data; boundary=b", ServeSettings())
    return document


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("intro\n# One  \ntext\n# Two", "a.md"),  # no heading is above all of the text
        ("```\n# code\n```\n<!-- # comment -->\n# One\ntext", "One"),
        ("# A #", "A"),
        ("#\ttwo words ##  \r\ntext", "two words"),
        ("# C#", "C#"),
        ("#\nnext line", "a.md"),
        ("## Deep", "Deep"),
        ("#none", "a.md"),
    ],
)
def test_the_first_heading_of_markdown_is_the_title(text: str, title: str):
    assert upload("a.md", text).title == title
    assert upload("a.txt", text).title == "a.txt"


@pytest.mark.parametrize("text", ["# " + "\n" * 50_000 + "x", "# x" + " " * 50_000 + "y", "#" + " " * 50_000 + "\nx"])
def test_long_white_space_after_a_heading_takes_little_time(text: str):
    begin = time.process_time()
    upload("a.md", text)
    assert time.process_time() - begin < 2


FACTS = {"path", "modified", "file_bytes"}
CONTENTS = {
    "a.txt": "A text.\nTwo lines.",
    "a.md": "---\ntitle: Front\ntags: [x, y]\nid: 7\n---\n# One\ntext with `code`\n## Two\nmore",
    "a.rst": "Title\n=====\n\nSee :func:`~a.b`.\n\nPart\n----\n\nmore",
    "a.html": "<title>T</title><h1>T</h1><p>one</p><h2>Two</h2><p>two",
    "a.csv": "Prices\nname;price\nTea;1,50\nMilk;2\n",
    "a.tsv": "name\tprice\nTea\t1.50\n",
    "a.jsonl": '{"a": 1.10, "b": true}\n{"a": null}\n',
    "corpus.jsonl": '{"_id": "x", "title": "T", "text": "one", "year": 1965}\n{"_id": "y", "text": "two"}\n',
    "ids.csv": "id,title,text,kind\nq1,T,one,k\nq2,,two,\n",
    "a.py": "def f():\n    return 1\n\n\nclass A:\n    def g(self):\n        return 2\n",
    "a.js": "function f() { return 1 }\n",
}
FILES = Path(__file__).parent.parent / "data" / "files"


@pytest.mark.parametrize(
    "name", [*CONTENTS, "bees.docx", "clocks.pdf", "tides.pptx", "trees.xlsx", "birds.epub", "a.parquet"]
)
def test_a_file_is_read_as_from_a_folder(tmp_path: Path, name: str):
    path = tmp_path / name
    if name == "a.parquet":
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.table({"name": ["Oak"], "age": [3]}), path)
    elif name in CONTENTS:
        path.write_text(CONTENTS[name])
    else:
        shutil.copy(FILES / name, path)
    found = find_documents([path])
    expected = list(found)
    assert expected
    assert not found.skipped
    head = f'--b\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'.encode()
    body = head + path.read_bytes() + b"\r\n--b--\r\n"
    uploaded = documents_of(body, "multipart/form-data; boundary=b", ServeSettings())
    assert uploaded.is_corpus == (name in ("corpus.jsonl", "ids.csv"))
    assert len(uploaded) == len(expected)
    for one, other in zip(uploaded, expected, strict=True):
        assert (one.id, one.title, one.text, one.document_id) == (other.id, other.title, other.text, other.document_id)
        assert getattr(one, "sections", None) == getattr(other, "sections", None)
        counted = {"row", "num_rows"} if uploaded.is_corpus else set()
        assert one.metadata == {k: v for k, v in other.metadata.items() if k not in FACTS | counted}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.exe", "x", "a.exe: files of this type cannot be read; send one of .bash"),
        ("a.csv.gz", "x", "a.csv.gz: files of this type cannot be read"),
        ("a.jsonl", '{"_id": "1", "text": "x"}\n{"_id": "2"}\n', "a.jsonl:2: field 'text' is missing"),
        ("a.pdf", "no pdf", "a.pdf: "),
        ("a.txt", "", "a.txt: it is empty"),
    ],
)
def test_what_cannot_be_read_is_named(name: str, content: str, message: str):
    with pytest.raises(ServingError) as error:
        upload(name, content)
    assert error.value.problem.message.startswith(message)
