"""Approximate candidates: the promised recall, immediate changes, and an exact scan if the file cannot be used."""

import gzip
import json
import logging
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from d2llm.core.errors import IndexLockedError, IndexMismatchError, InputError
from d2llm.core.types import Passage, Query
from d2llm.retrieval import build_ann as module
from d2llm.retrieval.build_ann import build_ann
from d2llm.retrieval.encode import encode
from d2llm.retrieval.index import Index
from d2llm.retrieval.local_segment import AnnSource, open_view
from d2llm.retrieval.search import Searcher
from d2llm.retrieval.settings import SearchSettings
from d2llm.store import ann
from d2llm.store.ann import AnnSearch
from d2llm.store.checksums import read_checked, write_checked
from d2llm.store.index_spec import StoredSpec
from d2llm.store.index_store import IndexStore
from d2llm.store.inspection import stats
from d2llm.store.shards import Storage
from d2llm.store.view import PassageView
from fake_models import DotStudent, FakeStudent, PreparedDotStudent
from searching import search
from tiny_ann import DIM, PlainStudent, clustered, new_ann_store, products, put_vectors

NUM = 4_000
QUERY = Query("q", "text")


@pytest.fixture(autouse=True, scope="module")
def _lower_minimum_passages():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MIN_PASSAGES", 500)
        patch.setattr(ann, "MAX_EFFORT", 0.25)  # few rows: the exact scan would always be as fast
        patch.setattr(module, "MAX_EFFORT", 0.25)
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    store = new_ann_store(tmp_path_factory.mktemp("ann") / "i", clustered(NUM))
    build_ann(store, PlainStudent(), recall=0.95, depth=50)
    return store.folder


@pytest.fixture
def store(built, tmp_path):
    return IndexStore.open(shutil.copytree(built, tmp_path / "i"))


def propose(view, query, top_k, allowed=None):
    return AnnSource(view, allowed).propose(QUERY, query, top_k)


def search_file(view, query, top_k, allowed=None):
    """As ``propose``, but without the fallback to the exact scan."""
    result = AnnSearch(view.ann, view.mask(allowed), view.ids).search(query, top_k)
    assert result is not None
    return result


def exact_best(view, query, top_k, mask=None):
    scores = products(view, query)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    return np.argsort(-scores, kind="stable")[:top_k]


def recall_of(view, queries, top_k, allowed=None):
    mask = view.mask(allowed)
    recalls = [
        np.isin(exact_best(view, q, top_k, mask), search_file(view, q, top_k, allowed)[0]).mean() for q in queries
    ]
    return np.mean(recalls)


