"""Stored projections: the same scores and rankings as without them, of the right rows, and never from a wrong file."""

from __future__ import annotations

import itertools
import logging
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
    """Distinct texts of five known words."""
    made = []
    for n in range(start, start + number):
        words = np.random.default_rng(n).choice(WORDS, 5)
        made.append(Passage(f"p{n}", f"{' '.join(words)} {n}"))
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "llama")


def make_student(model, head="paper", features="concat", dtype="float32", **changes):
    config = tiny_student_config(model)
    interaction = config.interaction.model_copy(update={"head": head, "features": features} | changes)
    made = Student.create(config.model_copy(update={"interaction": interaction}), device="cpu", dtype=dtype)
    randomise(made.interaction, scale=0.5)
    return made.eval()


@pytest.fixture(scope="module")
def students(model):
    return {head: make_student(model, head) for head in ("paper", "anchored")}


@pytest.fixture(params=["paper", "anchored"])
def student(students, request):
    return students[request.param]


@pytest.fixture
def index(student, tmp_path):
    made = Index.create(tmp_path / "i", student)
    made.upsert(passages(60))
    return made


def unchanged_by(index, student, **settings):
    """Scores with the stored projections, having seen that they are those of the reference without."""
    found = index.search(QUERIES, top_k=70, **settings)
    for ranking, query in zip(found, QUERIES, strict=True):
        rows = np.arange(index.view.capacity) if index.view.live is None else np.flatnonzero(index.view.live)
        vectors = torch.from_numpy(index.view.vectors(rows))
        with torch.inference_mode():
            asked = torch.from_numpy(student.encode_queries([query]).vectors)
            plain = student.interaction(asked, vectors, index.view.task).logits[0].numpy()
        scores = {place.passage.id: place.score for place in ranking.passages}
        expected = dict(zip(index.view.ids(rows), plain.tolist(), strict=True))
        assert scores.keys() == expected.keys()
        spread = float(np.ptp(plain))
        for name, score in scores.items():
            assert score == pytest.approx(expected[name], abs=0.01 * spread)
        # The order is the reference's wherever the reference's scores differ by more than the rounding.
        ordered = [expected[place.passage.id] for place in ranking.passages]
        assert all(here >= later - 0.02 * spread for here, later in itertools.pairwise(ordered))
    return found


def refuse_vectors(monkeypatch):
    monkeypatch.setattr(PassageView, "vectors", lambda *_: pytest.fail("vectors were read"))


