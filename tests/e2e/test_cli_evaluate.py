"""``d2llm evaluate`` on real text with tiny models: its outputs, reuse of earlier measurements, and bad input."""

from __future__ import annotations

import json

import pytest

from d2llm.data.trec import read_run
from d2llm.models.student import Student
from e2e.command_line import fail, succeed, succeed_with_report, write_lines
from e2e.small_corpus import SENTENCES
from tiny_models import tiny_student_config

TEACHER = "teacher (reranking 3 of BM25 and D2LLM)"
QUICK = ("--teacher-queries", 2, "--teacher-depth", 3, "--dtype", "float32")


@pytest.fixture(scope="module")
def cosine(workspace, reports, tmp_path_factory):
    """A student in the role of the tuned cosine; it is not trained."""
    from d2llm.recipe import AutoPooling, InteractionConfig

    folder = tmp_path_factory.mktemp("cosine") / "cosine"
    changes = {"pooling": AutoPooling(), "interaction": InteractionConfig(head="cosine")}
    config = tiny_student_config(workspace / "encoder").model_copy(update=changes)
    Student.create(config, dtype="float32").save(folder)
    return folder


class Evaluated:
    """One run of ``d2llm evaluate`` with every kind of output."""

    def __init__(self, workspace, cosine, folder):
        self.folder = folder
        self.arguments = ("evaluate", workspace / "everyday", "--student", workspace / "run" / "student", *QUICK)
        self.arguments += ("--work", folder / "work", "--tuned-cosine", cosine)
        outputs = ("--html", folder / "r.html", "--markdown", folder / "r.md", "--save-runs", folder / "runs")
        result, self.written = succeed_with_report(*self.arguments, *outputs, folder=folder)
        self.printed = result.stdout
        self.result = self.written["result"]


@pytest.fixture(scope="module")
def evaluated(workspace, reports, cosine, tmp_path_factory):
    return Evaluated(workspace, cosine, tmp_path_factory.mktemp("evaluated"))


@pytest.fixture
def options(workspace, reports, tmp_path):
    """Options of the smallest evaluation: one student and no teacher."""
    student = ("--student", workspace / "run" / "student", "--no-teacher", "--dtype", "float32")
    return (*student, "--work", tmp_path / "work")


def values(result, name):
    (row,) = (row for row in result["rows"] if row["name"] == name)
    return {measure: estimate["value"] for measure, estimate in row["measures"].items()}


def test_reports_of_several_sets_in_one_table(evaluated, tmp_path):
    other = tmp_path / "other.json"
    report = json.loads(json.dumps(evaluated.written))
    report["result"]["dataset"] = "another set"
    other.write_text(json.dumps(report))
    (evaluated.folder / "everyday.json").write_text(json.dumps(evaluated.written))
    files = ("--markdown", tmp_path / "l.md", "--html", tmp_path / "l.html")
    result, written = succeed_with_report(
        "leaderboard", evaluated.folder / "everyday.json", other, *files, folder=tmp_path
    )
    assert "systems on 2 data sets" in result.stdout
    assert [one["name"] for one in written["result"]["sets"]] == ["everyday", "another set"]
    means = {row["name"]: row["means"]["nDCG@10"] for row in written["result"]["rows"]}
    assert means["BM25"] == {"value": 1.0, "num_sets": 2}
    assert "another set" in (tmp_path / "l.md").read_text()
    assert "another set" in (tmp_path / "l.html").read_text()


def test_the_rows_are_printed_and_written(evaluated):
    result = evaluated.result
    assert [row["name"] for row in result["rows"]] == [
        "BM25",
        "hybrid: BM25 + cosine, untuned",
        "hybrid: BM25 + D2LLM",
        "fitted sum: BM25 + cosine, tuned",
        "cosine, untuned",
        "cosine, tuned",
        "cosine, D2LLM vectors",
        "D2LLM",
        "D2LLM, weights fitted here",
        TEACHER,
    ]
    assert values(result, "BM25")["nDCG@10"] == 1.0  # each query is the beginning of its sentence
    assert (result["kind"], result["num_items"], result["num_passages"]) == ("retrieval", 4, 60)
    assert result["baseline"] == "cosine, tuned"
    assert [row["num_items"] for row in result["sample_rows"]] == [2] * 10
    assert result["report_version"] == 2
    assert evaluated.written["arguments"]["teacher_depth"] == 3
    for row in result["rows"]:
        assert row["cost"]["total"]["p50"] <= row["cost"]["total"]["p95"]
        for estimate in row["measures"].values():
            assert 0 <= estimate["low"] <= estimate["value"] <= estimate["high"] <= 1
    for text in ("BM25", "1.0000", "D2LLM", "everyday / test, 4 queries, 60 passages", "Cost, one at a time"):
        assert text in evaluated.printed
    assert "significantly better" in evaluated.printed


def test_a_missing_row_says_how_to_get_it(evaluated):
    (missing,) = evaluated.result["missing"]
    assert missing["name"] == "D2LLM, paper head"
    assert missing["reason"].endswith("train it: d2llm distill RECIPE --variant paper")
    assert "not measured" in evaluated.printed


