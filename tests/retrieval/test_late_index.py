"""An index of late chunks: what is encoded again when a document changes, and when not."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from d2llm.core.errors import InputError
from d2llm.core.types import LateChunk, Passage, WholeText
from d2llm.models.student import Student
from d2llm.retrieval import upserting
from d2llm.retrieval.chunking import Chunker, upsert_documents
from d2llm.retrieval.encode import encode
from d2llm.retrieval.index import Index
from d2llm.store.blocks import ROW_HASH_LENGTH, row_hash
from d2llm.store.side_files import Chunking
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
    made = Index.create(tmp_path / "i", student, vector_format="float32")
    upsert_documents(made, [CATS, SHIPS], late(student))
    return made


def late(student, **settings):
    return Chunker(student, Chunking(32, late=True, **settings))


def vectors_of(index):
    """By passage id."""
    rows = index.view.live_rows()
    return dict(zip(index.view.ids(rows), index.view.vectors(rows), strict=True))


def check_vectors(index, student, documents, **settings):
    """They are those of the documents as they are now, read whole."""
    wanted = {}
    for document in documents:
        chunks = late(student, **settings).split(document)
        encoded = student.encode_chunks([(chunks[0].whole, [(chunk.start, chunk.end) for chunk in chunks])])
        wanted |= dict(zip((chunk.id for chunk in chunks), encoded.vectors, strict=True))
    found = vectors_of(index)
    assert found.keys() == wanted.keys()
    for passage_id, vector in wanted.items():
        np.testing.assert_allclose(found[passage_id], vector, atol=1e-5, err_msg=passage_id)
    assert index.verify().problems == []


def test_chunks_are_the_same_pieces_and_know_their_place(student):
    document = Passage("d", "  Éclairs 🐈‍⬛ sleep.\n\n猫 " + CATS.text, "On cats", metadata={"year": 1})
    chunks, early = late(student).split(document), Chunker(student, Chunking(32)).split(document)
    assert len(chunks) > 3
    for chunk, piece in zip(chunks, early, strict=True):
        assert isinstance(chunk, LateChunk)
        assert Passage(chunk.id, chunk.text, chunk.title, chunk.document_id, chunk.position, chunk.metadata) == piece
        assert document.text[chunk.start : chunk.end] == chunk.text
    assert {chunk.whole for chunk in chunks} == {WholeText(document.text, "On cats", 512)}
    short = Passage("d", "the cat sat on the mat", "On cats")
    assert late(student).split(short) == [short]  # it is the whole that is around it


def test_vectors_are_of_whole_documents(index, student):
    check_vectors(index, student, [CATS, SHIPS])
    alone = student.encode_passages([chunk.full_text for chunk in late(student).split(CATS)]).vectors
    assert np.abs(vectors_of(index)["cats#1"] - alone[0]).max() > 1e-2


def test_what_is_as_it_was_is_not_read(index, student):
    version = index.store.table().version
    report = upsert_documents(index, [CATS, SHIPS], late(student))
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
def test_a_change_reads_all_of_its_document_and_only_it(index, student, changed):
    num_cats = len(late(student).split(CATS))
    assert num_cats > 2
    assert len(late(student).split(changed)) == num_cats
    report = upsert_documents(index, [changed, SHIPS], late(student))
    assert (report.num_updated, report.num_added, report.num_windows) == (num_cats, 0, 1)
    assert report.num_unchanged == len(index) - num_cats
    check_vectors(index, student, [changed, SHIPS])


def test_other_metadata_keep_the_vectors(index, student):
    before = vectors_of(index)
    documents = [Passage(d.id, d.text, d.title, metadata={"year": 1}) for d in (CATS, SHIPS)]
    report = upsert_documents(index, documents, late(student))
    assert (report.num_metadata, report.num_tokens) == (len(index), 0)
    after = vectors_of(index)
    assert all((before[passage_id] == after[passage_id]).all() for passage_id in before)
    assert upsert_documents(index, documents, late(student)).num_unchanged == len(index)
    assert index.verify().problems == []


@pytest.mark.parametrize("other", [Chunking(32), Chunking(32, late=True, late_window=40)], ids=str)
def test_late_and_early_chunks_or_other_windows_are_not_mixed(index, student, other):
    """The texts would be the same, the vectors not."""
    with pytest.raises(InputError, match="late chunks of at most 32 tokens, read in windows of 512 tokens, and cannot"):
        index.upsert_documents([CATS], other)
    check_vectors(index, student, [CATS, SHIPS])
    assert index.upsert_documents([CATS, SHIPS], Chunking(32, late=True, late_window=512)).num_tokens == 0


def test_smaller_windows(student, tmp_path):
    index = Index.create(tmp_path / "i", student, vector_format="float32")
    assert index.upsert_documents([CATS, SHIPS], Chunking(32, late=True, late_window=40)).num_windows > 2
    check_vectors(index, student, [CATS, SHIPS], late_window=40)


def test_a_document_may_lie_in_several_commits(student, tmp_path, monkeypatch):
    monkeypatch.setattr(upserting, "BLOCK_PASSAGES", 2)
    index = Index.create(tmp_path / "i", student, vector_format="float32")
    upsert_documents(index, [CATS, SHIPS], late(student))
    check_vectors(index, student, [CATS, SHIPS])


def test_late_chunks_and_passages_in_one_upsert(student, tmp_path):
    index = Index.create(tmp_path / "i", student, vector_format="float32")
    chunks, alone = late(student).split(CATS), Passage("alone", SHIPS.text * 2)
    report = index.add([chunks[1], alone, chunks[0]])
    assert (report.num_windows, report.num_truncated) == (1, 1)
    found = vectors_of(index)
    np.testing.assert_allclose(found["alone"], student.encode_passages([alone.text]).vectors[0], atol=1e-5)
    wanted = student.encode_chunks([(chunks[0].whole, [(chunk.start, chunk.end) for chunk in chunks])]).vectors
    np.testing.assert_allclose(found["cats#2"], wanted[1], atol=1e-5)
    np.testing.assert_allclose(found["cats#1"], wanted[0], atol=1e-5)
    assert index.store.table().columns(["id"], "d2_truncated")["id"].to_pylist() == ["alone"]


def test_a_damaged_context_is_found(index):
    table = index.store.table()
    rows = table.columns(table.schema.names).to_pylist()
    rows[1]["d2_hash"] = rows[1]["d2_hash"][:-1] + "x"
    table.replace_all(table.schema, iter(pa.Table.from_pylist(rows, schema=table.schema).to_batches()))
    (problem,) = index.verify().problems
    assert rows[1]["id"] in problem


def test_rows_of_passages_read_alone_have_the_hash_they_always_had():
    """Indexes that know no late chunks stay as they are."""
    found = row_hash("a", "title", "text", {"position": 1, "document_id": "d", "year": None})
    assert found == "0dc555e35164576c60832f131c35f6aebdf81cad8b6702f6"
    assert len(found) == ROW_HASH_LENGTH


def test_refusals(student, tmp_path):
    with pytest.raises(InputError, match="only applies to late chunks"):
        Chunker(student, Chunking(32, late_window=64))
    with pytest.raises(InputError, match="smaller than a passage of 32"):
        late(student, late_window=31)
    with pytest.raises(InputError, match="reads up to 512"):
        late(student, late_window=513)
    chunks = late(student).split(CATS)
    with pytest.raises(InputError, match="FakeStudent cannot read parts"):
        Index.create(tmp_path / "fake", FakeStudent()).upsert(chunks)
    with pytest.raises(InputError, match=r"keeps its vectors once.*chunk early"):
        Index.create(tmp_path / "once", student, vector_copies=1).upsert(chunks)


def test_encode_takes_late_chunks(student, tmp_path):
    chunks = [*late(student).split(CATS), *late(student).split(SHIPS)]
    encode(chunks, student, tmp_path / "folder", vector_format="float32")
    check_vectors(Index.open(tmp_path / "folder", student), student, [CATS, SHIPS])