class TestRecall:
    @pytest.mark.parametrize("name", ["bfloat16", "float32", "int8", "int3"])
    def test_recall_holds_for_unseen_queries(self, tmp_path, name):
        store = new_ann_store(tmp_path / "i", clustered(NUM), name)
        unseen = clustered(100, seed=5)
        report = build_ann(
            store, PlainStudent(clustered(300, seed=4)), recall=0.9, depth=50, queries=[str(n) for n in range(300)]
        )
        assert (report.queries, report.num_queries, report.num_passages) == ("given", 300, NUM)
        assert [measured.depth for measured in report.recalls] == [10, 50]
        assert all(measured.at_least >= 0.9 for measured in report.recalls)
        view = PassageView(store)
        assert recall_of(view, unseen, 50) >= 0.88
        assert recall_of(view, unseen, 10) >= 0.86
        # If every row were compared, the recall would prove nothing.
        assert view.ann.record.efforts[-1][1] < NUM / 4

    def test_recall_holds_on_real_texts(self, tmp_path):
        corpus = Path(__file__).parents[3] / "shared/data/wikiqa/corpus.jsonl.gz"
        if not corpus.is_file():
            pytest.skip(f"{corpus} is not there")
        with gzip.open(corpus, "rt", encoding="utf-8") as lines:
            texts = [json.loads(line)["text"] for _, line in zip(range(8_300), lines, strict=False)]
        vectors = FakeStudent(dim=DIM).encode_passages(texts).vectors
        store = new_ann_store(tmp_path / "i", vectors[:8_000])
        build_ann(store, PlainStudent(), recall=0.9, depth=100)
        assert recall_of(PassageView(store), vectors[8_000:], 100) >= 0.88

    def test_a_passage_used_as_a_query_does_not_count_itself(self, tmp_path):
        """Unclustered vectors: each finds itself at once, but its nearest neighbour only with more effort."""
        vectors = np.random.default_rng(0).standard_normal((1_000, DIM)).astype(np.float32)
        (measured,) = build_ann(new_ann_store(tmp_path / "i", vectors), PlainStudent(), recall=0.5, depth=1).recalls
        assert measured.recall < 1
        tuning_queries = module._TuningQueries(np.zeros((1, 2), np.float32), np.array([7]))
        assert module._others(tuning_queries, 0, np.array([3, 7, 5])).tolist() == [3, 5]

    def test_lower_bound_matches_hand_computed_values(self):
        assert module._at_least(np.array([1.0, 0.5, 0.75, 0.75])) == pytest.approx(0.75 - 1.645 * 0.2041241 / 2)
        assert module._at_least(np.array([[0.5, 1.0]])).tolist() == [0.5, 1.0]

    @pytest.mark.parametrize(("num_lost", "num_asked"), [(2, 100), (3, 83), (50, 6)])
    def test_queries_are_asked_only_until_the_target_is_out_of_reach(self, num_lost, num_asked):
        """Of 100 queries, those after the first lost ones find everything; two may find nothing at .98."""
        asked, lost = [], np.linspace(5, 82, num_lost).astype(int) if num_lost < 50 else np.arange(3, 53)

        class Graph:
            record = SimpleNamespace(target=0.98 - 0.03 * (num_lost == 2))  # as the bound is below the mean

            def nearest(self, query, top_k, effort):
                asked.append(int(query[0]))
                return np.array([-1]) if asked[-1] in lost else np.array([7])

        tuning = module._TuningQueries(np.arange(100, dtype=np.float32)[:, None], None)
        found = module._measured(Graph(), tuning, [np.array([7])] * 100, 1, 10)
        assert len(asked) == num_asked
        if num_lost == 2:
            assert (found.recall, found.at_least >= 0.95) == (pytest.approx(0.98), True)
        else:
            assert found is None

    def test_efforts_are_interpolated_up_to_the_deepest_tuned_depth(self, store):
        graph = PassageView(store).ann
        graph._log_depths, graph._log_efforts = np.log([10, 1000]), np.log([40, 160])
        assert [graph.effort_for(depth) for depth in (1, 10, 100, 1000, 1001)] == [40, 40, 80, 160, None]

    def test_an_effort_that_takes_as_long_as_the_exact_scan_is_not_made(self, store):
        graph = PassageView(store).ann
        graph._log_depths, graph._log_efforts = np.log([10, 1000]), np.log([NUM / 4, NUM / 4 + 10])
        assert [graph.effort_for(depth) for depth in (10, 1000)] == [NUM // 4, None]


class TestAnswers:
    def test_equal_scores_are_ordered_by_id(self, store):
        vector = clustered(1, seed=3)
        put_vectors(store, NUM, np.repeat(vector, 3, axis=0))
        build_ann(store, PlainStudent(), recall=0.95, depth=50)
        put_vectors(store, NUM - 1, np.repeat(vector, 1, axis=0), "other")  # last row, first id
        view = PassageView(store)
        rows, _ = search_file(view, vector[0], 4)
        assert view.ids(rows) == [f"p{NUM + n:06d}" for n in (-1, 0, 1, 2)]

    def test_deletions_and_additions_take_effect_immediately(self, store):
        query = clustered(1, seed=8)[0]
        old_view = PassageView(store)
        old_ids = old_view.ids(search_file(old_view, query, 10)[0])
        store.delete(old_ids[:3])
        put_vectors(store, NUM, query[None] * 2)
        view = PassageView(store)
        ids = view.ids(search_file(view, query, 10)[0])
        assert ids[0] == f"p{NUM:06d}"
        assert ids[1:8] == old_ids[3:]
        put_vectors(store, NUM, -query[None], "other")
        assert PassageView(store).ids(search_file(PassageView(store), query, 7)[0]) == old_ids[3:]

    def test_an_older_view_still_returns_deleted_passages(self, store):
        query = clustered(1, seed=8)[0]
        old_view = PassageView(store)
        old_ids = old_view.ids(search_file(old_view, query, 10)[0])
        store.delete(old_ids[:3])
        assert old_view.ids(search_file(old_view, query, 10)[0]) == old_ids
        assert PassageView(store, old_view.version).ids(search_file(old_view, query, 10)[0]) == old_ids

    def test_a_version_with_rows_missing_from_the_file_is_scanned(self, store, caplog):
        query = clustered(1, seed=8)[0]
        old_version = PassageView(store).version
        old_ids = PassageView(store).ids(search_file(PassageView(store), query, 10)[0])
        store.delete(old_ids[:3])
        build_ann(store, PlainStudent(), recall=0.95, depth=50)
        view = PassageView(store, old_version)
        assert (view.ann, view.ids(propose(view, query, 3).rows)) == (None, old_ids[:3])
        assert "built over version" in caplog.text
        assert PassageView(store).ids(search_file(PassageView(store), query, 7)[0]) == old_ids[3:]

    def test_recall_holds_for_random_and_adverse_filters(self, store):
        view = PassageView(store)
        queries = clustered(60, seed=8)
        random_mask = np.random.default_rng(0).random(NUM) < 0.4
        assert recall_of(view, queries, 20, random_mask) >= 0.93
        # Only a tenth of the 500 rows nearest to each query passes: probing for the overall share finds too few.
        recalls = []
        for query in queries:
            allowed = np.ones(NUM, np.bool_)
            allowed[exact_best(view, query, 500)[np.arange(500) % 10 > 0]] = False
            rows = propose(view, query, 20, allowed).rows
            recalls.append(np.isin(exact_best(view, query, 20, allowed), rows).mean())
            assert allowed[rows].all()
        assert np.mean(recalls) >= 0.88

    def test_invalid_query_vectors_are_rejected(self, store):
        view = PassageView(store)
        for query in (np.zeros(DIM + 1, np.float32), np.full(DIM, np.nan, np.float32)):
            with pytest.raises(InputError, match="must be 32 finite numbers"):
                propose(view, query, 3)


class TestDamage:
    @staticmethod
    def damage(folder, damage):
        file, record = folder / "ann-0.faiss", folder / "ann-0.json"
        if damage == "byte":
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        elif damage == "short":
            file.write_bytes(file.read_bytes()[:-100])
        elif damage == "gone":
            file.unlink()
        elif damage == "no json":
            record.write_text("{")
        elif damage == "a list":
            record.write_text("[]")
        else:
            write_checked(record, {**read_checked(record), **damage})

    @pytest.mark.parametrize(
        ("damage", "reason"),
        [
            ("byte", "not what was written"),
            ("short", "not what was written"),
            ("gone", "No such file"),
            ("no json", "Expecting"),
            ("a list", "not what was written"),
            ({"more": 1}, "not what was written|other fields"),
            ({"student": "another"}, "other vectors"),
            ({"vector_format": "int8"}, "other vectors"),
            ({"since": 3}, "other vectors"),
            ({"covered": NUM + 1}, "built over version"),
            ({"efforts": []}, "not enough values|zero-size|unpack"),
            ({"covered": None}, "not supported"),
        ],
    )
    def test_damaged_files_fall_back_to_the_exact_scan(self, store, caplog, damage, reason):
        self.damage(store.folder, damage)
        view, query = PassageView(store), clustered(1, seed=8)[0]
        result = propose(view, query, 20)
        assert result.rows.tolist() == view.scan(query, 20).rows.tolist()
        assert result.scores.tolist() == view.scan(query, 20).scores.tolist()
        assert len(caplog.records) == 1
        assert caplog.records[0].levelno == logging.WARNING
        assert re.search(reason, caplog.records[0].message), caplog.records[0].message

    def test_rebuilt_vectors_make_the_file_unusable(self, store):
        store.delete([f"p{NUM - 1:06d}"])
        (store.folder / "vectors-0.bin").unlink()
        assert PassageView(store).capacity == NUM - 1
        put_vectors(store, NUM, clustered(1, seed=8) * 2)
        view = PassageView(store)
        assert view.ann is None
        assert view.ids(propose(view, clustered(1, seed=8)[0], 1).rows) == [f"p{NUM:06d}"]

    def test_a_dense_compaction_makes_the_file_unusable(self, store):
        store.delete([f"p{n:06d}" for n in range(1, NUM, 3)])
        store.compact(dense=True)
        view, query = PassageView(store), clustered(1, seed=8)[0]
        assert view.ann is None
        assert propose(view, query, 20).rows.tolist() == view.scan(query, 20).rows.tolist()
        (store.folder / ".ann-0.new").write_text("left by a crash")
        build_ann(store, PlainStudent(), recall=0.9, depth=20)
        assert sorted(path.name for path in store.folder.glob("*ann-*")) == ["ann-1.faiss", "ann-1.json"]
        assert recall_of(PassageView(store), clustered(50, seed=8), 20) >= 0.88

    def test_deleted_rows_are_in_the_graph_but_are_not_found(self, store):
        store.delete([f"p{n:06d}" for n in range(0, NUM, 3)])
        report = build_ann(store, PlainStudent(), recall=0.9, depth=20)
        assert report.num_passages == len(PassageView(store)) == PassageView(store).ann.record.num_rows


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"recall": 0.0}, "recall is 0.0, but must be more than 0"),
            ({"recall": 1.1}, "recall is 1.1, but must be at most 1"),
            ({"depth": 0}, "at least 1"),
            ({"depth": 1_001}, "more than a quarter of its 4,000"),
            ({"queries": []}, "the list of queries is empty"),
            ({"recall": 1.0, "depth": 1_000}, "take as long as the exact scan; lower the recall"),
        ],
    )
    def test_invalid_options_are_rejected_and_change_no_files(self, store, options, message):
        before = {path: path.stat().st_mtime_ns for path in store.folder.iterdir()}
        with pytest.raises(InputError, match=message):
            build_ann(store, PlainStudent(), **options)
        assert {path: path.stat().st_mtime_ns for path in store.folder.iterdir()} == before

    def test_unsuitable_students_are_rejected(self, store):
        with pytest.raises(IndexMismatchError):
            build_ann(store, FakeStudent())
        with pytest.raises(InputError, match="no inner product"):
            build_ann(store, PlainStudent(has_dot=False))

    @pytest.mark.parametrize("num", [0, 3, 499])
    def test_too_few_passages_are_rejected(self, tmp_path, num):
        store = IndexStore.create(tmp_path / "i", StoredSpec(student="student", dim=DIM))
        if num:
            put_vectors(store, 0, clustered(num))
        with pytest.raises(InputError, match=rf"holds {num} passages; below 500 the exact scan is faster"):
            build_ann(store, PlainStudent(), depth=1)
        result = propose(PassageView(store), clustered(1)[0], 5)
        assert len(result.rows) == min(5, num)

    def test_a_concurrent_writer_stops_the_build_before_its_commit(self, store):
        checksum = PassageView(store).ann.record.checksum
        with IndexStore.open(store.folder).writing(), pytest.raises(IndexLockedError):
            build_ann(store, PlainStudent(), recall=0.9, depth=20)
        assert PassageView(store).ann.record.checksum == checksum

    def test_a_compaction_during_the_build_is_an_error(self, store):
        class CompactingStudent(PlainStudent):
            compacted = False

            def query_vectors(self, vectors, task):
                if not self.compacted:
                    store.compact(dense=True)
                    self.compacted = True
                return super().query_vectors(vectors, task)

        with pytest.raises(InputError, match="compacted or restored during the build"):
            build_ann(store, CompactingStudent(), recall=0.9, depth=20)


