"""Training plans: writing and reading, and rejection of changed or damaged plans."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from d2llm.core.errors import DataFormatError, DuplicateIdError
from d2llm.data.plan import PLAN_FILE, PlanEntry, read_plan, write_plan

ENTRIES = [
    PlanEntry("q 2", ("p1",), ("p2", "中文"), ("p9",)),
    PlanEntry("q\u20281", ("p1", "p3"), (), ()),  # U+2028 does not end a line in JSON Lines
]


def test_round_trip_keeps_entries_order_and_content(tmp_path: Path) -> None:
    write_plan(tmp_path / "plan", ENTRIES, {"seed": 3, "mining": {"num_hard": 2}})
    plan = read_plan(tmp_path / "plan")
    assert plan.entries == tuple(ENTRIES)
    assert plan.manifest["kind"] == "plan"
    assert plan.manifest["num_entries"] == 2
    assert plan.manifest["seed"] == 3
    assert plan.manifest["mining"] == {"num_hard": 2}


def test_passage_ids_are_positives_then_hard_then_easy() -> None:
    assert ENTRIES[0].passage_ids == ("p1", "p2", "中文", "p9")


def test_writing_again_replaces_the_plan(tmp_path: Path) -> None:
    write_plan(tmp_path / "plan", ENTRIES, {})
    write_plan(tmp_path / "plan", ENTRIES[:1], {})
    assert read_plan(tmp_path / "plan").entries == (ENTRIES[0],)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan"]


def test_callers_content_cannot_override_computed_fields(tmp_path: Path) -> None:
    write_plan(tmp_path / "plan", ENTRIES, {"content_hash": "forged", "num_entries": 99})
    assert read_plan(tmp_path / "plan").manifest["num_entries"] == 2


def test_plan_changed_by_hand_is_refused(tmp_path: Path) -> None:
    write_plan(tmp_path / "plan", ENTRIES, {})
    path = tmp_path / "plan" / PLAN_FILE
    path.write_text(path.read_text(encoding="utf-8").replace("p9", "p8"), encoding="utf-8")
    with pytest.raises(DataFormatError, match="was changed after it was made"):
        read_plan(tmp_path / "plan")


def test_missing_plan_files_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataFormatError, match="not a d2llm plan folder"):
        read_plan(tmp_path)
    write_plan(tmp_path / "plan", ENTRIES, {})
    (tmp_path / "plan" / PLAN_FILE).unlink()
    with pytest.raises(DataFormatError, match="not found beside its manifest"):
        read_plan(tmp_path / "plan")


GOOD = {"query_id": "q9", "positives": [], "hard_negatives": [], "easy_negatives": []}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not valid JSON"),
        ("[]", "'query_id' must be a string"),
        (json.dumps(GOOD | {"positives": "p1"}), "'positives' must be a list of passage ids"),
        (json.dumps(GOOD | {"hard_negatives": [1]}), "'hard_negatives' must be a list of passage ids"),
        (json.dumps({"query_id": "q9", "positives": [], "hard_negatives": []}), "'easy_negatives' must be a list"),
    ],
)
def test_malformed_line_is_reported_with_its_number(tmp_path: Path, line: str, problem: str) -> None:
    write_plan(tmp_path / "plan", ENTRIES, {})
    with (tmp_path / "plan" / PLAN_FILE).open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(DataFormatError, match=problem) as caught:
        read_plan(tmp_path / "plan")
    assert caught.value.line == 3


def test_second_entry_of_a_query_is_refused(tmp_path: Path) -> None:
    write_plan(tmp_path / "plan", [*ENTRIES, ENTRIES[0]], {})
    with pytest.raises(DuplicateIdError, match="query 'q 2' has a second entry"):
        read_plan(tmp_path / "plan")
