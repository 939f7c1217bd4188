"""Rows for search options (exact, approximate, reranker, filter), compared with the plain student."""

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
from d2llm.retrieval.reranker import OpenReranker, Reranker
from fake_models import FakeStudent, FakeTeacher
from tiny_evaluations import everyone, figures, make_words, measure, with_indexes_of

NO_SHORTCUTS = {"teacher_depth": 5, "teacher_queries": 6}


@pytest.fixture(scope="module")
def words():
    """Random texts; each dev query consists of a passage's first two words."""
    dataset = make_words()
    texts = [passage.text for passage in list(dataset.passages.values())[60:75]]
    dev = {f"d{n:02}": Query(f"d{n:02}", " ".join(text.split()[:2])) for n, text in enumerate(texts)}
    qrels = {"dev": {name: {f"p{60 + n:03}": 1} for n, name in enumerate(dev)}}
    return replace(dataset, queries=dataset.queries | dev, qrels=dataset.qrels | qrels)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A work folder in which these tests reuse each other's results."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture
def without_results(work, tmp_path):
    """A work folder that holds indexes only."""
    return with_indexes_of(work, tmp_path / "work")


@pytest.fixture(scope="module")
def on_disk(words, tmp_path_factory):
    """The same data set on disk, with metadata: the year is the passage's number."""
    folder = tmp_path_factory.mktemp("data") / "words"
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


def test_no_shortcuts_are_measured_by_default(words, work):
    report = measure(words, everyone(), work, **NO_SHORTCUTS)
    assert [row.name for row in report.rows if row.kind == "shortcut"] == []


def test_exact_search_equals_search_with_enough_candidates(words, work):
    report = measure(words, everyone(), work, exact=True, num_candidates=130, **NO_SHORTCUTS)
    rows = rows_of(report)
    assert figures(rows["D2LLM, exact"]) == pytest.approx(figures(rows["D2LLM"]))
    assert report.details.rankings["D2LLM, exact"].keys() == report.details.rankings["D2LLM"].keys()


def test_a_head_without_an_inner_product_has_no_exact_row(words, work):
    paper = FakeStudent(fingerprint="own paper", head="paper")
    report = measure(words, everyone(student=paper), work, exact=True, **NO_SHORTCUTS)
    assert "D2LLM, exact" not in rows_of(report)
    assert "always exact" in next(row.reason for row in report.missing if row.name == "D2LLM, exact")


def test_approximate_search_is_refused_for_small_corpora(words, work):
    report = measure(words, everyone(), work, ann_recall=0.9, **NO_SHORTCUTS)
    (missing,) = [row for row in report.missing if row.name == "D2LLM, approximate (0.9)"]
    assert "below 20,000 the exact scan is faster" in missing.reason


def test_approximate_search_is_tuned_on_dev_queries(words, work, monkeypatch):
    tuning_queries = []

    def record_queries(store, student, *, queries, **options):
        tuning_queries.extend(queries)
        raise InputError("stop here")

    monkeypatch.setattr("d2llm.evaluation.shortcuts.build_ann", record_queries)
    measure(words, everyone(), work, ann_recall=0.9, num_candidates=20, **NO_SHORTCUTS)
    assert sorted(tuning_queries) == sorted(words.queries[name].text for name in words.qrels["dev"])


def test_approximate_search_gets_a_row(words, without_results, monkeypatch):
    monkeypatch.setattr(building, "MIN_PASSAGES", 1)
    monkeypatch.setattr("d2llm.store.ann.MAX_EFFORT", 1.0)
    monkeypatch.setattr(building, "MAX_EFFORT", 1.0)
    settings = {"ann_recall": 0.5, "num_candidates": 20} | NO_SHORTCUTS
    report = measure(words, everyone(), without_results, **settings)
    row = rows_of(report)["D2LLM, approximate (0.5)"]
    assert row.kind == "shortcut"
    assert row.num_items == rows_of(report)["D2LLM"].num_items
    assert 0 < figures(row)["nDCG@10"] <= 1


@pytest.fixture
def cascade(tmp_path):
    (tmp_path / "cascade.toml").write_text('kind = "cascade"\nnum_passages = 4\n')
    return str(tmp_path / "cascade.toml")


def test_a_cascade_is_fitted_on_dev_and_run_on_the_sample(words, without_results, cascade):
    teacher = FakeTeacher()
    report = measure(words, everyone(teacher=teacher), without_results, reranker=cascade, **NO_SHORTCUTS)
    rows = rows_of(report)
    row = rows["D2LLM, reranker cascade"]
    assert row.num_items == rows["teacher (reranking 5 of BM25 and D2LLM)"].num_items == 6
    dev = {words.queries[name].text for name in words.qrels["dev"]}
    assert dev <= {query for query, _ in teacher.pairs}
    sample = {sample_row.name: figures(sample_row) for sample_row in report.sample_rows}
    assert sample[row.name] == pytest.approx(figures(row))
    assert row.name not in report.details.values


