"""An OpenAI-compatible endpoint that repeats what a large language model once wrote for the passages of some data sets.

It stands for a strong writer where none can be reached: everything between `d2llm fit` and the answers is as with a
live endpoint. `written_queries/NAME.jsonl` has the queries by passage id, so the texts of the passages come from the
data set itself. A passage that was not recorded gets an empty answer, as do passages whose text differs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recorded_endpoint import recorded_endpoint

from d2llm.data.beir import read_beir

RECORDED = Path(__file__).parent / "written_queries"
_KEYWORDS = "Number of queries to write"  # in the prompt for keywords, but not in that for questions
_COMPARED_CHARACTERS = 160  # of a passage, to find it in a prompt, where its end may be cut


def read_recorded(name: str) -> dict[tuple[str, str], list[str]]:
    """The recorded queries of a data set, by passage id and kind."""
    lines = (RECORDED / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return {(record["id"], record["kind"]): record["queries"] for record in map(json.loads, lines)}


def written_queries(name: str) -> dict[str, tuple[str, str]]:
    """query id -> the text of each recorded query, and the id of the passage that it was written for."""
    return {
        f"{kind}-{index}-{passage_id}": (text, passage_id)
        for (passage_id, kind), queries in read_recorded(name).items()
        for index, text in enumerate(queries)
    }


@contextmanager
def recorded_writer(data: Path) -> Iterator[str]:
    """Serve the recorded queries of a data set on a local port; yields the address for ``WriterEndpointConfig.url``."""
    recorded = read_recorded(data.name)
    corpus = read_beir(data, splits=["test"]).passages
    answers = {(_beginning(corpus[name].text), kind): queries for (name, kind), queries in recorded.items()}

    def answer(prompt: str) -> str:
        plain = " ".join(prompt.split())
        kind = "keywords" if _KEYWORDS in plain else "question"
        queries: list[str] = next(
            (answer for (text, of_kind), answer in answers.items() if of_kind == kind and text in plain), []
        )
        return "\n".join(queries)

    with recorded_endpoint(answer) as url:
        yield url


def _beginning(text: str) -> str:
    return " ".join(text.split())[:_COMPARED_CHARACTERS]
