"""Approximate candidates: recall as promised, changes seen at once, and never a wrong answer for want of the file."""

import gzip
import json
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from d2llm.core.errors import IndexLockedError, IndexMismatchError, InputError
from d2llm.core.types import Passage, Query
from d2llm.retrieval import build_ann as module
from d2llm.retrieval.build_ann import build_ann
from d2llm.retrieval.candidates import AnnSource
from d2llm.retrieval.encode import encode
from d2llm.retrieval.index import Index
from d2llm.retrieval.search import search
from d2llm.store.ann import AnnSearch
from d2llm.store.checksums import read_checked, write_checked
from d2llm.store.index_store import IndexStore
from d2llm.store.view import PassageView
from fake_models import AnchorStudent, FakeStudent, PreparedAnchorStudent
from tiny_ann import DIM, PlainStudent, clustered, new_ann_store, products, put_vectors

NUM = 4_000
QUERY = Query("q", "text")


@pytest.fixture(autouse=True, scope="module")
def _few_passages_are_enough():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MIN_PASSAGES", 500)
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    made = new_ann_store(tmp_path_factory.mktemp("ann") / "i", clustered(NUM))
    build_ann(made, PlainStudent(), recall=0.95, depth=50)
    return made.folder


@pytest.fixture
def store(built, tmp_path):
    return IndexStore.open(shutil.copytree(built, tmp_path / "i"))


def searched(view, query, top_k, allowed=None):
    return AnnSource(view, allowed).propose(QUERY, query, top_k)


def by_file(view, query, top_k, allowed=None):
    """As ``searched``, and certainly not by the exact scan."""
    found = AnnSearch(view.ann, view.mask(allowed), view.ids).search(query, top_k)
    assert found is not None
    return found


def best(view, query, top_k, mask=None):
    scores = products(view, query)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    return np.argsort(-scores, kind="stable")[:top_k]


def recall_of(view, queries, top_k, allowed=None):
    mask = view.mask(allowed)
    found = [np.isin(best(view, q, top_k, mask), by_file(view, q, top_k, allowed)[0]).mean() for q in queries]
    return np.mean(found)


class TestRecall:
    @pytest.mark.parametrize("name", ["bfloat16", "float32", "int8", "int3"])
    def test_kept_for_queries_not_seen_before(self, tmp_path, name):
        store = new_ann_store(tmp_path / "i", clustered(NUM), name)
        unseen = clustered(100, seed=5)
        report = build_ann(
            store, PlainStudent(clustered(300, seed=4)), recall=0.9, depth=50, queries=[str(n) for n in range(300)]
        )
        assert (report.queries, report.num_queries, report.num_passages) == ("given", 300, NUM)
        assert [found.depth for found in report.recalls] == [10, 50]
        assert all(found.at_least >= 0.9 for found in report.recalls)
        view = PassageView(store)
        assert recall_of(view, unseen, 50) >= 0.88
        assert recall_of(view, unseen, 10) >= 0.86
        assert view.ann.record.probes[-1][1] < view.ann.record.num_lists  # else nothing was shown

    def test_kept_on_real_texts(self, tmp_path):
        corpus = Path(__file__).parents[3] / "shared/data/wikiqa/corpus.jsonl.gz"
        if not corpus.is_file():
            pytest.skip(f"{corpus} is not there")
        with gzip.open(corpus, "rt", encoding="utf-8") as lines:
            texts = [json.loads(line)["text"] for _, line in zip(range(8_300), lines, strict=False)]
        vectors = FakeStudent(dim=DIM).encode_passages(texts).vectors
        store = new_ann_store(tmp_path / "i", vectors[:8_000])
        build_ann(store, PlainStudent(), recall=0.9, depth=100)
        assert recall_of(PassageView(store), vectors[8_000:], 100) >= 0.88

    def test_a_passage_that_asks_does_not_count_itself(self, tmp_path):
        """Vectors without clusters: each finds itself with one probe, and its nearest neighbour with many."""
        vectors = np.random.default_rng(0).standard_normal((1_000, DIM)).astype(np.float32)
        (found,) = build_ann(new_ann_store(tmp_path / "i", vectors), PlainStudent(), recall=0.5, depth=1).recalls
        assert found.num_probes >= 5
        asked = module._TuningQueries(np.zeros((1, 2), np.float32), np.array([7]))
        assert module._others(asked, 0, np.array([3, 7, 5])).tolist() == [3, 5]

    def test_bound_by_hand(self):
        assert module._at_least(np.array([1.0, 0.5, 0.75, 0.75])) == pytest.approx(0.75 - 1.645 * 0.2041241 / 2)
        assert module._at_least(np.array([[0.5, 1.0]])).tolist() == [0.5, 1.0]

    def test_probes_between_depths_are_interpolated_and_end_at_the_deepest(self, store):
        ann = PassageView(store).ann
        ann._log_depths, ann._log_probes = np.log([10, 1000]), np.log([4, 16])
        assert ann.probes_for(np.array([1, 10, 100, 1000, 1001, np.inf])).tolist() == [4, 4, 8, 16, np.inf, np.inf]


