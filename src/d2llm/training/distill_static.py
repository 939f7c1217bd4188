"""Make static token embeddings, a backbone that looks up one vector for each token (``methods.backbones.model2vec``).

The vectors come from a transformer that reads each token of its vocabulary alone, as in Tulkens and van Dongen,
"Model2Vec: Fast State-of-the-Art Static Embeddings", 2024 (doi 10.5281/zenodo.17270888); weights by how frequent a
token is, from Arora et al., "A Simple but Tough-to-Beat Baseline for Sentence Embeddings", ICLR 2017.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float32, Float64
from safetensors.torch import save_file
from torch import Tensor

from d2llm.core.batches import batched
from d2llm.core.errors import InputError
from d2llm.core.files import new_folder, write_json
from d2llm.core.inputs import stream_of_texts

if TYPE_CHECKING:
    from d2llm.data.documents import SkippedFile
    from d2llm.models.backbone import Backbone

SMOOTHING = 1e-3
"""a in the weight a / (a + p) of a token that is the fraction p of all tokens."""
_WHITENING = 0.5
"""Each principal component is divided by this power of its standard deviation: 0 leaves it, 1 makes all equal."""
_TOKENS_AT_ONCE, _TEXTS_AT_ONCE = 1_024, 1_000
_UNSEEN = 0.1  # how often a token occurs that was not seen
_MODULES = [
    {"idx": 0, "name": "0", "path": ".", "type": "sentence_transformers.models.StaticEmbedding"},
    {"idx": 1, "name": "1", "path": "1_Normalize", "type": "sentence_transformers.models.Normalize"},
]
"""What sentence-transformers makes of the folder."""
_CONFIG = {
    "model_type": "model2vec",
    "architectures": ["StaticModel"],
    "normalize": True,
    "pooling": "mean",
    "seq_length": 1_000_000,
}
"""What model2vec writes into config.json, besides sizes."""


@dataclass(frozen=True, slots=True)
class StaticReport:
    """What a static model was made of.

    ``variance`` is the fraction of the vectors' variance that ``dim`` kept. ``skipped`` are documents that could not be
    read, if the caller adds them.
    """

    num_vectors: int
    dim: int
    variance: float
    num_passages: int
    num_tokens: int
    skipped: tuple[SkippedFile, ...] = ()


def distill_static(
    backbone: Backbone,
    passages: Iterable[str],
    folder: str | Path,
    *,
    dim: int | None = None,
    smoothing: float = SMOOTHING,
) -> StaticReport:
    """Make a backbone of static token embeddings (one vector for each token, without context) in a new folder.

    Args:
        backbone: reads each token of its vocabulary alone.
        passages: of the corpus to search, or like those; how frequent their tokens are decides the weights.
        folder: must not exist.
        dim: principal components to keep, by default all.
        smoothing: the larger it is, the more frequent tokens count.

    Raises:
        InputError: there are no passages, ``dim`` exceeds the backbone's, ``smoothing`` is not positive, or the folder
            exists. Nothing is written then.
    """
    backbone.require_tokens("a vector for each token of a vocabulary")
    if dim is not None and not 0 < dim <= backbone.dim:
        raise InputError(f"dim is {dim}, but '{backbone.config.model}' has {backbone.dim}; give at most that")
    if smoothing <= 0:
        raise InputError(f"smoothing is {smoothing}; give a positive number, such as {SMOOTHING}")
    folder = Path(folder)
    if folder.exists():
        raise InputError(f"{folder} exists; name a new folder")
    counts, num_passages = _count_tokens(backbone, passages)
    if num_passages == 0:
        raise InputError("there are no passages to count tokens in; give those of the corpus")
    with new_folder(folder) as unfinished:
        vectors = _read_alone(backbone)
        special = torch.tensor(sorted(backbone.tokenizer.all_special_ids), dtype=torch.long)
        ordinary = torch.ones(len(vectors), dtype=torch.bool)
        ordinary[special] = False
        vectors -= vectors[ordinary].mean(0)
        covariance = torch.cov(vectors[ordinary].double().T)
        variances, directions = torch.linalg.eigh(covariance)
        variances, directions = variances.flip(0).clamp(min=0), directions.flip(1)  # largest first
        kept = backbone.dim if dim is None else dim
        scale = variances[:kept].clamp(min=1e-12).sqrt() ** _WHITENING
        fractions = (counts + _UNSEEN) / (counts + _UNSEEN).sum()
        weights = smoothing / (smoothing + fractions)
        embeddings = (vectors.double() @ (directions[:, :kept] / scale) * weights[:, None]).float()
        embeddings[special] = 0  # as model2vec, which leaves them out
        write_json(unfinished / "config.json", _CONFIG | {"hidden_dim": kept, "vocab_size": len(embeddings)})
        save_file({"embeddings": embeddings.contiguous()}, unfinished / "model.safetensors", metadata={"format": "pt"})
        backbone.tokenizer.save_pretrained(unfinished)
        (unfinished / "modules.json").write_text(json.dumps(_MODULES, indent=1), encoding="utf-8")
    fraction = float(variances[:kept].sum() / variances.sum())
    return StaticReport(len(embeddings), kept, fraction, num_passages, int(counts.sum()))


def _count_tokens(backbone: Backbone, passages: Iterable[str]) -> tuple[Float64[Tensor, " tokens"], int]:
    """Count of each token in the passages, and the number of passages."""
    counts = torch.zeros(len(backbone.tokenizer), dtype=torch.float64)
    num_passages = 0
    for texts in batched(stream_of_texts(passages, "passages"), _TEXTS_AT_ONCE):
        ids = [token for row in backbone.tokenize(texts, "passage", prefix="", limit=sys.maxsize).ids for token in row]
        counts += torch.bincount(torch.tensor(ids), minlength=len(counts))
        num_passages += len(texts)
    return counts, num_passages


def _read_alone(backbone: Backbone) -> Float32[Tensor, "tokens dim"]:
    """The pooled states of each token between the special tokens that the tokenizer puts around a text."""
    encoded: Any = backbone.tokenizer("a", return_special_tokens_mask=True)
    ids, is_special = encoded["input_ids"], encoded["special_tokens_mask"]
    first, last = is_special.index(0), len(ids) - is_special[::-1].index(0)
    size = len(backbone.tokenizer)
    rows: list[Tensor] = []
    with torch.inference_mode():
        for start in range(0, size, _TOKENS_AT_ONCE):
            tokens = range(start, min(size, start + _TOKENS_AT_ONCE))
            texts = [[*ids[:first], token, *ids[last:]] for token in tokens]
            rows.append(backbone.pool(*backbone(*backbone.pad(texts))).cpu())
    return torch.cat(rows)
