import gzip
import json
from dataclasses import replace

import numpy as np
import pytest

from d2llm.core.errors import DataFormatError, DuplicateIdError, IndexLockedError, IndexMismatchError, InputError
from d2llm.core.files import folder_bytes
from d2llm.core.types import Passage
from d2llm.retrieval import upserting
from d2llm.retrieval.encode import encode
from d2llm.retrieval.index import Index
from fake_models import FakeStudent

PASSAGES = [Passage(f"p{n}", f"text {n} of {n % 5} words", f"title {n}" if n % 2 else "") for n in range(23)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(upserting, "BLOCK_PASSAGES", 5)


class Interrupted(Exception):
    pass


class FailingStudent(FakeStudent):
    """Raises ``Interrupted`` after encoding ``blocks`` blocks."""

    def __init__(self, blocks, **kwargs):
        super().__init__(**kwargs)
        self.blocks_left = blocks

    def encode_passages(self, texts, *, advance=None):
        if self.blocks_left == 0:
            raise Interrupted
        self.blocks_left -= 1
        return super().encode_passages(texts, advance=advance)


def contents(folder):
    """The manifest of the index, and its passages with their vectors."""
    index = Index.open(folder).unsharded_view
    rows = index.live_rows()
    vectors = [vector.tolist() for vector in index.vectors(rows)]
    return index.store.manifest, list(zip(index.passages(rows), vectors, strict=True))


def test_vectors_texts_and_report(tmp_path):
    student = FakeStudent(max_words=6)
    report = encode(PASSAGES, student, tmp_path / "i", vector_format="float32", task="symmetric")
    index = Index.open(tmp_path / "i", student)
    rows = index.view.live_rows()
    assert index.view.passages(rows) == PASSAGES
    expected = student.encode_passages([passage.full_text for passage in PASSAGES])
    np.testing.assert_array_equal(index.view.vectors(rows), expected.vectors)
    index = index.unsharded_view
    assert index.task == "symmetric"
    # Untitled: 5 words. Titled: "title n" + 5 = 7 words, of which 6 are read. 11 of 23 have a title.
    assert (report.num_passages, report.num_truncated, report.num_tokens) == (23, 11, 12 * 5 + 11 * 6)
    assert report.vector_bytes_per_passage == 16 * 4
    open_now = sum(path.stat().st_size for path in (tmp_path / "i").glob("passages.db-*"))
    assert report.bytes_per_passage == pytest.approx((folder_bytes(tmp_path / "i") - open_now) / 23, abs=0.1)
    assert report.passages_per_second == pytest.approx(23 / report.seconds)
    assert report.folder == tmp_path / "i"


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    encode(PASSAGES, FakeStudent(), tmp_path / "whole")
    with pytest.raises(Interrupted):
        encode(PASSAGES, FailingStudent(3), tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    student = FakeStudent()
    report = encode(PASSAGES, student, tmp_path / "cut")
    assert student.encoded_passages == 23 - 15
    assert (report.num_resumed, report.num_passages) == (15, 23)
    assert report.num_tokens == sum(len(passage.full_text.split()) for passage in PASSAGES[15:])  # of this run
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "whole"]


@pytest.mark.parametrize("change", ["student", "corpus", "format", "task"])
def test_blocks_of_a_different_run_are_not_reused(tmp_path, change):
    with pytest.raises(Interrupted):
        encode(PASSAGES, FailingStudent(3), tmp_path / "i")
    student = FakeStudent(fingerprint="other") if change == "student" else FakeStudent()
    passages = [Passage("p0", "changed"), *PASSAGES[1:]] if change == "corpus" else PASSAGES
    vector_format = "float32" if change == "format" else "bfloat16"
    task = "symmetric" if change == "task" else "asymmetric"
    report = encode(passages, student, tmp_path / "i", vector_format=vector_format, task=task)
    assert report.num_resumed == 0
    assert student.encoded_passages == 23


def test_vectors_stored_in_one_copy(tmp_path):
    many = [replace(passage, id=f"{passage.id}-{copy}") for passage in PASSAGES for copy in range(9)]
    twice = encode(many, FakeStudent(), tmp_path / "twice", vector_format="float32")
    once = encode(many, FakeStudent(), tmp_path / "once", vector_format="float32", vector_copies=1)
    assert Index.open(tmp_path / "once").stats().vector_copies == 1
    assert once.bytes_per_passage < twice.bytes_per_passage
    assert contents(tmp_path / "once")[1] == contents(tmp_path / "twice")[1]


@pytest.mark.parametrize("compressed", [False, True])
def test_corpus_file_and_folder(tmp_path, compressed):
    data = tmp_path / "data"
    data.mkdir()
    lines = [json.dumps({"_id": p.id, "title": p.title, "text": p.text}) for p in PASSAGES]
    content = "\n".join(lines).encode()
    path = data / ("corpus.jsonl.gz" if compressed else "corpus.jsonl")
    path.write_bytes(gzip.compress(content) if compressed else content)
    encode(path, FakeStudent(), tmp_path / "a")
    encode(data, FakeStudent(), tmp_path / "b")
    encode(iter(PASSAGES), FakeStudent(), tmp_path / "c")
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")


def test_an_existing_index_is_kept_without_overwrite(tmp_path):
    encode(PASSAGES, FakeStudent(), tmp_path / "i")
    student = FakeStudent(fingerprint="new")
    with pytest.raises(InputError, match=r"already holds an index.*--overwrite"):
        encode(PASSAGES, student, tmp_path / "i")
    assert student.encoded_passages == 0  # refused before anything is encoded
    encode(PASSAGES, student, tmp_path / "i", overwrite=True)
    assert Index.open(tmp_path / "i").view.student_fingerprint == "new"


def test_an_encoded_index_can_be_changed_and_searched(tmp_path):
    student = FakeStudent()
    encode([Passage("a", "cats sleep", metadata={"year": 1}), *PASSAGES], student, tmp_path / "i")
    index = Index.open(tmp_path / "i", student)
    index.upsert([Passage("b", "cats run", metadata={"year": 2})])
    for changes in ({"filter": "year > 1"}, {"sources": ("bm25",), "top_k": 1, "filter": "year = 2"}):
        ranking = index.search("cats", **changes)
        assert [hit.passage.id for hit in ranking.passages] == ["b"]


def test_an_interrupted_overwrite_leaves_the_old_index(tmp_path):
    encode(PASSAGES, FakeStudent(), tmp_path / "i")
    before = contents(tmp_path / "i")
    with pytest.raises(Interrupted):
        encode(PASSAGES[:10], FailingStudent(1), tmp_path / "i", overwrite=True)
    assert contents(tmp_path / "i") == before


def test_a_writer_of_a_replaced_index_is_rejected(tmp_path):
    encode(PASSAGES[:10], FakeStudent(), tmp_path / "i")
    old_index = Index.open(tmp_path / "i", FakeStudent())
    assert len(old_index) == 10
    encode(PASSAGES, FakeStudent(fingerprint="another"), tmp_path / "i", overwrite=True)
    new_contents = contents(tmp_path / "i")
    for write in (
        lambda: old_index.upsert([Passage("other", "text")]),
        lambda: old_index.delete(["p1"]),
        old_index.compact,
    ):
        with pytest.raises(IndexMismatchError, match="taken this one's place"):
            write()
    assert contents(tmp_path / "i") == new_contents


def test_an_index_is_not_replaced_while_it_is_written(tmp_path):
    encode(PASSAGES[:10], FakeStudent(), tmp_path / "i")
    before = contents(tmp_path / "i")
    with Index.open(tmp_path / "i", FakeStudent()).store.writing(), pytest.raises(IndexLockedError):
        encode(PASSAGES, FakeStudent(fingerprint="another"), tmp_path / "i", overwrite=True)
    assert contents(tmp_path / "i") == before
    report = encode(PASSAGES, FakeStudent(fingerprint="another"), tmp_path / "i", overwrite=True)
    assert report.num_resumed == 23  # the encoded blocks were kept


def test_invalid_input_is_rejected(tmp_path):
    student = FakeStudent()
    with pytest.raises(InputError, match="no passages"):
        encode([], student, tmp_path / "i")
    with pytest.raises(DuplicateIdError, match="share the id 'p0', the second is number 24"):
        encode([*PASSAGES, PASSAGES[0]], student, tmp_path / "i")
    with pytest.raises(InputError, match="there are no documents"):
        encode(tmp_path, student, tmp_path / "i")
    with pytest.raises(DataFormatError, match=r"missing\.jsonl"):
        encode(tmp_path / "missing.jsonl", student, tmp_path / "i")
    with pytest.raises(InputError, match="'int7' is unknown"):
        encode(PASSAGES, student, tmp_path / "i", vector_format="int7")


def test_non_finite_vectors_are_an_error_naming_the_passage(tmp_path):
    class NanStudent(FakeStudent):
        def encode_passages(self, texts, *, advance=None):
            encoded = super().encode_passages(texts, advance=advance)
            encoded.vectors[[text.startswith("text 12 ") for text in texts]] = np.nan
            return encoded

    with pytest.raises(InputError, match=r"1 vector is not finite.*'p12'"):
        encode(PASSAGES, NanStudent(), tmp_path / "i")
