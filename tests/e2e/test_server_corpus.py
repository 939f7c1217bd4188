"""The contents of an index over HTTP: listing, reading, deleting, uploading files, and snapshots."""

from __future__ import annotations

import gzip
import io
import json
import shutil
from urllib.parse import quote

import numpy as np
import pytest

from d2llm import Index, Passage, Student
from d2llm.store.index_manifest import Chunking
from file_cases.epub_cases import epub, page
from tiny_models import TEXTS
from tiny_server import write_tiny_index, write_tiny_student

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")

from live_server import patient, served


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    with served(write_tiny_index(tmp_path_factory.mktemp("corpus"), 30)) as address:

        def send(method, path, status=200, **content):
            response = patient.request(method, address + path, **content)
            assert response.status_code == status, response.text
            return response.json()

        yield send


def all_pages(ask, path, name, **parameters):
    items, cursor = [], ""
    while cursor is not None:
        page = ask("GET", path, params={"cursor": cursor, "limit": 7, **parameters})
        assert len(page[name]) <= 7
        items += page[name]
        cursor = page["next_cursor"]
    return items


def test_ids_are_listed_in_pages_without_repeats(ask):
    assert all_pages(ask, "/v1/passages", "ids") == sorted(f"p{n}" for n in range(30))
    documents = all_pages(ask, "/v1/documents", "documents")
    assert [document["id"] for document in documents] == sorted(f"d{n}" for n in range(8))
    assert {document["id"]: document["num_passages"] for document in documents}["d7"] == 2
    assert ask("GET", "/v1/passages", params={"cursor": "p9"}) == {"ids": [], "next_cursor": None}
    ask("GET", "/v1/passages", 422, params={"limit": 0})


@pytest.mark.parametrize(
    ("method", "path", "message"),
    [
        ("GET", "/v1/passages?curser=p9", "query.curser: there is no such parameter; did you mean 'cursor'?"),
        ("GET", "/v1/documents?zzz", "query.zzz: there is no such parameter; there are: cursor, limit"),
        ("GET", "/v1/passages?limit=1&limit=2", "query.limit: is given several times; give it once"),
        ("POST", "/v1/search?top_k=3", "query.top_k: there is no such parameter; this address takes none"),
    ],
)
def test_a_parameter_that_an_address_does_not_have_is_refused(ask, method, path, message):
    body = {"query": "cat"} if method == "POST" else None
    assert ask(method, path, 422, json=body)["error"]["message"] == message


def test_a_document_is_read_and_deleted_whole(ask):
    text = "the cat sat on the mat. " * 12
    report = ask("POST", "/v1/documents", json={"documents": [{"id": "a/b", "text": text}], "chunk_tokens": 16})
    document = ask("GET", "/v1/documents/a/b")
    assert [passage["position"] for passage in document["passages"]] == list(range(1, report["num_added"] + 1))
    assert ask("DELETE", "/v1/documents/a/b")["num_deleted"] == report["num_added"] > 1
    ask("GET", "/v1/documents/a/b", 404)
    ask("DELETE", "/v1/documents/a/b", 404)
    assert "a/b#1" not in ask("GET", "/v1/passages", params={"limit": 1000})["ids"]


def test_what_passages_of_a_document_repeat_is_counted(tmp_path):
    text = " ".join(f"{sentence.capitalize()} {number}." for number, sentence in enumerate(TEXTS))
    with served(write_tiny_index(tmp_path, 4)) as address:
        body = {"documents": [{"id": "all", "text": text}], "chunk_tokens": 40, "chunk_overlap": 16}
        patient.post(f"{address}/v1/documents", json=body).raise_for_status()
        document = patient.get(f"{address}/v1/documents/all").json()
        texts = [passage["text"] for passage in document["passages"]]
        assert len(texts) > 2
        assert sum(map(len, texts)) > len(text)
        assert document["repeated"][0] == 0
        rest = [part[repeated:] for part, repeated in zip(texts, document["repeated"], strict=True)]
        assert " ".join(" ".join(rest).split()) == text


@pytest.mark.parametrize("name", ["a/b c", "two\nlines", "ends\n", "50%"])
def test_any_id_can_be_read_and_deleted(ask, name):
    ask("POST", "/v1/passages", json={"passages": [{"id": name, "text": "the cat", "document_id": name}]})
    assert ask("GET", f"/v1/passages/{quote(name)}")["id"] == name
    assert len(ask("GET", f"/v1/documents/{quote(name)}")["passages"]) == 1
    assert ask("DELETE", f"/v1/passages/{quote(name)}")["num_deleted"] == 1


