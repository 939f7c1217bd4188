from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

from d2llm.ops.losses import masked_mean


def test_shapes_in_annotations_are_checked_while_tests_run():
    """pyproject.toml enables the check for d2llm.ops and d2llm.models; this test fails if it is lost."""
    with pytest.raises(TypeCheckError):
        masked_mean(torch.zeros(2, 3), torch.ones(2, 4, dtype=torch.bool))