class TestAnswers:
    def test_scores_are_those_of_the_exact_scan(self, store):
        view = PassageView(store)
        for query in clustered(5, seed=8):
            rows, scores = by_file(view, query, 30)
            exact = dict(zip(*(part.tolist() for part in view.scan(query, NUM)), strict=True))
            assert scores.tolist() == [exact[row] for row in rows.tolist()]
            assert (np.diff(scores) <= 0).all()

    def test_equal_scores_in_the_order_of_their_ids(self, store):
        same = clustered(1, seed=3)
        put_vectors(store, NUM, np.repeat(same, 3, axis=0))
        build_ann(store, PlainStudent(), recall=0.95, depth=50)
        put_vectors(store, NUM - 1, np.repeat(same, 1, axis=0), "other")  # last row, first id
        view = PassageView(store)
        rows, _ = by_file(view, same[0], 4)
        assert view.ids(rows) == [f"p{NUM + n:06d}" for n in (-1, 0, 1, 2)]

    def test_a_deleted_passage_is_gone_and_a_new_one_is_found_at_once(self, store):
        query = clustered(1, seed=8)[0]
        before = PassageView(store)
        first = before.ids(by_file(before, query, 10)[0])
        store.delete(first[:3])
        put_vectors(store, NUM, query[None] * 2)
        view = PassageView(store)
        found = view.ids(by_file(view, query, 10)[0])
        assert found[0] == f"p{NUM:06d}"
        assert found[1:8] == first[3:]
        put_vectors(store, NUM, -query[None], "other")
        assert PassageView(store).ids(by_file(PassageView(store), query, 7)[0]) == first[3:]

    def test_a_view_from_before_still_sees_what_was(self, store):
        query = clustered(1, seed=8)[0]
        before = PassageView(store)
        first = before.ids(by_file(before, query, 10)[0])
        store.delete(first[:3])
        assert before.ids(by_file(before, query, 10)[0]) == first
        assert PassageView(store, before.version).ids(by_file(before, query, 10)[0]) == first

    def test_a_version_with_rows_that_the_file_lacks_is_scanned_exactly(self, store, caplog):
        query = clustered(1, seed=8)[0]
        old = PassageView(store).version
        first = PassageView(store).ids(by_file(PassageView(store), query, 10)[0])
        store.delete(first[:3])
        build_ann(store, PlainStudent(), recall=0.95, depth=50)
        view = PassageView(store, old)
        assert (view.ann, view.ids(searched(view, query, 3).rows)) == (None, first[:3])
        assert "built over version" in caplog.text
        assert PassageView(store).ids(by_file(PassageView(store), query, 7)[0]) == first[3:]

    def test_one_of_a_thousand_matches(self, store):
        view, query = PassageView(store), clustered(1, seed=8)[0]
        allowed = np.arange(NUM) % 1_000 == 7
        found = searched(view, query, 10, allowed)
        assert found.rows.tolist() == best(view, query, 10, allowed)[:4].tolist()
        assert len(searched(view, query, 10, np.zeros(NUM, np.bool_)).rows) == 0

    def test_a_filter_keeps_the_recall_wherever_its_rows_lie(self, store):
        view = PassageView(store)
        queries = clustered(60, seed=8)
        anywhere = np.random.default_rng(0).random(NUM) < 0.4
        assert recall_of(view, queries, 20, anywhere) >= 0.93
        # Of the nearest 500 rows to each query a tenth is left: probing as for half of all rows would find few.
        found = []
        for query in queries:
            away = np.ones(NUM, np.bool_)
            away[best(view, query, 500)[np.arange(500) % 10 > 0]] = False
            rows = searched(view, query, 20, away).rows
            found.append(np.isin(best(view, query, 20, away), rows).mean())
            assert away[rows].all()
        assert np.mean(found) >= 0.88

    @pytest.mark.parametrize("top_k", [1, 401, NUM, NUM + 10])
    def test_any_top_k(self, store, top_k):
        view, query = PassageView(store), clustered(1, seed=8)[0]
        found = searched(view, query, top_k)
        assert len(found.rows) == min(top_k, NUM)
        if top_k > 400:  # beyond what was tuned
            assert found.rows.tolist() == view.scan(query, top_k).rows.tolist()

    def test_a_query_that_is_no_vector_of_this_width(self, store):
        view = PassageView(store)
        for wrong in (np.zeros(DIM + 1, np.float32), np.full(DIM, np.nan, np.float32)):
            with pytest.raises(InputError, match="must be 32 finite numbers"):
                searched(view, wrong, 3)

    def test_everything_deleted(self, store):
        store.delete([f"p{n:06d}" for n in range(NUM)])
        assert len(searched(PassageView(store), clustered(1)[0], 3).rows) == 0