class TestScores:
    @pytest.mark.parametrize("exact", [False, True])
    def test_are_those_of_the_plain_way(self, index, student, exact):
        report = project(index.store, student)
        assert (report.num_rows, report.num_added, report.width, report.bytes_per_row) == (60, 60, 16, 32)
        index.refresh()
        unchanged_by(index, student, exact=exact)

    def test_stored_rows_are_the_product(self, index, student):
        project(index.store, student)
        view = PassageView(index.store)
        rows = np.array([3, 41, 0, 59])
        weight = student.interaction.first.weight.detach().double().numpy()[:, student.vector_dim :]
        expected = view.vectors(rows).astype(np.float64) @ weight.T
        stored = view.projections.read(rows)
        assert stored.dtype == torch.bfloat16
        np.testing.assert_allclose(stored.double().numpy(), expected, rtol=2**-8, atol=1e-6)

    def test_they_are_used(self, index, student, monkeypatch):
        """Other numbers in the file are other scores; and a head without an anchor reads no vectors at all."""
        project(index.store, student)
        query = student.encode_queries(QUERIES[:1]).vectors[0]
        scorer = RowScorer(PassageView(index.store), student, query, "symmetric")
        rows = np.arange(60)
        before = scorer(rows), scorer.change(rows) if student.has_anchor else None
        monkeypatch.setattr(StoredProjections, "read", lambda self, rows: 5 * torch.ones(len(rows), 16).bfloat16())
        assert abs(scorer(rows) - before[0]).max() > 0.01
        if student.has_anchor:
            refuse_vectors(monkeypatch)
            assert len(scorer.change(rows)) == 60
        else:
            refuse_vectors(monkeypatch)
            assert len(set(scorer(rows).tolist())) == 1

    def test_of_both_tasks_from_one_file(self, index, student):
        project(index.store, student)
        index.refresh()
        query = student.encode_queries(QUERIES[:1]).vectors[0]
        rows = np.arange(60)
        for task in ("symmetric", "asymmetric"):
            plain = student.score(query, index.view.vectors(rows), task)
            scores = RowScorer(index.view, student, query, task)(rows)
            np.testing.assert_allclose(scores, plain, rtol=0, atol=0.01 * np.ptp(plain))

    def test_in_bfloat16(self, model, tmp_path):
        student = make_student(model, dtype="bfloat16")
        index = Index.create(tmp_path / "i", student)
        index.upsert(passages(40))
        query = student.encode_queries(QUERIES[:1]).vectors[0]
        rows = np.arange(40)
        plain = student.score(query, index.view.vectors(rows), "symmetric")
        project(index.store, student)
        scores = RowScorer(PassageView(index.store), student, query, "symmetric")(rows)
        np.testing.assert_allclose(scores, plain, rtol=0, atol=0.03 * np.ptp(plain))

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
    def test_upsert_extends_and_computes_only_what_is_missing(self, index, student, monkeypatch):
        project(index.store, student)
        before = (index.folder / "projections-0.bin").read_bytes()
        computed = []
        original = Student.project_passages
        monkeypatch.setattr(
            Student, "project_passages", lambda self, vectors: computed.append(len(vectors)) or original(self, vectors)
        )
        index.upsert(passages(7, start=60))
        assert max(computed) == 7
        assert sum(computed) <= 8  # one of them to learn the width
        assert (index.folder / "projections-0.bin").read_bytes().startswith(before)
        assert index.view.projections.num_rows == 67
        unchanged_by(index, student)
        assert project(index.store, student).num_added == 0

    def test_rows_that_came_later_are_computed_as_they_would_be_stored(self, index, student, monkeypatch):
        project(index.store, student)
        monkeypatch.setattr("d2llm.retrieval.upserting.extend_projections", lambda *_: None)
        index.upsert([*passages(7, start=60), Passage("p3", "bread and salt")])
        assert index.view.projections.num_rows == 60
        before = unchanged_by(index, student)
        assert project(index.store, student).num_added == 8
        index.refresh()
        assert index.view.projections.num_rows == 68
        after = unchanged_by(index, student)
        for one, other in zip(before, after, strict=True):
            assert [place.passage.id for place in one.passages] == [place.passage.id for place in other.passages]
            scores = np.array([[place.score for place in ranking.passages] for ranking in (one, other)])
            np.testing.assert_allclose(scores[0], scores[1], rtol=0, atol=1e-5)

    def test_deleted_passages_are_left_out(self, index, student):
        project(index.store, student)
        index.delete([f"p{n}" for n in range(0, 60, 2)])
        assert {place.passage.id for place in unchanged_by(index, student)[0].passages} == {
            f"p{n}" for n in range(1, 60, 2)
        }
        index.delete([f"p{n}" for n in range(50, 60)])
        assert project(index.store, student).num_added == 0

    def test_a_dense_compaction_drops_them(self, index, student):
        project(index.store, student)
        index.delete(["p0"])
        index.compact(keep=timedelta(0), dense=True)
        assert not list(index.folder.glob("projections-0.*"))
        assert index.view.projections is None
        unchanged_by(index, student)
        assert project(index.store, student).num_added == 59
        assert (index.folder / "projections-1.bin").stat().st_size == 59 * 32
        index.refresh()
        unchanged_by(index, student)

    def test_an_interrupted_run_goes_on(self, index, student, monkeypatch):
        monkeypatch.setattr(module, "_BLOCK_ROWS", 16)
        original, calls = Student.project_passages, []

        def fail_at_last(self, vectors):
            calls.append(len(vectors))
            if len(calls) == 4:
                raise KeyboardInterrupt
            return original(self, vectors)

        monkeypatch.setattr(Student, "project_passages", fail_at_last)
        with pytest.raises(KeyboardInterrupt):
            project(index.store, student)
        monkeypatch.setattr(Student, "project_passages", original)
        index.refresh()
        assert index.view.projections.num_rows == 32
        unchanged_by(index, student)
        assert project(index.store, student).num_added == 28

    def test_a_reader_keeps_its_version(self, index, student):
        project(index.store, student)
        reader = PassageView(index.store)
        index.upsert(passages(5, start=60))
        assert [len(ranking.passages) for ranking in search(reader, student, QUERIES, top_k=100)] == [60] * 3


