"""Words of the command line in the wrong order: the message has the right one."""

from __future__ import annotations

import shlex

import pytest
from typer.testing import CliRunner

from d2llm.cli.main import app
from d2llm.core.files import MANIFEST_NAME


def message(*words: str) -> str:
    result = CliRunner().invoke(app, words, env={"COLUMNS": "300"})
    assert result.exit_code == 2, result.output
    return result.stderr.strip()


@pytest.fixture(autouse=True)
def names(tmp_path, monkeypatch):
    """Documents, and an index, of which nothing is read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("a text")
    (tmp_path / "old.index").mkdir()
    (tmp_path / "old.index" / MANIFEST_NAME).write_text("{}")


@pytest.mark.parametrize(
    ("words", "right"),
    [
        ("index sync new.index docs", "index new.index sync docs"),
        ("index sync docs", "index INDEX sync docs"),
        ("index upsert new.index docs --exclude a.*", "index new.index upsert docs --exclude 'a.*'"),
        ("index --exclude a.txt add new.index docs", None),
        ("index stats old.index", "index old.index stats"),
        ("index list", "index INDEX list"),
        ("index old.index snapshots", "index old.index stats"),
        ("index old.index rm id1", "index old.index delete id1"),
        ("index delete old.index id1 id2", "index old.index delete id1 id2"),
        ("index old.index search two words", "search old.index two words"),
        ("index search old.index two words", "search old.index two words"),
        ("keys add keys.json page", "keys keys.json add page"),
        ("keys list", "keys FILE list"),
        ("old.index search two words", "search old.index two words"),
        ("old.index serve", "serve old.index"),
        ("old.index stats", "index old.index stats"),
        ("old.index index stats", "index old.index stats"),
        ("upsert old.index docs", "index old.index upsert docs"),
        ("sync old.index docs", "index old.index sync docs"),
        ("check docs", "recipe check docs, or: d2llm data check docs"),
        ("data docs check", "data check docs"),
        ("labels runs/labels stats", "labels stats runs/labels"),
        ("list", "index INDEX list, or: d2llm keys FILE list"),
        ("help search", "search --help"),
        ("help", "--help"),
        ("index docs sync new.index", "index new.index sync docs"),
        ("index docs upsert new.index", "index new.index upsert docs"),
        ("index docs/a.txt add new.index", "index new.index add docs/a.txt"),
        ("index docs upsert old.index", "index old.index upsert docs"),
        ("search question old.index", "search old.index question"),
        ("search two words old.index", "search old.index two words"),
    ],
)
def test_the_right_order_is_said(words, right):
    said = message(*shlex.split(words))
    if right is None:  # an unknown option comes first
        assert "No such option" in said
        return
    assert said.startswith("error: ")
    assert said.endswith(f"write: d2llm {right}")


def test_a_mistyped_verb_is_still_suggested():
    assert "Did you mean 'search'?" in message("serach", "old.index", "words")
    assert "Did you mean 'upsert'?" in message("index", "old.index", "upsrt", "docs")


def test_words_in_the_right_order_are_left_alone():
    for words in (["index", "old.index", "stats"], ["index", "sync", "stats"], ["search", "old.index", "index"]):
        assert "write: d2llm" not in message(*words)
    for words in (["index", "x", "--help"], ["index", "x", "upsert", "--help"], ["keys", "x", "add", "-h"]):
        assert CliRunner().invoke(app, words).exit_code == 0


@pytest.mark.parametrize(
    "words",
    [
        "search old.index cat -q dog",
        "search old.index -q cat -q dog",
        "search old.index 'a cat' --top-k 3 -q 'a dog' --json -",
        "classify old.index cat -q dog",
    ],
)
def test_quiet_among_words_joins_no_queries(words):
    assert message(*shlex.split(words)).startswith("error: -q is --quiet, and stands among the words of the query; ")


@pytest.mark.parametrize(
    "words",
    [
        "search old.index cat dog -q",
        "search old.index -q search cat",
        "-q search old.index cat dog",
        "search old.index cat -q --top-k 3",
        "search old.index --top-k 3 -q cat",
        "search old.index --query cat -q --query dog",
        "search old.index -- cat -q dog",
    ],
)
def test_quiet_elsewhere_is_quiet(words):
    assert "-q" not in message(*shlex.split(words))  # that the index is none


@pytest.mark.parametrize("option", ["--limit", "-k", "--n-results=3", "--where"])
def test_an_option_with_its_name_in_other_libraries(option):
    meant = "--filter" if option == "--where" else "--top-k"
    assert message("search", "old.index", "words", option).startswith(
        f"error: there is no option {option.partition('=')[0]}; did you mean {meant}?"
    )
    assert "there is no option" not in message("search", "old.index", "--", "words", option)
