"""Plans of recorded lists: alone, and beside what was mined."""

from __future__ import annotations

from pathlib import Path

from recorded_judge import RECORDED, read_graded_lists
from recorded_lists import Part, make_run

from d2llm import Run
from d2llm.data.beir import read_beir
from d2llm.data.plan import PlanEntry, read_plan, write_plan

RECIPE = """
name = "beside"
[student.backbone]
model = "minilm"
[teacher]
model = "recorded"
kind = "graded"
recorded = { lists = "benchmarks/judgements" }
[losses]
feature_imitation = 0.0
[training]
unlabelled = "own_labels"
[[data]]
path = "covidqa"
task = "asymmetric"
[[data]]
path = "pubmedqa"
task = "asymmetric"
"""


def test_mined_queries_without_a_list_stay_beside_the_lists(shared_data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "beside.toml"
    recipe.write_text(RECIPE, encoding="utf-8")
    run = Run(recipe, tmp_path / "run", data=str(shared_data), recorded=RECORDED)
    lists = {each.query_id: each for each in read_graded_lists("covidqa") if each.split == "train"}
    mined: dict[str, list[PlanEntry]] = {}
    for data in run.recipe.data:
        name = Path(data.path).name
        dataset = read_beir(shared_data / name, splits=["train", "dev"])
        positives = dataset.positives("train")
        mined[name] = [
            PlanEntry(query, tuple(sorted(positives[query])), (next(p for p in dataset.passages if p not in own),), ())
            for query in sorted(positives)
            for own in [set(positives[query])]
        ]
        write_plan(run.parts.plan(data), mined[name], {"dataset": name, "split": "train", "report": {}})

    report = make_run(run, Part(queries=50), beside=True)
    assert report.queries == 50  # pubmedqa has no lists: nothing of it is labelled
    covidqa, pubmedqa = (read_plan(run.parts.plan(data)).entries for data in run.recipe.data)
    assert list(pubmedqa) == mined["pubmedqa"]
    assert [entry.query_id for entry in covidqa] == [entry.query_id for entry in mined["covidqa"]]
    before = {entry.query_id: entry for entry in mined["covidqa"]}
    changed = [entry for entry in covidqa if entry != before[entry.query_id]]
    assert len(changed) == 50
    assert all({*entry.positives, *entry.hard_negatives} == {*lists[entry.query_id].passages} for entry in changed)
