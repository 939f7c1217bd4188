"""The rows of an evaluation that make a search cheaper or ask more of it, each beside the student without them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from d2llm.core.errors import FilterError, InputError
from d2llm.core.types import Query
from d2llm.data.beir import read_beir
from d2llm.data.pairs import PairDataset
from d2llm.ops.measures import per_query_measures
from d2llm.retrieval import build_ann as building
from fake_models import FakeStudent, FakeTeacher
from tiny_evaluations import everyone, figures, make_words, measure

NO_SHORTCUTS = {"teacher_depth": 5, "teacher_queries": 6}


@pytest.fixture(scope="module")
def words():
    """Random texts; the dev queries are the first words of passages."""
    dataset = make_words()
    texts = [passage.text for passage in list(dataset.passages.values())[60:75]]
    dev = {f"d{n:02}": Query(f"d{n:02}", " ".join(text.split()[:2])) for n, text in enumerate(texts)}
    qrels = {"dev": {name: {f"p{60 + n:03}": 1} for n, name in enumerate(dev)}}
    return replace(dataset, queries=dataset.queries | dev, qrels=dataset.qrels | qrels)


@pytest.fixture
def on_disk(words, tmp_path):
    """The same with metadata: the year is the passage's number."""
    folder = tmp_path / "words"
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": p.id, "text": p.text, "year": int(p.id[1:])} for p in words.passages.values()]
    queries = [{"_id": query.id, "text": query.text} for query in words.queries.values()]
    for name, records in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    for split, judged in words.qrels.items():
        lines = [f"{q}\t{p}\t{grade}" for q, grades in judged.items() for p, grade in grades.items()]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]))
    return read_beir(folder)


def rows_of(report):
    return {row.name: row for row in report.rows}


def test_nothing_is_measured_that_was_not_asked_for(words):
    report = measure(words, everyone(), **NO_SHORTCUTS)
    assert [row.name for row in report.rows if row.kind == "shortcut"] == []


def test_the_exact_search_finds_what_enough_candidates_find(words):
    report = measure(words, everyone(), exact=True, num_candidates=130, **NO_SHORTCUTS)
    rows = rows_of(report)
    assert figures(rows["D2LLM, exact"]) == pytest.approx(figures(rows["D2LLM"]))
    assert report.details.rankings["D2LLM, exact"].keys() == report.details.rankings["D2LLM"].keys()


def test_a_head_without_inner_product_has_no_exact_row(words):
    report = measure(words, everyone(student=FakeStudent(head="paper")), exact=True, **NO_SHORTCUTS)
    assert "D2LLM, exact" not in rows_of(report)
    assert "always exact" in next(row.reason for row in report.missing if row.name == "D2LLM, exact")


def test_approximate_candidates_are_refused_where_they_do_not_pay(words):
    report = measure(words, everyone(), ann_recall=0.9, **NO_SHORTCUTS)
    (missing,) = [row for row in report.missing if row.name == "D2LLM, approximate (0.9)"]
    assert "below 20,000 the exact scan is faster" in missing.reason


def test_approximate_candidates_are_tuned_on_other_queries(words, monkeypatch):
    given = []

    def noted(store, student, *, queries, **options):
        given.extend(queries)
        raise InputError("stop here")

    monkeypatch.setattr("d2llm.evaluation.shortcuts.build_ann", noted)
    measure(words, everyone(), ann_recall=0.9, num_candidates=20, **NO_SHORTCUTS)
    assert sorted(given) == sorted(words.queries[name].text for name in words.qrels["dev"])


def test_approximate_candidates_where_they_do(words, monkeypatch):
    monkeypatch.setattr(building, "MIN_PASSAGES", 1)
    monkeypatch.setattr("d2llm.store.ann.AnnSearch.num_probes", lambda self, anchor, top_k: 5)
    settings = {"ann_recall": 0.5, "num_candidates": 20} | NO_SHORTCUTS
    report = measure(words, everyone(), **settings)
    row = rows_of(report)["D2LLM, approximate (0.5)"]
    assert row.kind == "shortcut"
    assert row.num_items == rows_of(report)["D2LLM"].num_items
    assert 0 < figures(row)["nDCG@10"] <= 1


