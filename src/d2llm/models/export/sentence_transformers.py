"""The files that let plain sentence-transformers load a student with the library's own modules.

The library has a transformer, the usual poolings, unit length, and separate linear maps for queries and passages (its
Router). That is enough for the inner product of a student whose texts are pooled with the backbone's own pooling: u of
length 1, then sqrt(dim) u for a passage, and the vector of ``Student.query_vectors`` for a query. The library has no
pooling by attention (PMA) and no interaction. A student with PMA gets none of the files, because its vectors would
differ. The transformer's weights are all in the student's folder, or only an adapter is, and the library loads the rest
from the Hub.

A student's token embeddings are another model for the library, a ``MultiVectorEncoder`` (``write_multi_vector``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from d2llm.core.files import write_json
from d2llm.core.json_values import read_model_json
from d2llm.core.types import Task, default_task
from d2llm.models.interaction import CosineHead, Interaction
from d2llm.models.pretrained import SENTENCE_TRANSFORMERS_POOLINGS
from d2llm.models.sources import name_of_same_weights
from d2llm.models.student_files import BACKBONE_FOLDER, MODULES_FILE, trained_tasks
from d2llm.models.tokens import search_query_tokens
from d2llm.recipe import AutoPooling, BackboneConfig, CustomBackbone, StudentConfig

if TYPE_CHECKING:
    from d2llm.models.backbone import Backbone
    from d2llm.models.token_vectors import TokenProjection

_REQUIRES = ">=6"  # the first version whose Transformer has separate length limits for queries and passages
_BASE, _OWN = "sentence_transformers.base.modules", "sentence_transformers.sentence_transformer.modules"
_DENSE = f"{_BASE}.dense.Dense"
_MASK = "sentence_transformers.multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask"
_PYLATE_DENSE = "pylate.models.Dense.Dense"
_MODULES = (
    ("1_Pooling", f"{_OWN}.pooling.Pooling"),
    ("2_Normalize", f"{_BASE}.normalize.Normalize"),
    ("3_Router", f"{_BASE}.router.Router"),
)


def why_no_transformer(config: StudentConfig) -> str | None:
    """Why the library's transformer cannot be the backbone of a student with this configuration; None if it can."""
    if isinstance(config.backbone, CustomBackbone):
        return f"its backbone is of kind '{config.backbone.kind}'"
    if (reason := config.backbone.why_not_merged) is not None:
        return reason
    if config.backbone.bidirectional:
        return "the library would read its decoder in one direction"
    return None


def why_not_plain(config: StudentConfig) -> str | None:
    """Why sentence-transformers cannot load a student with this configuration without d2llm; None if it can."""
    if (reason := why_no_transformer(config)) is not None:
        return reason
    if config.interaction.head == "paper":
        return "its head 'paper' has no inner product"
    if not isinstance(config.pooling, AutoPooling) and config.pooling.kind not in SENTENCE_TRANSFORMERS_POOLINGS:
        return f"its pooling '{config.pooling.kind}' is not one of the library's modules"
    return None


def base_of_adapter(config: StudentConfig) -> str | None:
    """The model on the Hub to which the library can add a student's adapter; None if it cannot load such a student."""
    backbone = config.backbone
    if why_not_plain(config) is not None or backbone.tuning.kind != "lora" or backbone.layers is not None:
        return None
    return name_of_same_weights(backbone.model)


def task_of_plain(manifest: Mapping[str, Any]) -> Task:
    """The task whose inner product the library gets: symmetric only if the student was trained for nothing else."""
    return default_task(trained_tasks(manifest))


def write_plain_form(
    folder: Path, config: StudentConfig, pooling: str, head: Interaction | CosineHead, task: Task
) -> None:
    """Add the library's files to a student's folder, or nothing if ``why_not_plain`` says that this cannot be.

    The backbone's weights and its tokenizer are in ``BACKBONE_FOLDER``; or the folder itself has an adapter and the
    tokenizer. ``pooling`` is the kind of the backbone's own; the inner product of ``head`` is written as it is for
    ``task``.
    """
    if why_not_plain(config) is not None:
        return
    backbone = config.backbone
    transformer = BACKBONE_FOLDER if (folder / BACKBONE_FOLDER).is_dir() else ""
    modules = ((transformer, f"{_BASE}.transformer.Transformer"), *_MODULES)
    unit = torch.eye(head.dim) * head.dim**0.5  # scales a vector of length 1 to the student's length
    with torch.no_grad():
        query_rows = head.query_vectors(unit.to(next(head.parameters()).device), task).float().cpu()
    _write_modules(folder, modules)
    model = {"model_type": "SentenceTransformer", "similarity_fn_name": "dot"}
    _write_model(folder, backbone, model | {"requirements": {"sentence_transformers": _REQUIRES}})
    _write_transformer(folder / transformer, backbone)
    write_json(
        folder / "1_Pooling" / "config.json",
        {
            "embedding_dimension": head.dim,
            "pooling_mode": SENTENCE_TRANSFORMERS_POOLINGS[pooling],
            "include_prompt": True,
        },
    )
    write_json(folder / "2_Normalize" / "config.json", {})
    write_json(
        folder / "3_Router" / "router_config.json",
        {
            "types": {"query_0_Dense": _DENSE, "document_0_Dense": _DENSE},
            "structure": {"query": ["query_0_Dense"], "document": ["document_0_Dense"]},
            "parameters": {"default_route": "document", "allow_empty_key": True, "route_mappings": {}},
        },
    )
    _write_dense(folder / "3_Router" / "query_0_Dense", query_rows.T)
    _write_dense(folder / "3_Router" / "document_0_Dense", unit)