def test_long_texts_and_titles_are_refused(ask):
    long = "cat " * 25_001
    for passage in ({"text": long}, {"text": "cat", "title": long}):
        answer = ask("POST", "/v1/passages", 400, json={"passages": [{"id": "long", **passage}]})
        assert "this server accepts 100,000" in answer["error"]["message"]
    documents = [{"id": "fine", "text": "the cat"}, {"id": "long", "text": "cat", "title": long}]
    answer = ask("POST", "/v1/documents", 400, json={"documents": documents})
    assert answer["error"]["field"] == "documents.1.title"
    ask("GET", "/v1/documents/fine", 404)
    answer = ask("POST", "/v1/files", 400, files={"file": ("long.md", f"# {long}\n\nThe cat.")})
    assert "title of long.md" in answer["error"]["message"]


def test_snapshots_are_listed_restored_and_deleted(ask):
    assert ask("POST", "/v1/index/snapshots", json={"name": "then"})["snapshots"] == ["then"]
    before = ask("GET", "/v1/index")["num_passages"]
    ask("DELETE", "/v1/documents/d3")
    assert ask("GET", "/v1/index")["num_passages"] == before - 4
    restored = ask("POST", "/v1/index/snapshots/then/restore")
    assert restored["num_passages"] == before
    assert restored["version"] == ask("GET", "/v1/index")["version"]
    assert len(ask("GET", "/v1/documents/d3")["passages"]) == 4
    assert ask("GET", "/v1/index/snapshots")["snapshots"] == ["then"]
    assert ask("DELETE", "/v1/index/snapshots/then")["snapshots"] == []
    assert "no snapshot" in ask("POST", "/v1/index/snapshots/then/restore", 404)["error"]["message"]
    ask("DELETE", "/v1/index/snapshots/then", 404)


def test_files_become_documents(ask):
    corpus = "\n".join(
        json.dumps(record) for record in ({"_id": 41, "text": "a cat"}, {"id": "forty two", "text": "a dog"})
    )
    files = [
        ("file", ("corpus.jsonl", corpus.encode())),
        ("file", ("more.jsonl.gz", gzip.compress(b'{"id": "\xc3\xa9", "text": "rain\\r\\nand snow"}\n'))),
        ("file", ("näher.md", b"# Of ships\r\n\r\nthe sea\r\n")),
    ]
    report = ask("POST", "/v1/files", files=files)
    assert report["num_documents"] == 4
    for name, text in (("41", "a cat"), ("forty two", "a dog"), ("é", "rain\r\nand snow")):
        assert ask("GET", f"/v1/documents/{name}")["passages"][0]["text"] == text
    passages = ask("GET", "/v1/documents/näher.md")["passages"]  # the index splits texts after a few tokens
    assert {passage["title"] for passage in passages} == {"Of ships"}
    assert " ".join(" ".join(passage["text"] for passage in passages).split()) == "the sea"
    for name in ("41", "forty two", "é", "näher.md"):
        ask("DELETE", f"/v1/documents/{name}")


def test_an_upload_says_what_was_left_out(ask):
    book = epub({"a.xhtml": page("<p>The wren sings.</p>"), "map.xhtml": page("")})
    report = ask("POST", "/v1/files", files=[("file", ("birds.epub", book))])
    assert report["num_documents"] == 1
    assert report["skipped"] == [{"file": "birds.epub", "part": "map.xhtml", "reason": "it has no text"}]
    assert ask("GET", "/v1/documents/birds.epub")["passages"][0]["text"].startswith("The wren")
    assert ask("POST", "/v1/files", files=[("file", ("a.txt", b"fine"))])["skipped"] == []
    for name in ("birds.epub", "a.txt"):
        ask("DELETE", f"/v1/documents/{name}")


