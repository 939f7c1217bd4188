"""An OpenAI-compatible endpoint that repeats what a large language model once wrote for the passages of some data sets.

It stands for a strong writer where none can be reached: everything between `d2llm fit` and the answers is as with a
live endpoint. `written_queries/NAME.jsonl` has the queries by passage id, so the texts of the passages come from the
data set itself. A passage that was not recorded gets an empty answer, as do passages whose text differs.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from d2llm.data.beir import read_beir

RECORDED = Path(__file__).parent / "written_queries"
_KEYWORDS = "Number of queries to write"  # in the prompt for keywords, but not in that for questions
_COMPARED_CHARACTERS = 160  # of a passage, to find it in a prompt, where its end may be cut


def read_recorded(name: str) -> dict[tuple[str, str], list[str]]:
    """The recorded queries of a data set, by passage id and kind."""
    lines = (RECORDED / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return {(record["id"], record["kind"]): record["queries"] for record in map(json.loads, lines)}


@contextmanager
def recorded_writer(data: Path) -> Iterator[str]:
    """Serve the recorded queries of a data set on a local port; yields the address for ``RemoteWriterConfig.url``."""
    recorded = read_recorded(data.name)
    corpus = read_beir(data, splits=["test"]).passages
    answers = {(_beginning(corpus[name].text), kind): queries for (name, kind), queries in recorded.items()}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = " ".join(body["messages"][-1]["content"].split())
            kind = "keywords" if _KEYWORDS in prompt else "question"
            queries: list[str] = next(
                (answer for (text, of_kind), answer in answers.items() if of_kind == kind and text in prompt), []
            )
            message: dict[str, Any] = {"role": "assistant", "content": "\n".join(queries)}
            content = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name there
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()


def _beginning(text: str) -> str:
    return " ".join(text.split())[:_COMPARED_CHARACTERS]