def write_multi_vector(folder: Path, backbone: Backbone, projection: TokenProjection, *, pylate: bool) -> None:
    """Write a student's token embeddings as a ``MultiVectorEncoder``, or as a model of PyLate.

    Tokens without a vector are in the skip list, which is for both sides. PyLate has one for documents only (in the
    files of its version 3, which the library reads too), so there, queries must be encoded as documents are.
    """
    backbone.save_merged(folder)
    backbone.tokenizer.save_pretrained(folder)
    skipped: Any = [token for token, rarity in enumerate(projection.rarities) if rarity <= 0]
    words = {"skiplist_words": backbone.tokenizer.convert_ids_to_tokens(skipped)}
    _write_dense(folder / "1_Dense", projection.weight.detach().float().cpu(), None if pylate else "token_embeddings")
    if pylate:
        limit = backbone.config.max_passage_tokens
        _write_modules(folder, (("", "sentence_transformers.models.Transformer"), ("1_Dense", _PYLATE_DENSE)))
        lengths = {"query_length": limit, "document_length": limit, "query_prefix": "", "document_prefix": ""}
        model = {"model_type": "ColBERT", "similarity_fn_name": "MaxSim", "do_query_expansion": False}
        _write_model(folder, backbone.config, model | lengths | words)
        write_json(folder / "sentence_bert_config.json", {"max_seq_length": limit, "do_lower_case": False})
        return
    modules = (
        ("", f"{_BASE}.transformer.Transformer"),
        ("1_Dense", _DENSE),
        ("2_MultiVectorMask", _MASK),
        ("3_Normalize", f"{_BASE}.normalize.Normalize"),
    )
    _write_modules(folder, modules)
    requires = {"requirements": {"sentence_transformers": _REQUIRES}}
    model = {"model_type": "MultiVectorEncoder", "similarity_fn_name": "meanmaxsim"}
    _write_model(folder, backbone.config, model | requires)
    _write_transformer(folder, backbone.config)
    write_json(folder / "2_MultiVectorMask" / "config.json", words | {"skiplist_tasks": ["query", "document"]})
    write_json(folder / "3_Normalize" / "config.json", {"module_input_name": "token_embeddings"})


def _write_modules(folder: Path, modules: Sequence[tuple[str, str]]) -> None:
    write_json(
        folder / MODULES_FILE,
        [{"idx": n, "name": str(n), "path": path, "type": kind} for n, (path, kind) in enumerate(modules)],
    )


def _write_model(folder: Path, backbone: BackboneConfig, settings: Mapping[str, Any]) -> None:
    prompts = {
        "prompts": {"query": backbone.query_prefix, "document": backbone.passage_prefix},
        "default_prompt_name": "document" if backbone.passage_prefix else None,
    }
    write_json(folder / "config_sentence_transformers.json", prompts | dict(settings))


def _write_transformer(folder: Path, backbone: BackboneConfig) -> None:
    """The settings beside a backbone's weights."""
    write_json(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            # Texts are read as they are, even if the tokenizer has a chat template.
            "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
            "module_output_name": "token_embeddings",
            "query_length": search_query_tokens(backbone),
            "document_length": backbone.max_passage_tokens,
        },
    )
    tokenizer = folder / "tokenizer_config.json"
    settings = read_model_json(tokenizer)
    # Plain `encode` reads texts as passages. Padding on the left would shift the positions.
    write_json(tokenizer, settings | {"model_max_length": backbone.max_passage_tokens, "padding_side": "right"})


def _write_dense(folder: Path, weight: Tensor, features: str | None = "sentence_embedding") -> None:
    """A linear map of some ``features``; PyLate's knows them."""
    settings = {
        "in_features": weight.shape[1],
        "out_features": weight.shape[0],
        "bias": False,
        "activation_function": "torch.nn.modules.linear.Identity",
    } | ({} if features is None else {"module_input_name": features, "module_output_name": features})
    write_json(folder / "config.json", settings)
    save_file({"linear.weight": weight.contiguous()}, folder / "model.safetensors", metadata={"format": "pt"})