def test_a_teacher_that_reorders_needs_no_other_split(words, work):
    teacher = FakeTeacher()
    only_test = replace(words, qrels={"test": words.qrels["test"]})
    report = measure(only_test, everyone(teacher=teacher), work, reranker="teacher", **NO_SHORTCUTS)
    row = rows_of(report)["D2LLM, reranker teacher"]
    assert row.num_items == 6
    assert {query for query, _ in teacher.pairs} <= {words.queries[name].text for name in words.qrels["test"]}


def test_a_reranker_without_a_teacher(words, without_results, monkeypatch):
    monkeypatch.setattr(Reranker.kinds, "_classes", {**Reranker.kinds._classes})

    class Reversed(Reranker, kind="reversed"):
        def open(self, *, device=None, dtype=None):
            return OpenReversed(self)

    class OpenReversed(OpenReranker):
        def rerank(self, query, candidates):
            return -candidates.scores

    report = measure(words, everyone(teacher=None), without_results, reranker="reversed", **NO_SHORTCUTS)
    rows = rows_of(report)
    assert figures(rows["D2LLM, reranker reversed"]) != figures(rows["D2LLM"])


def test_a_cascade_needs_a_teacher_and_another_split(words, work, cascade):
    without = measure(words, everyone(teacher=None), work, reranker=cascade, **NO_SHORTCUTS)
    only_test = measure(
        replace(words, qrels={"test": words.qrels["test"]}), everyone(), work, reranker=cascade, **NO_SHORTCUTS
    )
    for report, reason in ((without, "no teacher was given"), (only_test, "no other split")):
        (missing,) = [row for row in report.missing if row.name == "D2LLM, reranker cascade"]
        assert reason in missing.reason


def test_filtering_before_and_after_the_search(on_disk, work):
    condition = "year < 40"
    report = measure(on_disk, everyone(), work, filter=condition, num_candidates=10, **NO_SHORTCUTS)
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
        ranked_ids = {query: [p for p, _ in rankings[row.name][query]] for query in qrels}
        assert all(int(p[1:]) < 40 for ids in ranked_ids.values() for p in ids)
        expected = per_query_measures(ranked_ids, qrels)["nDCG@10"]
        assert figures(row)["nDCG@10"] == pytest.approx(sum(expected.values()) / len(expected))
    # 40 of 130 passages match: filtering first ranks them all, filtering afterwards only those in the top 100.
    assert all(len(ranking) == 40 for ranking in rankings[before.name].values())
    assert any(len(ranking) < 40 for ranking in rankings[afterwards.name].values())
    assert any("40 of 130 passages match" in note for note in report.notes)
    assert not {before.name, afterwards.name} & {comparison.row for comparison in report.comparisons}


@pytest.mark.parametrize(
    ("condition", "error", "message"),
    [("yeer < 40", FilterError, "yeer"), ("year > 1000", InputError, "no relevant passage .* 0 of 130 passages")],
)
def test_unusable_filters_are_rejected(on_disk, work, condition, error, message):
    with pytest.raises(error, match=message):
        measure(on_disk, everyone(), work, filter=condition, **NO_SHORTCUTS)


def test_an_instruction_is_put_before_each_query(words, without_results):
    report = measure(words, everyone(), without_results, instruction="Find: ", **NO_SHORTCUTS)
    ranked = report.details.rankings
    assert ranked["D2LLM, with an instruction"] != ranked["D2LLM"]
    prefixed = replace(
        words, queries={name: replace(query, text=f"Find: {query.text}") for name, query in words.queries.items()}
    )
    by_hand = measure(prefixed, everyone(), without_results, **NO_SHORTCUTS)
    assert ranked["D2LLM, with an instruction"] == by_hand.details.rankings["D2LLM"]
    other = measure(words, everyone(), without_results, instruction="Seek: ", **NO_SHORTCUTS)
    assert other.details.rankings["D2LLM, with an instruction"] != ranked["D2LLM, with an instruction"]


def test_measured_shortcuts_are_reused(on_disk, without_results, cascade):
    settings = {"exact": True, "reranker": cascade, "filter": "year < 40"} | NO_SHORTCUTS
    first = measure(on_disk, everyone(), without_results, **settings)
    failing = everyone(student=FakeStudent(fail_after=0), teacher=FakeTeacher(fail_after=0))
    second = measure(on_disk, failing, without_results, **settings)
    assert [figures(row) for row in second.rows] == [figures(row) for row in first.rows]
    assert [row.name for row in second.rows] == [row.name for row in first.rows]


@pytest.mark.parametrize("setting", [{"ann_recall": 0.0}, {"ann_recall": 1.5}])
def test_settings_out_of_range_are_rejected(words, setting):
    (name,) = setting
    with pytest.raises(InputError, match=name):
        measure(words, everyone(), **setting)


def test_pairs_do_not_support_shortcuts():
    pairs = PairDataset("p", Path("p"), "scores", (), {"test": ()}, ())
    with pytest.raises(InputError, match=r"single pairs.*leave exact, filter out"):
        measure(pairs, everyone(), exact=True, filter="year = 1")
