import gzip
import json

import numpy as np
import pytest

from d2llm.core.errors import DataFormatError, DuplicateIdError, InputError
from d2llm.core.types import Passage
from d2llm.index.folder import FolderIndex
from d2llm.pipeline import encode as module
from d2llm.pipeline.encode import encode
from fake_models import FakeStudent

PASSAGES = [Passage(f"p{n}", f"text {n} of {n % 5} words", f"title {n}" if n % 2 else "") for n in range(23)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_PASSAGES", 5)


class Interrupted(Exception):
    pass


class FailingStudent(FakeStudent):
    """Stops in its n-th block."""

    def __init__(self, blocks, **kwargs):
        super().__init__(**kwargs)
        self.blocks_left = blocks

    def encode_passages(self, texts, *, advance=None):
        if self.blocks_left == 0:
            raise Interrupted
        self.blocks_left -= 1
        return super().encode_passages(texts, advance=advance)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_vectors_texts_and_report(tmp_path):
    student = FakeStudent(max_words=6)
    report = encode(PASSAGES, student, tmp_path / "i", dtype="float32", task="symmetric")
    index = FolderIndex.open(tmp_path / "i", student_fingerprint=student.fingerprint)
    assert index.passages(range(23)) == PASSAGES
    expected = student.encode_passages([passage.full_text for passage in PASSAGES])
    np.testing.assert_array_equal(index.vectors(range(23)), expected.vectors)
    assert index.task == "symmetric"
    # Untitled: 5 words. Titled: "title n" + 5 = 7 words, of which 6 are read. 11 of 23 have a title.
    assert (report.num_passages, report.num_truncated, report.num_tokens) == (23, 11, 12 * 5 + 11 * 6)
    assert index.num_truncated == 11
    assert report.vector_bytes_per_passage == 16 * 4
    assert report.text_bytes_per_passage == pytest.approx(
        (tmp_path / "i" / "passages.arrow").stat().st_size / 23, abs=0.1
    )
    assert report.passages_per_second == pytest.approx(23 / report.seconds)
    assert json.loads(json.dumps(report.to_json()))["folder"] == str(tmp_path / "i")


def test_resumed_equals_uninterrupted(tmp_path):
    encode(PASSAGES, FakeStudent(), tmp_path / "whole")
    with pytest.raises(Interrupted):
        encode(PASSAGES, FailingStudent(3), tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    student = FakeStudent()
    report = encode(PASSAGES, student, tmp_path / "cut")
    assert student.encoded_passages == 23 - 15
    assert (report.num_resumed, report.num_passages) == (15, 23)
    assert report.num_tokens == 12 * 5 + 11 * 7  # of all passages, the resumed ones too
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "whole"]


@pytest.mark.parametrize("change", ["student", "corpus", "dtype"])
def test_blocks_of_another_run_are_not_taken_over(tmp_path, change):
    with pytest.raises(Interrupted):
        encode(PASSAGES, FailingStudent(3), tmp_path / "i")
    student = FakeStudent(fingerprint="other") if change == "student" else FakeStudent()
    passages = [Passage("p0", "changed"), *PASSAGES[1:]] if change == "corpus" else PASSAGES
    report = encode(passages, student, tmp_path / "i", dtype="float32" if change == "dtype" else "bfloat16")
    assert report.num_resumed == 0
    assert student.encoded_passages == 23


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


def test_existing_index_is_kept_unless_told(tmp_path):
    encode(PASSAGES, FakeStudent(), tmp_path / "i")
    student = FakeStudent(fingerprint="new")
    with pytest.raises(InputError, match="already holds an index"):
        encode(PASSAGES, student, tmp_path / "i")
    assert student.encoded_passages == 0  # refused before the work
    encode(PASSAGES, student, tmp_path / "i", overwrite=True)
    assert FolderIndex.open(tmp_path / "i").student_fingerprint == "new"


def test_an_interrupted_overwrite_leaves_the_old_index(tmp_path):
    encode(PASSAGES, FakeStudent(), tmp_path / "i")
    before = contents(tmp_path / "i")
    with pytest.raises(Interrupted):
        encode(PASSAGES[:10], FailingStudent(1), tmp_path / "i", overwrite=True)
    assert contents(tmp_path / "i") == before


def test_bad_input(tmp_path):
    student = FakeStudent()
    with pytest.raises(InputError, match="no passages"):
        encode([], student, tmp_path / "i")
    with pytest.raises(DuplicateIdError, match="passages 1 and 24 share the id 'p0'"):
        encode([*PASSAGES, PASSAGES[0]], student, tmp_path / "i")
    with pytest.raises(DataFormatError, match=r"no corpus\.jsonl"):
        encode(tmp_path, student, tmp_path / "i")
    with pytest.raises(DataFormatError, match=r"missing\.jsonl"):
        encode(tmp_path / "missing.jsonl", student, tmp_path / "i")
    with pytest.raises(InputError, match="'int3' is unknown"):
        encode(PASSAGES, student, tmp_path / "i", dtype="int3")
    assert student.encoded_passages == 0


def test_vectors_that_are_not_finite_name_the_passage(tmp_path):
    class Broken(FakeStudent):
        def encode_passages(self, texts, *, advance=None):
            encoded = super().encode_passages(texts, advance=advance)
            encoded.vectors[[text.startswith("text 12 ") for text in texts]] = np.nan
            return encoded

    with pytest.raises(InputError, match=r"1 vectors are not finite.*'p12'"):
        encode(PASSAGES, Broken(), tmp_path / "i")
