"""The compiled loops of BM25 against NumPy, bit for bit; how they are loaded, and what happens where they cannot be."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiled_loops import compiled
from d2llm.core.fallbacks import fallback_counts
from d2llm.ops import kernels
from d2llm.ops.bm25_bounds import RANGE
from d2llm.ops.bm25_words import terms
from d2llm.ops.kernels import CompiledLoops, compiler
from d2llm.store import bm25
from d2llm.store.bm25 import WordIndex, bounds_of_segment
from d2llm.store.word_segment import WordSegment, learned_term


def random_index(random: np.random.Generator, num_rows: int, *, added: bool, dead: bool) -> WordIndex:
    """Passages of one to four sentences of words that are rare and frequent, as in a language, in three segments."""
    vocabulary = np.array([f"word{number}" for number in range(200)])
    fractions = 1 / np.arange(1, 201)
    texts: list[str] = []
    for _ in range(num_rows):
        words = random.choice(vocabulary, random.integers(1, 40), p=fractions / fractions.sum())
        cuts = np.sort(random.integers(0, len(words) + 1, random.integers(0, 4)))
        texts.append(" ".join(" ".join(part).capitalize() + "." for part in np.split(words, cuts) if len(part)))
    segments: list[WordSegment] = []
    for start, end in ((0, num_rows // 2), (num_rows // 2, num_rows - 3), (num_rows - 3, num_rows)):
        segment = WordSegment.from_texts(texts[start:end])
        extra = [
            {f"extra{number}": float(random.uniform(0.1, 3)), learned_term(number): float(random.uniform(0, 3))}
            for number in random.integers(0, 5, end - start)
        ]
        segments.append(segment.with_added(extra) if added else segment)
    return WordIndex(segments, live=random.random(num_rows) < 0.8 if dead else None)


def assert_equal_ways(index: WordIndex, text: str, num: int, allowed: np.ndarray | None) -> None:
    query = index.query(text, dict.fromkeys(terms(text), 1.0) | {learned_term(2): 0.2, learned_term(3): 0.7})
    rows = np.random.default_rng(len(text)).integers(0, len(index), 50)
    found = []
    for is_compiled in (False, True):
        with compiled(is_compiled):
            best, scores = index.best(query, num, allowed=allowed)
            order = np.argsort(best)
            found.append((best[order], scores[order], *index.score(query, rows)))
    for by_numpy, by_kernel in zip(*found, strict=True):
        assert by_numpy.dtype == by_kernel.dtype
        np.testing.assert_array_equal(by_kernel, by_numpy)


@given(st.integers(0, 1 << 30), st.booleans(), st.booleans(), st.booleans(), st.integers(1, 60))
def test_best_rows_and_scores_are_those_of_numpy(seed, added, dead, filtered, num):
    random = np.random.default_rng(seed)
    index = random_index(random, int(random.integers(6, 60)), added=added, dead=dead)
    words = [f"word{number}" for number in random.integers(0, 220, random.integers(0, 12))]
    text = " ".join([*words, *(["extra1", "extra2"] if added else [])])
    assert_equal_ways(index, text, num, random.random(len(index)) < 0.5 if filtered else None)


@pytest.mark.parametrize("added", [False, True])
def test_ranges_and_terms_are_skipped_without_a_difference(added):
    """More rows than a range has, so that bounds leave out ranges and frequent words."""
    random = np.random.default_rng(5)
    index = random_index(random, 9_000, added=added, dead=True)
    for text in ("word0 word1 word2 word150 word199", "word0", "word7 word7 word30 extra3", "word0 word1 unknown"):
        for num in (1, 10, 300):
            assert_equal_ways(index, text, num, None)
            assert_equal_ways(index, text, num, random.random(len(index)) < 0.01)


def test_as_many_ties_as_rows():
    index = WordIndex.from_texts(["the same words"] * 5_000)
    for num in (1, 4_999, 5_000, 6_000):
        assert_equal_ways(index, "same words", num, None)


@pytest.mark.parametrize("part", ["rows", "offsets", "starts"])
def test_damaged_words_are_an_error(part):
    segment = WordSegment.from_texts(["one two. three", "two three"] * 50)
    damaged = getattr(segment, part).copy()
    damaged[len(damaged) // 2] = 1 << 31
    index = WordIndex([dataclasses.replace(segment, **{part: damaged})])
    query = index.query("one two three")
    with compiled(True), pytest.raises(ValueError, match=r"not ascending|not where they should be"):
        _ = index.score(query, np.arange(100)) if part == "offsets" else index.best(query, 3)


def test_damaged_bounds_are_an_error():
    segment = WordSegment.from_texts(["one two", "two three"] * 400)
    bounds = bounds_of_segment(segment)
    assert len(bounds.terms) == 3
    index = WordIndex([dataclasses.replace(segment, bounds=bounds._replace(shares=bounds.shares[:-1]))])
    with compiled(True), pytest.raises(ValueError, match="not where they should be"):
        index.best(index.query("one two three"), 3)


def test_bounds_skip_postings():
    """A term is frequent, but in each range but one it is found only in long passages."""
    random = np.random.default_rng(0)
    long = " ".join(f"filler{number}" for number in random.integers(0, 50, 20))
    texts = [f"common {long}"] * (2 * RANGE) + ["common rare"] * 30
    segment = WordSegment.from_texts(texts)
    found = {}
    for name, bounds in (
        ("computed", None),
        ("none", bounds_of_segment(segment)._replace(terms=np.zeros(0, np.uint32))),
    ):
        index = WordIndex([dataclasses.replace(segment, bounds=bounds)]).only(np.ones(len(texts), np.bool_))
        query = index.query("common rare")
        found[name] = index.best_compiled(kernels.BM25.load(), query, 20)
    best = list(range(2 * RANGE, len(texts)))
    assert sorted(found["computed"][0].tolist()) == sorted(found["none"][0].tolist()) == best
    others = WordSegment.from_texts(texts[:RANGE])
    for segments in ([WordSegment.from_texts(texts[::-1])], [WordSegment.from_texts(texts[::-1]), others]):
        index = WordIndex(segments)
        rows, scores, read = index.best_compiled(kernels.BM25.load(), index.query("common"), 20)
        assert rows.tolist() == np.flatnonzero(index.scores(index.query("common")) == scores.max()).tolist()
        assert read <= RANGE  # the first range has the best, and no other, also of another segment, can reach them


@pytest.mark.parametrize("most", [65_535, 8], ids=["few lengths", "more than the loops can tell apart"])
@pytest.mark.parametrize("is_added", [False, True])
def test_lengths_that_are_too_many_are_searched_by_numpy(monkeypatch, most, is_added):
    monkeypatch.setattr(bm25, "_MAX_INDEX", most)
    segment = WordSegment.from_texts(["one" + " two" * number for number in range(10)])
    if is_added:
        segment = segment.with_added([{"three": 0.5 * number} for number in range(10)])
    with compiled(True):
        index = WordIndex([segment])
        rows, scores = index.best(index.query("one"), 3)
    assert rows.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(scores, index.scores(index.query("one"))[:3])


def test_they_are_loaded_in_another_thread_after_a_few_calls():
    loops = CompiledLoops("bm25")
    assert loops.get(kernels.MIN_PARTS - 1) is None
    assert [loops.get(kernels.MIN_PARTS) for _ in range(kernels.MIN_CALLS)] == [None] * kernels.MIN_CALLS
    assert loops._thread is None
    end = time.monotonic() + 60
    while loops.get(kernels.MIN_PARTS) is None and time.monotonic() < end:
        time.sleep(0.01)
    assert loops.get(kernels.MIN_PARTS).RANGE > 0


def test_without_numba_numpy_answers(caplog):
    loops = CompiledLoops("missing")
    before = fallback_counts().get("compiled loops", 0)
    assert loops.load() is None
    assert fallback_counts()["compiled loops"] == before + 1
    assert "NumPy does their work" in caplog.text
    loops.get(kernels.MIN_PARTS)
    assert loops.get(kernels.MIN_PARTS) is None


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch, caplog):
    """As where neither the package nor a home folder can be written: compiled anew by each program, with a warning."""
    import numba

    njit = numba.njit
    monkeypatch.setattr(compiler, "_kernels", [])

    def without_cache(*arguments, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(*arguments, **options)

    monkeypatch.setattr(numba, "njit", without_cache)
    double = compiler.compiled(numba.types.int64(numba.types.int64))(lambda number: 2 * number)
    assert double(21) == 42
    assert "NUMBA_CACHE_DIR" in caplog.text
    assert compiler.compiled_code() == (1, 1, 0, [])


KERNEL = """
from numba import types
from d2llm.ops.kernels.compiler import compiled, compiled_code

@compiled(types.float64(types.float64))
def half(number):
    return number / 2

assert half(3.0) == 1.5
print(compiled_code().num_compiled, compiled_code().num_kept)
"""


def test_kept_code_is_not_used_by_another_processor(tmp_path):
    (tmp_path / "half.py").write_text(KERNEL)

    def compiled_and_kept(**processor: str) -> list[str]:
        paths = {"PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
        command = [sys.executable, "-c", "import half"]
        done = subprocess.run(command, env=os.environ | paths | processor, capture_output=True, text=True, check=True)
        return done.stdout.split()

    other = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    assert compiled_and_kept() == ["1", "1"]
    assert compiled_and_kept() == ["0", "1"]
    assert compiled_and_kept(**other) == ["1", "1"]
    assert compiled_and_kept(**other) == ["0", "1"]
    assert compiled_and_kept() == ["0", "1"]
