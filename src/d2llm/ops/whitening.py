"""Linear maps fitted to vectors: whitening, and the principal components."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float64

from d2llm.core.errors import InputError

_NEGLIGIBLE = 1e-9
"""Directions whose variance is below this fraction of the largest one are left out: they hold rounding errors."""


def whitening(
    vectors: Float[np.ndarray, "texts dim"], num: int | None = None
) -> tuple[Float64[np.ndarray, " dim"], Float64[np.ndarray, "dim num"]]:
    """Mean m and matrix W such that (x - m) W has mean 0 and covariance 1; float64.

    W = U S^-1/2, where U S U^T is the covariance of the vectors, largest variances first; with ``num``, the first
    columns alone. Columns of directions in which the vectors do not vary are 0. Su et al., "Whitening Sentence
    Representations for Better Semantics and Faster Retrieval", 2021 (arXiv 2103.15316), section 3.2, and 3.3 for
    ``num`` (whitening-k).

    Raises:
        InputError: there are not more vectors than dimensions are kept, so their covariance cannot be estimated.
    """
    count, dim = len(vectors), num or vectors.shape[1]
    if count <= dim:
        raise InputError(
            f"whitening vectors of {dim} dimensions takes more than {dim} passages, better ten times as many, but "
            f"there are {count}; give more passages, a smaller pooling.dim, or name another pooling"
        )
    variances, directions = _directions(vectors)
    kept = variances > _NEGLIGIBLE * variances[0]
    mean = vectors.mean(axis=0, dtype=np.float64)
    return mean, np.where(kept, directions / np.sqrt(np.where(kept, variances, 1.0)), 0.0)[:, :dim]


def principal_components(vectors: Float[np.ndarray, "texts dim"], num: int) -> Float64[np.ndarray, "num dim"]:
    """The ``num`` orthonormal directions in which vectors vary most, largest variance first; float64.

    Raises:
        InputError: there are not more vectors than directions, so some of these would be arbitrary.
    """
    if len(vectors) <= num:
        raise InputError(
            f"{num} principal components take more than {num} passages, better ten times as many, but there are "
            f"{len(vectors)}; give more passages, or a smaller pooling.dim"
        )
    return _directions(vectors)[1].T[:num]


def _directions(
    vectors: Float[np.ndarray, "texts dim"],
) -> tuple[Float64[np.ndarray, " dim"], Float64[np.ndarray, "dim dim"]]:
    """The variances of vectors in their principal directions, largest first, and these directions as columns."""
    dim = vectors.shape[1]
    wide = vectors.astype(np.float64)
    variances, directions = np.linalg.eigh(np.cov((wide - wide.mean(axis=0)).T).reshape(dim, dim))
    return variances[::-1], directions[:, ::-1]
