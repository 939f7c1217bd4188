"""ops/whitening.py against maps worked out by hand, and against their definitions in float64."""

from __future__ import annotations

import numpy as np
import pytest

from d2llm.core.errors import InputError
from d2llm.ops.whitening import principal_components, whitening


def test_independent_directions_are_divided_by_their_standard_deviation() -> None:
    """x takes 1 +- 3, y takes 2 +- 1, independently: variances 9 and 1, times 4 / 3 for a sample of four."""
    vectors = np.array([[4, 3], [4, 1], [-2, 3], [-2, 1]], dtype=np.float32)
    mean, matrix = whitening(vectors)
    np.testing.assert_allclose(mean, [1, 2])
    np.testing.assert_allclose(np.abs(matrix), [[1 / np.sqrt(12), 0], [0, 1 / np.sqrt(4 / 3)]], atol=1e-12)


def test_correlated_vectors_get_mean_0_and_covariance_1() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(400, 5)) @ rng.normal(size=(5, 5)) + rng.normal(size=5)
    mean, matrix = whitening(vectors)
    white = (vectors - mean) @ matrix
    np.testing.assert_allclose(white.mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(white.T @ white / 399, np.eye(5), atol=1e-9)


def test_a_direction_without_variance_is_left_out() -> None:
    rng = np.random.default_rng(1)
    vectors = np.concatenate([rng.normal(size=(50, 2)), np.full((50, 1), 7.0)], axis=1)
    mean, matrix = whitening(vectors)
    white = (vectors - mean) @ matrix
    np.testing.assert_allclose(np.cov(white.T), np.diag([1.0, 1.0, 0.0]), atol=1e-9)


def test_fewer_directions_are_the_first_ones_and_take_fewer_vectors() -> None:
    rng = np.random.default_rng(2)
    vectors = rng.normal(size=(8, 10)) * np.arange(1, 11)
    mean, matrix = whitening(vectors, 3)
    white = (vectors - mean) @ matrix
    _, lengths, _ = np.linalg.svd(vectors - vectors.mean(axis=0))
    np.testing.assert_allclose(np.cov(white.T), np.eye(3), atol=1e-9)
    np.testing.assert_allclose(1 / (matrix**2).sum(axis=0), lengths[:3] ** 2 / 7, rtol=1e-9)


def test_too_few_vectors_are_refused() -> None:
    with pytest.raises(InputError, match=r"takes more than 4 passages, .* but there are 4"):
        whitening(np.ones((4, 4), np.float32))


def test_principal_components_are_the_first_singular_vectors_of_the_centred_vectors() -> None:
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(60, 6)) * [1, 5, 2, 9, 0.5, 3] + 4).astype(np.float32)
    components = principal_components(vectors, 3)
    _, _, singular = np.linalg.svd(vectors.astype(np.float64) - vectors.astype(np.float64).mean(axis=0))
    np.testing.assert_allclose(np.abs(np.sum(components * singular[:3], axis=1)), 1, rtol=1e-6)


def test_too_few_vectors_for_principal_components_are_refused() -> None:
    with pytest.raises(InputError, match=r"4 principal components take more than 4 passages, .* there are 4"):
        principal_components(np.eye(4, 9, dtype=np.float32), 4)
