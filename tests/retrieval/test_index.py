"""``Index`` with a fake student: adding, changing, deleting and searching passages. The store has its own tests."""

import json
import time

import numpy as np
import pytest

from d2llm.core.errors import DataFormatError, DuplicateIdError, IndexMismatchError, InputError
from d2llm.core.types import Passage
from d2llm.data.indexed_corpus import check_corpus, iter_corpus
from d2llm.retrieval import upserting
from d2llm.retrieval.index import Index
from d2llm.retrieval.settings import SearchSettings
from fake_models import FakeStudent, Interruption

TEXTS = ["the cat sleeps", "the dog runs", "a fish swims", "a bird flies", "the horse eats", "cat and dog"]


def passages(*, year=2000):
    return [Passage(f"p{n}", text, metadata={"year": year + n}) for n, text in enumerate(TEXTS)]


@pytest.fixture
def student():
    return FakeStudent()


@pytest.fixture
def index(student, tmp_path):
    index = Index.create(tmp_path / "i", student)
    index.upsert(passages())
    return index


def search_ids(index, text, **settings):
    ranking = index.search(text, **settings)
    return [hit.passage.id for hit in ranking.passages]


class TestUpsert:
    def test_only_new_and_changed_texts_are_encoded(self, index, student):
        assert student.encoded_passages == 6
        changed = [Passage("p0", "the cat runs", metadata={"year": 2000}), *passages()[1:5], Passage("p9", "a new one")]
        changed[1] = Passage("p1", TEXTS[1], metadata={"year": 1999})
        report = index.upsert(changed)
        assert student.encoded_passages == 8
        assert (report.num_added, report.num_updated, report.num_metadata, report.num_unchanged) == (1, 1, 1, 3)
        assert report.num_passages == 6
        assert [passage.text for passage in index.get(["p0", "p9"])] == ["the cat runs", "a new one"]
        assert index.get(["p1"])[0].metadata == {"year": 1999}
        assert len(index) == 7

    def test_the_index_may_change_while_passages_are_generated(self, index, monkeypatch):
        monkeypatch.setattr(upserting, "BLOCK_PASSAGES", 2)

        def deleting_passages():
            yield from passages()[:2]
            index.delete(["p2", "p5"])
            yield from passages()[2:]

        report = index.upsert(deleting_passages())
        assert (report.num_added, report.num_unchanged) == (2, 4)
        assert {passage.id for passage in index.get([f"p{n}" for n in range(6)])} == {f"p{n}" for n in range(6)}

    def test_a_changed_text_replaces_the_old_one_immediately(self, index):
        assert search_ids(index, "cat sleeps", top_k=1) == ["p0"]
        index.upsert([Passage("p0", "something else"), Passage("p3", "cat sleeps")])
        assert search_ids(index, "cat sleeps", top_k=1) == ["p3"]

    def test_truncated_texts_are_counted_in_report_and_stats(self, tmp_path):
        index = Index.create(tmp_path / "short", FakeStudent(max_words=2))
        assert index.upsert(passages()).num_truncated == 6
        assert index.stats().num_truncated == 6
        index.upsert([Passage("p0", "two words")])
        assert index.stats().num_truncated == 5

    def test_blank_passages_are_counted_and_logged_once(self, tmp_path, monkeypatch, caplog):
        monkeypatch.setattr(upserting, "BLOCK_PASSAGES", 2)
        index = Index.create(tmp_path / "blank", FakeStudent())
        assert index.upsert(passages()[:2]).num_blank == 0
        assert caplog.records == []
        collection = [passages()[2], Passage("b1", " \n\t"), Passage("t", " ", "a title"), Passage("b2", "\u3000")]
        report = index.upsert(collection)
        assert (report.num_passages, report.num_blank, report.first_blank) == (4, 2, "b1")
        (record,) = caplog.records
        assert "2 of the 4 passages have only white space as text, the first is 'b1'" in record.getMessage()

    def test_an_interrupted_upsert_resumes_after_the_last_commit(self, tmp_path, monkeypatch):
        monkeypatch.setattr(upserting, "BLOCK_PASSAGES", 2)
        student = FakeStudent(fail_after=5)
        index = Index.create(tmp_path / "i", student)
        with pytest.raises(Interruption):
            index.upsert(passages())
        assert len(index) == 4
        student.fail_after = None
        report = index.upsert(passages())
        assert (report.num_added, report.num_unchanged) == (2, 4)
        assert student.encoded_passages == 6

    @pytest.mark.parametrize("block", [2, 100])
    def test_duplicate_ids_are_an_error_for_any_block_size(self, index, monkeypatch, block):
        monkeypatch.setattr(upserting, "BLOCK_PASSAGES", block)
        duplicates = [Passage("a", "one"), Passage("b", "two"), Passage("c", "three"), Passage("a", "four")]
        with pytest.raises(DuplicateIdError, match="share the id 'a'"):
            index.upsert(duplicates)
        assert len(index) == (8 if block == 2 else 6)  # earlier blocks are kept

    def test_add_rejects_existing_ids(self, index):
        with pytest.raises(DuplicateIdError, match=r"1 of the passages already exist, such as 'p3'"):
            index.add([Passage("new", "text"), Passage("p3", "text")])
        assert index.add([Passage("new", "text")]).num_added == 1

    def test_fields_are_added_with_their_first_values(self, index):
        index.upsert([Passage("p7", "text", metadata={"language": "en", "score": 0.5})])
        assert index.stats().metadata == {"year": "integer", "language": "string", "score": "number"}
        assert index.get(["p0"])[0].metadata == {"year": 2000}

    def test_a_value_of_the_wrong_type_is_an_error_that_names_it(self, index):
        with pytest.raises(InputError, match=r"'p7'.*'year'"):
            index.upsert([Passage("p7", "text", metadata={"year": "long ago"})])
        assert len(index) == 6


