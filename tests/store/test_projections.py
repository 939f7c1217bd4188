"""Stored projections: scores and rankings do not change, and files that do not fit the index are ignored."""

from __future__ import annotations

import itertools
import logging
import shutil
from datetime import timedelta

import numpy as np
import pytest
import torch

from d2llm.core.errors import IndexMismatchError, InputError
from d2llm.core.types import Passage
from d2llm.models.student import Student
from d2llm.retrieval import project as module
from d2llm.retrieval.index import Index
from d2llm.retrieval.project import project
from d2llm.retrieval.row_scorer import RowScorer
from d2llm.retrieval.search import search
from d2llm.store.checksums import read_checked, write_checked
from d2llm.store.index_store import IndexStore
from d2llm.store.inspection import stats, verify
from d2llm.store.projections import StoredProjections
from d2llm.store.view import PassageView
from fake_models import FakeStudent
from tiny_models import TEXTS, randomise, tiny_student_config, write_tiny_model

WORDS = " ".join(TEXTS).split()
QUERIES = ["the cat sleeps", "rain in the mountains", "a train to far ports"]


def passages(number, start=0):
    """Passages with distinct texts: five known words and a number."""
    collection = []
    for n in range(start, start + number):
        words = np.random.default_rng(n).choice(WORDS, 5)
        collection.append(Passage(f"p{n}", f"{' '.join(words)} {n}"))
    return collection


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "llama")


def make_student(model, head="paper", features="concat", dtype="float32", **changes):
    config = tiny_student_config(model)
    interaction = config.interaction.model_copy(update={"head": head, "features": features} | changes)
    student = Student.create(config.model_copy(update={"interaction": interaction}), device="cpu", dtype=dtype)
    randomise(student.interaction, scale=0.5)
    return student.eval()


@pytest.fixture(scope="module")
def students(model):
    return {head: make_student(model, head) for head in ("paper", "anchored")}


@pytest.fixture(params=["paper", "anchored"])
def student(students, request):
    return students[request.param]


@pytest.fixture(scope="module")
def folders(students, tmp_path_factory):
    """The folder of an index of 60 passages, by the fingerprint of its student."""
    root = tmp_path_factory.mktemp("indexes")
    for head, student in students.items():
        Index.create(root / head, student).upsert(passages(60))
    return {student.fingerprint: root / head for head, student in students.items()}


@pytest.fixture
def index(student, folders, tmp_path):
    return Index.open(shutil.copytree(folders[student.fingerprint], tmp_path / "i"), student)


def check_scores(index, student, **settings):
    """Search, check the scores against a reference without stored projections, and return the rankings."""
    rankings = index.search(QUERIES, top_k=70, **settings)
    for ranking, query in zip(rankings, QUERIES, strict=True):
        rows = np.arange(index.view.capacity) if index.view.live is None else np.flatnonzero(index.view.live)
        vectors = torch.from_numpy(index.view.vectors(rows))
        with torch.inference_mode():
            query_vectors = torch.from_numpy(student.encode_queries([query]).vectors)
            reference = student.interaction(query_vectors, vectors, index.view.task).logits[0].numpy()
        scores = {hit.passage.id: hit.score for hit in ranking.passages}
        expected = dict(zip(index.view.ids(rows), reference.tolist(), strict=True))
        assert scores.keys() == expected.keys()
        spread = float(np.ptp(reference))
        for name, score in scores.items():
            assert score == pytest.approx(expected[name], abs=0.01 * spread)
        # The order matches the reference wherever its scores differ by more than the rounding.
        ordered = [expected[hit.passage.id] for hit in ranking.passages]
        assert all(above >= below - 0.02 * spread for above, below in itertools.pairwise(ordered))
    return rankings


def forbid_reading_vectors(monkeypatch):
    monkeypatch.setattr(PassageView, "vectors", lambda *_: pytest.fail("vectors were read"))


