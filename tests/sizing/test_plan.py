"""Numbers as people write them, and plans that cannot be sized."""

from __future__ import annotations

import pytest

from d2llm.core.errors import InputError
from d2llm.sizing.plan import SizePlan, in_words, parse_bytes, parse_count


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1", 1),
        ("20000", 20_000),
        ("20_000", 20_000),
        ("20,000", 20_000),
        ("10k", 10_000),
        ("50M", 50_000_000),
        ("50 m", 50_000_000),
        ("2.5B", 2_500_000_000),
        ("2.5G", 2_500_000_000),
        ("1.2345k", None),
        ("0", None),
        ("0.5", None),
        ("-3", None),
        ("", None),
        ("many", None),
        ("5x", None),
        ("1e6", None),
        ("nan", None),
        ("9" * 400, None),
        ("5 0M", None),
    ],
)
def test_counts(text, number):
    if number is None:
        with pytest.raises(InputError, match=r"--passages is '.*'; give a whole number above 0"):
            parse_count(text, "--passages")
    else:
        assert parse_count(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("512", None),
        ("64G", 64 * 2**30),
        ("64GiB", 64 * 2**30),
        ("64 gib", 64 * 2**30),
        ("64GB", 64 * 10**9),
        ("1.5T", int(1.5 * 2**40)),
        ("512MiB", 512 * 2**20),
        ("64 cats", None),
        ("0", None),
    ],
)
def test_bytes(text, number):
    if number is None:
        with pytest.raises(InputError, match=r"--machine-memory is '.*'; give bytes with a unit"):
            parse_bytes(text, "--machine-memory")
    else:
        assert parse_bytes(text) == number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5, "0.5"),
        (999, "999"),
        (1_000, "1 thousand"),
        (59_340_000, "59.3 million"),
        (2.5e9, "2.5 billion"),
        (4e13, "40 trillion"),
    ],
)
def test_numbers_in_words(value, text):
    assert in_words(value) == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"passages": 0}, "passages is 0, but must be at least 1"),
        ({"tokens": 0}, "tokens is 0"),
        ({"num_candidates": -1}, "num_candidates is -1"),
        ({"queries": 0}, "queries is 0"),
        ({"candidates": 0}, "candidates is 0"),
        ({"shards": 0}, "shards is 0"),
        ({"shards": 11}, "shards is 11, but there are only 10 passages"),
        ({"machine_memory": 0}, "machine_memory is 0"),
        ({"machine_cores": 0}, "machine_cores is 0"),
        ({"recall": 1.01}, "recall is 1.01, but must be at most 1"),
        ({"recall": 0.0}, "recall is 0.0, but must be more than 0"),
        ({"recall": float("nan")}, "recall is nan"),
        ({"qps": 0.0}, "qps is 0.0, but must be more than 0"),
        ({"qps": float("inf")}, "qps is inf"),
        ({"core_hour_price": -0.1}, "core_hour_price is -0.1"),
        ({"memory_price": float("inf")}, "memory_price is inf"),
        ({"vector_copies": 3}, "vector_copies is 3, but must be at most 2"),
        ({"task": "both"}, "task is 'both'"),
        ({"vector_format": "int9"}, "vector format 'int9' is unknown; use one of .*; did you mean 'int"),
        ({"token_vectors": "bfloat61"}, "did you mean 'bfloat16'"),
    ],
)
def test_impossible_plans(changes, message):
    with pytest.raises(InputError, match=message):
        SizePlan(**({"passages": 10} | changes))