class TestDelete:
    def test_deleted_passages_are_gone_from_every_source(self, index):
        assert index.delete(["p0", "p5", "nobody"]) == 2
        assert "p0" not in search_ids(index, "cat sleeps", top_k=10)
        assert search_ids(index, "cat", top_k=10, sources=("bm25",)) == []
        assert index.get(["p0"]) == []
        assert len(index) == 4

    def test_deleting_everything(self, index):
        index.delete([f"p{n}" for n in range(6)])
        assert search_ids(index, "cat", top_k=3) == []
        assert search_ids(index, "cat", top_k=3, exact=True) == []
        index.upsert(passages())
        assert search_ids(index, "bird flies", top_k=1) == ["p3"]


class TestSearch:
    def test_filters_apply_before_candidates_are_chosen(self, index):
        filtered = {"filter": "year >= 2004", "top_k": 6}
        for settings in ({}, {"exact": True}, {"num_candidates": 1}, {"sources": ("vectors", "bm25")}, {"hybrid": 0.5}):
            expected = {"p4", "p5"}
            assert set(search_ids(index, "cat dog horse", **(filtered | settings))) == expected, settings
        assert search_ids(index, "cat", filter="year >= 2004", sources=("bm25",)) == ["p5"]

    def test_scoring_every_candidate_equals_an_exact_search(self, index):
        ranking = index.search("the cat", top_k=6)
        exact = index.search("the cat", top_k=6, exact=True)
        assert [hit.passage.id for hit in ranking.passages] == [hit.passage.id for hit in exact.passages]
        assert exact.certificate is not None
        assert (exact.certificate.proved, ranking.certificate) == (6, None)
        assert exact.index_version == index.view.version

    def test_candidates_of_both_sources_are_merged(self, index):
        assert set(search_ids(index, "fish", num_candidates=1, top_k=1, sources=("bm25",))) == {"p2"}
        nearest = set(search_ids(index, "fish", num_candidates=1, top_k=1, sources=("vectors",)))
        ranking = index.search("fish", num_candidates=1, top_k=1, sources=("vectors", "bm25"))
        assert ranking.num_candidates == len({"p2"} | nearest)

    @pytest.mark.parametrize(
        ("sources", "counts_words", "hybrid", "proposers"),
        [
            (None, False, None, {"vectors"}),
            (None, True, None, {"vectors", "bm25"}),
            (None, False, 0.5, {"vectors", "bm25"}),
            (("ann",), True, None, {"ann"}),
            (("ann",), False, 0.0, {"ann", "bm25"}),
            (("bm25",), True, 0.5, {"bm25"}),
            (("bm25", "vectors"), False, 0.5, {"vectors", "bm25"}),
        ],
    )
    def test_bm25_proposes_if_words_count_or_rankings_are_fused(self, sources, counts_words, hybrid, proposers):
        actual = SearchSettings(sources=sources, hybrid=hybrid).proposers(counts_words=counts_words)
        assert sorted(actual) == sorted(proposers)

    def test_fusion_uses_both_sources_unless_only_bm25_is_named(self, index):
        ranking = index.search("fish", hybrid=0.5, top_k=6)
        named = index.search("fish", hybrid=0.5, top_k=6, sources=("vectors", "bm25"))
        assert ranking.passages == named.passages
        assert {hit.passage.id for hit in ranking.passages} == {f"p{n}" for n in range(6)}
        alone = index.search("fish", hybrid=0.5, top_k=6, sources=("bm25",))
        assert [hit.passage.id for hit in alone.passages] == ["p2"]

    def test_fusion_matches_hand_computed_scores(self, index):
        ranking = index.search("fish", hybrid=0.5, top_k=6)
        by_score = search_ids(index, "fish", top_k=6)
        # BM25 finds only p2, at rank 1, which adds 1/61 to its share from the student's ranking.
        fused = {name: 1 / (60 + rank) for rank, name in enumerate(by_score, start=1)}
        fused["p2"] += 1 / 61
        expected = sorted(fused, key=lambda name: (-fused[name], name))
        assert [hit.passage.id for hit in ranking.passages] == expected
        assert ranking.passages[0].score == pytest.approx(fused[expected[0]])

    def test_explanations_add_up_to_the_score(self, index):
        ranking = index.search("the cats", sources=("vectors", "bm25"), explain=True, top_k=3)
        for hit in ranking.passages:
            explanation = hit.explanation
            assert explanation is not None
            assert explanation.dot + explanation.interaction == pytest.approx(hit.score, abs=1e-5)
        by_id = {hit.passage.id: hit.explanation for hit in ranking.passages}
        cat = by_id.get("p0") or by_id["p5"]
        assert cat.terms["cat"] == 1  # the stem of the query word
        assert set(cat.source_ranks) == {"vectors", "bm25"}

    def test_a_word_that_a_passage_repeats_is_explained_in_linear_time(self, student, tmp_path):
        index = Index.create(tmp_path / "i", student)
        index.upsert([Passage("p", "cat " * 100_000)])
        begin = time.process_time()
        (hit,) = index.search("the cats", explain=True)
        assert time.process_time() - begin < 5
        assert hit.explanation.terms == {"cat": 100_000}

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"top_k": 0}, "must be at least 1"),
            ({"budget_ms": 5.0}, "for an exact search"),
            ({"exact": True, "hybrid": 0.5}, "leave out hybrid"),
            ({"sources": ()}, "sources is empty"),
        ],
    )
    def test_invalid_settings_are_rejected(self, index, settings, message):
        with pytest.raises(InputError, match=message):
            index.search("cat", **settings)

    def test_an_empty_index_returns_no_results(self, student, tmp_path):
        empty = Index.create(tmp_path / "empty", student)
        for settings in ({}, {"exact": True}, {"sources": ("bm25",)}, {"hybrid": 0.5}):
            assert search_ids(empty, "cat", **settings) == []

    def test_a_reader_keeps_its_version_until_it_refreshes(self, index, student):
        reader = Index.open(index.folder, student)
        assert len(reader) == 6
        index.upsert([Passage("p3", "cat sleeps"), Passage("p8", "cat sleeps")])
        assert search_ids(reader, "cat sleeps", top_k=1) == ["p0"]
        reader.refresh(if_newer=True)
        assert search_ids(reader, "cat sleeps", top_k=2) == ["p3", "p8"]
        view = reader.view
        reader.refresh(if_newer=True)
        assert reader.view is view
        reader.refresh()
        assert reader.view is not view

    def test_another_student_is_refused(self, index):
        with pytest.raises(IndexMismatchError, match="fake-student"):
            Index.open(index.folder, FakeStudent(fingerprint="stranger")).search("cat")