class TestSearch:
    def test_ann_source_in_an_index_search(self, tmp_path):
        student = FakeStudent(dim=DIM)
        words = ["cat", "dog", "fish", "bird", "horse", "sleeps", "runs", "swims", "flies", "eats"]
        rng = np.random.default_rng(0)
        index = Index.create(tmp_path / "i", student, metadata={"year": "integer"})
        index.upsert(
            [Passage(f"{n}", f"{' '.join(rng.choice(words, 3))} {n}", metadata={"year": n % 50}) for n in range(900)]
        )
        report = index.build_ann(recall=0.9, depth=20)
        assert report.bytes_per_passage < 200
        options = {"num_candidates": 20, "top_k": 5}
        approximate = index.search("cat runs", sources=("ann",), explain=True, **options)
        exact = index.search("cat runs", **options)
        assert len({hit.passage.id for hit in approximate.passages} & {hit.passage.id for hit in exact.passages}) >= 4
        assert set(approximate.passages[0].explanation.source_ranks) == {"ann"}
        filtered = index.search("cat runs", sources=("ann",), filter="year = 7", top_k=30)
        assert len(filtered.passages) == 18
        both = index.search("cat runs", sources=("ann", "bm25"), explain=True, **options)
        assert {name for hit in both.passages for name in hit.explanation.source_ranks} == {"ann", "bm25"}
        queries = ["cat runs", "dog swims", "bird eats"]
        singly = [index.search(query, **options) for query in queries]
        assert [one.passages for one in index.search(queries, **options)] == [one.passages for one in singly]

    def test_nothing_is_rescored_if_the_inner_product_is_the_score(self, tmp_path):
        student = DotStudent(dim=DIM)
        words = ["cat", "dog", "fish", "bird", "horse", "sleeps", "runs", "swims", "flies", "eats"]
        rng = np.random.default_rng(1)
        index = Index.create(tmp_path / "i", student, vector_format="float32")
        index.upsert([Passage(f"{n}", " ".join(rng.choice(words, 3))) for n in range(600)])
        index.build_ann(recall=0.9, depth=20)
        for query_text in ("cat runs", "horse eats fish"):
            options = {"num_candidates": 20, "top_k": 5, "sources": ("ann",)}
            (slow,) = search(index.view, DotStudent(dim=DIM), [query_text], **options)
            (fast,) = search(index.view, PreparedDotStudent(dim=DIM), [query_text], **options)
            assert fast.passages == slow.passages
            assert (fast.num_candidates, slow.num_candidates) == (5, 20)

    def test_a_tiny_index_falls_back_to_the_exact_scan(self, tmp_path, caplog):
        encode([Passage("a", "cat"), Passage("b", "dog")], FakeStudent(), tmp_path / "i")
        (ranking,) = search(Index.open(tmp_path / "i").view, FakeStudent(), ["dog"], sources=("ann",))
        assert ranking.passages[0].passage.id == "b"
        assert ranking.sources == ("vectors",)
        assert "using the exact scan" in caplog.text

    def test_a_head_without_an_inner_product_is_searched_exactly(self, tmp_path):
        student = FakeStudent(head="paper")
        encode([Passage("a", "cat"), Passage("b", "dog")], student, tmp_path / "i")
        (ranking,) = search(Index.open(tmp_path / "i").view, student, ["dog"], sources=("ann",))
        assert ranking.certificate is not None


