from __future__ import annotations

import pytest
from transformers import AutoModel

from d2llm.models.length_limit import fit_pair, readable_tokens
from d2llm.models.sources import load_pretrained
from tiny_models import write_tiny_model


def test_readable_tokens(tmp_path):
    for architecture, expected in (("llama", 512), ("bert", 512), ("xlm_roberta", 512)):
        model = load_pretrained(AutoModel, str(write_tiny_model(tmp_path / architecture, architecture)))
        assert readable_tokens(model.config) == expected


@pytest.mark.parametrize(
    ("num_query", "num_passage", "room", "expected"),
    [
        (3, 5, 10, (3, 5)),  # all fits
        (3, 9, 10, (3, 7)),  # the passage is cut at its end
        (9, 3, 10, (7, 3)),  # a short passage leaves the query more than half
        (9, 9, 10, (5, 5)),
        (9, 9, 11, (5, 6)),  # with an odd number of tokens the passage gets the larger half
        (3, 0, 2, (2, 0)),
        (0, 7, 4, (0, 4)),
    ],
)
def test_the_passage_is_truncated_first(num_query, num_passage, room, expected):
    assert fit_pair(num_query, num_passage, room) == expected
