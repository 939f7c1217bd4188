"""The quality of passages: fitted to judgements, stored with the student, used to leave passages out of an index."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from d2llm.core.errors import DataFormatError, InputError
from d2llm.core.types import Passage
from d2llm.data.beir import Dataset
from d2llm.models.fitted_part import PassageQuality, Widths
from d2llm.models.student import Student
from d2llm.ops import ridge
from d2llm.retrieval.encode import encode
from d2llm.retrieval.index import Index
from d2llm.training.fit_scores import fit_quality, fit_scores
from fake_models import FakeStudent
from tiny_data import make_source
from tiny_models import tiny_student_config, write_tiny_model

DIM = 6
PASSAGES = [Passage(f"p{n:02}", f"text {n} of {n % 5} words") for n in range(23)]


class PointStudent:
    """The vector of a text is in it; it counts the texts it reads."""

    fingerprint = "points"
    num_read = 0

    def encode_passages(self, texts: list[str], *, advance: object = None) -> SimpleNamespace:
        self.num_read += len(texts)
        return SimpleNamespace(vectors=np.array([json.loads(text) for text in texts], np.float32))


def points(name: str, *, offset: float = 0.0, num: int = 200, seed: int = 0, noise: bool = False) -> Dataset:
    """Passages at random points of which those with a larger first coordinate are relevant to a train query.

    A fifth of these is relevant to a dev query only. ``offset`` moves all points along the second coordinate; with
    ``noise``, relevance has nothing to do with the points.
    """
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(num, DIM))
    is_relevant = rng.normal(size=num) > 0 if noise else vectors[:, 0] > 0
    vectors[:, 1] += offset
    passages = {f"p{n:03}": json.dumps(vector.tolist()) for n, vector in enumerate(vectors)}
    relevant = [name for name, flag in zip(passages, is_relevant, strict=True) if flag]
    qrels = {"train": {"q": dict.fromkeys(relevant[::5] + relevant[1::5] + relevant[2::5] + relevant[3::5], 1)}}
    qrels["dev"] = {"d": dict.fromkeys(relevant[4::5], 1)}
    return make_source(passages, {"q": "query", "d": "query"}, [], qrels=qrels, name=name).dataset


def test_the_weights_are_those_of_ridge_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ridge, "PENALTIES", (0.1,))
    data, student = points("one", num=60), PointStudent()
    quality = fit_quality(student, [data])
    reserved = set(data.qrels["dev"]["d"])
    ids = [name for name in data.passages if name not in reserved]
    assert student.num_read == len(ids)
    x = np.array([json.loads(data.passages[name].text) for name in ids], np.float32).astype(float)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    y = np.array([name in data.qrels["train"]["q"] for name in ids], float)
    # The same problem as least squares: the penalty, 0.1 of a feature's variance, as additional rows.
    centred = x - x.mean(axis=0)
    rows = np.vstack([centred / len(ids) ** 0.5, (0.1 * centred.var(axis=0).mean()) ** 0.5 * np.eye(DIM)])
    values = np.concatenate([(y - y.mean()) / len(ids) ** 0.5, np.zeros(DIM)])
    expected, *_ = np.linalg.lstsq(rows, values, rcond=None)
    np.testing.assert_allclose(quality.weights, expected, rtol=1e-6, atol=1e-9)
    assert (quality.num_passages, quality.num_relevant) == ({"one": len(ids)}, {"one": int(y.sum())})


def test_auc_tells_a_quality_from_noise() -> None:
    fitted = fit_quality(PointStudent(), [points("real"), points("noise", seed=1, noise=True)])
    assert fitted.auc["real"] > 0.9
    assert 0.3 < fitted.auc["noise"] < 0.7


def test_what_distinguishes_data_sets_is_no_quality() -> None:
    """Set "far" lies elsewhere and has many more relevant passages; only the first coordinate may count."""
    near, far = points("near"), points("far", offset=3.0, seed=1)
    others = [name for name in far.passages if name not in far.qrels["train"]["q"]][25:]
    far = replace(far, passages={name: passage for name, passage in far.passages.items() if name not in others})
    weights = np.array(fit_quality(PointStudent(), [near, far]).weights)
    assert np.abs(weights[1:]).max() < 0.4 * weights[0]


def test_too_few_passages_are_refused() -> None:
    data = points("few", num=30)
    with pytest.raises(
        InputError, match=r"few: \d+ of \d+ passages are relevant to a query of 'train', but at least 20"
    ):
        fit_quality(PointStudent(), [data])


def test_quality_is_stored_with_the_student(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", "modernbert")
    student = Student.create(tiny_student_config(model), device="cpu", dtype="float32")
    student.save(tmp_path / "without")
    assert not (tmp_path / "without" / "quality.json").exists()
    student.quality = quality_of(np.arange(student.vector_dim))
    student.save(tmp_path / "with")
    loaded = Student.load(tmp_path / "with", device="cpu", dtype="float32")
    assert loaded.quality == student.quality
    assert loaded.fingerprint == student.fingerprint
    loaded.prepare_training()
    assert loaded.quality is None
    with pytest.raises(DataFormatError, match="was fitted to the student"):
        PassageQuality.read(tmp_path / "with", "another")
    with pytest.raises(InputError, match="labelled pairs have none"):
        fit_scores(student, [], "asymmetric", words=False, quality=True)


def quality_of(weights: np.ndarray) -> PassageQuality:
    counts = {"tiny": 1}
    return PassageQuality(
        weights=tuple(map(float, weights)), num_passages=counts, num_relevant=counts, auc={"tiny": 0.7}
    )


def test_quality_ignores_the_length_of_a_vector() -> None:
    quality = quality_of(np.array([2.0, -1.0]))
    assert quality.of(np.array([[3.0, 4.0], [30.0, 40.0], [0.0, 0.0]], np.float32)).tolist() == pytest.approx(
        [0.4, 0.4, 0]
    )


class TestEncode:
    @pytest.fixture
    def student(self) -> FakeStudent:
        student = FakeStudent()
        student.quality = quality_of(np.random.default_rng(0).normal(size=16))
        return student

    def lowest(self, student: FakeStudent, num: int) -> set[str]:
        vectors = student.encode_passages([passage.full_text for passage in PASSAGES]).vectors.astype(float)
        values = vectors @ np.array(student.quality.weights) / np.linalg.norm(vectors, axis=1)
        return {PASSAGES[int(row)].id for row in np.argsort(values)[:num]}

    @pytest.mark.parametrize("num_shards", [None, 3])
    def test_the_lowest_share_is_left_out(self, student: FakeStudent, tmp_path: Path, num_shards: int | None) -> None:
        report = encode(PASSAGES, student, tmp_path / "i", vector_format="float32", prune=0.3, num_shards=num_shards)
        assert (report.num_pruned, report.num_passages) == (6, 23)  # 6.9 passages
        index = Index.open(tmp_path / "i", student)
        kept = {passage.id for passage in PASSAGES} - self.lowest(student, 6)
        assert set(index.view.ids(index.view.live_rows())) == kept
        assert {result.passage.id for result in index.search("text 3", top_k=23).passages} == kept
        assert not index.verify().problems

    def test_an_interrupted_run_leaves_out_the_same(self, student, tmp_path, monkeypatch):
        def interrupt(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Index, "compact", interrupt)
            with pytest.raises(KeyboardInterrupt):
                encode(PASSAGES, student, tmp_path / "i", vector_format="float32", prune=0.3)
        assert not (tmp_path / "i").exists()
        report = encode(PASSAGES, student, tmp_path / "i", vector_format="float32", prune=0.3)
        assert report.num_pruned == 6
        index = Index.open(tmp_path / "i", student)
        assert set(index.missing([passage.id for passage in PASSAGES])) == self.lowest(student, 6)

    def test_without_pruning_nothing_is_left_out(self, student: FakeStudent, tmp_path: Path) -> None:
        report = encode(PASSAGES, student, tmp_path / "i")
        assert report.num_pruned == 0
        assert len(Index.open(tmp_path / "i", student)) == 23

    def test_shares_and_students_that_cannot_prune_are_refused(self, student: FakeStudent, tmp_path: Path) -> None:
        for fraction in (-0.1, 1.0):
            with pytest.raises(InputError, match=f"prune is {fraction:g}, but must be a fraction"):
                encode(PASSAGES, student, tmp_path / "i", prune=fraction)
        with pytest.raises(InputError, match="fit-scores --quality"):
            encode(PASSAGES, FakeStudent(), tmp_path / "i", prune=0.5)


def test_quality_of_another_width_is_refused(tmp_path: Path) -> None:
    quality_of(np.arange(7)).write(tmp_path, "known")
    assert PassageQuality.read(tmp_path, "known", Widths(7, 1)) is not None
    with pytest.raises(
        DataFormatError, match=r"does not fit vectors of width 8 and states of width 7; restore .*quality"
    ):
        PassageQuality.read(tmp_path, "known", Widths(8, 7))
