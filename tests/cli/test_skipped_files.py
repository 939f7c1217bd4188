"""The warning about files that could not be read."""

from __future__ import annotations

from d2llm.cli.index_options import warn_of_skipped
from d2llm.cli.session import Session
from d2llm.data.documents import SkippedFile


def warning(reasons: list[str], capsys) -> str:
    warn_of_skipped(Session(), [SkippedFile(f"f{number}", reason, "") for number, reason in enumerate(reasons)])
    return capsys.readouterr().err.strip()


def test_rare_reasons_are_not_hidden_behind_frequent_ones(capsys):
    assert warning([], capsys) == ""
    expected = "warning: 1,001 files could not be read: f700: it crashes; f0: it is empty, like 999 others"
    assert warning(["it is empty"] * 700 + ["it crashes"] + ["it is empty"] * 300, capsys) == expected
    many = warning([f"reason {number}" for number in range(6)] + ["it is empty"] * 3, capsys)
    assert many.endswith("; f4: reason 4; and 4 more, which --json lists")
    assert warning(["it is empty"] * 2, capsys).endswith("f0: it is empty, like 1 other")
