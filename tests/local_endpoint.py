"""A small OpenAI-compatible endpoint on a real socket, whose replies are determined by the test."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from d2llm.models.teachers.remote import RemoteTeacher
from d2llm.recipe import TeacherConfig

Headers = dict[str, str]
PAIRS = [(f"query {n}", f"passage {n}") for n in range(12)]


@dataclass
class Reply:
    """A reply; ``body`` is sent as JSON, or verbatim if it is a string."""

    body: Any = None
    status: int = 200
    headers: Headers = field(default_factory=dict)
    delay: float = 0.0
    hang_up: bool = False


@dataclass
class Request:
    """A received request and its time (``time.monotonic``)."""

    path: str
    body: dict[str, Any]
    headers: Headers
    when: float

    @property
    def prompt(self) -> str:
        return self.body["prompt"] if "prompt" in self.body else self.body["messages"][0]["content"]


class LocalEndpoint:
    """Records requests and answers each with ``reply(request, number)``, where number counts from 0."""

    def __init__(self, reply: Callable[[Request, int], Reply]) -> None:
        self.reply = reply
        self.requests: list[Request] = []
        self.most_at_once = 0
        self.connections = self.disconnections = 0
        self.open: set[socket.socket] = set()
        self.url = ""
        self._at_once = 0
        self._lock = threading.Lock()

    @property
    def prompts(self) -> list[str]:
        return [request.prompt for request in self.requests]

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        request = Request(handler.path, body, dict(handler.headers), time.monotonic())
        with self._lock:
            number = len(self.requests)
            self.requests.append(request)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        reply = self.reply(request, number)
        time.sleep(reply.delay)
        with self._lock:
            self._at_once -= 1
        if reply.hang_up:
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        content = (reply.body if isinstance(reply.body, str) else json.dumps(reply.body)).encode()
        handler.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(content))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)


@contextmanager
def local_endpoint(reply: Callable[[Request, int], Reply], *, port: int = 0) -> Iterator[LocalEndpoint]:
    """Serve on a local port, by default a free one, until the block ends; connections are refused then."""
    endpoint = LocalEndpoint(reply)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # keeps connections alive, as real servers do
        disable_nagle_algorithm = True  # as real servers do, too

        def setup(self) -> None:
            super().setup()
            endpoint.connections += 1
            endpoint.open.add(self.connection)

        def finish(self) -> None:
            endpoint.open.discard(self.connection)
            super().finish()
            endpoint.disconnections += 1

        def do_POST(self) -> None:
            try:
                endpoint.handle(self)
            except OSError:
                self.close_connection = True  # the client was killed, or the endpoint is closing

        def log_message(self, *arguments: object) -> None: ...

    with _Server(("127.0.0.1", port), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
        try:
            yield endpoint
        finally:
            server.shutdown()
            for connection in [*endpoint.open]:
                with suppress(OSError):  # the client was faster
                    connection.shutdown(socket.SHUT_RDWR)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    """Connections that wait to be accepted. With the standard 5, a busy machine resets some of many at once."""


def completion(top: dict[str, float] | None, *, num_prompt_tokens: int | None = None) -> dict[str, Any]:
    """A response in OpenAI's completions format (vLLM, SGLang, llama-cpp-python)."""
    logprobs = None if top is None else {"top_logprobs": [top] if top else []}
    response: dict[str, Any] = {"object": "text_completion", "choices": [{"text": "x", "logprobs": logprobs}]}
    return response if num_prompt_tokens is None else response | {"usage": {"prompt_tokens": num_prompt_tokens}}


def chat(text: str | None, *, reason: str = "stop", usage: tuple[int, int] | None = (100, 20), **message: Any) -> Any:
    """A response in OpenAI's chat format; ``usage`` are the numbers of tokens read and written."""
    choice = {"finish_reason": reason, "message": {"role": "assistant", "content": text, **message}}
    tokens = {} if usage is None else {"usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1]}}
    return {"choices": [choice], **tokens}


def chat_completion(top: dict[str, float]) -> dict[str, Any]:
    """A response in OpenAI's chat format, which llama.cpp's server also uses for completions."""
    listed = [{"token": token, "logprob": value} for token, value in top.items()]
    return {"choices": [{"logprobs": {"content": [{**listed[0], "top_logprobs": listed}]}}]}


PLAIN = completion({" yes": -0.5, " no": -1.5, " maybe": -3.0})
"""Log-odds 1."""


def always(body: object, **reply: Any) -> Callable[[Request, int], Reply]:
    """The same reply to every request."""
    return lambda request, number: Reply(body, **reply)


EMBEDDING_DIM = 16


def embedding(text: str, dim: int = EMBEDDING_DIM) -> list[float]:
    """A vector of length 1 that texts with the same words share: the sum of a fixed random vector for each word."""
    words = re.findall(r"\w+", text.lower()) or [text]
    seeds = [int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "little") for word in words]
    vector = sum(np.random.default_rng(seed).normal(size=dim) for seed in seeds)
    return (vector / np.linalg.norm(vector)).tolist()


def embeddings(request: Request, number: int) -> Reply:
    """An answer of ``/v1/embeddings``; a token is a word."""
    texts = request.body["input"]
    dim = request.body.get("dimensions", EMBEDDING_DIM)
    data = [{"object": "embedding", "index": n, "embedding": embedding(text, dim)} for n, text in enumerate(texts)]
    num_tokens = sum(len(text.split()) for text in texts)
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return Reply({"object": "list", "data": data[::-1], "model": request.body["model"], "usage": usage})


def number_in(request: Request) -> int:
    """The n of "passage n" in the short prompt."""
    return int(request.prompt.split("passage ")[1].split("\n")[0])


def remote_config(url: str, *, prompt: str = "short", max_tokens: int = 350, **remote: object) -> TeacherConfig:
    values = {"kind": "remote", "model": "served", "prompt": prompt, "max_tokens": max_tokens}
    return TeacherConfig.model_validate(values | {"remote": {"url": url} | remote})


def remote_teacher(endpoint: LocalEndpoint, **settings: Any) -> RemoteTeacher:
    return RemoteTeacher(remote_config(endpoint.url, **settings))
