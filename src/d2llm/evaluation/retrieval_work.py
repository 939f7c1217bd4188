"""What every system that ranks a corpus is measured with, and what is kept of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from d2llm.core.fingerprint import fingerprint_json, fingerprint_passages
from d2llm.core.types import Passage, Query, SystemKind
from d2llm.data.beir import Dataset
from d2llm.evaluation.setting import EvaluationSettings
from d2llm.evaluation.store import MeasuredStore
from d2llm.evaluation.systems import System, Trial, student_system
from d2llm.retrieval.cascade import Cascade
from d2llm.retrieval.encode import encode
from d2llm.retrieval.index import Index, window_format
from d2llm.retrieval.protocols import SearchStudent
from d2llm.retrieval.row_evidence import evidence_weights
from d2llm.retrieval.search import Searcher, SearchSettings
from d2llm.store.index_manifest import FORMAT_VERSION
from d2llm.store.view import PassageView


@dataclass
class RetrievalWork:
    """One evaluation. Judges are asked ``sampled`` queries; ``folder`` keeps indexes and what is measured."""

    dataset: Dataset
    settings: EvaluationSettings
    trial: Trial
    sampled: Sequence[Query]
    folder: Path
    labels: Path | None

    def __post_init__(self) -> None:
        self.passages: list[Passage] = list(self.dataset.passages.values())
        self.corpus = fingerprint_passages(self.passages)
        self.store = MeasuredStore(self.folder / "measured")
        self.notes: list[str] = []
        self._window_formats: dict[str, str] = {}

    def key(self, name: str, *parts: object) -> list[object]:
        """What a measured system depends on: its name, ``parts``, the corpus and what is asked."""
        trial = self.trial
        asked = [[(query.id, query.text) for query in queries] for queries in (trial.queries, trial.probes)]
        return [name, *parts, self.corpus, fingerprint_json(asked), trial.task, trial.top_k]

    def identity(self, model: SearchStudent) -> object:
        """What a student's rankings depend on: its fingerprint, and what an index adds to its scores."""
        weights = evidence_weights(model, self.trial.task)
        return [model.fingerprint, weights.model_dump(mode="json")] if weights else model.fingerprint

    def store_windows_for(self, student: SearchStudent) -> None:
        """Let the index of a student, which its inner product alone shares, have what its score counts."""
        windows = window_format(student, self.trial.task, "auto")
        if windows is not None:
            self._window_formats[student.fingerprint] = windows

    def index(self, model: SearchStudent) -> tuple[Index, float | None]:
        """The index of a model, and the passages a second if it had to be made just now."""
        dtype, rate = self.settings.dtype, None
        windows = self._window_formats.get(model.fingerprint)
        name = f"{model.fingerprint}-{self.corpus}-{dtype}-{FORMAT_VERSION}{f'-{windows}' if windows else ''}"
        target = self.folder / "indexes" / name
        if not target.exists():
            report = encode(
                self.passages,
                model,
                target,
                vector_format=dtype,
                window_vectors=windows,
                show_progress=self.trial.show_progress,
            )
            rate = report.passages_per_second
        return Index.open(target, model), rate

    def measure(
        self,
        name: str,
        kind: SystemKind,
        index: Index,
        settings: SearchSettings,
        *,
        view: PassageView | None = None,
        trial: Trial | None = None,
        cascade: Cascade | None = None,
        passages_per_second: float | None = None,
    ) -> System:
        """Rank by an index's student; ``view`` is searched in the place of the index, ``trial`` asked in that of all.

        ``passages_per_second`` is what the encoding did.
        """
        searched = view or index.view
        searcher = Searcher(searched, index.student, settings, cascade=cascade)
        system = student_system(name, kind, searcher, trial or self.trial)
        more = searched.words.num_bytes if searcher.counts_words else 0
        if searcher.counts_windows and searched.windows is not None:
            more += searched.windows.num_bytes
        return replace(
            system,
            passages_per_second=passages_per_second,
            bytes_per_passage=searched.format.code_size + more / max(len(searched), 1),
            fingerprint=index.student.fingerprint,
            num_truncated=index.stats().num_truncated,
        )

    def search_settings(self, num_candidates: int) -> SearchSettings:
        """How a row searches: ``num_candidates`` passages get the full score."""
        return SearchSettings(self.trial.task, self.trial.top_k, num_candidates)

    @cached_property
    def relevant(self) -> dict[str, frozenset[str]]:
        """The relevant passages of each query."""
        return {query_id: frozenset(ids) for query_id, ids in self.dataset.positives(self.settings.split).items()}

    @cached_property
    def qrels(self) -> dict[str, dict[str, int]]:
        """The grades of the judged passages that are in the corpus, of each query."""
        judged = self.dataset.qrels[self.settings.split]
        return {
            query.id: {p: grade for p, grade in judged[query.id].items() if p in self.dataset.passages}
            for query in self.trial.queries
        }
