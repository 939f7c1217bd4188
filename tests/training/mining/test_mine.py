"""Mining on corpora small enough to work out every list by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from d2llm.core.errors import InputError, ModelError
from d2llm.core.types import Passage, Query
from d2llm.data.beir import Dataset
from d2llm.ops import selection
from d2llm.ops.selection import nearest_rows
from d2llm.recipe import MiningConfig, StudentConfig
from d2llm.training.mining.mine import mine


@dataclass(frozen=True)
class Encoded:
    vectors: NDArray[np.float32]
    truncated: tuple[int, ...] = ()
    num_truncated: int = 0
    num_tokens: int = 0


class Encoder:
    """Looks vectors up by text; their norms differ, so only normalised vectors give the cosine's order."""

    fingerprint = "by-hand"
    config = StudentConfig()

    def __init__(self, vector_of: Callable[[str], Sequence[float]]) -> None:
        self.vector_of = vector_of

    def encode(
        self, texts: Sequence[str], *, instruction: str | None = None, advance: Callable[[int], None] | None = None
    ) -> Encoded:
        assert instruction is None
        if advance is not None:
            advance(len(texts))
        return Encoded(np.array([self.vector_of(text) for text in texts], dtype=np.float32))

    encode_queries = encode
    encode_passages = encode


def dataset(passages: dict[str, str], queries: dict[str, str], qrels: dict[str, dict[str, dict[str, int]]]) -> Dataset:
    return Dataset(
        "tiny",
        Path("tiny"),
        {passage_id: Passage(passage_id, text) for passage_id, text in passages.items()},
        {query_id: Query(query_id, text) for query_id, text in queries.items()},
        qrels,
    )


# BM25 for "cat" ranks shorter passages first: c1, c2, ...; the others share no term with the query. All other words
# differ, so that no two passages are near duplicates.
CATS = {
    f"c{n}": " ".join(["cat", *(f"{letter * 3}{word}" for word in range(n))]) for n, letter in enumerate("abcdef", 1)
}
OTHERS = {f"x{number}": f"word{number}" for number in range(1, 7)}


def cats(train: dict[str, int], **splits: dict[str, dict[str, int]]) -> Dataset:
    return dataset(CATS | OTHERS, {"q1": "cat", "q2": "cat"}, {"train": {"q1": train}, **splits})


def test_hard_negatives_are_top_ranked_and_easy_ones_the_rest() -> None:
    result = mine(cats({"c2": 1}), "train", MiningConfig(num_hard=8, num_easy=3, range_max=4), encoder=None, seed=0)
    [entry] = result.entries
    assert entry.query_id == "q1"
    assert entry.positives == ("c2",)
    assert set(entry.hard_negatives) == {"c1", "c3", "c4"}
    assert len(entry.easy_negatives) == 3
    assert set(entry.easy_negatives) <= {"c5", "c6", *OTHERS}
    assert result.report["queries"]["too_few_hard"] == {"count": 1, "first": ["q1"]}
    assert result.report["queries"]["too_few_easy"] == {"count": 0, "first": []}


def test_range_min_skips_the_first_non_positives() -> None:
    config = MiningConfig(num_hard=8, num_easy=0, range_max=5, range_min=2)
    [entry] = mine(cats({"c2": 1}), "train", config, encoder=None, seed=0).entries
    assert set(entry.hard_negatives) == {"c4", "c5"}  # without the positive c2, the first two are c1 and c3


def test_bm25_and_cosine_candidates_are_joined():
    # By inner product x1 would be nearest; by cosine x3, then c1, then x2.
    vectors = {"cat": (1, 0), "word1": (50, 60), "word2": (2, 1), "word3": (0.1, 0), CATS["c1"]: (3, 1)}
    encoder = Encoder(lambda text: vectors.get(text, (-1, 0)))
    config = MiningConfig(num_hard=8, num_easy=0, range_max=3)
    result = mine(cats({"c2": 1}), "train", config, encoder=encoder, seed=0)
    assert set(result.entries[0].hard_negatives) == {"c1", "c3", "x2", "x3"}
    assert result.report["hard_negatives_from"] == {"bm25": 1, "bm25+cosine": 1, "cosine": 2}
    assert set(result.report["seconds"]) == {"bm25", "encoding", "cosine", "choosing", "total"}
    # range_min applies to both lists: c1 (BM25) and x3 (cosine) are skipped, c1 in the cosine list too.
    result = mine(cats({"c2": 1}), "train", config.model_copy(update={"range_min": 1}), encoder=encoder, seed=0)
    assert set(result.entries[0].hard_negatives) == {"c3", "x2"}