class TestScores:
    @pytest.mark.parametrize("exact", [False, True])
    def test_scores_match_the_reference(self, index, student, exact):
        report = project(index.store, student)
        assert (report.num_rows, report.num_added, report.width, report.bytes_per_row) == (60, 60, 16, 32)
        index.refresh()
        check_scores(index, student, exact=exact)

    def test_stored_rows_are_products_of_vectors_and_weights(self, index, student):
        project(index.store, student)
        view = PassageView(index.store)
        rows = np.array([3, 41, 0, 59])
        weight = student.interaction.first.weight.detach().double().numpy()[:, student.vector_dim :]
        expected = view.vectors(rows).astype(np.float64) @ weight.T
        stored = view.projections.read(rows)
        assert stored.dtype == torch.bfloat16
        np.testing.assert_allclose(stored.double().numpy(), expected, rtol=2**-8, atol=1e-6)

    def test_stored_projections_are_used(self, index, student, monkeypatch):
        """Other projections give other scores, and a head without an anchor reads no vectors at all."""
        project(index.store, student)
        query = student.encode_queries(QUERIES[:1]).vectors[0]
        scorer = RowScorer(PassageView(index.store), student, query, "symmetric")
        rows = np.arange(60)
        before = scorer(rows), scorer.change(rows) if student.has_anchor else None
        monkeypatch.setattr(StoredProjections, "read", lambda self, rows: 5 * torch.ones(len(rows), 16).bfloat16())
        assert abs(scorer(rows) - before[0]).max() > 0.01
        if student.has_anchor:
            forbid_reading_vectors(monkeypatch)
            assert abs(scorer.change(rows) - before[1]).max() > 0.001
        else:
            forbid_reading_vectors(monkeypatch)
            assert len(set(scorer(rows).tolist())) == 1

    def test_one_file_serves_both_tasks(self, index, student):
        project(index.store, student)
        index.refresh()
        query = student.encode_queries(QUERIES[:1]).vectors[0]
        rows = np.arange(60)
        for task in ("symmetric", "asymmetric"):
            expected = student.score(query, index.view.vectors(rows), task)
            scores = RowScorer(index.view, student, query, task)(rows)
            np.testing.assert_allclose(scores, expected, rtol=0, atol=0.01 * np.ptp(expected))

    def test_in_bfloat16(self, model, tmp_path):
        student = make_student(model, dtype="bfloat16")
        index = Index.create(tmp_path / "i", student)
        index.upsert(passages(40))
        query = student.encode_queries(QUERIES[:1]).vectors[0]
        rows = np.arange(40)
        expected = student.score(query, index.view.vectors(rows), "symmetric")
        project(index.store, student)
        scores = RowScorer(PassageView(index.store), student, query, "symmetric")(rows)
        np.testing.assert_allclose(scores, expected, rtol=0, atol=0.03 * np.ptp(expected))

    def test_weight_zero_reads_no_projections(self, students, tmp_path, monkeypatch):
        student = students["anchored"]
        index = Index.create(tmp_path / "i", student)
        index.upsert(passages(5))
        project(index.store, student)
        monkeypatch.setattr(StoredProjections, "read", lambda *_: pytest.fail("projections were read"))
        residual = student.interaction.interaction_weight("symmetric")
        before = residual.clone()
        residual.fill_(0.0)
        try:
            query = student.encode_queries(QUERIES[:1]).vectors[0]
            scores = RowScorer(PassageView(index.store), student, query, "symmetric")(np.arange(5))
        finally:
            residual.copy_(before)
        anchor = student.anchor_queries(query[None], "symmetric")[0]
        np.testing.assert_allclose(scores, index.view.vectors(np.arange(5)) @ anchor, rtol=0, atol=1e-4)


