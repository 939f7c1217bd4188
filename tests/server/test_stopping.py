"""Stopping a server during a write."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra 'serve'")

from attacked_server import JSON, Answer, attacked
from d2llm import Index, Passage, Student
from d2llm.server.errors import ServingError
from d2llm.server.model_service import ModelService
from d2llm.server.served_index import ServedIndex
from d2llm.server.settings import ServeSettings
from d2llm.server.slow_models import SlowModels
from d2llm.server.student_pool import StudentPool
from d2llm.server.uploads import documents_of
from file_cases.docx_cases import docx, p, r
from live_server import LeavingClient, patient, served
from tiny_server import write_tiny_index


@pytest.mark.parametrize("path", ["/v1/documents", "/v1/files"])
def test_a_write_ends_with_the_server(path: str):
    """Of the largest text, or of a small file that unpacks to many: an answer in JSON, and the lock is free."""
    words = "the cat sat on the mat by the sea. "
    if path == "/v1/documents":
        kind, document = JSON, {"id": "long", "text": words * (3_900_000 // len(words))}
        body = json.dumps({"documents": [document]}).encode()
    else:
        rows = b"".join(b'{"id": "%d", "text": "%s"}\n' % (n, words.encode() * 30) for n in range(20_000))
        kind = {"Content-Type": "multipart/form-data; boundary=b"}
        head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl.gz"\r\n\r\n'
        body = head + gzip.compress(rows) + b"\r\n--b--\r\n"
        assert len(body) < 200_000
    with attacked(shutdown_seconds=2) as server:
        answers: list[Answer] = []
        client = threading.Thread(target=lambda: answers.append(server.request("POST", path, body, kind)))
        client.start()
        time.sleep(1)
        assert server.post("/v1/search", {"query": "cat"}).seconds < 5
        status, seconds, errors = server.stop()
        client.join()
        assert status == 0
        assert seconds < 30
        assert (answers[0].status, answers[0].body["error"]["kind"]) == (503, "not_ready")
        assert "Traceback" not in errors
        index = Index.open(server.index, dtype="float32")
        assert index.upsert([Passage("after", "the lock is free")]).num_added == 1


def test_a_write_stops_if_its_client_leaves(tmp_path: Path):
    words = "the cat sat on the mat by the sea. "
    body = {"documents": [{"id": f"d{n}", "text": words * 3_000} for n in range(30)]}
    with served(write_tiny_index(tmp_path, 5)) as address:
        client = LeavingClient(address, "/v1/documents", body)
        time.sleep(0.5)
        client.leave()
        began = time.monotonic()
        response = patient.post(f"{address}/v1/passages", json={"passages": [{"id": "next", "text": "a cat"}]})
        assert response.status_code == 200
        assert time.monotonic() - began < 20
        assert patient.get(f"{address}/v1/documents/d29").status_code == 404


def test_documents_have_a_limit_also_if_they_are_unpacked(tmp_path: Path):
    settings = ServeSettings(max_document_chars=1_000_000)
    word = "word " * 1_000
    bomb = docx(p(r(word)) * 400)
    assert len(bomb) < 100_000
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="bomb.docx"\r\n\r\n'
    with pytest.raises(ServingError, match=r"bomb.docx: it has 2,000,\d\d\d characters of text, more than 1,000,000"):
        documents_of(head + bomb + b"\r\n--b--\r\n", "multipart/form-data; boundary=b", settings)
    rows = [json.dumps({"id": str(n), "text": word}) for n in range(200)]
    head = head.replace(b"bomb.docx", b"rows.jsonl.gz")
    packed = gzip.compress("\n".join([*rows, json.dumps({"id": "long", "text": word * 300})]).encode())
    with pytest.raises(ServingError, match=r"rows.jsonl.gz: a row of it has 1,500,000 characters of text"):
        documents_of(head + packed + b"\r\n--b--\r\n", "multipart/form-data; boundary=b", settings)
    packed = gzip.compress("\n".join(rows).encode())
    documents = documents_of(head + packed + b"\r\n--b--\r\n", "multipart/form-data; boundary=b", settings)
    assert len(documents) == 200
    small = settings.model_copy(update={"max_body_bytes": 100_000})
    with pytest.raises(ServingError, match="more than 800,000"):
        documents_of(head + packed + b"\r\n--b--\r\n", "multipart/form-data; boundary=b", small)
    with served(write_tiny_index(tmp_path, 5), max_document_chars=1_000) as address:
        body = {"documents": [{"id": "a", "text": "a cat"}, {"id": "b", "text": word}]}
        response = patient.post(f"{address}/v1/documents", json=body)
        assert response.status_code == 400
        assert "documents.1.text: 5,000 characters" in response.json()["error"]["message"]
        assert "max_document_chars" in response.json()["error"]["message"]


def test_a_long_write_does_not_delay_the_shutdown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write_tiny_index(tmp_path, 5)
    student = Student.load(tmp_path / "student-0", dtype="float32")
    encode, calls = student.encode_tokens, 0

    def slow(ids: Sequence[Sequence[int]]) -> Any:
        nonlocal calls
        calls += 1
        time.sleep(0.1)
        return encode(ids)

    monkeypatch.setattr(student, "encode_tokens", slow)

    async def main() -> None:
        models = ModelService(student, "tiny", batch_tokens=16)
        settings = ServeSettings(queue_texts=2_048)
        index = ServedIndex("index", folder, StudentPool(lambda _: models), SlowModels(settings), settings)
        models.start()
        index.start()
        passages = [Passage(f"new{n}", f"the cat number {n} sat on the mat and slept") for n in range(500)]
        writing = asyncio.create_task(index.write(lambda opened, _, stop: opened.upsert(stop.between(passages))))
        while not calls:
            await asyncio.sleep(0.01)
        writing.cancel()  # as uvicorn does when the time is up
        with contextlib.suppress(asyncio.CancelledError):
            await writing
        await index.stop(0.5)
        await models.stop(0.5)

    began = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - began < 45  # encoding 500 texts one by one takes 50 s
    assert calls < 200
