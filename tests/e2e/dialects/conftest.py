"""What the tests of all dialects share: a server over one tiny student."""

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

    with serving(folder / "student-0", model_name=NAME, max_texts=32, max_text_chars=2_000) as found:
        yield found


@pytest.fixture
def ask(address):
    """Sends a body, or else asks for a path, and gives the answer, whose status has to be the one given."""

    def send(path, body=None, status=200):
        method = "GET" if body is None else "POST"
        answer = httpx2.request(method, address + path, json=body, timeout=60)
        assert answer.status_code == status, answer.text
        return answer

    return send


@pytest.fixture
def post(ask):
    return lambda *arguments: ask(*arguments).json()


@pytest.fixture
def overloaded(address, monkeypatch):
    """The queue is full."""
    from d2llm.server.errors import OverloadedError
    from d2llm.server.model_service import ModelService

    async def refuse(*_arguments, **_settings):
        raise OverloadedError(3.0)

    monkeypatch.setattr(ModelService, "_encode", refuse)


@pytest.fixture
def online(monkeypatch):
    """Lets Hugging Face's client ask this machine; the tests' environment keeps it from the internet."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
