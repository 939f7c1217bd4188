"""The words of texts as a segment: the same bytes as counting the terms of one sentence after the other."""

from __future__ import annotations

import re
from collections import Counter
from itertools import accumulate, islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2llm.data.beir import read_beir
from d2llm.ops import bm25_words
from d2llm.ops.bm25_words import sentences, terms
from d2llm.store import word_segment
from d2llm.store.word_segment import MAX_COUNT, WordSegment

FULL_STOPS = "。！？；．｡।॥۔؟؛።፧։།༎។៕။"
SENTENCE_END = re.compile(rf"()\n+|(?<=[{FULL_STOPS}])([”’」』）]*)|(?<=[.!?;:…])([\"'”’»)\]]*)\s+(?=[^\sa-z])")
PIECES = (
    *("Das Café in der Straße", "The ships' sails", "running dogs ran", "e.g. this", "snake_case 3.14", "x" * 450),
    *("Η Ελλάδα Οδυσσεύς", "Ёлка и йод", "הַמֶּלֶךְ גָּר", "يَدْرُسُ الطَّالِبُ", "हिन्दी भारत की राजभाषा", "বাংলা ভাষা হঠাৎ"),
    *("தமிழ் மொழி", "తెలుగు భాష", "ಕನ್ನಡ", "മലയാളം", "සිංහල ශ්‍රී", "เราดื่มน้ำเย็น", "ພາສາລາວ", "ភាសាខ្មែរ", "မြန်မာဘာသာစကား"),
    *(
        "བོད་སྐད",
        "ꦧꦱꦗꦮ",
        "我们在北京",
        "ガソリンスタンド",
        "한국어 문법",
        "አማርኛ",
        "Երևանը",
        "საქართველო",
        "Ｄ２ＬＬＭ ﬁnds ①",
        "a\r\nb\x85c",
    ),
    *(".", "!”", "?)", "…", '." ', ":", "\n", "\n\n ", " ", "\t", "\u2028", *FULL_STOPS, "」", "’"),
)
MARKS = " .!?;:\n\t\"')]aA1_é。」”"
any_text = st.lists(
    st.one_of(st.sampled_from(PIECES), st.text(max_size=6), st.text(MARKS, max_size=12)),
    max_size=12,
).map("".join)


def slow_sentences(text: str) -> list[str]:
    """Its sentences by the rule as it is written, before long ones are split."""
    parts: list[str] = []
    start = 0
    for match in SENTENCE_END.finditer(text):
        parts.append(text[start : match.end(match.lastindex or 0)])
        start = match.end()
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]


def slow_arrays(texts: list[str]) -> dict[str, list[int]]:
    """The words of texts, counted one by one."""
    rows = [[[word_segment._hash(term) for term in terms(text[a:b])] for a, b in sentences(text)] for text in texts]
    vocabulary = sorted({one for row in rows for sentence in row for one in sentence})
    number = {one: index for index, one in enumerate(vocabulary)}
    counts = [Counter(one for sentence in row for one in sentence) for row in rows]
    postings = [[(row, own[one]) for row, own in enumerate(counts) if one in own] for one in vocabulary]
    lengths = [[len(sentence) for sentence in row] for row in rows]
    windows = [[sum(own[at : at + 2]) for at in range(max(len(own) - 1, min(len(own), 1)))] for own in lengths]
    return {
        "terms": vocabulary,
        "starts": [0, *accumulate(map(len, postings))],
        "rows": [row for own in postings for row, _ in own],
        "counts": [min(count, MAX_COUNT) for own in postings for _, count in own],
        "tokens": [
            token for row in rows for sentence in row for token in [*(number[one] for one in sentence), len(vocabulary)]
        ],
        "offsets": [0, *accumulate(sum(own) + len(own) for own in lengths)],
        "lengths": [sum(own) for own in lengths],
        "num_windows": [len(own) for own in windows],
        "window_lengths": [sum(own) for own in windows],
    }


def assert_counted(texts: list[str]) -> None:
    segment = WordSegment.from_texts(texts)
    for name, values in slow_arrays(texts).items():
        array = getattr(segment, name)
        assert array.tobytes() == np.array(values, array.dtype).tobytes(), name


@given(st.lists(any_text, max_size=6))
def test_words_of_any_script(texts):
    assert_counted(texts)


@given(any_text)
def test_sentences_are_those_of_the_rule(text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bm25_words, "_LONGEST_SENTENCE", len(text))
        assert [text[start:end] for start, end in sentences(text)] == slow_sentences(text)


@pytest.mark.parametrize("name", ["squad-sent", "cmrc2018"])
def test_words_of_real_passages(name, shared_data):
    passages = read_beir(shared_data / name, splits=["dev"]).passages.values()
    assert_counted([passage.full_text for passage in islice(passages, 100)])


def test_words_of_real_pages():
    pages = sorted(Path(__file__).parents[2].glob("docs/**/*.md"))[:40]
    assert pages
    assert_counted([part for page in pages for part in page.read_text(encoding="utf-8").split("\n\n")])


@pytest.mark.parametrize("known", [0, 1, 3])
def test_more_different_words_than_are_kept(known, monkeypatch):
    monkeypatch.setattr(word_segment, "_KNOWN_WORDS", known)
    assert_counted(["one two three. Two four one!", "", "five one\none", "北京 ships ship shipping"])
