"""What an index holds, over HTTP: listed, read, deleted, sent as files, kept as snapshots and put back."""

from __future__ import annotations

import gzip
import json

import pytest

from tiny_server import tiny_settings, write_tiny_index

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")

from d2llm.server.app import make_app
from live_server import patient, serve, wait_until_ready


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    with serve(make_app(tiny_settings(write_tiny_index(tmp_path_factory.mktemp("corpus"), 30)))) as address:
        wait_until_ready(address)

        def send(method, path, status=200, **content):
            answer = patient.request(method, address + path, **content)
            assert answer.status_code == status, answer.text
            return answer.json()

        yield send


def pages(ask, path, name, **more):
    found, cursor = [], ""
    while cursor is not None:
        answer = ask("GET", path, params={"cursor": cursor, "limit": 7, **more})
        assert len(answer[name]) <= 7
        found += answer[name]
        cursor = answer["next_cursor"]
    return found


def test_ids_come_in_pages_each_once(ask):
    assert pages(ask, "/v1/passages", "ids") == sorted(f"p{n}" for n in range(30))
    documents = pages(ask, "/v1/documents", "documents")
    assert [one["id"] for one in documents] == sorted(f"d{n}" for n in range(8))
    assert {one["id"]: one["num_passages"] for one in documents}["d7"] == 2
    assert ask("GET", "/v1/passages", params={"cursor": "p9"}) == {"ids": [], "next_cursor": None}
    ask("GET", "/v1/passages", 422, params={"limit": 0})


def test_a_document_is_read_and_deleted_whole(ask):
    text = "the cat sat on the mat. " * 12
    made = ask("POST", "/v1/documents", json={"documents": [{"id": "a/b", "text": text}], "chunk_tokens": 16})
    found = ask("GET", "/v1/documents/a/b")
    assert [passage["position"] for passage in found["passages"]] == list(range(1, made["num_added"] + 1))
    assert ask("DELETE", "/v1/documents/a/b")["num_deleted"] == made["num_added"] > 1
    ask("GET", "/v1/documents/a/b", 404)
    ask("DELETE", "/v1/documents/a/b", 404)
    assert "a/b#1" not in ask("GET", "/v1/passages", params={"limit": 1000})["ids"]


def test_snapshots_are_listed_put_back_and_dropped(ask):
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
    corpus = "\n".join(json.dumps(one) for one in ({"_id": 41, "text": "a cat"}, {"id": "forty two", "text": "a dog"}))
    files = [
        ("file", ("corpus.jsonl", corpus.encode())),
        ("file", ("more.jsonl.gz", gzip.compress(b'{"id": "\xc3\xa9", "text": "rain\\r\\nand snow"}\n'))),
        ("file", ("näher.md", b"# Of ships\r\n\r\nthe sea\r\n")),
    ]
    report = ask("POST", "/v1/files", files=files)
    assert report["num_documents"] == 4
    for name, text in (("41", "a cat"), ("forty two", "a dog"), ("é", "rain\r\nand snow")):
        assert ask("GET", f"/v1/documents/{name}")["passages"][0]["text"] == text
    passages = ask("GET", "/v1/documents/näher.md")["passages"]  # the index cuts after few tokens
    assert {passage["title"] for passage in passages} == {"Of ships"}
    assert " ".join(" ".join(passage["text"] for passage in passages).split()) == "# Of ships the sea"
    for name in ("41", "forty two", "é", "näher.md"):
        ask("DELETE", f"/v1/documents/{name}")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("file", ("a.pdf", b"x"))], "a.pdf: the file type is not supported"),
        ([("file", ("a.txt", b"\xff"))], "a.txt: is not UTF-8"),
        ([("file", ("a.txt", b"  "))], "'a.txt' has no text"),
        ([("file", ("a.jsonl", b'{"id": "a", "text": "b"}\nnonsense'))], "a.jsonl:2: not valid JSON"),
        ([("file", ("a.jsonl.gz", b"nonsense"))], "a.jsonl.gz: damaged"),
        ([("other", ("a.txt", b"x"))], "no file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(ask, files, message):
    assert message in ask("POST", "/v1/files", 400, files=files)["error"]["message"]


def test_a_form_that_is_none(ask):
    assert "form" in ask("POST", "/v1/files", 415, json={"file": "x"})["error"]["message"]
    headers = {"Content-Type": "multipart/form-data; boundary=there"}
    assert "boundary" in ask("POST", "/v1/files", 400, content=b"not here", headers=headers)["error"]["message"]
    ask("POST", "/v1/passages", 415, files=[("file", ("a.txt", b"x"))])


def test_metadata_that_does_not_fit_is_named_or_left_out(ask):
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