class TestChanges:
    def test_upsert_computes_only_missing_projections(self, index, student, monkeypatch):
        project(index.store, student)
        before = (index.folder / "projections-0.bin").read_bytes()
        computed = []
        original = Student.project_passages
        monkeypatch.setattr(
            Student, "project_passages", lambda self, vectors: computed.append(len(vectors)) or original(self, vectors)
        )
        index.upsert(passages(7, start=60))
        assert max(computed) == 7
        assert sum(computed) <= 8  # one extra row to learn the width
        assert (index.folder / "projections-0.bin").read_bytes().startswith(before)
        assert index.view.projections.num_rows == 67
        check_scores(index, student)
        assert project(index.store, student).num_added == 0

    def test_missing_projections_are_computed_like_stored_ones(self, index, student, monkeypatch):
        project(index.store, student)
        monkeypatch.setattr("d2llm.retrieval.upserting.extend_projections", lambda *_: None)
        index.upsert([*passages(7, start=60), Passage("p3", "bread and salt")])
        assert index.view.projections.num_rows == 60
        before = check_scores(index, student)
        assert project(index.store, student).num_added == 8
        index.refresh()
        assert index.view.projections.num_rows == 68
        after = check_scores(index, student)
        for old_ranking, new_ranking in zip(before, after, strict=True):
            assert [hit.passage.id for hit in old_ranking.passages] == [hit.passage.id for hit in new_ranking.passages]
            scores = np.array([[hit.score for hit in ranking.passages] for ranking in (old_ranking, new_ranking)])
            np.testing.assert_allclose(scores[0], scores[1], rtol=0, atol=1e-5)

    def test_deleted_passages_are_left_out(self, index, student):
        project(index.store, student)
        index.delete([f"p{n}" for n in range(0, 60, 2)])
        assert {hit.passage.id for hit in check_scores(index, student)[0].passages} == {
            f"p{n}" for n in range(1, 60, 2)
        }
        index.delete([f"p{n}" for n in range(50, 60)])
        assert project(index.store, student).num_added == 0

    def test_a_dense_compaction_drops_projections(self, index, student):
        project(index.store, student)
        index.delete(["p0"])
        index.compact(keep=timedelta(0), dense=True)
        assert not list(index.folder.glob("projections-0.*"))
        assert index.view.projections is None
        check_scores(index, student)
        assert project(index.store, student).num_added == 59
        assert (index.folder / "projections-1.bin").stat().st_size == 59 * 32
        index.refresh()
        check_scores(index, student)

    def test_an_interrupted_run_is_resumed(self, index, student, monkeypatch):
        monkeypatch.setattr(module, "_BLOCK_ROWS", 16)
        original, calls = Student.project_passages, []

        def interrupt_fourth_call(self, vectors):
            calls.append(len(vectors))
            if len(calls) == 4:
                raise KeyboardInterrupt
            return original(self, vectors)

        monkeypatch.setattr(Student, "project_passages", interrupt_fourth_call)
        with pytest.raises(KeyboardInterrupt):
            project(index.store, student)
        monkeypatch.setattr(Student, "project_passages", original)
        index.refresh()
        assert index.view.projections.num_rows == 32
        check_scores(index, student)
        assert project(index.store, student).num_added == 28

    def test_a_reader_keeps_its_version(self, index, student):
        project(index.store, student)
        reader = PassageView(index.store)
        index.upsert(passages(5, start=60))
        assert [len(ranking.passages) for ranking in search(reader, student, QUERIES, top_k=100)] == [60] * 3


