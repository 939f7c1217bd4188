"""However an index's files are damaged: no wrong answers once ``verify`` has called the index good, and no crashes.

``python tests/index_damage.py`` runs any number of such cases, and can also repair each of them.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from index_damage import DAMAGES, Case, cases, faults, kind_of, make_bases, run

pytestmark = pytest.mark.timeout(1200)  # many cases

NUM_CASES, NUM_REPAIRED = 100, 80
_FILE_KINDS = (
    "passages.db",
    "words.bin",
    "words.json",
    "vectors-0.bin",
    "vectors-0.json",
    "window-vectors-0.bin",
    "window-places-0.bin",
    "token-vectors-0.bin",
    "token-places-0.bin",
    "manifest.json",
)

Outcomes = list[tuple[Case, dict[str, Any]]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_bases(tmp_path_factory.mktemp("damage"))


@pytest.fixture(scope="module")
def all_outcomes(bases: dict[str, Path]) -> Outcomes:
    """Of all cases, in one process, because it takes seconds to start."""
    seed = int(os.environ.get("D2LLM_TEST_SEED", "7"))
    chosen = [*cases(bases, NUM_CASES, seed), *cases(bases, NUM_REPAIRED, 11, repair=True)]
    return [(case, report) for case, report in run(bases, chosen) if report]


@pytest.fixture(scope="module")
def outcomes(all_outcomes: Outcomes) -> Outcomes:
    """Of the cases that are not repaired."""
    return [(case, report) for case, report in all_outcomes if not case.repair]


def test_verify_misses_no_damage_that_affects_answers(outcomes: Outcomes):
    assert [(case, faults(report), report) for case, report in outcomes if faults(report)] == []


def test_searching_a_small_index_detects_damage_by_itself(outcomes: Outcomes):
    """A small index is checked in full when it is opened, so no answer is wrong even before ``verify``."""
    assert Counter(report["search"][0] for _, report in outcomes).keys() == {"same", "refused"}


def test_the_cases_do_damage_the_index(outcomes: Outcomes):
    """``verify`` finds most cases, in every kind of file and of every kind of damage: the damage is real."""
    assert len(outcomes) >= 0.85 * NUM_CASES  # a file "of another" index may be the same
    detected = [case for case, report in outcomes if report["verify"][0] != "good"]
    assert len(detected) > 0.85 * len(outcomes)
    assert {case.how for case in detected} == set(DAMAGES)
    assert {kind_of(case.path) for case in detected} >= set(_FILE_KINDS)
    assert {case.base for case in detected} == {"two copies", "one copy", "snapshot", "compacted"}


def test_errors_name_the_file_and_the_remedy(outcomes: Outcomes):
    for case, report in outcomes:
        outcome, message = report["search"]
        if outcome == "refused" and "passages.db" in case.path and case.how != "removed":
            assert Path(case.path).name in message
            assert "verify --repair" in message


def test_a_repair_restores_answers_or_reports_what_is_lost(all_outcomes: Outcomes):
    repairs = [(case, report) for case, report in all_outcomes if case.repair]
    assert [(case, faults(report), report) for case, report in repairs if faults(report)] == []
    refused = [(case, report) for case, report in repairs if report["search"][0] == "refused"]
    repaired = [
        case for case, report in refused if (report["verify again"][0], report["search again"][0]) == ("good", "same")
    ]
    assert "passages.db" in {kind_of(case.path) for case in repaired}