def test_positives_and_their_repeats_are_never_negatives() -> None:
    data = cats({"c1": 1, "c2": 0}, extra={"q1": {"c3": 2}})
    data.passages["c4"] = Passage("c4", data.passages["c1"].text.upper().replace(" ", " ,"), title="Other title")
    data.passages["x1"] = Passage("x1", data.passages["c3"].text + "!")
    for seed in range(5):
        result = mine(data, "train", MiningConfig(num_hard=9, num_easy=9, range_max=9), encoder=None, seed=seed)
        [entry] = result.entries
        assert entry.positives == ("c1",)
        assert set(entry.hard_negatives) == {"c2", "c5", "c6"}
        assert set(entry.easy_negatives) == {"x2", "x3", "x4", "x5", "x6"}
        assert result.report["num_same_text_as_positive"] == 2
        assert result.report["queries"]["too_few_easy"]["count"] == 1


def test_texts_without_letters_do_not_count_as_repeats() -> None:
    passages = {"p1": "?!", "p2": "...", "p3": "", "p4": "cat"}
    data = dataset(passages, {"q1": "the cat"}, {"train": {"q1": {"p1": 1}}})
    [entry] = mine(data, "train", MiningConfig(num_hard=4, num_easy=4), encoder=None, seed=0).entries
    assert entry.hard_negatives == ("p4",)
    assert set(entry.easy_negatives) == {"p2", "p3"}


def test_queries_sharing_a_positive_with_dev_or_test_are_left_out() -> None:
    qrels = {
        "train": {"q1": {"c1": 1, "c2": 1}, "q2": {"c3": 1}, "q3": {"c4": 1}},
        "dev": {"q4": {"c2": 1, "c3": 0}},
        "test": {"q5": {"c4": 3}},
    }
    data = dataset(CATS, {f"q{number}": "cat" for number in range(1, 6)}, qrels)
    config = MiningConfig(num_hard=9, num_easy=0)
    result = mine(data, "train", config, encoder=None, seed=0)
    assert [entry.query_id for entry in result.entries] == ["q2"]
    assert {"c2", "c4"} <= set(result.entries[0].hard_negatives)  # left out as positives, still allowed as negatives
    assert result.report["queries"]["shared_positive"] == {"count": 2, "first": ["q1", "q3"]}
    result = mine(data, "train", config, encoder=None, seed=0, exclude_passages_of=["dev"])
    assert [entry.query_id for entry in result.entries] == ["q2", "q3"]
    result = mine(data, "train", config, encoder=None, seed=0, exclude_passages_of=())
    assert [entry.query_id for entry in result.entries] == ["q1", "q2", "q3"]
    with pytest.raises(InputError, match=r"Of 3 in its qrels.* 3 share one with other; to keep these"):
        mine(
            replace(data, qrels={**qrels, "other": {"q4": {"c1": 1, "c3": 1, "c4": 1}}}),
            "train",
            config,
            encoder=None,
            seed=0,
            exclude_passages_of=("other",),
        )


def test_an_excluded_split_can_itself_be_mined() -> None:
    data = cats({"c2": 1}, dev={"q2": {"c1": 1}})
    result = mine(data, "dev", MiningConfig(num_hard=2, num_easy=0), encoder=None, seed=0)
    assert [entry.query_id for entry in result.entries] == ["q2"]


def test_excluded_splits_that_were_not_read_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    mine(cats({"c2": 1}), "train", MiningConfig(), encoder=None, seed=0)
    assert "queries that share positives with dev, test are not left out" in caplog.text


def test_queries_without_positives_are_counted() -> None:
    qrels = {"train": {"q1": {"c1": 1}, "q2": {"gone": 1}, "q3": {"c1": 0}, "unknown": {"c1": 1}}}
    data = dataset(CATS, {f"q{number}": "cat" for number in range(1, 4)}, qrels)
    result = mine(data, "train", MiningConfig(), encoder=None, seed=0)
    assert [entry.query_id for entry in result.entries] == ["q1"]
    report = result.report
    assert report["queries"]["without_positives"] == {"count": 2, "first": ["q2", "q3"]}
    assert (report["num_judged_queries"], report["num_unknown_queries"], report["num_entries"]) == (4, 1, 1)


