"""How many examples a property test draws."""

from __future__ import annotations

import os

TESTS_ALL = os.environ.get("D2LLM_TEST_ALL") == "1"
"""Whether ``make test-all`` runs the tests, and not ``make test``, which has a time limit."""


def examples(count: int) -> int:
    """``count`` in ``make test-all``; at most 25 in ``make test``."""
    return count if TESTS_ALL else min(count, 25)