@pytest.mark.skipif(shutil.which("tesseract") is None, reason="needs tesseract: apt-get install tesseract-ocr")
def test_an_uploaded_picture_is_recognised(ask):
    image = pytest.importorskip("PIL.Image", reason="needs Pillow").new("L", (900, 150), 255)
    from PIL import ImageDraw, ImageFont

    ImageDraw.Draw(image).text((40, 40), "the ship of the winter sea", fill=0, font=ImageFont.load_default(size=44))
    image.save(buffer := io.BytesIO(), "PNG")
    assert ask("POST", "/v1/files", files=[("file", ("ship.png", buffer.getvalue()))])["num_documents"] == 1
    passages = ask("GET", "/v1/documents/ship.png")["passages"]
    assert " ".join(passage["text"] for passage in passages) == "the ship of the winter sea"
    assert ".png" in ask("GET", "/page/settings.json")["file_types"]
    ask("DELETE", "/v1/documents/ship.png")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("file", ("a.pdf", b"x"))], "a.pdf: it cannot be parsed"),
        ([("file", ("a.txt", b"  "))], "a.txt: it has no text"),
        ([("file", ("a.jsonl", b'{"_id": "a", "text": " "}'))], "'a' has no text"),
        ([("file", ("a.jsonl.gz", b"nonsense"))], "a.jsonl.gz: damaged"),
        ([("other", ("a.txt", b"x"))], "no file"),
    ],
)
def test_an_unreadable_file_is_named_in_the_error(ask, files, message):
    assert message in ask("POST", "/v1/files", 400, files=files)["error"]["message"]


def test_malformed_forms_are_rejected(ask):
    assert "form" in ask("POST", "/v1/files", 415, json={"file": "x"})["error"]["message"]
    headers = {"Content-Type": "multipart/form-data; boundary=there"}
    assert "boundary" in ask("POST", "/v1/files", 400, content=b"not here", headers=headers)["error"]["message"]
    ask("POST", "/v1/passages", 415, files=[("file", ("a.txt", b"x"))])


def test_metadata_of_wrong_types_is_named_or_left_out(ask):
    passages = [
        {"id": "odd", "text": "a cat", "metadata": {"year": "soon", "language": "en", "tags": ["x"], "id": 3}},
        {"id": "even", "text": "a dog", "metadata": {"year": 1999, "empty": None}},
    ]
    error = ask("POST", "/v1/passages", 400, json={"passages": passages})["error"]["message"]
    assert "'odd'" in error
    assert "lenient_metadata" in error
    assert "--no-metadata" in error
    ask("GET", "/v1/passages/odd", 404)
    report = ask("POST", "/v1/passages", json={"passages": passages, "lenient_metadata": True})
    assert report["left_out"] == {"year": 1, "tags": 1, "id": 1}
    assert ask("GET", "/v1/passages/odd")["metadata"] == {"language": "en"}
    assert ask("GET", "/v1/passages/even")["metadata"] == {"year": 1999}
    ask("DELETE", "/v1/passages/odd")
    ask("DELETE", "/v1/passages/even")


def test_documents_become_late_chunks_as_in_the_library(tmp_path):
    student = Student.load(write_tiny_student(tmp_path), dtype="float32")
    documents = [Passage(name, ". ".join(TEXTS[start:])) for start, name in enumerate("abc")]
    chunking = Chunking(32, late=True)
    folders = [tmp_path / "library", tmp_path / "served"]
    indexes = [Index.create(folder, student, student_source=str(tmp_path / "student-0")) for folder in folders]
    indexes[0].upsert_documents(documents, chunking)
    indexes[1].upsert_documents(documents[:1], chunking)
    with served(folders[1]) as address:
        body = {"documents": [{"id": document.id, "text": document.text} for document in documents]}
        response = patient.post(f"{address}/v1/documents", json=body)
        assert response.status_code == 200, response.text
        assert response.json()["num_added"] > 2
    expected, vectors = (vectors_by_id(Index.open(folder, student)) for folder in folders)
    assert vectors.keys() == expected.keys()
    for name, vector in vectors.items():
        np.testing.assert_allclose(vector, expected[name], atol=1e-2)


def test_an_omitted_option_of_splitting_is_that_of_the_index(tmp_path):
    folder = write_tiny_index(tmp_path, 0)
    with served(folder) as address:
        body = {"documents": [{"id": "a", "text": "the cat sat on the mat. " * 12}]}
        url = f"{address}/v1/documents"
        first = patient.post(url, json=body | {"chunk_tokens": 16, "chunk_overlap": 4})
        assert first.status_code == 200, first.text
        for options in ({"chunk_tokens": 16}, {"chunk_overlap": 4}):
            response = patient.post(url, json=body | options)
            assert response.status_code == 200, response.text
            assert response.json()["num_unchanged"] == first.json()["num_added"]
        assert "at most 16 tokens" in patient.post(url, json=body | {"chunk_tokens": 20}).text


def vectors_by_id(index):
    rows = index.view.live_rows()
    return dict(zip(index.view.ids(rows), index.view.vectors(rows), strict=True))