class TestSnapshots:
    def test_an_index_is_made_from_a_snapshot(self, index, tmp_path):
        made = Index.from_snapshot(index.snapshot("before"), tmp_path / "made")
        assert (made.list_passages(), made.spec) == (index.list_passages(), index.spec)
        assert made.verify().problems == []
        assert made.delete(made.list_passages()) == 6
        assert made  # though it has no passages

    def test_compaction_does_not_change_rankings(self, index):
        index.upsert([Passage(f"p{n}", f"{text} again") for n, text in enumerate(TEXTS[:4])])
        before = [search_ids(index, text) for text in TEXTS]
        index.compact(dense=True)
        assert [search_ids(index, text) for text in TEXTS] == before
        assert index.stats().num_rows == 6
        assert index.verify().problems == []


class TestOpening:
    def test_opening_without_a_student(self, index, tmp_path):
        with pytest.raises(InputError, match="does not say where its student is"):
            _ = Index.open(index.folder).student
        with pytest.raises(DataFormatError, match="not found"):
            Index.open(tmp_path / "nowhere")

    def test_create_does_not_touch_files_of_the_user(self, student, tmp_path):
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "mine.txt").write_text("keep me")
        with pytest.raises(InputError, match="holds files that d2llm did not make"):
            Index.create(tmp_path / "full", student)
        assert (tmp_path / "full" / "mine.txt").read_text() == "keep me"


