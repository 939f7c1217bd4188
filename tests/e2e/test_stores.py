"""The recipes in docs/how-to/stores.md: other stores, with the head in numpy, rank as ``d2llm search`` does."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from d2llm import Index, Passage

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "stores.md"
STORES = ("qdrant", "lance", "milvus", "postgres")
QUESTIONS = ("remove indentation from every line", "how far values are spread", "wrap a long line of text")
TASKS = ("asymmetric", "symmetric")


@pytest.fixture(scope="module")
def page():
    """Names defined by the page's code blocks; the last block, which closes a store, runs after the tests."""
    for package in ("qdrant_client", "milvus_lite", "pgserver", "psycopg"):
        pytest.importorskip(package)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    before, folder = Path.cwd(), Path(tempfile.mkdtemp())
    folder.chmod(0o755)  # when started by root, PostgreSQL runs as another user, who needs access
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
    """Results of ``d2llm search`` by question and task, from vectors alone, since the stores do no word search."""
    folder = tmp_path_factory.mktemp("index") / "index"
    index = Index.create(folder, page["student"], vector_format="float32")
    index.add([Passage(name, text) for name, text in page["passages"].items()])
    return {
        (question, task): [
            (hit.passage.id, hit.score)
            for hit in index.search([question], task=task, top_k=10, num_candidates=100, score_features={})[0].passages
        ]
        for question in QUESTIONS
        for task in TASKS
    }


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("store", STORES)
def test_a_store_ranks_as_d2llm_does(page, expected, store, task):
    for question in QUESTIONS:
        results, reference = page[f"search_{store}"](question, task), expected[question, task]
        assert [name for name, _ in results] == [name for name, _ in reference]
        np.testing.assert_allclose([score for _, score in results], [score for _, score in reference], atol=1e-4)


@pytest.mark.parametrize("program", ["elasticsearch", "opensearch"])
def test_the_scripts_for_search_engines_give_the_score_with_maxsim(page, program, tmp_path):
    """Their functions, by their documentation, in Python."""
    body = page["search_body"](QUESTIONS[0], program)
    rescoring = body["rescore"]["query"]
    assert (rescoring["query_weight"], rescoring["rescore_query_weight"]) == (0, 1)
    script = rescoring["rescore_query"]["script_score"]["script"]
    scores = {}
    for name, document in zip(page["passages"], page["documents"], strict=True):

        def dots(query, field, document=document):
            return np.asarray(query) @ np.asarray(document[field]).T

        functions = {
            "dotProduct": dots,
            "innerProduct": lambda query, vector: np.dot(query, vector),
            "maxSimDotProduct": lambda query, field, dots=dots: dots(query, field).max(1).sum(),
            "lateInteractionScore": lambda query, field, *_, dots=dots: dots(query, field).max(1).sum(),
            "doc": document,
            "params": SimpleNamespace(**script["params"], _source=document),
            "Math": SimpleNamespace(max=max),
        }
        scores[name] = eval(script["source"], {"__builtins__": {}}, functions) - 100
    index = Index.create(tmp_path / "index", page["student"], vector_format="float32", token_vectors="float32")
    index.add([Passage(name, text) for name, text in page["passages"].items()])
    weight = page["student"].feature_weights("asymmetric").terms["maxsim"]
    for hit in index.search(QUESTIONS[0], top_k=10, score_features={"maxsim": weight}):
        assert scores[hit.passage.id] == pytest.approx(hit.score, abs=1e-3)
    for kind in ("elasticsearch", "opensearch"):
        fields = page[f"{kind}_index"]["mappings"]["properties"].keys()
        assert fields == page["documents"][0].keys()


def test_there_are_more_passages_than_candidates(page):
    assert len(page["passages"]) > 100


def test_rescoring_changes_the_scores_of_a_store(page, expected):
    """Otherwise the tests above would not notice if rescoring were left out."""
    query = page["student"].encode_queries([QUESTIONS[0]]).vectors
    dots = page["vectors"] @ page["head"].query_vectors(query, "symmetric")[0]
    rescored = [score for _, score in expected[QUESTIONS[0], "symmetric"]]
    assert np.abs(np.sort(dots)[::-1][:10] - rescored).max() > 0.05


def test_the_output_shown_on_the_page_is_right(page):
    documented = re.findall(r"^```output\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    actual = [page[f"search_{store}"](QUESTIONS[0])[0][0] for store in STORES]
    assert [text.strip() for text in documented] == actual
