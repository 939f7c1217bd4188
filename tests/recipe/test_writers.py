"""Kinds of writers: settings of each, and those that other packages add."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2llm.core.errors import RecipeError
from d2llm.methods.losses.soft_expansion import SoftExpansion
from d2llm.models.writers.writer import Assignment, load_writer
from d2llm.recipe import LocalWriterConfig, WriterConfig
from d2llm.recipe.recipe import load_recipe_text, named_writer
from installed_package import install

THEIRS = """
from d2llm.models.writers.writer import WrittenQueries
from d2llm.recipe import WriterConfig


class Backwards:
    def __init__(self, config):
        self.config, self.fingerprint = config, f"backwards-{config.mark}"

    def write(self, assignments, *, advance=None):
        return [WrittenQueries((each.passage[::-1] + self.config.mark,), 1, 1) for each in assignments]


class Theirs(WriterConfig, kind="theirs"):
    '''Texts backwards.'''

    mark: str = "?"
    '''Their last character.'''

    def load(self, *, device=None, dtype=None):
        return Backwards(self)
"""


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", THEIRS, WriterConfig.kinds, {"theirs": "Theirs"}, monkeypatch)


def writer_of(text: str) -> WriterConfig:
    text = f"[losses.soft_expansion]\npassages = 'file'\n[losses.soft_expansion.writer]\n{text}"
    loss = load_recipe_text(text, where="recipe.toml").losses.root["soft_expansion"]
    assert isinstance(loss, SoftExpansion)
    assert loss.writer is not None
    return loss.writer


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("kind = 'remot'", "losses.soft_expansion.writer: no kind of writer 'remot'; did you mean 'remote'?"),
        (
            "remote = { url = 'http://h/v1' }",
            "unknown key 'losses.soft_expansion.writer.remote' of kind local; it is a setting of kind remote",
        ),
        ("max_new_token = 5", "unknown key 'losses.soft_expansion.writer.max_new_token'; did you mean 'max_new_tokens"),
        ("kind = 'remote'", "losses.soft_expansion.writer.remote is missing; set it"),
    ],
)
def test_a_wrong_writer_says_what_is_wrong(text: str, problem: str) -> None:
    with pytest.raises(RecipeError) as error:
        writer_of(text)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


def test_the_default_is_local() -> None:
    assert writer_of("top_p = 0.5") == LocalWriterConfig(top_p=0.5) == WriterConfig(top_p=0.5)
    assert named_writer("local:smollm2") == named_writer("smollm2") == LocalWriterConfig()


@pytest.mark.usefixtures("theirs")
def test_another_package_adds_a_writer(tmp_path: Path) -> None:
    config = writer_of("kind = 'theirs'\nmark = '!'")
    [written] = load_writer(config).write([Assignment("abc", "answer")])
    assert written.queries == ("cba!",)
    assert named_writer("theirs:anything").model_dump() == {"kind": "theirs", "model": "anything", "mark": "?"}
    (tmp_path / "writer.toml").write_text("[writer]\nkind = 'theirs'\nmark = '.'\n")
    assert load_writer(named_writer(str(tmp_path / "writer.toml"))).fingerprint == "backwards-."
    with pytest.raises(RecipeError, match=r"unknown key 'losses.soft_expansion.writer.mark' of kind local; .* theirs"):
        writer_of("mark = '!'")
    with pytest.raises(RecipeError, match="did you mean 'theirs'"):
        writer_of("kind = 'their'")