class TestDamage:
    @pytest.fixture
    def built(self, index, student):
        project(index.store, student)
        index.refresh()
        return index

    def ignored(self, index, student, caplog, reason):
        """Check that the file is ignored, that the log and verify say why, and that building it again repairs it."""
        with caplog.at_level(logging.WARNING):
            view = PassageView(index.store)
            assert view.projections is None
        assert reason in caplog.text
        assert "passages are scored from their vectors" in caplog.text
        assert any(reason in problem for problem in verify(index.store).problems)
        index.refresh()
        check_scores(index, student)
        assert project(index.store, student).num_added == 60
        assert verify(index.store).problems == []
        assert PassageView(index.store).projections.num_rows == 60

    def test_a_damaged_file_is_ignored(self, built, student, caplog):
        path = built.folder / "projections-0.bin"
        content = bytearray(path.read_bytes())
        content[777] ^= 1
        path.write_bytes(content)
        self.ignored(built, student, caplog, "1 of 1 parts are not what was written")

    def test_a_truncated_file_is_ignored(self, built, student, caplog):
        path = built.folder / "projections-0.bin"
        path.write_bytes(path.read_bytes()[:-1])
        self.ignored(built, student, caplog, "projections-0.bin is shorter than its list of extents says")

    def test_a_file_without_its_record_is_ignored(self, built, student, caplog):
        (built.folder / "projections-0.json").unlink()
        self.ignored(built, student, caplog, "its projections cannot be used")

    @pytest.mark.parametrize("change", [("made_of", "another bfloat16"), ("since", 5)])
    def test_projections_of_other_vectors_are_ignored(self, built, student, caplog, change):
        path = built.folder / "projections-0.json"
        write_checked(path, read_checked(path) | dict([change]))
        self.ignored(built, student, caplog, "was made of other vectors")

    def test_rebuilt_vectors_invalidate_projections(self, built, student):
        """Row numbers after the last passage are assigned again, so the file records since when it is valid."""
        built.upsert(passages(1, start=60))
        (built.folder / "vectors-0.bin").unlink()
        built.refresh()
        assert built.view.projections is None
        check_scores(built, student)

    def test_rows_missing_from_the_table_are_not_stored(self, index, student):
        vectors = PassageView(index.store).vector_file
        vectors.append(np.zeros((3, vectors.code_size), np.uint8))  # an upsert killed before its commit
        assert PassageView(index.store).capacity == 63
        assert project(index.store, student).num_rows == 60

    def test_a_repair_removes_a_damaged_file(self, built):
        path = built.folder / "projections-0.bin"
        path.write_bytes(bytes(path.stat().st_size))
        (problem,) = verify(built.store, repair=True).problems
        assert "it was removed" in problem
        assert verify(built.store).problems == []
        assert not list(built.folder.glob("projections-*"))

    def test_stats(self, built, index):
        index_stats = stats(index.store)
        assert (index_stats.num_projections, index_stats.projection_bytes) == (60, 32)
        (index.folder / "projections-0.json").unlink()
        index_stats = stats(index.store)
        assert (index_stats.num_projections, index_stats.projection_bytes) == (0, 0)


class TestRefusals:
    @pytest.mark.parametrize("features", ["product", "difference", "rich"])
    def test_features_of_both_vectors_together_are_rejected(self, model, tmp_path, features):
        student = make_student(model, features=features)
        index = Index.create(tmp_path / "i", student)
        index.upsert(passages(3))
        with pytest.raises(InputError, match=rf"the features '{features}'.*nothing is gained.*'concat'"):
            project(index.store, student)
        assert not list(index.folder.glob("projections-*"))
        check_scores(index, student)

    def test_a_cosine_head_is_rejected(self, model, tmp_path):
        student = make_student(model, head="cosine")
        index = Index.create(tmp_path / "i", student)
        index.upsert(passages(3))
        with pytest.raises(InputError, match="only an inner product"):
            project(index.store, student)

    def test_another_student_is_rejected(self, index, model):
        with pytest.raises(IndexMismatchError):
            project(index.store, make_student(model, "paper", max_bound=3.0))

    def test_a_student_without_projections_is_rejected(self, tmp_path):
        index = Index.create(tmp_path / "i", FakeStudent())
        index.upsert(passages(3))
        with pytest.raises(InputError, match="no projections to store"):
            project(index.store, FakeStudent())

    def test_an_empty_index_is_rejected(self, students, tmp_path):
        index = Index.create(tmp_path / "i", students["paper"])
        with pytest.raises(InputError, match="holds no passages"):
            project(index.store, students["paper"])

    def test_a_scorer_requires_the_vectors_that_it_uses(self, students):
        student = students["anchored"]
        query, vectors = student.encode_queries(QUERIES[:1]).vectors[0], student.encode_passages(TEXTS).vectors
        projections = student.project_passages(vectors)
        scorer = student.prepare(query, "symmetric")
        with pytest.raises(InputError, match="neither vectors nor projections"):
            scorer(None)
        with pytest.raises(InputError, match="pass the vectors too"):
            scorer(None, projections)
        assert scorer(vectors, projections).shape == (len(TEXTS),)

    def test_a_scorer_rejects_projections_it_cannot_use(self, model):
        student = make_student(model, features="rich")
        query, vectors = student.encode_queries(QUERIES[:1]).vectors[0], student.encode_passages(TEXTS).vectors
        with pytest.raises(InputError, match="this head has none"):
            student.prepare(query, "symmetric")(vectors, torch.zeros(len(TEXTS), 16))


def test_projections_are_used_after_reopening(index, student):
    project(index.store, student)
    reopened = Index(IndexStore.open(index.folder), student)
    assert reopened.view.projections.num_rows == 60
    check_scores(reopened, student)