def test_a_cascade_reads_on_the_sample_and_learns_from_other_queries(words):
    teacher = FakeTeacher()
    report = measure(words, everyone(teacher=teacher), cascade_passages=4, **NO_SHORTCUTS)
    rows = rows_of(report)
    row = rows["D2LLM, teacher reads 4 again"]
    assert row.num_items == rows["teacher (reranking 5 of BM25 and D2LLM)"].num_items == 6
    dev = {words.queries[name].text for name in words.qrels["dev"]}
    assert dev <= {query for query, _ in teacher.pairs}
    sample = {one.name: figures(one) for one in report.sample_rows}
    assert sample[row.name] == pytest.approx(figures(row))
    assert row.name not in report.details.values


def test_a_cascade_without_a_teacher_or_other_queries(words):
    without = measure(words, everyone(teacher=None), cascade_passages=4, **NO_SHORTCUTS)
    only_test = measure(
        replace(words, qrels={"test": words.qrels["test"]}), everyone(), cascade_passages=4, **NO_SHORTCUTS
    )
    for report, reason in ((without, "no teacher was given"), (only_test, "no other split")):
        (missing,) = [row for row in report.missing if row.name == "D2LLM, teacher reads 4 again"]
        assert reason in missing.reason


def test_a_filter_before_the_choice_and_afterwards(on_disk):
    condition = "year < 40"
    report = measure(on_disk, everyone(), filter=condition, num_candidates=10, **NO_SHORTCUTS)
    rows = rows_of(report)
    before, afterwards = rows[f"D2LLM WHERE {condition}"], rows[f"D2LLM, WHERE {condition} afterwards"]
    qrels = {
        query: {p: grade for p, grade in grades.items() if int(p[1:]) < 40}
        for query, grades in on_disk.qrels["test"].items()
    }
    qrels = {query: grades for query, grades in qrels.items() if max(grades.values(), default=0) > 0}
    assert 0 < len(qrels) < len(on_disk.qrels["test"])
    rankings = report.details.rankings
    for row in (before, afterwards):
        assert row.num_items == len(qrels) == len(rankings[row.name])
        found = {query: [p for p, _ in rankings[row.name][query]] for query in qrels}
        assert all(int(p[1:]) < 40 for ids in found.values() for p in ids)
        expected = per_query_measures(found, qrels)["nDCG@10"]
        assert figures(row)["nDCG@10"] == pytest.approx(sum(expected.values()) / len(expected))
    # Of 130 passages 40 fit: all are ranked, where afterwards only those among the first hundred are left.
    assert all(len(ranking) == 40 for ranking in rankings[before.name].values())
    assert any(len(ranking) < 40 for ranking in rankings[afterwards.name].values())
    assert any("40 of 130 passages match" in note for note in report.notes)
    assert not {before.name, afterwards.name} & {comparison.row for comparison in report.comparisons}


@pytest.mark.parametrize(
    ("condition", "error", "message"),
    [("yeer < 40", FilterError, "yeer"), ("year > 1000", InputError, "no relevant passage .* 0 of 130 passages")],
)
def test_filters_that_cannot_be_measured(on_disk, condition, error, message):
    with pytest.raises(error, match=message):
        measure(on_disk, everyone(), filter=condition, **NO_SHORTCUTS)


def test_what_was_measured_is_not_measured_again(on_disk, tmp_path):
    settings = {"exact": True, "cascade_passages": 4, "filter": "year < 40"} | NO_SHORTCUTS
    first = measure(on_disk, everyone(), tmp_path / "work", **settings)
    again = everyone(student=FakeStudent(fail_after=0), teacher=FakeTeacher(fail_after=0))
    second = measure(on_disk, again, tmp_path / "work", **settings)
    assert [figures(row) for row in second.rows] == [figures(row) for row in first.rows]
    assert [row.name for row in second.rows] == [row.name for row in first.rows]


@pytest.mark.parametrize("wrong", [{"ann_recall": 0.0}, {"ann_recall": 1.5}, {"cascade_passages": 0}])
def test_settings_out_of_range(words, wrong):
    (name,) = wrong
    with pytest.raises(InputError, match=name):
        measure(words, everyone(), **wrong)


def test_pairs_have_no_searches():
    pairs = PairDataset("p", Path("p"), "scores", (), {"test": ()}, ())
    with pytest.raises(InputError, match=r"single pairs.*leave exact, filter out"):
        measure(pairs, everyone(), exact=True, filter="year = 1")