class TestDamage:
    @staticmethod
    def damage(folder, how):
        file, record = folder / "ann-0.faiss", folder / "ann-0.json"
        if how == "byte":
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        elif how == "short":
            file.write_bytes(file.read_bytes()[:-100])
        elif how == "gone":
            file.unlink()
        elif how == "no json":
            record.write_text("{")
        elif how == "a list":
            record.write_text("[]")
        else:
            write_checked(record, {**read_checked(record), **how})

    @pytest.mark.parametrize(
        ("how", "why"),
        [
            ("byte", "not what was written"),
            ("short", "not what was written"),
            ("gone", "No such file"),
            ("no json", "Expecting"),
            ("a list", "other fields"),
            ({"more": 1}, "other fields"),
            ({"student": "another"}, "other vectors"),
            ({"vector_format": "int8"}, "other vectors"),
            ({"since": 3}, "other vectors"),
            ({"covered": NUM + 1}, "built over version"),
            ({"probes": []}, "not enough values|zero-size|unpack"),
            ({"covered": None}, "not supported"),
        ],
    )
    def test_the_exact_scan_answers(self, store, caplog, how, why):
        self.damage(store.folder, how)
        view, query = PassageView(store), clustered(1, seed=8)[0]
        found = searched(view, query, 20)
        assert found.rows.tolist() == view.scan(query, 20).rows.tolist()
        assert found.scores.tolist() == view.scan(query, 20).scores.tolist()
        assert len(caplog.records) == 2
        assert caplog.records[0].levelno == logging.WARNING
        assert re.search(why, caplog.records[0].message), caplog.records[0].message

    def test_vectors_written_anew_may_have_other_rows(self, store):
        store.delete([f"p{NUM - 1:06d}"])
        (store.folder / "vectors-0.bin").unlink()
        assert PassageView(store).capacity == NUM - 1
        put_vectors(store, NUM, clustered(1, seed=8) * 2)
        view = PassageView(store)
        assert view.ann is None
        assert view.ids(searched(view, clustered(1, seed=8)[0], 1).rows) == [f"p{NUM:06d}"]

    def test_a_new_generation_is_another_index(self, store):
        store.delete([f"p{n:06d}" for n in range(1, NUM, 3)])
        store.compact(dense=True)
        view, query = PassageView(store), clustered(1, seed=8)[0]
        assert view.ann is None
        assert searched(view, query, 20).rows.tolist() == view.scan(query, 20).rows.tolist()
        (store.folder / ".ann-0.new").write_text("left by a crash")
        build_ann(store, PlainStudent(), recall=0.9, depth=20)
        assert sorted(path.name for path in store.folder.glob("*ann-*")) == ["ann-1.faiss", "ann-1.json"]
        assert recall_of(PassageView(store), clustered(50, seed=8), 20) >= 0.88

    def test_holes_are_not_in_it(self, store):
        store.delete([f"p{n:06d}" for n in range(0, NUM, 3)])
        report = build_ann(store, PlainStudent(), recall=0.9, depth=20)
        assert report.num_passages == len(PassageView(store)) == PassageView(store).ann.faiss_index.ntotal


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"recall": 0.0}, r"recall must be in \(0, 1\]"),
            ({"recall": 1.1}, r"recall must be in \(0, 1\]"),
            ({"depth": 0}, "at least 1"),
            ({"depth": 1_001}, "more than a quarter of its 4,000"),
            ({"queries": []}, "the list of queries is empty"),
            ({"recall": 1.0, "depth": 900}, "the exact scan is faster; lower the recall"),
        ],
    )
    def test_what_makes_no_sense(self, store, options, message):
        before = {path: path.stat().st_mtime_ns for path in store.folder.iterdir()}
        with pytest.raises(InputError, match=message):
            build_ann(store, PlainStudent(), **options)
        assert {path: path.stat().st_mtime_ns for path in store.folder.iterdir()} == before

    def test_another_student_or_none_with_an_inner_product(self, store):
        with pytest.raises(IndexMismatchError):
            build_ann(store, FakeStudent())
        with pytest.raises(InputError, match="no inner product"):
            build_ann(store, PlainStudent(has_anchor=False))

    @pytest.mark.parametrize("num", [0, 3, 499])
    def test_few_passages(self, tmp_path, num):
        store = IndexStore.create(tmp_path / "i", student_fingerprint="student", dim=DIM)
        if num:
            put_vectors(store, 0, clustered(num))
        with pytest.raises(InputError, match=rf"holds {num} passages; below 500 the exact scan is faster"):
            build_ann(store, PlainStudent(), depth=1)
        found = searched(PassageView(store), clustered(1)[0], 5)
        assert len(found.rows) == min(5, num)

    def test_while_another_writes_at_the_end(self, store):
        checksum = PassageView(store).ann.record.checksum
        with IndexStore.open(store.folder).writing(), pytest.raises(IndexLockedError):
            build_ann(store, PlainStudent(), recall=0.9, depth=20)
        assert PassageView(store).ann.record.checksum == checksum

    def test_compacted_while_it_is_built(self, store):
        class Compacts(PlainStudent):
            def anchor_queries(self, vectors, task):
                store.compact(dense=True)
                return super().anchor_queries(vectors, task)

        with pytest.raises(InputError, match="compacted or restored during the build"):
            build_ann(store, Compacts(), recall=0.9, depth=20)