def test_split_without_queries_is_refused() -> None:
    with pytest.raises(InputError, match=r"split 'train' has no query to mine for\. Of 0 in its qrels"):
        mine(dataset(CATS, {"q1": "cat"}, {"train": {}}), "train", MiningConfig(), encoder=None, seed=0)


def test_sample_of_queries_keeps_order_and_draws() -> None:
    queries = {f"q{number:02}": "cat" for number in range(30)}
    data = dataset(CATS | OTHERS, queries, {"train": {query_id: {"c1": 1} for query_id in queries}})
    config = MiningConfig(num_hard=2, num_easy=2)
    everything = mine(data, "train", config, encoder=None, seed=4).entries
    smaller: list[str] = []
    for max_queries in (5, 12):
        result = mine(data, "train", config, encoder=None, seed=4, max_queries=max_queries)
        kept = [entry.query_id for entry in result.entries]
        assert len(kept) == max_queries
        assert result.entries == [entry for entry in everything if entry.query_id in kept]
        assert result.report["queries"]["not_sampled"]["count"] == 30 - max_queries
        assert set(smaller) <= set(kept)
        smaller = kept
    other = mine(data, "train", config, encoder=None, seed=5, max_queries=12)
    assert [entry.query_id for entry in other.entries] != smaller


def test_draws_are_spread_over_the_pool_and_follow_the_seed() -> None:
    queries = {f"q{number:03}": "cat" for number in range(300)}
    data = dataset(CATS | OTHERS, queries, {"train": {query_id: {"c1": 1} for query_id in queries}})
    config = MiningConfig(num_hard=1, num_easy=1, range_max=6)
    entries = mine(data, "train", config, encoder=None, seed=0).entries
    hard = [entry.hard_negatives[0] for entry in entries]
    # Hard: 300 draws from 5, 60 each, standard deviation 6.9. Easy: 300 from 10 (6 others, 4 cats), 30 each, 5.2.
    assert {
        passage_id: 30 < hard.count(passage_id) < 90 for passage_id in ("c2", "c3", "c4", "c5", "c6")
    } == dict.fromkeys(("c2", "c3", "c4", "c5", "c6"), True)
    easy = [entry.easy_negatives[0] for entry in entries]
    assert all(8 < easy.count(passage_id) < 60 for passage_id in OTHERS)
    assert mine(data, "train", config, encoder=None, seed=1).entries != entries


def test_non_finite_vectors_are_reported_by_passage() -> None:
    encoder = Encoder(lambda text: (float("nan"), 0) if text == "word3" else (1, 0))
    with pytest.raises(ModelError, match="1 passage vector not finite, the first is that of 'x3'"):
        mine(cats({"c2": 1}), "train", MiningConfig(), encoder=encoder, seed=0)


def test_report_shows_examples() -> None:
    result = mine(cats({"c2": 1}), "train", MiningConfig(num_hard=1, range_max=1), encoder=None, seed=0)
    assert result.report["examples"] == [
        {"query_id": "q1", "query": "cat", "positive": CATS["c2"], "hard_negative": CATS["c1"]}
    ]
    assert (result.report["num_positives"], result.report["num_hard_negatives"]) == (1, 1)


@pytest.mark.parametrize("block_numbers", [1, 7, 20, 1000])
def test_block_size_does_not_change_the_nearest(block_numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_BLOCK_NUMBERS", block_numbers)
    rng = np.random.default_rng(0)
    queries = rng.integers(-3, 4, (9, 4)).astype(np.float32)
    passages = rng.integers(-3, 4, (20, 4)).astype(np.float32)  # small integers: exact products, many ties
    ids = [f"p{number}" for number in rng.permutation(20)]
    expected = [
        sorted(ids, key=lambda passage_id: (-int(passages[ids.index(passage_id)] @ query), passage_id))
        for query in queries
    ]
    for top_k in (1, 5, 20, 50):
        nearest = nearest_rows(queries, passages, top_k, ids)
        assert [[ids[row] for row in rows] for rows in nearest] == [order[:top_k] for order in expected]
