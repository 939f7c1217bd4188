"""Whatever happens to the bytes of an index, no answer is wrong after ``verify`` has called it good, and nothing dies.

``python tests/index_damage.py`` does the same with as many cases as one likes, and with a repair of each.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from index_damage import DAMAGES, Case, cases, faults, kind_of, make_bases, run

pytestmark = pytest.mark.timeout(1200)  # hundreds of cases

NUM_CASES, NUM_REPAIRED = 540, 10
_SEARCHED = (
    "data",
    "_deletions",
    "_versions",
    "page_data.lance",
    "words.bin",
    "words.json",
    "vectors-0.bin",
    "vectors-0.json",
    "window-vectors-0.bin",
    "window-places-0.bin",
    "checksums.json",
)

Seen = list[tuple[Case, dict[str, Any]]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_bases(tmp_path_factory.mktemp("damage"))


@pytest.fixture(scope="module")
def seen(bases: dict[str, Path]) -> Seen:
    seed = int(os.environ.get("D2LLM_TEST_SEED", "7"))
    return [(case, said) for case, said in run(bases, list(cases(bases, NUM_CASES, seed))) if said]


def test_no_damage_is_silent_after_verify(seen: Seen):
    assert [(case, faults(said), said) for case, said in seen if faults(said)] == []


def test_a_search_of_a_small_index_finds_it_by_itself(seen: Seen):
    """All of it is compared when it is opened, so there is no wrong answer even before ``verify``."""
    assert Counter(said["search"][0] for _, said in seen).keys() == {"same", "refused"}


def test_the_damage_is_one(seen: Seen):
    """Most cases are found, of every kind of file and in every way; so it is not that nothing was damaged."""
    assert len(seen) >= 500
    found = [case for case, said in seen if said["verify"][0] != "good"]
    assert len(found) > 0.85 * len(seen)
    assert {case.how for case in found} == set(DAMAGES)
    assert {kind_of(case.path) for case in found} >= set(_SEARCHED)
    assert {case.base for case in found} == {"two copies", "one copy", "snapshot", "compacted"}


def test_errors_name_the_file_and_what_to_do(seen: Seen):
    for case, said in seen:
        outcome, message = said["search"]
        if outcome == "refused" and "passages.lance" in case.path:
            assert Path(case.path).name in message
            assert "verify --repair" in message


def test_after_a_repair_the_answers_are_the_same_or_the_report_says_what_is_lost(bases: dict[str, Path]):
    chosen = list(cases(bases, NUM_REPAIRED, 11))
    told = [(case, said) for case, said in run(bases, chosen, repair=True) if said]
    assert [(case, faults(said), said) for case, said in told if faults(said)] == []
    again = [(case, said) for case, said in told if said["search"][0] == "refused"]
    repaired = [case for case, said in again if (said["verify again"][0], said["search again"][0]) == ("good", "same")]
    assert {kind_of(case.path) for case in repaired} & {"page_data.lance", "page_lookup.lance", "metadata.lance"}