def test_the_html_and_the_markdown_contain_the_figures(evaluated):
    page, markdown = ((evaluated.folder / name).read_text(encoding="utf-8") for name in ("r.html", "r.md"))
    ours = f"{values(evaluated.result, 'D2LLM')['nDCG@10']:.4f}"
    assert page.lstrip().lower().startswith("<!doctype html")
    assert "<svg" in page
    for text in (page, markdown):
        assert ours in text
        assert "cosine, tuned" in text
        assert "--variant paper" in text
    assert evaluated.result["provenance"]["student"]["fingerprint"] in page
    ours, theirs = (values(evaluated.result, name)["nDCG@10"] for name in ("D2LLM", "cosine, tuned"))
    # The page quotes wins and losses, but four queries may have none.
    assert any(sentence[:40] in page for sentence in SENTENCES) == (ours != theirs)


def test_evaluating_saved_runs_gives_the_same_figures(evaluated, workspace, options):
    runs = sorted((evaluated.folder / "runs").iterdir())
    assert {path.stem for path in runs} >= {"BM25", "D2LLM", "hybrid-BM25-D2LLM", "cosine-tuned"}
    assert len(runs) == 10
    run_options = [argument for path in runs for argument in ("--run", path)]
    _, report = succeed_with_report("evaluate", workspace / "everyday", *options, *run_options, folder=evaluated.folder)
    names = {path.stem: read_run(path).name for path in runs}
    names |= {name: f"{name} (run)" for name in ("BM25", "D2LLM")}
    for row in evaluated.result["rows"][:-1]:
        stem = row["name"].replace(": ", "-").replace(" + ", "-").replace(", ", "-").replace(" ", "-")
        assert values(report["result"], names[stem]) == pytest.approx(values(evaluated.result, row["name"]))
    teacher_runs = [path.stem for path in runs if path.stem.startswith("teacher")]
    assert len(read_run(evaluated.folder / "runs" / f"{teacher_runs[0]}.run").rankings) == 2
    assert f"{teacher_runs[0]}: 2 queries not in the run, counted as 0" in report["result"]["notes"]


def test_existing_labels_and_indexes_are_used(evaluated, tmp_path, monkeypatch):
    from d2llm.models.teachers.causal import CausalTeacher

    batch_sizes, score_pairs = [], CausalTeacher.score_pairs
    monkeypatch.setattr(
        CausalTeacher,
        "score_pairs",
        lambda self, pairs, task: (batch_sizes.append(len(pairs)), score_pairs(self, pairs, task))[1],
    )
    (store,) = (evaluated.folder / "work" / "labels").iterdir()
    indexes = [option for index in (evaluated.folder / "work" / "indexes").iterdir() for option in ("--index", index)]
    result = succeed(*evaluated.arguments, "--work", tmp_path / "work", "--labels", store, *indexes)
    assert batch_sizes == [3, 3, 3]  # only to measure its time: two queries, the first of them twice
    assert not (tmp_path / "work" / "labels").exists()
    assert not (tmp_path / "work" / "indexes").exists()
    assert "was not searched" not in result.stdout


def write_pairs(folder):
    """Pair the first words of a sentence with the rest of the same one (label 1) or of another one (label 0)."""
    folder.mkdir()
    for split, start in (("dev", 0), ("test", 30)):
        records = []
        for n in range(start, start + 30):
            words, other = SENTENCES[n].split(), SENTENCES[(n + 7) % 60].split()
            same = n % 2 == 0
            records.append(
                {"query": " ".join(words[:5]), "document": " ".join((words if same else other)[2:]), "label": int(same)}
            )
        write_lines(folder / f"{split}.jsonl", records)
    return folder


def test_pairs(options, tmp_path, monkeypatch):
    monkeypatch.setattr("d2llm.evaluation.pairs.NUM_RESAMPLES", 200)  # the default, 2,000, takes most of the time
    data = write_pairs(tmp_path / "halves")
    outputs = ("--html", tmp_path / "r.html", "--markdown", tmp_path / "r.md")
    result, report = succeed_with_report("evaluate", data, *options, "--task", "symmetric", *outputs, folder=tmp_path)
    evaluation = report["result"]
    assert (evaluation["kind"], evaluation["num_items"], evaluation["main_measure"]) == ("pairs", 30, "AP")
    assert values(evaluation, "BM25")["AP"] == 1.0  # a sentence shares words with itself
    assert set(values(evaluation, "D2LLM")) == {"accuracy", "F1", "AP", "AUC"}
    assert "halves / test, 30 pairs" in " ".join(result.stdout.split())
    assert "it was left out" in " ".join(row["reason"] for row in evaluation["missing"])
    assert "<svg" in (tmp_path / "r.html").read_text(encoding="utf-8")
    arguments = ("evaluate", data, *options, "--save-runs", tmp_path / "runs")
    fail(*arguments, containing=["--save-runs", "single pairs, which have no rankings"])
