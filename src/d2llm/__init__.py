"""D2LLM: decomposed and distilled large language models for semantic search.

The names below are the public interface. They are imported on first use, so ``import d2llm`` stays quick and does not
load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from d2llm.core.thread_waiting import limit_spinning

if TYPE_CHECKING:
    from d2llm.core.errors import D2LLMError
    from d2llm.core.progress import showing_progress
    from d2llm.core.types import (
        Candidate,
        Certificate,
        Excerpt,
        Explanation,
        Passage,
        Query,
        RankedPassage,
        Ranking,
        Task,
    )
    from d2llm.data.beir import Dataset, read_beir
    from d2llm.data.documents import find_documents
    from d2llm.data.label_sets import count_labels, export_labels, merge_labels
    from d2llm.data.open_data import open_data
    from d2llm.data.pairs import PairDataset, read_pairs
    from d2llm.evaluation.contenders import Contenders
    from d2llm.evaluation.evaluate import evaluate
    from d2llm.evaluation.loading import load_contenders
    from d2llm.evaluation.settings import EvaluationSettings
    from d2llm.fitting.fit import Fit, fit
    from d2llm.fitting.settings import FitSettings
    from d2llm.models.backbone import Backbone
    from d2llm.models.export.export import export
    from d2llm.models.listwise_reader import ListwiseReader
    from d2llm.models.static_model import distill_static
    from d2llm.models.student import Student
    from d2llm.models.teachers.judge import load_judge
    from d2llm.models.writers.writer import Assignment, load_writer
    from d2llm.ops.gating import never_worse
    from d2llm.recipe import ReaderTuningConfig, Recipe, TeacherConfig, WriterConfig, WriterTuningConfig
    from d2llm.recipe.losses import Loss
    from d2llm.recipe.recipe_file import load_recipe
    from d2llm.retrieval.cascade import Cascade, ListwiseReading
    from d2llm.retrieval.chunking import Chunker
    from d2llm.retrieval.context import AnswerContext
    from d2llm.retrieval.encode import encode
    from d2llm.retrieval.expansion import Expansion
    from d2llm.retrieval.index import Index
    from d2llm.retrieval.settings import SearchSettings
    from d2llm.retrieval.shard import shard
    from d2llm.retrieval.sync import sync_documents
    from d2llm.sizing.plan import SizePlan
    from d2llm.sizing.size import size
    from d2llm.store.index_spec import IndexSpec
    from d2llm.store.side_files import Chunking
    from d2llm.training.check_data import check_data
    from d2llm.training.fit_evidence import fit_evidence
    from d2llm.training.fit_probabilities import fit_probabilities
    from d2llm.training.fit_scores import fit_scores
    from d2llm.training.fit_tokens import fit_tokens
    from d2llm.training.gate import read_gate
    from d2llm.training.run import Run
    from d2llm.training.starting_recipe import starting_recipe
    from d2llm.training.tune_reader import tune_reader
    from d2llm.training.tune_writer import tune_writer

__version__ = "0.1.0"
limit_spinning()

__all__ = [
    "AnswerContext",
    "Assignment",
    "Backbone",
    "Candidate",
    "Cascade",
    "Certificate",
    "Chunker",
    "Chunking",
    "Contenders",
    "D2LLMError",
    "Dataset",
    "EvaluationSettings",
    "Excerpt",
    "Expansion",
    "Explanation",
    "Fit",
    "FitSettings",
    "Index",
    "IndexSpec",
    "ListwiseReader",
    "ListwiseReading",
    "Loss",
    "PairDataset",
    "Passage",
    "Query",
    "RankedPassage",
    "Ranking",
    "ReaderTuningConfig",
    "Recipe",
    "Run",
    "SearchSettings",
    "SizePlan",
    "Student",
    "Task",
    "TeacherConfig",
    "WriterConfig",
    "WriterTuningConfig",
    "__version__",
    "check_data",
    "count_labels",
    "distill_static",
    "encode",
    "evaluate",
    "export",
    "export_labels",
    "find_documents",
    "fit",
    "fit_evidence",
    "fit_probabilities",
    "fit_scores",
    "fit_tokens",
    "load_contenders",
    "load_judge",
    "load_recipe",
    "load_writer",
    "merge_labels",
    "never_worse",
    "open_data",
    "read_beir",
    "read_gate",
    "read_pairs",
    "shard",
    "showing_progress",
    "size",
    "starting_recipe",
    "sync_documents",
    "tune_reader",
    "tune_writer",
]

_HOMES = {
    "d2llm.core.errors": ("D2LLMError",),
    "d2llm.recipe.losses": ("Loss",),
    "d2llm.core.progress": ("showing_progress",),
    "d2llm.recipe": ("ReaderTuningConfig", "Recipe", "TeacherConfig", "WriterConfig", "WriterTuningConfig"),
    "d2llm.recipe.recipe_file": ("load_recipe",),
    "d2llm.core.types": (
        "Candidate",
        "Certificate",
        "Excerpt",
        "Explanation",
        "Passage",
        "Query",
        "RankedPassage",
        "Ranking",
        "Task",
    ),
    "d2llm.data.beir": ("Dataset", "read_beir"),
    "d2llm.data.documents": ("find_documents",),
    "d2llm.data.label_sets": ("count_labels", "export_labels", "merge_labels"),
    "d2llm.retrieval.sync": ("sync_documents",),
    "d2llm.data.open_data": ("open_data",),
    "d2llm.data.pairs": ("PairDataset", "read_pairs"),
    "d2llm.store.index_spec": ("IndexSpec",),
    "d2llm.store.side_files": ("Chunking",),
    "d2llm.fitting.fit": ("Fit", "fit"),
    "d2llm.fitting.settings": ("FitSettings",),
    "d2llm.models.backbone": ("Backbone",),
    "d2llm.models.listwise_reader": ("ListwiseReader",),
    "d2llm.models.static_model": ("distill_static",),
    "d2llm.models.student": ("Student",),
    "d2llm.models.teachers.judge": ("load_judge",),
    "d2llm.models.writers.writer": ("Assignment", "load_writer"),
    "d2llm.ops.gating": ("never_worse",),
    "d2llm.retrieval.cascade": ("Cascade", "ListwiseReading"),
    "d2llm.training.check_data": ("check_data",),
    "d2llm.retrieval.chunking": ("Chunker",),
    "d2llm.retrieval.context": ("AnswerContext",),
    "d2llm.retrieval.encode": ("encode",),
    "d2llm.retrieval.expansion": ("Expansion",),
    "d2llm.evaluation.evaluate": ("evaluate",),
    "d2llm.evaluation.loading": ("load_contenders",),
    "d2llm.evaluation.contenders": ("Contenders",),
    "d2llm.evaluation.settings": ("EvaluationSettings",),
    "d2llm.models.export.export": ("export",),
    "d2llm.training.gate": ("read_gate",),
    "d2llm.retrieval.index": ("Index",),
    "d2llm.training.run": ("Run",),
    "d2llm.training.fit_evidence": ("fit_evidence",),
    "d2llm.training.fit_scores": ("fit_scores",),
    "d2llm.training.fit_tokens": ("fit_tokens",),
    "d2llm.training.fit_probabilities": ("fit_probabilities",),
    "d2llm.retrieval.settings": ("SearchSettings",),
    "d2llm.retrieval.shard": ("shard",),
    "d2llm.sizing.plan": ("SizePlan",),
    "d2llm.sizing.size": ("size",),
    "d2llm.training.starting_recipe": ("starting_recipe",),
    "d2llm.training.tune_reader": ("tune_reader",),
    "d2llm.training.tune_writer": ("tune_writer",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'd2llm' has no attribute '{name}'")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