class TestFirstTen:
    """The fraction of the first ten of an exact search that a search by default finds."""

    def test_report_record_and_statistics_agree(self, tmp_path):
        store = new_ann_store(tmp_path / "i", clustered(NUM))
        report = build_ann(store, PlainStudent(), recall=0.9, depth=20)
        assert report.num_ranked == module.NUM_RANKED
        assert 0 < report.first_ten <= 1
        assert PassageView(store).ann.record.first_ten == stats(store).first_ten == report.first_ten

    def test_given_queries_match_a_calculation_by_hand(self, tmp_path):
        """With a score that is not the inner product, so that candidates by vectors miss some of the best."""

        class OtherStudent(PlainStudent):
            def score(self, query_vector, passage_vectors, task):
                return super().score(query_vector, passage_vectors, task) + 20 * passage_vectors[:, 0]

        store = new_ann_store(tmp_path / "i", clustered(NUM))
        student = OtherStudent(clustered(30, seed=5))
        names = [str(number) for number in range(30)]
        report = build_ann(store, student, recall=0.5, depth=20, queries=names)
        view = open_view(Storage.single(store))
        found = Searcher(view, student, SearchSettings(top_k=10)).rank(names)
        fractions = []
        for query, ranking in zip(student.vectors, found, strict=True):
            passages = view.segments[0]
            first = products(passages, np.eye(DIM)[0])
            best = np.argsort(-(products(passages, query) + 20 * first), kind="stable")[:10]
            fractions.append(len({f"p{row:06d}" for row in best} & {one.passage.id for one in ranking.passages}) / 10)
        assert report.num_ranked == 30
        assert report.first_ten == pytest.approx(np.mean(fractions))
        assert 0.1 < report.first_ten < 0.9
