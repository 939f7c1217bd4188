"""``d2llm evaluate`` on retrieval sets: every figure recomputed from the rankings or the fake models."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from io import StringIO
from math import log2
from statistics import fmean

import numpy as np
import pytest
from ir_measures import Success
from rich.console import Console

from d2llm.evaluation.contenders import Contenders
from d2llm.evaluation.report import Cost
from d2llm.evaluation.systems import lexical_system
from d2llm.ops.measures import MEASURES, Measure
from d2llm.ops.significance import bootstrap_interval, holm, paired_randomisation
from d2llm.reports.evaluation_tables import evaluation_document, evaluation_tables
from d2llm.reports.html import render_html
from d2llm.retrieval.cosine import CosineStudent
from fake_models import FakeStudent, FakeTeacher
from tiny_evaluations import PASSAGES, QRELS, QUERIES, everyone, figures, make_dataset, make_words, measure, run

TEACHER = "teacher (reranking 50 of BM25 and D2LLM)"
FUSION, FUSION_UNTUNED = "hybrid: BM25 + D2LLM", "hybrid: BM25 + cosine, untuned"
FITTED = "fitted sum: BM25 + cosine, tuned"
FITTED_STUDENT = "D2LLM, weights fitted here"
NOT_BY_VECTORS = ("bm25", "hybrid", "fitted_sum", "fitted_student", "teacher")


@pytest.fixture(autouse=True)
def few_permutations(monkeypatch):
    """Speeds up tests that do not check p-values; module-scoped reports are made before this applies."""
    monkeypatch.setattr("d2llm.evaluation.figures.NUM_PERMUTATIONS", 100)


def values_of(ranking, grades):
    """All measures of one query, computed from their definitions."""
    relevant = {passage for passage, grade in grades.items() if grade > 0}
    gains = [grades.get(passage, 0) for passage in ranking]
    best = sorted(grades.values(), reverse=True)
    dcg, ideal = (sum(gain / log2(index + 2) for index, gain in enumerate(g[:10])) for g in (gains, best))
    ranks = [rank for rank, passage in enumerate(ranking, start=1) if passage in relevant]
    return {
        "nDCG@10": dcg / ideal,
        "MRR@10": max((1 / rank for rank in ranks if rank <= 10), default=0),
        "MAP": sum(num_found / rank for num_found, rank in enumerate(ranks, start=1)) / len(relevant),
        "Recall@10": sum(rank <= 10 for rank in ranks) / len(relevant),
        "Recall@100": sum(rank <= 100 for rank in ranks) / len(relevant),
    }


def shown(parts):
    """What a terminal shows."""
    console = Console(width=200, record=True, file=StringIO(), force_terminal=True)
    console.print(*parts)
    return console.export_text()


def values_by_hand(report, dataset):
    """row -> query -> measure -> value, from the rankings of the report."""
    return {
        row: {
            query: values_of([passage for passage, _ in ranking], dataset.qrels["test"][query])
            for query, ranking in rankings.items()
        }
        for row, rankings in report.details.rankings.items()
    }


# --- five passages, by hand -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report():
    return measure(make_dataset(), everyone())


def test_bm25_row_by_hand(report):
    # BM25 puts a first for q1, b before e for q2 (two terms against one), finds nothing for q3, c before d for q4.
    row = report.row("BM25")
    assert row.measures["nDCG@10"].value == pytest.approx((1 + 1 / log2(3) + 0 + 1) / 4)
    assert row.measures["MRR@10"].value == pytest.approx((1 + 1 / 2 + 0 + 1) / 4)
    assert row.measures["MAP"].value == pytest.approx((1 + 1 / 2 + 0 + 1) / 4)
    assert row.measures["Recall@100"].value == row.measures["Recall@10"].value == pytest.approx(3 / 4)
    assert row.num_items == 4


def test_teacher_row_by_hand(report):
    # Pool: the whole corpus. Shared words: q1 a 2; q2 b 2, e 1; q3 none, so ids decide and c is third; q4 c 2, d 1.
    row = report.row(TEACHER)
    assert row.measures["nDCG@10"].value == pytest.approx((1 + 1 / log2(3) + 1 / log2(4) + 1) / 4)
    assert row.measures["MRR@10"].value == pytest.approx((1 + 1 / 2 + 1 / 3 + 1) / 4)
    assert row.measures["Recall@100"].value == 1


def test_student_rows_against_numpy(report):
    def expected(fingerprint, scorer):
        student = FakeStudent(fingerprint=fingerprint)
        vectors = student.encode_passages([p.text for p in PASSAGES.values()]).vectors.astype(np.float64)
        reciprocal = []
        for query_id, relevant in (("q1", "a"), ("q2", "e"), ("q3", "c"), ("q4", "cd")):
            query = student.encode_queries([QUERIES[query_id].text]).vectors[0].astype(np.float64)
            order = np.argsort(-scorer(query, vectors))
            reciprocal.append(1 / (1 + min(order.tolist().index("abcde".index(name)) for name in relevant)))
        return pytest.approx(np.mean(reciprocal))

    def cosine(query, vectors):
        return vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)

    def full(query, vectors):
        return 2 * vectors @ query + np.tanh(vectors[:, 0] * query[1])

    def mrr_of(name):
        return report.row(name).measures["MRR@10"].value

    assert [row.name for row in report.rows] == [
        "BM25",
        FUSION_UNTUNED,
        FUSION,
        FITTED,
        "cosine, untuned",
        "cosine, tuned",
        "D2LLM, paper head",
        "cosine, D2LLM vectors",
        "D2LLM",
        FITTED_STUDENT,
        TEACHER,
    ]
    assert mrr_of("cosine, untuned") == expected("base", cosine)
    assert mrr_of("cosine, tuned") == expected("tuned", cosine)
    assert mrr_of("D2LLM, paper head") == expected("paper", full)
    assert mrr_of("cosine, D2LLM vectors") == expected("fake-student", lambda q, v: v @ q)
    assert mrr_of("D2LLM") == expected("fake-student", full)


def test_counts_and_notes_of_a_report(report):
    assert (report.kind, report.num_items, report.num_left_out, report.num_passages) == ("retrieval", 4, 2, 5)
    assert report.missing == report.sample_rows == ()
    odd, *weights = report.notes
    assert odd == "test: 1 odd thing"
    for note, start in zip(weights, (f"{FITTED}: 1 x cosine + ", f"{FITTED_STUDENT}: 1 x D2LLM + "), strict=True):
        assert note.startswith(start)
        assert note.endswith("each fitted on the half of the queries it does not rank")
    assert report.row("D2LLM").fingerprint == "fake-student"
    assert report.row("BM25").fingerprint is None
    assert report.settings["seed"] == 0
    assert report.seconds > 0
    assert (report.main_measure, report.subject, report.baseline) == ("nDCG@10", "D2LLM", "cosine, tuned")


def test_every_row_has_its_cost(report):
    students = ["cosine, untuned", "cosine, tuned", "D2LLM, paper head", "cosine, D2LLM vectors", "D2LLM"]
    for row in report.rows:
        assert 0 < row.cost.total.p50 <= row.cost.total.p95
        assert row.cost.total.mean > 0
    for name in (*students, "BM25"):
        assert report.row(name).cost.peak_memory_mib > 10  # Python and numpy alone take more
    for name in students:
        cost = report.row(name).cost
        for part in (cost.encode, cost.candidates, cost.score):
            assert 0 <= part.p50 <= part.p95
        # The parts and the total come from separate calls, so the parts need not add up to the total.
        assert cost.pairs_per_second > 0
        assert cost.bytes_per_passage == 32  # 16 numbers of bfloat16
    assert [name for name in students if report.row(name).cost.passages_per_second is None] == ["D2LLM"]  # shared index
    bm25, fused, teacher = (report.row(name).cost for name in ("BM25", FUSION, TEACHER))
    assert bm25.bytes_per_passage > 0
    assert fused.bytes_per_passage == bm25.bytes_per_passage + 32
    assert fused.total.mean == pytest.approx(bm25.total.mean + report.row("D2LLM").cost.total.mean)
    first = bm25.total.mean + report.row("D2LLM").cost.total.mean
    assert teacher.total.mean == pytest.approx(first + teacher.score.mean)
    assert teacher.bytes_per_passage is None


def test_report_is_json(report):
    document = json.loads(json.dumps(report.to_json()))
    assert document["report_version"] == 2
    assert "details" not in document
    row = next(row for row in document["rows"] if row["name"] == "D2LLM")
    assert {name: estimate["value"] for name, estimate in row["measures"].items()} == figures(report.row("D2LLM"))
    assert row["cost"]["total"]["p50"] == report.row("D2LLM").cost.total.p50
    with pytest.raises(KeyError):
        report.row("nobody")


def test_truncated_texts_are_noted():
    report = measure(make_dataset(), Contenders(FakeStudent(max_words=5)))
    # a, b and e have six words; both rows of the student read the same index.
    assert report.notes[:2] == (
        "test: 1 odd thing",
        f"cosine, D2LLM vectors; D2LLM; {FITTED_STUDENT}: 3 of 5 passages were truncated",
    )


# --- random texts: figures recomputed from the rankings ---------------------------------------------------------------


@pytest.fixture(scope="module")
def words():
    return make_words()


@pytest.fixture(scope="module")
def full(words):
    """A report with every kind of row; the teacher scores a sample."""
    other = {query: list(words.passages)[index : index + 9] for index, query in enumerate(words.queries)}
    contenders = everyone(
        bi_encoders={"their encoder": CosineStudent(FakeStudent(fingerprint="theirs"))},
        cross_encoders={"their judge": FakeTeacher(fingerprint="judge")},
        runs=[run("their run", other)],
    )
    return measure(words, contenders, teacher_queries=9, teacher_depth=20, num_candidates=110, seed=3)


SAMPLED = ("teacher (reranking 20 of BM25 and D2LLM)", "their judge")


def test_measures_are_computed_from_the_rankings(full, words):
    by_hand = values_by_hand(full, words)
    assert list(by_hand) == [row.name for row in full.rows]
    for row in full.rows:
        by_query = by_hand[row.name]
        assert row.num_items == len(by_query) == (9 if row.name in SAMPLED else 24)
        for name, estimate in row.measures.items():
            assert estimate.value == pytest.approx(fmean(values[name] for values in by_query.values())), (
                row.name,
                name,
            )
        assert list(row.measures) == ["nDCG@10", "MRR@10", "MAP", "Recall@10", "Recall@100"]
    assert 0 < full.row("D2LLM").measures["Recall@100"].value < 1
    assert max(len(ranking) for ranking in full.details.rankings["D2LLM"].values()) == 100


def test_values_of_single_queries_are_in_the_details(full, words):
    by_hand = values_by_hand(full, words)
    assert full.details.item_ids == tuple(words.queries)
    assert set(full.details.values) == set(by_hand) - set(SAMPLED)
    for row, measures in full.details.values.items():
        for name, values in measures.items():
            assert values == pytest.approx([by_hand[row][query][name] for query in words.queries])


def test_sample_rows_cover_only_the_sample(full, words):
    by_hand = values_by_hand(full, words)
    sample = list(by_hand[SAMPLED[0]])
    assert sample == list(by_hand[SAMPLED[1]]) == [query for query in words.queries if query in sample]
    assert [row.name for row in full.sample_rows] == [row.name for row in full.rows]
    for row in full.sample_rows:
        assert row.num_items == 9
        for name, estimate in row.measures.items():
            assert estimate.value == pytest.approx(fmean(by_hand[row.name][query][name] for query in sample))
    assert full.sample_rows[-3].measures == full.row(SAMPLED[0]).measures


def test_intervals_are_bootstrap_intervals(full, words):
    by_hand = values_by_hand(full, words)
    for row in full.rows:
        for name, estimate in row.measures.items():
            assert estimate.low <= estimate.value <= estimate.high
            interval = bootstrap_interval([values[name] for values in by_hand[row.name].values()], seed=3)
            assert (estimate.low, estimate.high) == pytest.approx((interval.low, interval.high))
    assert full.row("D2LLM").measures["nDCG@10"].low < full.row("D2LLM").measures["nDCG@10"].high


@pytest.mark.parametrize("name", ["nDCG@10", "MAP"])
def test_comparisons_are_paired_tests_with_holm(full, words, name):
    by_hand = values_by_hand(full, words)
    base = "cosine, tuned"
    rows = [row.name for row in full.rows if row.name != base]
    p_values = []
    for row in rows:
        comparison = full.comparison(row, name)
        queries = list(by_hand[row])  # for sampled rows, only the sample
        ours, theirs = ([by_hand[system][query][name] for query in queries] for system in (row, base))
        p_values.append(paired_randomisation(ours, theirs, seed=3))
        interval = bootstrap_interval(np.subtract(ours, theirs), seed=3)
        assert comparison.baseline == base
        assert comparison.num_items == len(queries)
        assert comparison.p_value == pytest.approx(p_values[-1])
        difference = comparison.difference
        assert difference.value == pytest.approx(fmean(ours) - fmean(theirs))
        assert (difference.low, difference.high) == pytest.approx((interval.low, interval.high))
        assert comparison.test == "paired randomisation, 10,000 permutations"
    adjusted = [full.comparison(row, name).adjusted_p for row in rows]
    assert adjusted == pytest.approx(holm(p_values))
    assert adjusted != pytest.approx(p_values)
    assert full.comparison(base, name) is None
    assert len(full.comparisons) == 5 * len(rows)


def fused_by_hand(*rankings):
    """Reciprocal rank fusion with k = 60; ties are ordered by id."""
    scores = {}
    for ranking in rankings:
        for rank, (passage, _) in enumerate(ranking, start=1):
            scores[passage] = scores.get(passage, 0) + 1 / (60 + rank)
    return sorted(scores, key=lambda passage: (-scores[passage], passage))[:100]


@pytest.mark.parametrize(("name", "second"), [(FUSION, "D2LLM"), (FUSION_UNTUNED, "cosine, untuned")])
def test_hybrid_is_reciprocal_rank_fusion(full, words, name, second):
    rankings = full.details.rankings
    for query in words.queries:
        expected = fused_by_hand(rankings["BM25"][query], rankings[second][query])
        assert [passage for passage, _ in rankings[name][query]] == expected


@pytest.mark.parametrize("name", SAMPLED)
def test_a_judge_reranks_the_pool_of_bm25_and_the_student(full, words, name):
    rankings = full.details.rankings
    for query, ranking in rankings[name].items():
        bm25, student = ([passage for passage, _ in rankings[system][query]] for system in ("BM25", "D2LLM"))
        pool = []
        for index in range(100):  # alternating between the two, without duplicates
            for proposed in (bm25[index : index + 1], student[index : index + 1]):
                pool += [passage for passage in proposed if passage not in pool and len(pool) < 20]
        query_words = set(words.queries[query].text.split())
        shared = {passage: len(query_words & set(words.passages[passage].text.split())) for passage in pool}
        judged = sorted(pool, key=lambda passage: (-shared[passage], passage))
        rest = [passage for passage in student if passage not in pool]
        assert [passage for passage, _ in ranking] == (judged + rest)[:100]
        scores = [score for _, score in ranking]
        assert scores[:20] == [shared[passage] for passage in judged]
        assert scores == sorted(scores, reverse=True)
        assert len(set(scores[20:])) == len(scores[20:])  # so that a run file keeps the order


def test_agreement_covers_the_pairs_the_teacher_judged(full, words):
    from scipy.stats import kendalltau

    rows = {row.name: row for row in full.agreement}
    assert list(rows) == [row.name for row in full.rows if row.kind not in NOT_BY_VECTORS][:6]
    student, teacher_rankings = FakeStudent(), full.details.rankings[SAMPLED[0]]
    pearsons, kendalls, overlaps, pairs = [], [], [], 0
    for query, ranking in teacher_rankings.items():
        judged = dict(ranking[:20])
        vectors = student.encode_passages([words.passages[passage].text for passage in judged]).vectors
        stored = (vectors.view(np.uint32) + 0x7FFF + ((vectors.view(np.uint32) >> 16) & 1)) & 0xFFFF0000  # bfloat16
        query_vector = student.encode_queries([words.queries[query].text]).vectors[0]
        logits = student.score(query_vector, stored.astype(np.uint32).view(np.float32), "asymmetric")
        values = list(judged.values())
        pearsons.append(np.corrcoef(values, logits)[0, 1])
        kendalls.append(kendalltau(values, logits).statistic)
        best = [list(judged)[index] for index in np.argsort(-logits)[:10]]
        overlaps.append(len(set(best) & set(list(judged)[:10])) / 10)
        pairs += len(judged)
    agreement_row = rows["D2LLM"]
    assert agreement_row.agreement.num_pairs == pairs
    assert agreement_row.agreement.pearson_within == pytest.approx(np.mean(pearsons), abs=1e-6)
    assert agreement_row.agreement.kendall_within == pytest.approx(np.mean(kendalls), abs=1e-6)
    assert agreement_row.top_10_overlap == pytest.approx(np.mean(overlaps))


def test_calibration_and_histograms_cover_all_pairs(full, words):
    judged = [(query, p) for query, ranking in full.details.rankings[SAMPLED[0]].items() for p, _ in ranking[:20]]
    relevant = sum(words.qrels["test"][query].get(passage, 0) > 0 for query, passage in judged)
    assert [entry.name for entry in full.calibration] == [SAMPLED[0], "D2LLM"]
    for entry in full.calibration:
        assert entry.num_pairs == len(judged) == sum(bin_.count for bin_ in entry.bins)
        rate = sum(bin_.count * bin_.fraction_positive for bin_ in entry.bins)
        assert rate == pytest.approx(relevant)
    assert {entry.name for entry in full.histograms} == {"cosine, untuned", "cosine, tuned", "D2LLM", SAMPLED[0]}
    for entry in full.histograms:
        ranked = full.details.rankings[entry.name]
        assert sum(entry.counts.positive) + sum(entry.counts.negative) == sum(map(len, ranked.values()))


def test_wins_and_losses_are_the_largest_differences(full, words):
    ours, base = (full.details.values[name]["nDCG@10"] for name in ("D2LLM", "cosine, tuned"))
    gains = dict(zip(words.queries, np.subtract(ours, base), strict=True))
    wins, losses = full.details.wins, full.details.losses
    assert 0 < len(wins) <= 10
    assert 0 < len(losses) <= 10
    assert [gains[example.id] for example in wins] == sorted([g for g in gains.values() if g > 0], reverse=True)[:10]
    assert [gains[example.id] for example in losses] == sorted(g for g in gains.values() if g < 0)[:10]
    example = wins[0]
    assert example.value - example.baseline_value == pytest.approx(gains[example.id])
    assert example.query == words.queries[example.id].text
    assert [shown.id for shown in example.top] == [p for p, _ in full.details.rankings["D2LLM"][example.id][:3]]
    grades = words.qrels["test"][example.id]
    assert all(shown.is_relevant == (grades.get(shown.id, 0) > 0) for shown in (*example.top, *example.baseline_top))
    assert {shown.id for shown in example.relevant} == {passage for passage, grade in grades.items() if grade > 0}


def test_with_a_judge_as_baseline_only_the_sample_is_compared(words):
    report = measure(words, everyone(), teacher_queries=9, teacher_depth=20, baseline="teacher", seed=3)
    by_hand = values_by_hand(report, words)
    sample = list(by_hand[SAMPLED[0]])
    assert report.baseline == SAMPLED[0]
    for row in report.rows[:-1]:
        comparison = report.comparison(row.name, "MAP")
        ours, theirs = ([by_hand[name][query]["MAP"] for query in sample] for name in (row.name, SAMPLED[0]))
        assert comparison.num_items == 9
        assert comparison.difference.value == pytest.approx(fmean(ours) - fmean(theirs))
        assert comparison.p_value == pytest.approx(paired_randomisation(ours, theirs, num_permutations=100, seed=3))
    assert {one.id for one in (*report.details.wins, *report.details.losses)} <= set(sample)


@pytest.mark.parametrize(
    ("baseline", "name"), [("bm25", "BM25"), ("hybrid", FUSION_UNTUNED), ("dot", "cosine, D2LLM vectors")]
)
def test_the_baseline_can_be_chosen(baseline, name):
    report = measure(make_dataset(), everyone(), baseline=baseline)
    assert report.baseline == name
    assert {comparison.baseline for comparison in report.comparisons} == {name}
    assert report.comparison(name, "MAP") is None


def test_the_default_baseline_is_the_best_available_row():
    assert measure(make_dataset(), everyone(tuned_cosine=None)).baseline == "cosine, untuned"
    assert measure(make_dataset(), everyone(tuned_cosine=None, untuned=None)).baseline == "BM25"


# --- missing rows -----------------------------------------------------------------------------------------------------


def test_missing_rows_have_a_reason():
    report = measure(make_dataset(), Contenders(FakeStudent(head="paper"), why_missing={"teacher": "it is on holiday"}))
    assert [row.name for row in report.rows] == ["BM25", FUSION, "D2LLM"]
    assert {row.name: row.reason for row in report.missing} == {
        "cosine, untuned": "no untuned encoder was given",
        "cosine, tuned": "no tuned cosine was given",
        "D2LLM, paper head": "no student with the paper's head was given",
        "cosine, D2LLM vectors": "the student's head has no inner-product part",
        TEACHER: "it is on holiday",
    }
    assert report.agreement == report.calibration == ()


def test_a_run_reports_unknown_queries_and_passages():
    theirs = run("theirs", {"q1": ["a", "x", "b"], "q4": ["d", "c"], "q9": ["a"]})
    theirs = replace(theirs, issues=("2 different tags",))
    report = measure(make_dataset(), everyone(runs=[theirs]))
    assert report.rows[-1].name == "theirs"
    assert [passage for passage, _ in report.details.rankings["theirs"]["q1"]] == ["a", "b"]
    assert figures(report.row("theirs"))["MRR@10"] == pytest.approx((1 + 0 + 0 + 1) / 4)
    assert [note for note in report.notes if note.startswith("theirs: ")] == [
        "theirs: 2 different tags",
        "theirs: 1 query of the run not judged here, left out",
        "theirs: 2 queries not in the run, counted as 0",
        "theirs: 1 ranked passage not in the corpus, left out",
    ]
    assert report.row("theirs").cost.total is None


# --- another measure --------------------------------------------------------------------------------------------------


def test_another_measure_is_one_entry(monkeypatch):
    """An entry of ``MEASURES``, of ir_measures or a function, is measured, compared and explained."""
    monkeypatch.setitem(MEASURES, "Success@1", Measure(Success @ 1, "whether the first passage is relevant"))
    monkeypatch.setitem(MEASURES, "length", Measure(lambda ranking, grades: len(ranking) / 5, "share that is ranked"))
    report = measure(make_dataset(), everyone())
    row = report.row("D2LLM")
    first = [report.details.rankings["D2LLM"][query][0][0] for query in report.details.item_ids]
    is_relevant = [q in QRELS and QRELS[q].get(p, 0) > 0 for q, p in zip(report.details.item_ids, first, strict=True)]
    assert row.measures["Success@1"].value == fmean(is_relevant)
    assert row.measures["length"].value == 1
    assert {comparison.measure for comparison in report.comparisons} == {*MEASURES}
    assert report.to_json()["rows"][0]["measures"]["Success@1"]
    for text in (evaluation_document(report).to_markdown(), render_html(report)):
        assert "whether the first passage is relevant" in text
        assert "share that is ranked" in text
    assert "Success@1" in shown(evaluation_tables(report))


# --- another column ---------------------------------------------------------------------------------------------------


def test_another_cost_is_a_field_and_what_measures_it(monkeypatch, tmp_path):
    """A field of ``Cost`` that a system gives by its name is in the tables, in Markdown, on the page and in JSON."""

    @dataclass(frozen=True)
    class Wider(Cost):
        parameters: float | None = field(default=None, metadata={"parameters": ""})

    def lexical(*given):
        system = lexical_system(*given)
        return replace(system, costs={**system.costs, "parameters": 4_321.0})

    monkeypatch.setattr("d2llm.evaluation.systems.Cost", Wider)
    monkeypatch.setattr("d2llm.evaluation.retrieval.lexical_system", lexical)
    measure(make_dataset(), everyone(), tmp_path)
    report = measure(make_dataset(), everyone(), tmp_path)  # read back
    assert [row.name for row in report.rows if row.cost.parameters] == ["BM25"]
    assert report.to_json()["rows"][0]["cost"]["parameters"] == 4_321
    for text in (evaluation_document(report).to_markdown(), render_html(report), shown(evaluation_tables(report))):
        assert "parameters" in text
        assert "4,321" in text
