"""Hypothetical passages for training queries, in a file that grows, and the vectors that queries with them have.

Each line is ``{"query": "the text of a query", "passages": ["a passage that would answer it"]}``. A query without
passages is one that the writer did not answer; it is not written again, and its vector has nothing to imitate.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2llm.core.batches import batched
from d2llm.core.errors import DataFormatError
from d2llm.core.progress import progress_bar
from d2llm.core.types import QueryExpansion
from d2llm.data.training import TrainingSource
from d2llm.models.remote.kept_answers import KeptAnswers
from d2llm.models.writers.writer import Assignment, Writer, write_until_error
from d2llm.retrieval.expansion import add_hypothetical_passages
from d2llm.retrieval.protocols import SearchStudent

_log = logging.getLogger(__name__)
_WRITTEN_TOGETHER = 64

Passages = dict[str, tuple[str, ...]]
"""The hypothetical passages of each query's text."""


def read_expansions(path: Path) -> Passages:
    """The passages in a file; none if it does not exist. A last line that an interruption left unfinished is ignored.

    Raises:
        DataFormatError: a line is not a query with passages.
    """
    passages: Passages = {}
    content = path.read_bytes() if path.is_file() else b""
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            values: Any = json.loads(line)
            query, texts = values["query"], values["passages"]
        except (ValueError, TypeError, KeyError) as error:
            raise DataFormatError(path, f"needs a query and its passages ({error!r})", line=number) from error
        if (
            not isinstance(query, str)
            or not isinstance(texts, list)
            or not all(isinstance(text, str) for text in texts)
        ):
            raise DataFormatError(path, "'query' must be a text and 'passages' a list of texts", line=number)
        passages[query] = tuple(texts)
    return passages


def write_expansions(path: Path, queries: Sequence[str], writer: Writer) -> None:
    """Let a writer answer the queries that are not in a file yet, and add what it writes, a few queries at a time.

    A process that is killed leaves the answers of an endpoint in the folder FILE.answers, for the next.
    """
    known = read_expansions(path)
    waiting = [query for query in dict.fromkeys(queries) if query not in known]
    if not waiting:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    answers = KeptAnswers(path.with_name(f"{path.name}.answers"), writer.fingerprint)
    with (
        path.open("ab+") as file,
        answers.used(),
        progress_bar("writing hypothetical passages", len(waiting)) as advance,
    ):
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        for together in batched(waiting, _WRITTEN_TOGETHER):
            assignments = [Assignment(query, "answer") for query in together]
            written = write_until_error(writer, assignments, advance=advance)
            lines = [
                json.dumps({"query": together[place], "passages": answer.queries}, ensure_ascii=False) + "\n"
                for place, answer in written.by_place.items()
            ]
            file.write("".join(lines).encode())
            file.flush()
            os.fsync(file.fileno())
            answers.clear()
            if written.error is not None:
                raise written.error


def expanded_vectors(
    student: SearchStudent, source: TrainingSource, query_ids: Sequence[str], passages: Mapping[str, Sequence[str]]
) -> dict[str, NDArray[np.float32]]:
    """The vector [dim] with which a search for each query would go on if it were expanded (``retrieval.expansion``).

    A query without passages has none.
    """
    expanded = [query_id for query_id in query_ids if passages[source.query_text(query_id)]]
    if len(expanded) < len(query_ids):
        _log.warning(
            "%s: %d of %d queries have no hypothetical passages, so soft_expansion leaves them out",
            source.dataset.name,
            len(query_ids) - len(expanded),
            len(query_ids),
        )
    if not expanded:
        return {}
    texts = [source.query_text(query_id) for query_id in expanded]
    expansions = [QueryExpansion("hyde", tuple(passages[text]), 0.0) for text in texts]
    vectors, _ = add_hypothetical_passages(student, student.encode_queries(texts).vectors, expansions)
    return dict(zip(expanded, vectors, strict=True))
