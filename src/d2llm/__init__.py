"""D2LLM: decomposed and distilled large language models for semantic search.

The names below are the public interface. They are imported on first use, so ``import d2llm`` stays quick and does not
load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from d2llm.core.errors import D2LLMError
    from d2llm.core.recipe import Recipe
    from d2llm.core.recipe_file import load_recipe
    from d2llm.core.types import (
        Candidate,
        Certificate,
        Explanation,
        Passage,
        Query,
        RankedPassage,
        Ranking,
        Task,
        TeacherLabel,
    )
    from d2llm.data.beir import Dataset, read_beir
    from d2llm.data.open_data import open_data
    from d2llm.data.pairs import PairDataset, read_pairs
    from d2llm.index.side_files import Chunking
    from d2llm.models.backbone import Backbone
    from d2llm.models.student import Student
    from d2llm.models.teacher import Teacher
    from d2llm.ops.gating import never_worse
    from d2llm.pipeline.ablate import ablate
    from d2llm.pipeline.build_ann import build_ann
    from d2llm.pipeline.calibrate import measure_error
    from d2llm.pipeline.cascade import Cascade
    from d2llm.pipeline.check_data import check_data
    from d2llm.pipeline.chunking import Chunker, upsert_documents
    from d2llm.pipeline.distill import distill
    from d2llm.pipeline.encode import encode
    from d2llm.pipeline.evaluate import evaluate
    from d2llm.pipeline.evaluation.loading import load_contenders
    from d2llm.pipeline.evaluation.setting import Contenders, EvaluationSettings
    from d2llm.pipeline.export import export
    from d2llm.pipeline.fit_evidence import fit_evidence
    from d2llm.pipeline.fit_scores import fit_scores
    from d2llm.pipeline.gate import gate, read_gate
    from d2llm.pipeline.index import Index
    from d2llm.pipeline.label import label
    from d2llm.pipeline.mine import mine
    from d2llm.pipeline.probabilities import fit_probabilities
    from d2llm.pipeline.search import SearchSettings, search
    from d2llm.pipeline.stack_teachers import stack_teachers
    from d2llm.pipeline.starting_recipe import starting_recipe
    from d2llm.pipeline.tune_teacher import tune_teacher

__version__ = "0.1.0"

__all__ = [
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
    "Explanation",
    "Index",
    "PairDataset",
    "Passage",
    "Query",
    "RankedPassage",
    "Ranking",
    "Recipe",
    "SearchSettings",
    "Student",
    "Task",
    "Teacher",
    "TeacherLabel",
    "__version__",
    "ablate",
    "build_ann",
    "check_data",
    "distill",
    "encode",
    "evaluate",
    "export",
    "fit_evidence",
    "fit_probabilities",
    "fit_scores",
    "gate",
    "label",
    "load_contenders",
    "load_recipe",
    "measure_error",
    "mine",
    "never_worse",
    "open_data",
    "read_beir",
    "read_gate",
    "read_pairs",
    "search",
    "stack_teachers",
    "starting_recipe",
    "tune_teacher",
    "upsert_documents",
]

_HOMES = {
    "d2llm.core.errors": ("D2LLMError",),
    "d2llm.core.recipe": ("Recipe",),
    "d2llm.core.recipe_file": ("load_recipe",),
    "d2llm.core.types": (
        "Candidate",
        "Certificate",
        "Explanation",
        "Passage",
        "Query",
        "RankedPassage",
        "Ranking",
        "Task",
        "TeacherLabel",
    ),
    "d2llm.data.beir": ("Dataset", "read_beir"),
    "d2llm.data.open_data": ("open_data",),
    "d2llm.data.pairs": ("PairDataset", "read_pairs"),
    "d2llm.index.side_files": ("Chunking",),
    "d2llm.models.backbone": ("Backbone",),
    "d2llm.models.student": ("Student",),
    "d2llm.models.teacher": ("Teacher",),
    "d2llm.ops.gating": ("never_worse",),
    "d2llm.pipeline.ablate": ("ablate",),
    "d2llm.pipeline.build_ann": ("build_ann",),
    "d2llm.pipeline.calibrate": ("measure_error",),
    "d2llm.pipeline.cascade": ("Cascade",),
    "d2llm.pipeline.check_data": ("check_data",),
    "d2llm.pipeline.chunking": ("Chunker", "upsert_documents"),
    "d2llm.pipeline.distill": ("distill",),
    "d2llm.pipeline.encode": ("encode",),
    "d2llm.pipeline.evaluate": ("evaluate",),
    "d2llm.pipeline.evaluation.loading": ("load_contenders",),
    "d2llm.pipeline.evaluation.setting": ("Contenders", "EvaluationSettings"),
    "d2llm.pipeline.export": ("export",),
    "d2llm.pipeline.gate": ("gate", "read_gate"),
    "d2llm.pipeline.index": ("Index",),
    "d2llm.pipeline.label": ("label",),
    "d2llm.pipeline.mine": ("mine",),
    "d2llm.pipeline.fit_evidence": ("fit_evidence",),
    "d2llm.pipeline.fit_scores": ("fit_scores",),
    "d2llm.pipeline.probabilities": ("fit_probabilities",),
    "d2llm.pipeline.search": ("SearchSettings", "search"),
    "d2llm.pipeline.stack_teachers": ("stack_teachers",),
    "d2llm.pipeline.starting_recipe": ("starting_recipe",),
    "d2llm.pipeline.tune_teacher": ("tune_teacher",),
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
