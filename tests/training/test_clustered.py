"""Batches of queries that are alike: the clusters by a search of its own, and what a batch is made of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d2llm.data.collation import LabelledSource, epoch_batches
from d2llm.data.labels import LabelStore
from d2llm.models.student import Student
from d2llm.ops.clusters import nearest_centres
from d2llm.training import distill
from tiny_data import topics
from tiny_distill import Workspace
from tiny_models import tiny_student_config


def test_each_vector_is_in_the_cluster_of_the_nearest_mean() -> None:
    vectors = np.random.default_rng(0).standard_normal((60, 5)).astype(np.float32)
    clusters = nearest_centres(vectors, 7)
    means = {cluster: vectors[clusters == cluster].mean(axis=0) for cluster in set(clusters.tolist())}
    for vector, cluster in zip(vectors, clusters.tolist(), strict=True):
        assert min(means, key=lambda one: np.linalg.norm(vector - means[one])) == cluster
    apart = np.repeat(np.eye(3) * 9, 4, axis=0)
    np.testing.assert_array_equal(nearest_centres(apart[::-1], 12).reshape(3, 4).std(axis=1), 0)
    assert nearest_centres(vectors[:2], 9).tolist() == [0, 1]


def test_a_batch_has_one_cluster_and_each_pass_another_order(tmp_path: Path) -> None:
    source = topics()
    joined = LabelledSource.join(
        source, LabelStore(tmp_path, teacher="T", prompt="P", dataset=source.dataset.name), keep_unlabelled=True
    )
    ids = [entry.query_id for entry in joined.entries]
    clustered = replace(joined, clusters={query_id: n % (len(ids) // 2) for n, query_id in enumerate(ids)})
    passes = [
        [
            [draw.entry.query_id for draw in draws]
            for _, draws in epoch_batches([clustered], epoch=epoch, batch_queries=2, num_hard=1, num_easy=0, seed=0)
        ]
        for epoch in range(3)
    ]
    for batches in passes:
        assert sorted(query_id for batch in batches for query_id in batch) == sorted(ids)
        assert all(len({clustered.clusters[query_id] for query_id in batch}) == 1 for batch in batches)
    assert passes[0] != passes[1] != passes[2]


def test_clusters_are_those_of_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, seen = Workspace(tmp_path), []

    def watched(vectors: np.ndarray, num_clusters: int, **options: Any) -> np.ndarray:
        seen.append(vectors)
        return nearest_centres(vectors, num_clusters, **options)

    monkeypatch.setattr(distill, "nearest_centres", watched)
    config = tiny_student_config(workspace.model)
    workspace.run(tmp_path / "out", student=config, clustered=True, epochs=1)
    start = Student.create(config, device="cpu", dtype="float32", seed=0)
    source = workspace.source
    entries = sorted(source.plan.entries, key=lambda entry: entry.query_id)
    queries = start.encode_query([source.dataset.queries[entry.query_id].text for entry in entries])
    positives = start.encode_document([source.dataset.passages[entry.positives[0]].full_text for entry in entries])
    np.testing.assert_allclose(seen[0], np.concatenate([queries, positives], axis=1), atol=1e-5)
