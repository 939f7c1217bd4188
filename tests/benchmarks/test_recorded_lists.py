"""Plans of recorded lists: alone, and beside what was mined."""

from __future__ import annotations

from pathlib import Path

import pytest
from recorded_judge import RECORDED, read_graded_lists
from recorded_lists import Part, make_run

from d2llm import Run
from d2llm.data.beir import read_beir
from d2llm.data.labels import LabelStore
from d2llm.data.plan import PlanEntry, read_plan, write_plan
from d2llm.models.teachers.pair_teacher import identify_teacher

RECIPE = """
name = "beside"
[student.backbone]
model = "minilm"
[teacher]
model = "recorded"
kind = "graded"
recorded = { lists = "benchmarks/judgements" }
[[data]]
path = "covidqa"
task = "asymmetric"
[[data]]
path = "pubmedqa"
task = "asymmetric"
"""


@pytest.fixture
def run(shared_data: Path, tmp_path: Path) -> Run:
    """A run of one data set with lists and one without, mined: one hard negative for each train query."""
    recipe = tmp_path / "beside.toml"
    recipe.write_text(RECIPE, encoding="utf-8")
    run = Run(recipe, tmp_path / "run", data=str(shared_data), recorded=RECORDED)
    for data in run.recipe.data:
        name = Path(data.path).name
        dataset = read_beir(shared_data / name, splits=["train", "dev"])
        positives = dataset.positives("train")
        entries = [
            PlanEntry(query, tuple(sorted(own)), (next(p for p in dataset.passages if p not in own),), ())
            for query, own in sorted(positives.items())
        ]
        write_plan(run.folder.plan(data), entries, {"dataset": name, "split": "train", "report": {}})
    return run


def plans(run: Run) -> list[tuple[PlanEntry, ...]]:
    return [read_plan(run.folder.plan(data)).entries for data in run.recipe.data]


def test_an_interrupted_call_keeps_what_was_mined(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: Run) -> None:
        raise KeyboardInterrupt

    mined = plans(run)
    monkeypatch.setattr(Run, "label", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_run(run, Part(queries=50), beside=True)
    assert plans(run) == mined


def test_mined_queries_without_a_list_stay_beside_the_lists(run: Run) -> None:
    lists = {each.query_id: each for each in read_graded_lists("covidqa") if each.split == "train"}
    mined = dict(zip(("covidqa", "pubmedqa"), plans(run), strict=True))
    report = make_run(run, Part(queries=50), beside=True)
    assert report.queries == 50  # pubmedqa has no lists: nothing of it is labelled
    covidqa, pubmedqa = plans(run)
    assert pubmedqa == mined["pubmedqa"]
    assert [entry.query_id for entry in covidqa] == [entry.query_id for entry in mined["covidqa"]]
    before = {entry.query_id: entry for entry in mined["covidqa"]}
    changed = [entry for entry in covidqa if entry != before[entry.query_id]]
    assert len(changed) == 50
    assert all({*entry.positives, *entry.hard_negatives} == {*lists[entry.query_id].passages} for entry in changed)
    identity = identify_teacher(run.recipe.teacher)
    store = LabelStore(
        run.folder.labels, teacher=identity.fingerprint, prompt=identity.prompts["asymmetric"], dataset="covidqa"
    )
    assert {*store.query_ids} == {entry.query_id for entry in changed}
    assert not any(store.missing(entry.query_id, entry.passage_ids) for entry in changed)
