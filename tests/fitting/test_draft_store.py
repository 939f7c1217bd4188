"""The store of written queries: nothing paid for is lost, and a torn line does no harm."""

from __future__ import annotations

import pytest

from d2llm.core.errors import DataFormatError
from d2llm.core.types import Passage
from d2llm.fitting.draft_store import Draft, DraftStore, passage_hash

FIRST = Draft("a1", "question", ("What is it?", "为什么？"), 100, 12)
SECOND = Draft("a1", "keywords", (), 90, 3, problem="no query in 'Sorry'")


def test_drafts_survive_reopening(tmp_path):
    DraftStore(tmp_path, "writer").add([FIRST])
    store = DraftStore(tmp_path, "writer")
    store.add([SECOND])
    again = DraftStore(tmp_path, "writer")
    assert [again.get(each.key) for each in (FIRST, SECOND)] == [FIRST, SECOND]
    assert (len(again), again.num_tokens) == (2, (190, 15))
    assert ("a1", "statement") not in again


def test_writers_do_not_share_drafts(tmp_path):
    DraftStore(tmp_path, "one").add([FIRST])
    assert len(DraftStore(tmp_path, "other")) == 0


@pytest.mark.parametrize("cut", [1, 20])
def test_a_line_that_was_cut_off_is_dropped_and_written_again(tmp_path, cut):
    store = DraftStore(tmp_path, "writer")
    store.add([FIRST, SECOND])
    store.path.write_bytes(store.path.read_bytes()[:-cut])
    torn = DraftStore(tmp_path, "writer")
    assert (torn.get(FIRST.key), torn.get(SECOND.key)) == (FIRST, None)
    torn.add([SECOND])
    assert DraftStore(tmp_path, "writer").get(SECOND.key) == SECOND


def test_another_damaged_line_is_an_error_that_names_it(tmp_path):
    store = DraftStore(tmp_path, "writer")
    store.add([FIRST])
    store.path.write_bytes(b'{"kind": "question"}\n' + store.path.read_bytes())
    with pytest.raises(DataFormatError, match="jsonl:1: is not a written query"):
        DraftStore(tmp_path, "writer")


def test_the_hash_depends_on_title_and_text_but_not_on_the_id():
    assert passage_hash(Passage("1", "text", "title")) == passage_hash(Passage("2", "text", "title"))
    assert passage_hash(Passage("1", "text", "title")) != passage_hash(Passage("1", "text"))
