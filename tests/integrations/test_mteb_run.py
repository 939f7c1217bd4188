"""Data sets on disk as tasks of mteb, run by the command line with a student's whole score."""

from __future__ import annotations

import json

import pytest

from d2llm.core.errors import DataFormatError, InputError
from late_import import late_import
from tiny_models import TEXTS, write_trained_student

mteb = late_import("mteb", reason="needs mteb: pip install 'd2llm[mteb]' (Python 3.11 or newer)")
data = late_import("d2llm.integrations.mteb_run")
runs = late_import("d2llm.integrations.mteb_run")


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of data sets: passages with queries, yes-or-no pairs, scores, and texts with labels."""
    root = tmp_path_factory.mktemp("sets")
    write_lines(root / "faq/corpus.jsonl", [{"_id": f"p{n}", "title": "", "text": t} for n, t in enumerate(TEXTS)])
    write_lines(root / "faq/queries.jsonl", [{"_id": f"q{n}", "text": t} for n, t in enumerate(TEXTS[:4])])
    (root / "faq/qrels").mkdir()
    lines = [f"q{n}\tp{n}\t1" for n in range(4)]
    (root / "faq/qrels/test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")
    pairs = [(TEXTS[n % 4], TEXTS[n % 7], n % 4 == n % 7) for n in range(16)]
    write_lines(root / "pairs/test.jsonl", [{"query": q, "document": d, "label": int(same)} for q, d, same in pairs])
    write_lines(
        root / "scores/test.jsonl",
        [{"query": q, "document": d, "score": 5.0 * same + n / 16} for n, (q, d, same) in enumerate(pairs)],
    )
    texts = [{"text": f"{TEXTS[n % 4]} {n}", "label": f"intent {n % 4}"} for n in range(40)]
    for split in ("train", "test"):
        write_lines(root / f"intents/{split}.jsonl", texts)
    return root


def test_every_kind_of_task_is_measured_and_kept_as_mteb_keeps_it(folder, tmp_path):
    student = write_trained_student(tmp_path / "student")
    names = ["faq", "pairs", "Reranking=pairs", "scores", "intents", "Clustering=intents"]
    tasks = [f"{kind}{mark}{folder / name}" for kind, mark, name in (one.rpartition("=") for one in names)]
    report = runs.run_mteb(student, tasks=tasks, out=tmp_path / "results", symmetric=["faq"], device="cpu")
    assert [(row.task, row.type, row.measure) for row in report.rows] == [
        ("faq", "Retrieval", "ndcg_at_10"),
        ("pairs", "PairClassification", "max_ap"),
        ("pairs-Reranking", "Reranking", "map_at_1000"),
        ("scores", "STS", "cosine_spearman"),
        ("intents", "Classification", "accuracy"),
        ("intents-Clustering", "Clustering", "v_measure"),
    ]
    values = {row.task: row.value for row in report.rows}
    assert values["faq"] == 1.0  # each query is a passage
    assert values["pairs-Reranking"] == 1.0
    assert values["intents"] > 0.9  # the training texts are the test texts
    stored = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results").rglob("*.json")}
    assert stored["faq"]["scores"]["test"][0]["main_score"] == 1.0
    assert stored["faq"]["mteb_version"] == report.mteb
    assert stored["model_meta"]["revision"] == report.revision
    loaded = mteb.ResultCache(tmp_path / "results").load_results(include_remote=False, load_experiments="match_name")
    found = [(model, result) for model in loaded.model_results for result in model.task_results]
    assert {result.task_name: result.get_score() for _, result in found} == pytest.approx(values)
    assert {model.model_revision for model, _ in found} == {report.revision}
    again = runs.run_mteb(student, tasks=tasks[:1], out=tmp_path / "results", symmetric=["faq"], device="cpu")
    assert again.rows == report.rows[:1]  # to the second: it was not run again


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("STS={}/faq", "cannot be a task of type STS; it can be Retrieval or Reranking"),
        ("STS={}/pairs", "has classes, not scores"),
        ("Reranking={}/faq", "nothing to rerank"),
        ("Retrieval={}/intents", "it can be Classification or Clustering"),
        ("Retrieval={}/nowhere", "no such file or folder"),
    ],
)
def test_a_set_that_cannot_be_such_a_task_says_what_it_can_be(folder, name, problem):
    kind, path = data.parse_task(name.format(folder))
    with pytest.raises(DataFormatError, match=problem):
        data.task_of_data(path, kind=kind)


def test_names_that_nothing_has(folder, tmp_path):
    faq = str(folder / "faq")
    for arguments, problem in (
        ({"tasks": ["NFCorpu"]}, "did you mean 'NFCorpus'"),
        ({"benchmark": "MTEB(eng, v9)"}, r"did you mean 'MTEB\(eng, v"),
        ({}, "no tasks"),
        ({"tasks": [faq], "symmetric": ["fag"]}, "'fag' is not among the tasks; did you mean 'faq'"),
        ({"tasks": [faq, faq]}, "two of the tasks are called 'faq'"),
    ):
        with pytest.raises(InputError, match=problem):
            runs.run_mteb("d2llm-minilm", out=tmp_path, **arguments)


def test_a_task_that_cannot_be_downloaded(tmp_path, monkeypatch):
    def evaluate(*_, **__):
        raise ConnectionError("Couldn't reach 'mteb/scidocs' on the Hub")

    monkeypatch.setattr("mteb.evaluate", evaluate)
    with pytest.raises(InputError, match="reach 'mteb/scidocs' on the Hub; mteb's own tasks are downloaded once"):
        runs.run_mteb("d2llm-minilm", tasks=["SCIDOCS"], out=tmp_path)


def test_chinese_is_told(tmp_path):
    write_lines(
        tmp_path / "zh/test.jsonl", [{"query": "怎么还款", "document": "如何偿还贷款", "label": n} for n in (0, 1)]
    )
    assert data.task_of_data(tmp_path / "zh").metadata.eval_langs == ["zho-Hans"]
    assert data.task_of_data(tmp_path / "zh", language="zho-Hant").metadata.eval_langs == ["zho-Hant"]
