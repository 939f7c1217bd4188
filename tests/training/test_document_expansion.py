"""Words that passages lack: predicted from vectors, fitted to queries, stored with a student and in its index."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from d2llm.core.errors import IndexMismatchError, InputError, ModelError
from d2llm.core.types import Passage
from d2llm.data.beir import Dataset
from d2llm.models.document_expansion import DocumentExpansion
from d2llm.models.fitted_part import Widths
from d2llm.models.student import Student
from d2llm.retrieval.cosine import DotStudent
from d2llm.retrieval.encode import encode
from d2llm.retrieval.index import Index
from d2llm.retrieval.shard import shard
from d2llm.store.bm25 import WordIndex
from d2llm.store.word_segment import WordSegment
from d2llm.training.fit_scores import fit_document_expansion, fit_scores
from fake_models import FakeStudent, Interruption
from tiny_data import make_source
from tiny_models import tiny_student_config, write_tiny_model

PASSAGES = [
    Passage("a", "green cats", metadata={"year": 1}),
    Passage("b", "purple"),
    Passage("c", "green cats run"),
    Passage("d", "dog"),
]


def random_expansion(dim: int, seed: int = 0, **changes: object) -> DocumentExpansion:
    random = np.random.default_rng(seed)
    words = ("cat", "dog", "owl", "run", "zebra")
    expansion = DocumentExpansion(
        terms=words,
        usual=np.full(5, 0.3, np.float32),
        middle=random.normal(size=dim).astype(np.float32),
        weights=random.normal(size=(dim, 5)).astype(np.float32),
        rarity=np.array([1, 2, 3, 4, 5], np.float32),
        num_passages={"tiny": 30},
        explained={"tiny": 0.1},
        num_words=3,
    )
    return replace(expansion, **changes)


class ExpandingStudent(FakeStudent):
    """Adds words by vectors."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.document_expansion = random_expansion(self.vector_dim, seed)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    model = write_tiny_model(tmp_path_factory.mktemp("model"), "modernbert", initializer_range=0.1)
    return Student.create(tiny_student_config(model), device="cpu", dtype="float32")


@pytest.fixture
def expanding(student: Student) -> Iterator[Student]:
    student.document_expansion = random_expansion(student.vector_dim)
    yield student
    student.document_expansion = None


def test_counts_go_on_where_those_of_the_text_end() -> None:
    expansion = random_expansion(
        2,
        usual=np.array([0.4, 0.3, 0.2, 0.2, 0.0], np.float32),
        middle=np.array([1.0, 0.0], np.float32),
        weights=np.array([[0.0, 0.0, 0.1, 0.0, -1.0], [0.0] * 5], np.float32),
    )
    vectors = np.array([[3.0, 5.0], [1.0, 0.0], [1.0, 0.0]], np.float32)
    words = expansion.words(vectors, ["The cats, the dogs", "running", "nothing known"])
    # Likelihoods .4, .3, .2 + 2 * .1, .2, 0: half of each over the mean of those that the text has, rarest first.
    assert words[0] == {"owl": round(0.5 * 0.4 / 0.35, 2), "run": round(0.5 * 0.2 / 0.35, 2)}
    assert words[1] == {"owl": 0.5, "dog": 0.75, "cat": 1.0}
    assert [*words[2]] == ["run", "dog", "owl"]  # by rarity times count; all over the least mean
    assert words[2]["dog"] == pytest.approx(0.5 * 0.3 / 0.01)
    assert replace(expansion, num_words=1).words(vectors[:1], ["cats dogs"]) == [{"owl": 0.57}]
    assert expansion.words(np.zeros((0, 2), np.float32), []) == []


class TopicVectors:
    """The vector of a passage is its topic, of eight."""

    fingerprint = "topics"

    def encode_passages(self, texts: list[str], *, advance=None) -> SimpleNamespace:
        del advance
        vectors = np.eye(8, dtype=np.float32)[[int(text.split()[0][-1]) for text in texts]]
        return SimpleNamespace(vectors=vectors)


