"""Embeddings of which tokens share parts: what k-means makes of values worked out by hand."""

from __future__ import annotations

import numpy as np
from subspace_embeddings import shared


def test_parts_are_replaced_by_the_nearest_centre() -> None:
    """Six tokens are three first parts, each twice, beside two second ones."""
    first = np.repeat([[0.0, 0.0], [5.0, 5.0], [9.0, 0.0]], 2, axis=0)
    second = np.tile([[1.0, 0.0], [-1.0, 0.0]], (3, 1))
    embeddings = np.concatenate([first, second], axis=1).astype(np.float32)
    np.testing.assert_allclose(shared(embeddings, 2, num_clusters=6), embeddings)
    np.testing.assert_allclose(shared(embeddings, 4, num_clusters=1), np.tile(embeddings.mean(axis=0), (6, 1)))
    halves = shared(embeddings, 2, num_clusters=2)
    assert len(np.unique(halves[:, :2], axis=0)) == len(np.unique(halves[:, 2:], axis=0)) == 2
    for token, half in zip(embeddings, halves, strict=True):
        centres = np.unique(halves[:, :2], axis=0)
        nearest = centres[((centres - token[:2]) ** 2).sum(axis=1).argmin()]
        np.testing.assert_allclose(half[:2], nearest)


def test_more_clusters_lose_less() -> None:
    embeddings = np.random.default_rng(0).standard_normal((200, 12)).astype(np.float32)
    errors = [float(((shared(embeddings, 3, count) - embeddings) ** 2).sum()) for count in (1, 8, 64)]
    assert errors[0] > errors[1] > errors[2] > 0
