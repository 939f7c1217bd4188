"""Documents from uploaded files."""

from __future__ import annotations

import shutil
import time
import tracemalloc
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra 'serve'")

from d2llm.core.types import Passage
from d2llm.data.documents import find_documents
from d2llm.server.errors import ServingError
from d2llm.server.settings import ServeSettings
from d2llm.server.uploads import _files_of, _stored, documents_of

LIMITS = ServeSettings()


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


def form(*parts: bytes, boundary: bytes = b"b", end: bytes = b"--") -> bytes:
    return b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts) + b"--" + boundary + end + b"\r\n"


def part(name: str, content: bytes, *headers: str) -> bytes:
    lines = [f'Content-Disposition: form-data; name="file"; filename="{name}"', *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def read(body: bytes, kind: str = "multipart/form-data; boundary=b") -> list[Passage]:
    return [*documents_of(body, kind, LIMITS)]


@pytest.mark.parametrize(
    "kind", ["message/rfc822", "multipart/mixed; boundary=c", "message/partial", "text/plain; charset=utf-16", "x"]
)
def test_the_type_of_a_part_does_not_change_its_content(kind: str):
    content = b"Subject: x\r\n\r\n--c\r\n\r\none line\r\n--c--"
    (document,) = read(form(part("a.txt", content, f"Content-Type: {kind}")))
    assert document.text.split() == content.decode().split()


def test_nested_forms_are_no_forms():
    body = part("a.txt", b"deep down")
    for depth in range(3_000):
        kind = f"Content-Type: multipart/mixed; boundary=n{depth}"
        body = part("a.txt", form(body, boundary=b"n%d" % depth), kind)
    (document,) = read(form(body))
    assert "deep down" in document.text


def test_bytes_of_files_are_stored_as_they_are(tmp_path: Path):
    content = bytes(range(256)) * 3 + b"\r\n--\r\n--a\r\n\n\r" + b"one\r\ntwo\nthree\rfour"
    names = ["a.txt", "näher (1).txt", 'quote %22" '.replace('"', "") + ".txt"]
    kind = "multipart/form-data; boundary=b"
    files = _stored(_files_of(form(*(part(name, content) for name in names)), kind, LIMITS), tmp_path, LIMITS)
    assert [file.path.read_bytes() for file in files] == [content] * 3
    assert [file.id for file in files] == ["a.txt", "näher (1).txt", 'quote " .txt']


@pytest.mark.parametrize(
    ("encoded", "name"),
    [
        ("utf-8''n%C3%A4her.txt", "näher.txt"),
        ("ISO-8859-1''n%E4her.txt", "näher.txt"),
        *((f"{charset}''n%C3%A4her.txt", "näher.txt") for charset in ("", "hex", "idna", "undefined", "no-such")),
    ],
)
def test_the_name_may_be_encoded_as_older_clients_do_it(encoded: str, name: str):
    header = f'Content-Disposition: form-data; name="file"; filename*={encoded}'
    (document,) = read(form(header.encode() + b"\r\n\r\ntext"))
    assert document.id == name


MALFORMED = {
    "many empty parts": (form(*[b""] * 300_000), "Content-Disposition"),
    "many parts": (form(*[part("", b"")] * 300_000), r"has no name|more or longer parts"),
    "many files": (form(*[part("a.txt", b"x")] * 3_000), r"more or longer parts .*max_texts"),
    "line ends": (form(b"\r\n" * (4 << 20)), "Content-Disposition"),
    "line ends before the first part": (b"\r\n" * (4 << 20) + form(part("a.txt", b"")), "is empty|cannot be parsed"),
    "line feeds": (form(part("a.txt", b"x")).replace(b"\r", b""), "cannot be parsed"),
    "many headers": (form(part("a.txt", b"x", *(f"X-{n}: 1" for n in range(100_000)))), "more or longer parts"),
    "a long header": (form(part("a.txt", b"x", "X-Long: " + "x" * (8 << 20))), "more or longer parts"),
    "a long name": (form(part("x" * (1 << 20) + ".txt", b"x")), "more or longer parts"),
    "a name that is too long for an id": (form(part("x" * 5_000 + ".txt", b"x")), "its name has 5,004 characters"),
    "an encoded part": (form(part("a.txt", b"eA==", "Content-Transfer-Encoding: base64")), "encoded as 'base64'"),
    "no end": (form(part("a.txt", b"x"), end=b""), "Unexpected end"),
    "half of a boundary again and again": (b"--b\r\n" + part("a.txt", b"\r\n--" * (3 << 20)), "Unexpected end"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_forms_are_refused_within_little_time_and_memory(name: str):
    body, message = MALFORMED[name]
    read(form(part("a.txt", b"x")))  # what is imported at the first form is not counted
    tracemalloc.start()
    begin = time.process_time()
    try:
        with pytest.raises(ServingError, match=message) as error:
            read(body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.process_time() - begin < 3
    assert peak < 5 * len(body) + (8 << 20)
    assert error.value.problem.status == 400
    assert len(error.value.problem.message) < 1_000


@pytest.mark.parametrize("kind", ["multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; x=b"])
def test_a_form_needs_a_boundary(kind: str):
    with pytest.raises(ServingError, match="boundary"):
        read(form(part("a.txt", b"x")), kind)
