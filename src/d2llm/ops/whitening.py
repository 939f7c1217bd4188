"""Whitening: the linear map after which vectors have mean 0 and covariance 1."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float64

from d2llm.core.errors import InputError

_NEGLIGIBLE = 1e-9
"""Directions whose variance is below this share of the largest one are left out: they hold rounding errors."""


def whitening(
    vectors: Float[np.ndarray, "texts dim"],
) -> tuple[Float64[np.ndarray, " dim"], Float64[np.ndarray, "dim dim"]]:
    """Mean m and matrix W such that (x - m) W has mean 0 and covariance 1; float64.

    W = U S^-1/2, where U S U^T is the covariance of the vectors, largest variances first. Columns of directions in
    which the vectors do not vary are 0. Su et al., "Whitening Sentence Representations for Better Semantics and Faster
    Retrieval", 2021 (arXiv 2103.15316), section 3.2.

    Raises:
        InputError: there are not more vectors than dimensions, so the covariance cannot be estimated.
    """
    count, dim = vectors.shape
    if count <= dim:
        raise InputError(
            f"whitening vectors of {dim} dimensions takes more than {dim} passages, better ten times as many, but "
            f"there are {count}; give more passages, or set pooling.whitening to false"
        )
    wide = vectors.astype(np.float64)
    mean = wide.mean(axis=0)
    variances, directions = np.linalg.eigh(np.cov((wide - mean).T).reshape(dim, dim))
    variances, directions = variances[::-1], directions[:, ::-1]
    kept = variances > _NEGLIGIBLE * variances[0]
    return mean, np.where(kept, directions / np.sqrt(np.where(kept, variances, 1.0)), 0.0)
