"""An index of late chunks: which documents are encoded again after a change, and which are not."""

from __future__ import annotations

import numpy as np
import pytest

from d2llm.core.errors import InputError
from d2llm.core.types import LateChunk, Passage, WholeText
from d2llm.models.student import Student
from d2llm.retrieval import upserting
from d2llm.retrieval.chunking import Chunker
from d2llm.retrieval.encode import encode
from d2llm.retrieval.index import Index
from d2llm.store.blocks import ROW_HASH_LENGTH, row_hash
from d2llm.store.index_manifest import Chunking
from fake_models import FakeStudent
from tiny_models import TEXTS, tiny_student_config, write_tiny_model

CATS = Passage("cats", ". ".join(TEXTS[:6]), "On cats")
SHIPS = Passage("ships", ". ".join(TEXTS[3:]), "On ships")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    model = write_tiny_model(tmp_path_factory.mktemp("models") / "bert", "bert")
    return Student.create(tiny_student_config(model), device="cpu", dtype="float32")


@pytest.fixture
def index(student, tmp_path):
    """Both documents as late chunks."""
    index = Index.create(tmp_path / "i", student, vector_format="float32")
    index.upsert_documents([CATS, SHIPS], late_chunker(student))
    return index


def late_chunker(student, **settings):
    return Chunker(student, Chunking(32, late=True, **settings))


def vectors_by_id(index):
    """Vectors by passage id."""
    rows = index.view.live_rows()
    return dict(zip(index.view.ids(rows), index.view.vectors(rows), strict=True))


def check_vectors(index, student, documents, **settings):
    """Check that the vectors are those of the current documents, each encoded as a whole."""
    expected = {}
    for document in documents:
        chunks = late_chunker(student, **settings).split(document)
        encoded = student.encode_chunks([(chunks[0].whole, [(chunk.start, chunk.end) for chunk in chunks])])
        expected |= dict(zip((chunk.id for chunk in chunks), encoded.vectors, strict=True))
    actual = vectors_by_id(index)
    assert actual.keys() == expected.keys()
    for passage_id, vector in expected.items():
        np.testing.assert_allclose(actual[passage_id], vector, atol=1e-5, err_msg=passage_id)
    assert index.verify().problems == []


def test_late_chunks_are_the_early_chunks_with_their_context(student):
    document = Passage("d", "  Éclairs 🐈‍⬛ sleep.\n\n猫 " + CATS.text, "On cats", metadata={"year": 1})
    chunks, early = late_chunker(student).split(document), Chunker(student, Chunking(32)).split(document)
    assert len(chunks) > 3
    for chunk, piece in zip(chunks, early, strict=True):
        assert isinstance(chunk, LateChunk)
        assert Passage(chunk.id, chunk.text, chunk.title, chunk.document_id, chunk.position, chunk.metadata) == piece
        assert document.text[chunk.start : chunk.end] == chunk.text
    assert {chunk.whole for chunk in chunks} == {WholeText(document.text, "On cats", 512)}
    short = Passage("d", "the cat sat on the mat", "On cats")
    assert late_chunker(student).split(short) == [short]  # the chunk is the whole document


def test_vectors_depend_on_the_whole_document(index, student):
    check_vectors(index, student, [CATS, SHIPS])
    alone = student.encode_passages([chunk.full_text for chunk in late_chunker(student).split(CATS)]).vectors
    assert np.abs(vectors_by_id(index)["cats#1"] - alone[0]).max() > 1e-2


def test_unchanged_documents_are_not_encoded(index, student):
    version = index.store.table().version
    report = index.upsert_documents([CATS, SHIPS], late_chunker(student))
    assert (report.num_unchanged, report.num_tokens, report.num_windows) == (len(index), 0, 0)
    assert index.store.table().version == version


@pytest.mark.parametrize(
    "changed",
    [
        Passage("cats", CATS.text.replace("planets", "ships"), "On cats"),  # in the last chunk
        Passage("cats", CATS.text, "On dogs"),
        Passage("cats", CATS.text.replace(". ", ".  ", 1), "On cats"),  # between two chunks
    ],
    ids=["one chunk", "title", "white space"],
)
def test_a_change_encodes_its_whole_document_and_no_other(index, student, changed):
    num_cats = len(late_chunker(student).split(CATS))
    assert num_cats > 2
    assert len(late_chunker(student).split(changed)) == num_cats
    report = index.upsert_documents([changed, SHIPS], late_chunker(student))
    assert (report.num_updated, report.num_added, report.num_windows) == (num_cats, 0, 1)
    assert report.num_unchanged == len(index) - num_cats
    check_vectors(index, student, [changed, SHIPS])


