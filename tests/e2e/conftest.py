"""One run from a folder of texts to an index, made by the command line and shared by its tests."""

from __future__ import annotations

import pytest

from e2e.command_line import succeed_with_report, write_data, write_recipe
from tiny_models import write_tiny_model


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """Models, data and recipe; tests that change them copy them first."""
    folder = tmp_path_factory.mktemp("cli")
    write_tiny_model(folder / "encoder", "bert")
    write_tiny_model(folder / "decoder", "llama")
    write_data(folder / "everyday")
    write_recipe(folder / "tiny.toml", folder, folder / "everyday")
    return folder


@pytest.fixture(scope="session")
def reports(place):
    """The four steps, one after the other, and what each reported."""
    arguments = (place / "tiny.toml", "--out", place / "run", "--dtype", "float32")
    found = {}
    for verb in ("mine", "tune-teacher", "label", "distill"):
        result, found[verb] = succeed_with_report(verb, *arguments, folder=place)
        assert result.stdout == ""  # remarks go to standard error
        assert f"{verb}: " in result.stderr
    return found


@pytest.fixture(scope="session")
def index(place, reports):
    arguments = (place / "everyday", "--student", place / "run" / "student", "--out", place / "index")
    _, report = succeed_with_report("encode", *arguments, "--dtype", "float32", folder=place)
    assert report["result"]["num_passages"] == 60
    assert report["arguments"]["vectors"] == "bfloat16"
    return place / "index"
