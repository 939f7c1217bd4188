"""`d2llm fit` on the command line: options become settings, and mistakes get a clear error before anything is read."""

from __future__ import annotations

import pytest

from d2llm.fitting.fit import Fit
from d2llm.recipe import WriterConfig, WriterEndpointConfig
from e2e.command_line import fail, succeed


@pytest.fixture
def opened(monkeypatch):
    """The fits that the verb opened; finishing them does nothing."""
    fits: list[Fit] = []
    monkeypatch.setattr(Fit, "finish", lambda self, *, again=False: fits.append(self))
    return fits


@pytest.fixture
def documents(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("# Pumps\n\nHow pumps are cleaned.\n")
    return tmp_path / "docs"


def test_options_become_settings(opened, documents, tmp_path):
    (tmp_path / "examples.tsv").write_text("Pumps are cleaned weekly.\thow often to clean a pump\n")
    arguments = [
        *("--minutes", "30", "--student", "d2llm-minilm", "--seed", "3", "--exclude", "*.log"),
        *("--max-queries", "9"),
    ]
    arguments += ["--endpoint", "http://127.0.0.1:9/v1", "--writer", "large", "--prices", "0.5", "2", "--max-cost", "1"]
    result = succeed("fit", documents, *arguments, "--examples", tmp_path / "examples.tsv")
    settings = opened[0].settings
    assert (settings.hours, settings.student, settings.seed, settings.exclude) == (0.5, "d2llm-minilm", 3, ("*.log",))
    assert (settings.max_queries, settings.max_cost, settings.max_tokens) == (9, 1.0, None)
    assert settings.examples == (("Pumps are cleaned weekly.", "how often to clean a pump"),)
    prices = {"price_per_million_prompt_tokens": 0.5, "price_per_million_written_tokens": 2.0}
    remote = WriterEndpointConfig(url="http://127.0.0.1:9/v1", **prices)
    assert settings.writer == WriterConfig(model="large", kind="remote", remote=remote)
    assert opened[0].folder.path == tmp_path / "docs.search"
    assert "is up to date" in result.stderr


def test_by_default_a_local_model_writes_for_eight_hours(opened, documents):
    succeed("fit", documents)
    assert (opened[0].settings.hours, opened[0].settings.writer, opened[0].settings.student) == (
        8.0,
        WriterConfig(model="smollm2-writer"),  # the one that ships with d2llm
        None,
    )


@pytest.mark.parametrize("content", [None, "image"])
def test_documents_that_cannot_be_read_leave_no_index(tmp_path, content):
    folder = tmp_path / "docs"
    folder.mkdir()
    if content is not None:
        (folder / "photo.heic").write_bytes(b"no text")
    fail("fit", folder, "--student", "d2llm-minilm", containing=["docs", "documents"])
    assert not (tmp_path / "docs.search" / "index").exists()
