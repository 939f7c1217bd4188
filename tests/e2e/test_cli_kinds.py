"""Kinds of teachers and writers that another package adds, as a user names them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from d2llm.data.labels import LabelStore
from d2llm.data.plan import read_plan
from d2llm.recipe import TeacherConfig, WriterConfig
from e2e.command_line import fail, succeed, succeed_with_report
from e2e.small_corpus import SENTENCES
from installed_package import install
from recipe.test_writers import THEIRS as WRITER

JUDGE = """
import numpy as np

from d2llm.models.teachers.judge import Judgements
from d2llm.recipe import TeacherConfig


class Overlap:
    def __init__(self, slope):
        self.slope, self.fingerprint = slope, f"overlap-{slope}"

    def prompt_fingerprint(self, task):
        return f"words-{task}"

    def judge(self, pairs, task, *, with_features=False, advance=None):
        shares = [len({*q.split()} & {*p.split()}) / len({*q.split()}) for q, p in pairs]
        if advance is not None:
            advance(len(pairs))
        return Judgements(self.slope * (np.array(shares, np.float32) - 0.5), None, num_truncated=0, num_tokens=0)


class Theirs(TeacherConfig, kind="overlap"):
    '''Words that query and passage share.'''

    slope: float = 4.0
    '''How much log-odds differ.'''

    def load(self, *, device=None, dtype=None):
        return Overlap(self.slope)
"""


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", JUDGE, TeacherConfig.kinds, {"overlap": "Theirs"}, monkeypatch)


@pytest.mark.usefixtures("judge")
def test_a_judge_of_another_package_judges_and_labels_and_is_tested(place: Path, tmp_path: Path) -> None:
    pair = ("judge", "green tea", "green leaves", "--teacher", "overlap:any")
    _, report = succeed_with_report(*pair, folder=tmp_path)
    assert report["result"]["judgements"][0]["log_odds"] == pytest.approx(0.0)
    (tmp_path / "overlap.toml").write_text('[teacher]\nkind = "overlap"\nslope = 8\n')
    _, report = succeed_with_report("judge", "tea", "tea", "--teacher", tmp_path / "overlap.toml", folder=tmp_path)
    assert report["result"]["judgements"][0]["log_odds"] == pytest.approx(4.0)

    text = (place / "tiny.toml").read_text()
    before, rest = text.split("[teacher]\n")
    recipe = tmp_path / "theirs.toml"
    recipe.write_text(f'{before}[teacher]\nkind = "overlap"\nslope = 2\n{rest[rest.index("[teacher_tuning]") :]}')
    recipe.write_text(recipe.read_text().replace("[teacher_tuning]\n", "[teacher_tuning]\nepochs = 0\n"))
    shown = " ".join(succeed("recipe", "check", recipe).output.split())
    assert "teacher.kind" in shown
    assert "teacher.slope" in shown
    arguments = (recipe, "--out", tmp_path / "run", "--dtype", "float32")
    succeed("mine", *arguments)
    _, report = succeed_with_report("gate", *arguments, folder=tmp_path)
    assert report["result"]["sets"][0]["name"] == "everyday"
    for teacher, is_another in (("overlap:other", False), (tmp_path / "overlap.toml", True)):  # slope is 2, then 8
        _, report = succeed_with_report("gate", *arguments, "--teacher", teacher, folder=tmp_path)
        assert (report["result"]["num_judged"] > 0) == is_another
    succeed("label", *arguments)
    key = {"teacher": "overlap-2.0", "prompt": "words-asymmetric"}
    store = LabelStore.open_for_reading(tmp_path / "run" / "labels", dataset="everyday", **key)
    for entry in read_plan(tmp_path / "run" / "plans" / "everyday").entries:
        log_odds = store.log_odds(entry.query_id)
        # A query is the first five words of its passage, so its words are all there.
        assert [log_odds[name] for name in entry.positives] == pytest.approx([1.0] * len(entry.positives))


@pytest.mark.usefixtures("judge")
def test_a_wrong_kind_or_setting_names_the_nearest(tmp_path: Path) -> None:
    recipe = tmp_path / "wrong.toml"
    for text, parts in (
        ('kind = "overlaps"', ["teacher: no kind of teacher 'overlaps'; did you mean 'overlap'?"]),
        ('kind = "overlap"\nslop = 2', ["unknown key 'teacher.slop'; did you mean 'slope'?"]),
        ("slope = 2", ["unknown key 'teacher.slope' of kind auto; it is a setting of kind overlap"]),
        (
            'kind = "overlap"\nmax_tokens = 99',
            ["'teacher.max_tokens' of kind overlap; it is a setting of kind auto,"],
        ),
    ):
        recipe.write_text(f"[teacher]\n{text}\n")
        fail("recipe", "check", recipe, containing=[str(recipe), *parts])
    schema = json.loads(succeed("recipe", "schema").stdout)
    assert '"overlap"' in json.dumps(schema["properties"]["teacher"])
    fail(
        "judge", "q", "p", "--teacher", "cosine:x", "--prompt", "short", containing=["kind cosine, which has no prompt"]
    )


def test_a_writer_of_another_package_expands_queries(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "site", WRITER, WriterConfig.kinds, {"theirs": "Theirs"}, monkeypatch)
    options = ("--expand", "hyde", "--writer", "theirs:any")
    _, report = succeed_with_report("search", index, SENTENCES[3], *options, folder=tmp_path)
    assert report["result"]["rankings"][0]["expansion"]["texts"] == [SENTENCES[3][::-1] + "?"]
    fail("search", index, "x", "--expand", "hyde", "--writer", "remote:m", containing=["writer.remote is missing"])