class TestCorpusFiles:
    def write(self, tmp_path, *records):
        file = tmp_path / "corpus.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        return file

    def test_metadata_from_top_level_and_metadata_object(self, tmp_path):
        record = {
            "_id": "a",
            "text": "t",
            "title": "T",
            "document_id": "d",
            "position": 2,
            "year": 1,
            "metadata": {"x": "y"},
        }
        file = self.write(tmp_path, record, {"_id": "b", "text": "u"})
        assert list(iter_corpus(file)) == [Passage("a", "t", "T", "d", 2, {"year": 1, "x": "y"}), Passage("b", "u")]
        assert list(iter_corpus(tmp_path, with_metadata=False)) == [Passage("a", "t", "T"), Passage("b", "u")]
        assert check_corpus(tmp_path) == 2

    @pytest.mark.parametrize(
        ("record", "message"),
        [
            ({"_id": "a", "text": "t", "x": 1, "metadata": {"x": 2}}, "'x' occurs twice"),
            ({"_id": "a", "text": "t", "metadata": 3}, "'metadata' must be an object"),
            ({"_id": "a", "text": "t", "position": "3"}, "'position' must be a whole number"),
            ({"_id": "a", "text": "t", "document_id": [3]}, "'document_id' must be a string"),
        ],
    )
    def test_invalid_lines_are_reported_with_their_number(self, tmp_path, record, message):
        file = self.write(tmp_path, {"_id": "ok", "text": "t"}, record)
        with pytest.raises(DataFormatError, match=f"corpus.jsonl:2: .*{message}"):
            list(iter_corpus(file))

    def test_an_empty_file_is_an_error(self, tmp_path):
        (tmp_path / "corpus.jsonl").write_text("\n")
        with pytest.raises(DataFormatError, match="holds no passages"):
            list(iter_corpus(tmp_path))


def test_vectors_are_those_of_the_student(index, student):
    expected = student.encode_passages(TEXTS).vectors
    np.testing.assert_allclose(index.view.vectors(np.arange(6)), expected, rtol=2**-8)