def test_metadata_changes_keep_the_vectors(index, student):
    before = vectors_by_id(index)
    documents = [Passage(d.id, d.text, d.title, metadata={"year": 1}) for d in (CATS, SHIPS)]
    report = index.upsert_documents(documents, late_chunker(student))
    assert (report.num_metadata, report.num_tokens) == (len(index), 0)
    after = vectors_by_id(index)
    assert all((before[passage_id] == after[passage_id]).all() for passage_id in before)
    assert index.upsert_documents(documents, late_chunker(student)).num_unchanged == len(index)
    assert index.verify().problems == []


@pytest.mark.parametrize("other", [Chunking(32), Chunking(32, late=True, late_window=40)], ids=str)
def test_late_chunks_are_not_mixed_with_other_chunks(index, student, other):
    """Their texts would be the same, but not their vectors."""
    with pytest.raises(InputError, match="late chunks of at most 32 tokens, read in windows of 512 tokens, and cannot"):
        index.upsert_documents([CATS], other)
    check_vectors(index, student, [CATS, SHIPS])
    assert index.upsert_documents([CATS, SHIPS], Chunking(32, late=True, late_window=512)).num_tokens == 0


def test_smaller_windows(student, tmp_path):
    index = Index.create(tmp_path / "i", student, vector_format="float32")
    assert index.upsert_documents([CATS, SHIPS], Chunking(32, late=True, late_window=40)).num_windows > 2
    check_vectors(index, student, [CATS, SHIPS], late_window=40)


def test_a_document_may_span_several_commits(student, tmp_path, monkeypatch):
    monkeypatch.setattr(upserting, "BLOCK_PASSAGES", 2)
    index = Index.create(tmp_path / "i", student, vector_format="float32")
    index.upsert_documents([CATS, SHIPS], late_chunker(student))
    check_vectors(index, student, [CATS, SHIPS])


def test_late_chunks_and_passages_in_one_upsert(student, tmp_path):
    index = Index.create(tmp_path / "i", student, vector_format="float32")
    chunks, alone = late_chunker(student).split(CATS), Passage("alone", SHIPS.text * 2)
    report = index.add([chunks[1], alone, chunks[0]])
    assert (report.num_windows, report.num_truncated) == (1, 1)
    vectors = vectors_by_id(index)
    np.testing.assert_allclose(vectors["alone"], student.encode_passages([alone.text]).vectors[0], atol=1e-5)
    expected = student.encode_chunks([(chunks[0].whole, [(chunk.start, chunk.end) for chunk in chunks])]).vectors
    np.testing.assert_allclose(vectors["cats#2"], expected[1], atol=1e-5)
    np.testing.assert_allclose(vectors["cats#1"], expected[0], atol=1e-5)
    assert [record["id"] for record in all_records(index) if record["d2_truncated"]] == ["alone"]


def all_records(index):
    return [record for batch in index.store.table().batches() for record in batch]


def test_a_damaged_context_hash_is_found(index):
    table = index.store.table()
    rows = all_records(index)
    rows[1]["d2_hash"] = rows[1]["d2_hash"][:-1] + "x"
    table.replace_all(table.metadata, [rows])
    (problem,) = index.verify().problems
    assert rows[1]["id"] in problem


def test_row_hashes_without_late_chunks_never_change():
    """Existing indexes without late chunks must stay valid."""
    actual = row_hash("a", "title", "text", {"position": 1, "document_id": "d", "year": None})
    assert actual == "0dc555e35164576c60832f131c35f6aebdf81cad8b6702f6"
    assert len(actual) == ROW_HASH_LENGTH


def test_invalid_requests_are_rejected(student, tmp_path):
    with pytest.raises(InputError, match="only applies to late chunks"):
        Chunker(student, Chunking(32, late_window=64))
    with pytest.raises(InputError, match="smaller than a passage of 32"):
        late_chunker(student, late_window=31)
    with pytest.raises(InputError, match="reads up to 512"):
        late_chunker(student, late_window=513)
    chunks = late_chunker(student).split(CATS)
    with pytest.raises(InputError, match="FakeStudent cannot read parts"):
        Index.create(tmp_path / "fake", FakeStudent()).upsert(chunks)
    with pytest.raises(InputError, match=r"keeps its vectors once.*chunk early"):
        Index.create(tmp_path / "once", student, vector_copies=1).upsert(chunks)


def test_encode_accepts_late_chunks(student, tmp_path):
    chunks = [*late_chunker(student).split(CATS), *late_chunker(student).split(SHIPS)]
    encode(chunks, student, tmp_path / "folder", vector_format="float32")
    check_vectors(Index.open(tmp_path / "folder", student), student, [CATS, SHIPS])