class TestSearch:
    def test_a_living_index(self, tmp_path):
        student = FakeStudent(dim=DIM)
        words = ["cat", "dog", "fish", "bird", "horse", "sleeps", "runs", "swims", "flies", "eats"]
        random = np.random.default_rng(0)
        index = Index.create(tmp_path / "i", student, metadata={"year": "integer"})
        index.upsert(
            [Passage(f"{n}", f"{' '.join(random.choice(words, 3))} {n}", metadata={"year": n % 50}) for n in range(900)]
        )
        report = build_ann(index.store, student, recall=0.9, depth=20)
        assert report.bytes_per_passage < 2 * (DIM + 8)  # with few passages the centroids weigh
        index.refresh()
        options = {"num_candidates": 20, "top_k": 5}
        (found,) = index.search("cat runs", sources=("ann",), explain=True, **options)
        (exact,) = index.search("cat runs", **options)
        assert len({place.passage.id for place in found.passages} & {place.passage.id for place in exact.passages}) >= 4
        assert set(found.passages[0].explanation.source_ranks) == {"ann"}
        (few,) = index.search("cat runs", sources=("ann",), filter="year = 7", top_k=30)
        assert len(few.passages) == 18
        (both,) = index.search("cat runs", sources=("ann", "bm25"), explain=True, **options)
        assert {name for place in both.passages for name in place.explanation.source_ranks} == {"ann", "bm25"}

    def test_where_the_anchor_is_the_score_nothing_is_scored_again(self, tmp_path):
        student = AnchorStudent(dim=DIM)
        words = ["cat", "dog", "fish", "bird", "horse", "sleeps", "runs", "swims", "flies", "eats"]
        random = np.random.default_rng(1)
        index = Index.create(tmp_path / "i", student, vector_format="float32")
        index.upsert([Passage(f"{n}", " ".join(random.choice(words, 3))) for n in range(600)])
        build_ann(index.store, student, recall=0.9, depth=20)
        index.refresh()
        for asked in ("cat runs", "horse eats fish"):
            options = {"num_candidates": 20, "top_k": 5, "sources": ("ann",)}
            (slow,) = search(index.view, AnchorStudent(dim=DIM), [asked], **options)
            (fast,) = search(index.view, PreparedAnchorStudent(dim=DIM), [asked], **options)
            assert fast.passages == slow.passages
            assert (fast.num_candidates, slow.num_candidates) == (5, 20)

    def test_an_index_that_cannot_have_one(self, tmp_path, caplog):
        encode([Passage("a", "cat"), Passage("b", "dog")], FakeStudent(), tmp_path / "i")
        (found,) = search(Index.open(tmp_path / "i").view, FakeStudent(), ["dog"], sources=("ann",))
        assert found.passages[0].passage.id == "b"
        assert "using the exact scan" in caplog.text

    def test_a_head_without_an_inner_product_is_searched_exactly(self, tmp_path):
        student = FakeStudent(head="paper")
        encode([Passage("a", "cat"), Passage("b", "dog")], student, tmp_path / "i")
        (found,) = search(Index.open(tmp_path / "i").view, student, ["dog"], sources=("ann",))
        assert found.certificate is not None