def by_topic(name: str, *, num: int = 160) -> Dataset:
    """Queries for a passage of topic t have the word synonym<t>, which it lacks, and every second one a word more."""
    passages = {f"p{n:03}": f"topic{n % 8} own{n}" for n in range(num)}
    queries = {f"q{n:03}": f"synonym{n % 8}" + (" often" if n // 8 % 2 else "") for n in range(num)}
    judged = {f"q{n:03}": {f"p{n:03}": 1} for n in range(num)}
    half = num // 2
    splits = {"train": dict([*judged.items()][:half]), "dev": dict([*judged.items()][half:])}
    return make_source(passages, queries, [], qrels=splits, name=name).dataset


def test_a_passage_learns_the_words_of_its_queries() -> None:
    dataset = by_topic("topics")
    fitted = fit_document_expansion(TopicVectors(), [dataset])
    assert fitted.num_passages == {"topics": 80}
    assert {*fitted.terms} == {*(f"synonym{n}" for n in range(8)), "often"}
    texts = [f"topic{n} new" for n in range(8)]
    words = fitted.words(TopicVectors().encode_passages(texts).vectors, texts)
    for n, own in enumerate(words):
        assert next(word for word in own if word != "often") == f"synonym{n}"
        assert own[f"synonym{n}"] > 3 * max(own.get(f"synonym{m}", 0) for m in range(8) if m != n)
        assert own["often"] == pytest.approx(own[f"synonym{n}"] / 2, rel=0.2)
    assert 0.6 < fitted.explained["topics"] < 1  # all of the topics, and half of the queries have no second word


def test_passages_of_other_splits_are_left_out() -> None:
    dataset = by_topic("topics")
    dataset.qrels["test"] = {"q000": {"p000": 1}}
    assert fit_document_expansion(TopicVectors(), [dataset]).num_passages == {"topics": 79}
    assert fit_document_expansion(TopicVectors(), [dataset], max_passages=50).num_passages == {"topics": 50}


def test_too_little_to_learn_from_is_refused() -> None:
    with pytest.raises(InputError, match=r"few: has 8 passages relevant to a query of 'train' .* at least 20"):
        fit_document_expansion(TopicVectors(), [by_topic("few", num=16)])
    passages = {f"p{n}": f"topic{n % 8}" for n in range(30)}
    queries = {f"q{n}": f"own{n}" for n in range(30)}
    judged = {"train": {f"q{n}": {f"p{n}": 1} for n in range(30)}}
    with pytest.raises(InputError, match="no word is in two of the queries"):
        fit_document_expansion(
            TopicVectors(), [make_source(passages, queries, [], qrels=judged, name="unique").dataset]
        )


def test_it_is_stored_with_the_student(expanding: Student, tmp_path: Path) -> None:
    own = expanding.document_expansion
    assert own is not None
    expanding.save(tmp_path / "s")
    loaded = Student.load(tmp_path / "s", device="cpu", dtype="float32")
    assert loaded.document_expansion is not None
    assert loaded.document_expansion.fingerprint == own.fingerprint
    assert loaded.document_expansion.facts() == own.facts()
    assert loaded.fingerprint == expanding.fingerprint
    assert replace(own, amount=0.4).fingerprint != own.fingerprint
    with pytest.raises(ModelError, match="was fitted to the student"):
        DocumentExpansion.read(tmp_path / "s", "another", Widths(expanding.vector_dim, 0))
    with pytest.raises(ModelError, match=r"does not fit 5 words and vectors of width 7 \(middle, weights\)"):
        DocumentExpansion.read(tmp_path / "s", expanding.fingerprint, Widths(7, 0))
    (tmp_path / "s" / DocumentExpansion.file_name).write_bytes(b"nothing")
    with pytest.raises(ModelError, match="delete the file and its name in the manifest to index passages without"):
        Student.load(tmp_path / "s", device="cpu", dtype="float32")


def expected_scores(student: ExpandingStudent, passages: list[Passage], text: str) -> dict[str, float]:
    """The score of each passage: the student's, and three times BM25 with the added words."""
    texts = [passage.full_text for passage in passages]
    vectors = student.encode_passages(texts).vectors
    added = student.document_expansion.words(vectors, texts)
    assert any(added)
    words = WordIndex([WordSegment.from_texts(texts).with_added(added)])
    scores = words.scores(words.query(text))
    assert (scores != WordIndex.from_texts(texts).scores(words.query(text))).any()
    own = student.score(student.encode_queries([text]).vectors[0], vectors, "asymmetric")
    return dict(zip([p.id for p in passages], (own + 3.0 * scores).tolist(), strict=True))


def check(index: Index, passages: list[Passage], text: str = "dog cats purple run") -> None:
    expected = expected_scores(ExpandingStudent(), passages, text)
    for exact in (False, True):
        ranking = index.search(text, top_k=len(passages), score_features={"bm25": 3.0}, exact=exact)
        assert {result.passage.id: result.score for result in ranking.passages} == pytest.approx(expected, rel=1e-5)
        if exact:
            assert ranking.certificate is not None
            assert ranking.certificate.proved == len(passages)


@pytest.mark.parametrize("num_shards", [None, 2])
def test_an_index_counts_the_words_that_passages_lack(tmp_path: Path, num_shards: int | None) -> None:
    student = ExpandingStudent()
    index = Index.create(tmp_path / "i", student, vector_format="float32", num_shards=num_shards)
    index.upsert(PASSAGES[:2])
    index.upsert(PASSAGES[2:])
    check(index, PASSAGES)
    index.upsert([replace(PASSAGES[0], metadata={"year": 2})])  # keeps vector and words
    check(index, PASSAGES)
    changed = [PASSAGES[0], Passage("b", "a dog runs"), *PASSAGES[2:]]
    index.upsert(changed[1:2])
    check(index, changed)
    index.delete(["a"])
    index.compact(dense=True)
    check(index, changed[1:])
    for path in (tmp_path / "i").rglob("words-*"):
        path.unlink()
    check(Index.open(tmp_path / "i", student), changed[1:])
    assert Index.open(tmp_path / "i", student).verify(repair=True).problems
    assert Index.open(tmp_path / "i", student).verify().problems == []
    check(Index.open(tmp_path / "i", student), changed[1:])


def test_shards_and_snapshots_keep_them(tmp_path: Path) -> None:
    student = ExpandingStudent()
    encode(PASSAGES, student, tmp_path / "one", vector_format="float32")
    shard(tmp_path / "one", tmp_path / "two", 2)
    two = Index.open(tmp_path / "two", student)
    check(two, PASSAGES)
    two.upsert([Passage("e", "an owl")])
    check(two, [*PASSAGES, Passage("e", "an owl")])
    one = Index.open(tmp_path / "one", student)
    one.snapshot("before")
    one.upsert([Passage("e", "an owl")])
    one.restore("before")
    check(one, PASSAGES)


def test_an_index_takes_words_of_one_expansion_only(tmp_path: Path) -> None:
    Index.create(tmp_path / "i", ExpandingStudent()).upsert(PASSAGES[:2])
    for other, own in ((ExpandingStudent(seed=1), r"[0-9a-f]{16}"), (FakeStudent(), "none")):
        index = Index.open(tmp_path / "i", other)
        with pytest.raises(IndexMismatchError, match=rf"words added by document expansion .* the student has {own};"):
            index.upsert(PASSAGES[2:])
        assert len(index.search("cats").passages) == 2
    plain = Index.create(tmp_path / "plain", FakeStudent())
    plain.upsert(PASSAGES[:2])
    with_words = Index.open(tmp_path / "plain", ExpandingStudent())  # an index from before adds none
    with_words.upsert(PASSAGES[2:])
    plain.refresh()
    found, expected = (index.search("cats", score_features={"bm25": 1.0}) for index in (with_words, plain))
    assert found.passages == expected.passages
    assert DotStudent(ExpandingStudent()).document_expansion is not None
    assert DotStudent(FakeStudent()).document_expansion is None


def test_an_interrupted_run_does_not_mix_expansions(tmp_path: Path) -> None:
    student = ExpandingStudent()
    texts = [Passage(f"p{n}", f"cats {n}") for n in range(3_000)]
    student.fail_after = 2_500
    with pytest.raises(Interruption):
        encode(texts, student, tmp_path / "i")
    (draft,) = tmp_path.glob(".i.work-*")
    other = ExpandingStudent(seed=1)
    report = encode(texts, other, tmp_path / "other")
    assert report.num_resumed == 0
    student.fail_after = None
    assert encode(texts, student, tmp_path / "i").num_resumed > 0
    assert not draft.exists()


def test_the_verb_fits_words_of_passages_before_weights(student: Student) -> None:
    data = by_topic("tiny")
    try:
        with pytest.raises(InputError, match="weight must be fitted again"):
            fit_scores(student, [data], "asymmetric", words=False, document_expansion=True)
        report = fit_scores(student, [data], "asymmetric", window_vectors=False, document_expansion=True)
        assert report.document_expansion is not None
        assert report.document_expansion["num_passages"] == {"tiny": 80}
        assert student.document_expansion is not None
        assert report.document_expansion == student.document_expansion.facts()
    finally:
        student.prepare_training()
    assert student.document_expansion is None


def test_a_server_adds_them_to_what_it_is_sent(expanding: Student, tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")
    from starlette.testclient import TestClient

    from d2llm.server.app import make_app
    from tiny_server import tiny_settings
    from waiting import until

    expanding.save(tmp_path / "student")
    index = Index.create(tmp_path / "i", tmp_path / "student", device="cpu", dtype="float32")
    index.upsert(PASSAGES)
    app = make_app(tiny_settings(tmp_path / "i", device="cpu"))
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        until(lambda: client.get("/health").json()["status"] == "ready", "a server that is ready")
        sent = {"passages": [{"id": "new", "text": "snow in winter"}]}
        assert client.post("/v1/passages", json=sent).json()["num_added"] == 1
    by_hand = Index.create(tmp_path / "j", tmp_path / "student", device="cpu", dtype="float32")
    by_hand.upsert([*PASSAGES, Passage("new", "snow in winter")])
    added, expected = (
        {record["id"]: record["d2_words"] for batch in each.store.table().batches() for record in batch}
        for each in (index, by_hand)
    )
    assert added == expected
    assert added["new"]
