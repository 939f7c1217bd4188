"""Shared fixtures for the API dialects: a server with one tiny student."""

from __future__ import annotations

import httpx2
import pytest

from d2llm import Student
from tiny_server import write_tiny_student


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("dialects")


@pytest.fixture(scope="session")
def student(folder):
    return Student.load(write_tiny_student(folder), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def address(folder, student):
    pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")
    from tiny_clients import NAME, serving

    with serving(folder / "student-0", model_name=NAME, max_texts=32, max_text_chars=2_000) as url:
        yield url


@pytest.fixture
def ask(address):
    """POSTs a body, or GETs the path if there is none, checks the status and returns the response."""

    def send(path, body=None, status=200):
        method = "GET" if body is None else "POST"
        response = httpx2.request(method, address + path, json=body, timeout=60)
        assert response.status_code == status, response.text
        return response

    return send


@pytest.fixture
def post(ask):
    return lambda *arguments: ask(*arguments).json()


@pytest.fixture
def overloaded(address, monkeypatch):
    """Makes the server refuse requests as if its queue were full."""
    from d2llm.server.errors import OverloadedError
    from d2llm.server.model_service import ModelService

    async def refuse(*_arguments, **_settings):
        raise OverloadedError(3.0)

    monkeypatch.setattr(ModelService, "_encode", refuse)


@pytest.fixture
def online(monkeypatch):
    """Takes Hugging Face's client out of the tests' offline mode, so that it can reach this machine."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
