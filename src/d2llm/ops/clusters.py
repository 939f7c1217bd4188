"""Clusters of vectors by the nearest of k centres (k-means)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

_ROUNDS = 25


def nearest_centres(
    vectors: Float[np.ndarray, "texts dim"], num_clusters: int, *, seed: int = 0
) -> Int[np.ndarray, " texts"]:
    """The cluster of each vector, from 0, after at most 25 rounds of Lloyd's algorithm from random vectors.

    Lloyd, "Least squares quantization in PCM", 1982. A centre that loses its vectors stays where it is.
    """
    chosen = np.random.default_rng(seed).choice(len(vectors), min(num_clusters, len(vectors)), replace=False)
    centres, clusters = vectors[np.sort(chosen)].astype(np.float64), np.full(len(vectors), -1)
    for _ in range(_ROUNDS):
        before, clusters = clusters, (vectors @ centres.T - (centres**2).sum(axis=1) / 2).argmax(axis=1)
        if (before == clusters).all():
            break
        for cluster in np.unique(clusters):
            centres[cluster] = vectors[clusters == cluster].mean(axis=0)
    return clusters