class TestTrust:
    @pytest.fixture
    def built(self, index, student):
        project(index.store, student)
        index.refresh()
        return index

    def ignored(self, index, student, caplog, reason):
        """The file is left aside with a reason in the log, verify says so too, and building again mends it."""
        with caplog.at_level(logging.WARNING):
            view = PassageView(index.store)
            assert view.projections is None
        assert reason in caplog.text
        assert "passages are scored from their vectors" in caplog.text
        assert any(reason in problem for problem in verify(index.store).problems)
        index.refresh()
        unchanged_by(index, student)
        assert project(index.store, student).num_added == 60
        assert verify(index.store).problems == []
        assert PassageView(index.store).projections.num_rows == 60

    def test_a_damaged_file(self, built, student, caplog):
        path = built.folder / "projections-0.bin"
        content = bytearray(path.read_bytes())
        content[777] ^= 1
        path.write_bytes(content)
        self.ignored(built, student, caplog, "1 of 1 parts are not what was written")

    def test_a_file_cut_short(self, built, student, caplog):
        path = built.folder / "projections-0.bin"
        path.write_bytes(path.read_bytes()[:-1])
        self.ignored(built, student, caplog, "projections-0.bin is shorter than its list of extents says")

    def test_a_record_that_is_gone(self, built, student, caplog):
        (built.folder / "projections-0.json").unlink()
        self.ignored(built, student, caplog, "its projections cannot be used")

    @pytest.mark.parametrize("change", [("made_of", "another bfloat16"), ("since", 5)])
    def test_made_of_other_vectors(self, built, student, caplog, change):
        path = built.folder / "projections-0.json"
        write_checked(path, read_checked(path) | dict([change]))
        self.ignored(built, student, caplog, "was made of other vectors")

    def test_vectors_written_anew_make_them_void(self, built, student):
        """Rows that were left behind the last passage get their numbers again, so the file says since when."""
        built.upsert(passages(1, start=60))
        (built.folder / "vectors-0.bin").unlink()
        built.refresh()
        assert built.view.projections is None
        unchanged_by(built, student)

    def test_rows_that_no_table_names_are_not_stored(self, index, student):
        vectors = PassageView(index.store).vector_file
        vectors.append(np.zeros((3, vectors.code_size), np.uint8))  # an upsert killed before its commit
        assert PassageView(index.store).capacity == 63
        assert project(index.store, student).num_rows == 60

    def test_verify_repairs_by_removing(self, built):
        path = built.folder / "projections-0.bin"
        path.write_bytes(bytes(path.stat().st_size))
        (problem,) = verify(built.store, repair=True).problems
        assert "it was removed" in problem
        assert verify(built.store).problems == []
        assert not list(built.folder.glob("projections-*"))

    def test_facts(self, built, index):
        facts = stats(index.store)
        assert (facts.num_projections, facts.projection_bytes) == (60, 32)
        (index.folder / "projections-0.json").unlink()
        facts = stats(index.store)
        assert (facts.num_projections, facts.projection_bytes) == (0, 0)


class TestRefusals:
    @pytest.mark.parametrize("features", ["product", "difference", "rich"])
    def test_features_that_see_both_at_once(self, model, tmp_path, features):
        student = make_student(model, features=features)
        index = Index.create(tmp_path / "i", student)
        index.upsert(passages(3))
        with pytest.raises(InputError, match=rf"the features '{features}'.*nothing is gained.*'concat'"):
            project(index.store, student)
        assert not list(index.folder.glob("projections-*"))
        unchanged_by(index, student)

    def test_a_cosine_head(self, model, tmp_path):
        student = make_student(model, head="cosine")
        index = Index.create(tmp_path / "i", student)
        index.upsert(passages(3))
        with pytest.raises(InputError, match="only an inner product"):
            project(index.store, student)

    def test_another_student(self, index, model):
        with pytest.raises(IndexMismatchError):
            project(index.store, make_student(model, "paper", max_bound=3.0))

    def test_a_student_of_another_kind(self, tmp_path):
        index = Index.create(tmp_path / "i", FakeStudent())
        index.upsert(passages(3))
        with pytest.raises(InputError, match="no projections to store"):
            project(index.store, FakeStudent())

    def test_no_passages(self, students, tmp_path):
        index = Index.create(tmp_path / "i", students["paper"])
        with pytest.raises(InputError, match="holds no passages"):
            project(index.store, students["paper"])

    def test_a_scorer_without_what_it_needs(self, students):
        student = students["anchored"]
        query, vectors = student.encode_queries(QUERIES[:1]).vectors[0], student.encode_passages(TEXTS).vectors
        projections = student.project_passages(vectors)
        scorer = student.prepare(query, "symmetric")
        with pytest.raises(InputError, match="neither vectors nor projections"):
            scorer(None)
        with pytest.raises(InputError, match="pass the vectors too"):
            scorer(None, projections)
        assert scorer(vectors, projections).shape == (len(TEXTS),)

    def test_a_scorer_that_cannot_use_them(self, model):
        student = make_student(model, features="rich")
        query, vectors = student.encode_queries(QUERIES[:1]).vectors[0], student.encode_passages(TEXTS).vectors
        with pytest.raises(InputError, match="this head has none"):
            student.prepare(query, "symmetric")(vectors, torch.zeros(len(TEXTS), 16))


def test_the_store_can_be_opened_again(index, student):
    project(index.store, student)
    again = Index(IndexStore.open(index.folder), student)
    assert again.view.projections.num_rows == 60
    unchanged_by(again, student)
