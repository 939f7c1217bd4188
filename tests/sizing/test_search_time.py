"""Times of searches, worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2llm.models.score_features import FeatureWeights
from d2llm.retrieval.segments import first_depth
from d2llm.sizing.index_bytes import StudentFacts
from d2llm.sizing.plan import SizePlan
from d2llm.sizing.search_time import (
    AnnFacts,
    MaxScoreFacts,
    can_approximate,
    fraction_that_waits,
    search_stages,
    shipped_ann_facts,
    shipped_maxscore_facts,
    slowest_of,
    total_ms,
    wait_ms,
)
from d2llm.sizing.texts import shipped_text_facts
from sizing.sized_index import made_up_speeds

NUM_CANDIDATES = 200
READ = shipped_maxscore_facts()
PLAN = SizePlan(passages=1_000_000, tokens=100)
ANN = AnnFacts(source="a test", passages=1_000_000, first_ten=0.99, candidates=100, visited=3_000)
STUDENT = StudentFacts(
    name="student",
    fingerprint="one",
    dim=100,
    token_dim=16,
    max_tokens=256,
    max_query_tokens=16,
    has_dot=True,
    counts_interaction=False,
    formats={"window": "int3", "token": "int4"},
    weights=FeatureWeights(),
)
TEXTS = (
    shipped_text_facts()
    .at(100)
    .model_copy(
        update={
            "words": 80.0,
            "windows": 3.0,
            "sentences": 4.0,
            "token_vectors": 0.5,
            "query_postings": 1.5,
            "candidate_length": 1.0,
        }
    )
)


def stages(student=STUDENT, *, num=1_000_000, plan=PLAN, **options):
    found = search_stages(plan, student, TEXTS, made_up_speeds("one"), num, **options)
    return {one.stage: one.ms for one in found}


def test_a_scan_reads_all_vectors():
    assert stages() == pytest.approx(
        {"query": 10, "scan of all vectors": 200, "candidates' vectors": 0.2, "texts of ten results": 2}
    )


def test_score_features_costs_words_windows_and_tokens():
    weights = {"bm25": 1.0, "window_bm25": 1.0, "window_vectors": 1.0, "maxsim": 1.0}
    times = stages(replace(STUDENT, weights=FeatureWeights(terms=weights)))
    assert times == pytest.approx(
        {
            "query": 10,
            "scan of all vectors": 200,
            "candidates' vectors": 0.3,  # 100 proposed by vectors, and all 200 scored
            "best passages by words": 15 * READ.fraction(100, 1_000_000) + 8 * 0.1 + 0.2,  # 1.5 million; 8 segments
            "words of candidates' windows": 1.6,
            "vectors of candidates' tokens": 1,
            "vectors of candidates' windows": 0.6,
            "texts of ten results": 2,
        }
    )


def test_a_shard_is_asked_for_its_part_of_the_proposals_and_scores_its_part_of_the_candidates():
    weights = FeatureWeights(terms={"bm25": 1.0, "window_bm25": 1.0, "maxsim": 1.0})
    times = stages(replace(STUDENT, weights=weights), num_shards=4)
    asked = 25 + 4 * 5 + 16  # of 100 proposals by each source: the mean, four deviations, and some more
    assert times == pytest.approx(
        {
            "query": 10,
            "scan of all vectors": 200,
            "candidates' vectors": (asked + 50) / 1_000,
            "best passages by words": 15 * READ.fraction(asked, 1_000_000) + 8 * 0.1 + 0.2,
            "words of candidates' windows": 1.6 / 4,
            "vectors of candidates' tokens": 1 / 4,
            "texts of ten results": 2,
        }
    )
    assert first_depth(100, 4) == asked
    assert first_depth(100, 1) == first_depth(100, 1_000) + 82 == 100


def test_the_interaction_scores_candidates_or_without_an_inner_product_everything():
    assert stages(replace(STUDENT, counts_interaction=True))["interaction"] == pytest.approx(2)
    paper = stages(replace(STUDENT, has_dot=False, counts_interaction=True))
    assert paper["interaction of every passage"] == pytest.approx(10_000)
    assert "scan of all vectors" not in paper


def test_an_approximate_index_compares_some_rows():
    times = stages(ann=ANN)
    assert times["approximate index"] == pytest.approx(1e3 * 3_000 * NUM_CANDIDATES / 100 / 1e6)
    assert times["candidates' vectors"] == pytest.approx(NUM_CANDIDATES / 1_000)


def test_rows_visited_grow_with_the_logarithm_of_the_passages_and_with_the_candidates():
    assert ANN.visited_at(1_000_000, 100) == pytest.approx(3_000)
    assert ANN.visited_at(10**9, 100) == pytest.approx(4_500)
    assert ANN.visited_at(1_000_000, 500) == pytest.approx(15_000)
    assert ANN.visited_at(1_000_000, 10) == pytest.approx(3_000)  # a search is never less deep than was measured
    assert ANN.visited_at(1_000, 100) == 1_000


def test_bm25_reads_a_fraction_of_the_postings():
    facts = MaxScoreFacts(source="a test", read=((1e-4, 0.1), (1e-2, 0.4)))
    assert facts.fraction(100, 1_000_000) == pytest.approx(0.1)
    assert facts.fraction(1_000, 1_000_000) == pytest.approx(0.2)  # a power law between
    assert facts.fraction(1, 1_000_000) == pytest.approx(0.025)  # and beyond
    assert facts.fraction(100_000, 1_000_000) == pytest.approx(0.4**0.5)  # towards everything for everything
    assert facts.fraction(200, 100) == pytest.approx(1)


@given(st.integers(1, 10_000), st.integers(1, 10_000), st.integers(10_000, 10**10))
def test_more_candidates_read_more(some, others, num_passages):
    few, many = sorted([some, others])
    assert 0 < READ.fraction(few, num_passages) <= READ.fraction(many, num_passages) <= 1


def test_when_an_index_is_approximate():
    assert can_approximate(PLAN, STUDENT, 1_000_000, ANN)
    assert not can_approximate(PLAN, STUDENT, 19_999, ANN)
    assert not can_approximate(PLAN.replace(recall=0.995), STUDENT, 1_000_000, ANN)
    assert not can_approximate(PLAN, replace(STUDENT, has_dot=False), 1_000_000, ANN)
    assert 0.9 < shipped_ann_facts().first_ten < 1


def test_what_was_not_measured_is_none():
    times = stages(plan=PLAN.replace(vector_format="int4"))
    assert times["scan of all vectors"] is None
    assert times["query"] == 10


def test_a_smaller_index_is_searched_faster():
    sizes = [1_000, 10_000, 100_000, 1_000_000, 10_000_000]
    times = [sum(filter(None, stages(num=num).values())) for num in sizes]
    assert times == sorted(times)
    assert total_ms(search_stages(PLAN, STUDENT, TEXTS, made_up_speeds("one"), 10)) < times[0]


def test_the_slowest_of_shards_against_drawn_times():
    """Maxima of drawn log-normal times have the predicted quantiles."""
    spread = math.log(3) / 2.3263479
    drawn = 20 * np.exp(spread * np.random.default_rng(0).standard_normal((20_000, 16))).max(axis=1)
    for fraction in (0.5, 0.99):
        assert slowest_of(16, 20, 3, fraction) == pytest.approx(np.quantile(drawn, fraction), rel=0.05)
    assert slowest_of(1, 20, 3, 0.5) == pytest.approx(20)
    assert slowest_of(1, 20, 3, 0.99) == pytest.approx(60)


def test_queues_by_hand():
    assert fraction_that_waits(1, 0.5) == pytest.approx(0.5)  # one core waits as often as it is busy
    assert fraction_that_waits(2, 1.0) == pytest.approx(1 / 3)  # Erlang C of two cores, one of them busy
    assert wait_ms(1, 0.5, 10, 0.99) == pytest.approx(10 / 0.5 * math.log(0.5 / 0.01))
    assert wait_ms(64, 1.0, 10, 0.99) == 0
    with pytest.raises(ValueError):
        fraction_that_waits(2, 2.0)


@given(st.integers(1, 200), st.floats(0.01, 0.99))
def test_the_share_that_waits_is_a_share_and_grows_with_the_load(cores, load):
    waiting = fraction_that_waits(cores, load * cores)
    assert 0 <= waiting <= 1
    assert waiting <= fraction_that_waits(cores, (load + (1 - load) / 2) * cores) + 1e-12
