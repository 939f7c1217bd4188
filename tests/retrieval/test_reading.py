"""What is read of passages: only the parts that are wanted, and every passage is counted once as finished."""

from __future__ import annotations

import numpy as np
import pytest

from d2llm.core.errors import InputError
from d2llm.core.types import Passage
from d2llm.retrieval import reading
from d2llm.retrieval.reading import read_passages
from fake_models import FakeStudent, TokenStudent

LONG = "The cat sleeps all day long. The dog runs over the field. Rain falls on the old roof. Bread is baked at night."
PASSAGES = [Passage(f"p{n}", LONG if n % 2 else "One short text.") for n in range(9)]


@pytest.mark.parametrize("parts", [(), ("window",), ("token",), ("window", "token")])
def test_each_passage_is_finished_once_and_only_wanted_parts_are_read(parts, monkeypatch):
    monkeypatch.setattr(reading, "_WINDOWS_AT_ONCE", 4)
    student, steps = TokenStudent(), []
    result = read_passages(student, PASSAGES, steps.append, parts=parts)
    assert sum(steps) == len(PASSAGES)
    assert set(result.parts) == set(parts)
    alone = FakeStudent()
    np.testing.assert_array_equal(result.vectors, alone.encode_passages([p.full_text for p in PASSAGES]).vectors)
    if "window" in parts:
        counts = result.parts["window"].counts
        assert (counts[1::2] > 1).all()
        assert not counts[::2].any()  # a single window has the vector of its passage
        assert len(result.parts["window"].vectors) == counts.sum()
    num_texts = len(PASSAGES) + (int(result.parts["window"].counts.sum()) if "window" in parts else 0)
    assert student.encoded_passages == num_texts


def test_words_that_passages_lack_need_a_student_that_knows_them():
    with pytest.raises(InputError, match="FakeStudent knows no words that passages lack"):
        read_passages(FakeStudent(), PASSAGES, expand=True)
