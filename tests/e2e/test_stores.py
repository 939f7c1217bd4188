"""The recipes of docs/how-to/stores.md: another store with the head in numpy ranks as ``d2llm search`` does."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

from d2llm import Index, Passage

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "stores.md"
STORES = ("qdrant", "lance", "postgres")
QUESTIONS = ("remove indentation from every line", "how far values are spread", "wrap a long line of text")
TASKS = ("asymmetric", "symmetric")


@pytest.fixture(scope="module")
def page():
    """The names that the page's blocks make, all run once but the last, which closes a store."""
    for package in ("qdrant_client", "pgserver", "psycopg"):
        pytest.importorskip(package)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    before, folder = Path.cwd(), Path(tempfile.mkdtemp())
    folder.chmod(0o755)  # run by root, PostgreSQL works as another user, who has to get there
    names: dict = {}
    os.chdir(folder)
    try:
        for block in blocks[:-1]:
            exec(block, names)
        yield names
        exec(blocks[-1], names)
    finally:
        if "postgres" in names:
            names["postgres"].close()
            names["server"].cleanup()
        os.chdir(before)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def expected(page, tmp_path_factory):
    """What ``d2llm search`` finds by the vectors alone, by question and task: the stores count no words."""
    folder = tmp_path_factory.mktemp("index") / "index"
    index = Index.create(folder, page["student"], vector_format="float32")
    index.add([Passage(name, text) for name, text in page["passages"].items()])
    return {
        (question, task): [
            (place.passage.id, place.score)
            for place in index.search([question], task=task, top_k=10, num_candidates=100, evidence={})[0].passages
        ]
        for question in QUESTIONS
        for task in TASKS
    }


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("store", STORES)
def test_a_store_ranks_as_d2llm_does(page, expected, store, task):
    for question in QUESTIONS:
        found, wanted = page[f"search_{store}"](question, task), expected[question, task]
        assert [name for name, _ in found] == [name for name, _ in wanted]
        np.testing.assert_allclose([score for _, score in found], [score for _, score in wanted], atol=1e-4)


def test_the_candidates_are_fewer_than_the_passages(page):
    assert len(page["passages"]) > 100


def test_rescoring_changes_what_the_store_found(page, expected):
    """Else the tests above would not notice that it is left out."""
    query = page["student"].encode_queries([QUESTIONS[0]]).vectors
    anchors = page["vectors"] @ page["head"].anchor_queries(query, "symmetric")[0]
    wanted = [score for _, score in expected[QUESTIONS[0], "symmetric"]]
    assert np.abs(np.sort(anchors)[::-1][:10] - wanted).max() > 0.1


def test_the_page_says_what_it_prints(page):
    said = re.findall(r"^```output\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    found = [page[f"search_{store}"](QUESTIONS[0])[0][0] for store in STORES]
    assert [text.strip() for text in said] == found
