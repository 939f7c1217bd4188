"""A query's vector is to be near that of the query with a hypothetical passage: searches need no writer (SoftQE).

The passages are in a file that grows. Each line is ``{"query": "its text", "passages": ["one that would answer it"]}``.
A query without passages is one that the writer did not answer; it is not written again, and its vector has nothing to
imitate.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from d2llm.core.batches import batched
from d2llm.core.errors import DataFormatError, InputError
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.json_values import parse_json
from d2llm.core.progress import progress_bar
from d2llm.core.types import QueryExpansion
from d2llm.data.plan import TrainingSource
from d2llm.models.protocols import SearchStudent
from d2llm.models.remote.kept_answers import KeptAnswers
from d2llm.models.student import Student
from d2llm.models.writers.writer import Assignment, Writer, load_writer, write_until_error
from d2llm.ops.losses import masked_mean, zero_outside
from d2llm.recipe import Recipe, WriterConfig
from d2llm.recipe.losses import Loss
from d2llm.recipe.sections import InputPath
from d2llm.retrieval.expansion import add_hypothetical_passages
from d2llm.training.losses import LossInput, Preparation

_log = logging.getLogger(__name__)
_WRITTEN_TOGETHER = 64

Passages = dict[str, tuple[str, ...]]
"""The hypothetical passages of each query's text."""


class SoftExpansion(Loss, kind="soft_expansion"):
    """The vector of a query is to be the one that it had, before training, with hypothetical passages added (HyDE)."""

    paper = "Pimpalkhute et al., ECIR 2024, arXiv 2402.12663 (SoftQE)"
    needs = frozenset({"writer"})
    costs = "passages for every training query, written once; each encoded once"
    measured = (
        "-.006 (.7779 against .7836: qnli -.016, banking77 +.004) with passages by SmolLM2-135M, [one "
        "seed](log/2026-11.md#2026-11-25-hypothetical-passages-as-a-loss-softqe-and-which-queries-a-teacher-"
        "labels)"
    )
    of_vectors: ClassVar[bool] = True
    not_shaping: ClassVar[frozenset[str]] = frozenset({"passages", "writer"})  # what they say is compared
    passages: InputPath
    """A JSONL file with passages that a writer wrote for the training queries."""
    writer: WriterConfig | None = None
    """Who writes the passages that the file lacks. By default nobody: a query without them is an error."""

    def check(self, recipe: Recipe) -> None:
        if recipe.student.backbone.tuning.kind == "frozen" and not recipe.student.pooling.is_trained:
            raise ValueError(
                "losses.soft_expansion trains the vectors of queries, but those of a frozen backbone with its own "
                "pooling stay as they are: set student.backbone.tuning to lora or full, or the weight to 0"
            )

    def check_student(self, student: Student, *, has_lists: bool) -> None:
        del student
        if not has_lists:
            raise InputError(
                "losses.soft_expansion is trained on the queries of retrieval sets, but all data sets are labelled "
                "pairs; set it to 0, or add a retrieval set"
            )

    def prepare(self, preparation: Preparation) -> dict[str, Any]:
        passages = self._passages(preparation)
        for labelled in preparation.with_lists:
            query_ids = [entry.query_id for entry in labelled.entries]
            vectors = expanded_vectors(preparation.student, labelled.source, query_ids, passages)
            preparation.add_query_input(self.kind, labelled, vectors)
        return {"expansions": fingerprint_json(passages)}

    def _passages(self, preparation: Preparation) -> Passages:
        """The hypothetical passages of the queries of retrieval sets; a writer, if any, writes missing ones."""
        processes, file = preparation.processes, Path(self.passages)
        queries = dict.fromkeys(
            labelled.source.query_text(entry.query_id)
            for labelled in preparation.with_lists
            for entry in labelled.entries
        )
        passages = read_expansions(file)
        missing = queries.keys() - passages.keys()
        if missing and self.writer is None:
            raise InputError(
                f"{file}: {len(missing)} of {len(queries)} training queries have no line, such as {min(missing)!r}; "
                "name a writer in [losses.soft_expansion.writer]"
            )
        if missing and self.writer is not None and processes.is_first:
            writer = load_writer(self.writer, device=preparation.device, dtype=preparation.dtype)
            write_expansions(file, [*queries], writer)
        processes.from_first(None)  # wait until they are written
        if missing:
            passages = read_expansions(file)
        return {query: passages[query] for query in queries}

    def __call__(self, inputs: LossInput) -> Tensor | None:
        expanded = inputs.query_input(self.kind)
        if expanded is None or inputs.vectors is None:
            return None
        return soft_expansion(inputs.encoded(inputs.vectors)[0].float(), expanded)


def soft_expansion(queries: Float[Tensor, "queries dim"], expanded: Float[Tensor, "queries dim"]) -> Float[Tensor, ""]:
    """A query's vector should be that of the query expanded by a language model, so that a search needs no such model.

    L = 1/Q sum_i |y_i - e_i|^2 / dim

    over the Q queries with an expanded vector e_i; a row of NaN is none. SoftQE, Pimpalkhute et al., "SoftQE: Learned
    Representations of Queries Expanded by LLMs", ECIR 2024 (arXiv 2402.12663), whose expanded vectors come from an
    encoder that was trained on expanded queries; here they come from the student as it was before training.
    """
    counted = torch.isfinite(expanded).all(dim=1)
    (distances,) = zero_outside(counted, (queries.float() - expanded.nan_to_num()).square().mean(dim=1))
    return masked_mean(distances, counted).to(queries.dtype)


def read_expansions(path: Path) -> Passages:
    """The passages in a file; none if it does not exist. A last line that an interruption left unfinished is ignored.

    Raises:
        DataFormatError: a line is not a query with passages.
    """
    passages: Passages = {}
    content = path.read_bytes() if path.is_file() else b""
    for line_number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            values: Any = parse_json(line)
            query, texts = values["query"], values["passages"]
        except (ValueError, TypeError, KeyError) as error:
            raise DataFormatError(path, f"needs a query and its passages ({error!r})", line=line_number) from error
        if (
            not isinstance(query, str)
            or not isinstance(texts, list)
            or not all(isinstance(text, str) for text in texts)
        ):
            raise DataFormatError(path, "'query' must be a text and 'passages' a list of texts", line=line_number)
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
                json.dumps({"query": together[index], "passages": answer.queries}, ensure_ascii=False) + "\n"
                for index, answer in written.by_index.items()
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
