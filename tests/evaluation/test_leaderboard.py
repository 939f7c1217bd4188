"""Many reports in one table, from reports written by hand."""

import json
from dataclasses import asdict

import pytest

from d2llm.core.errors import DataFormatError, InputError
from d2llm.evaluation.leaderboard import Mean, leaderboard, read_leaderboard
from d2llm.evaluation.report import REPORT_VERSION
from d2llm.reports.html import page as page_of
from d2llm.reports.leaderboard import leaderboard_document, set_table, system_table


def report(dataset, values, *, measure="nDCG@10", student="small", p_values=None, split="test", judged=None):
    """What ``d2llm evaluate`` writes of a data set of ten queries, as far as a leaderboard reads it."""
    kinds = {"BM25": "bm25", "D2LLM": "d2llm", "teacher": "teacher", "D2LLM without words": "shortcut"}
    of_student = {"D2LLM", "D2LLM without words"}
    rows = [
        {
            "name": name,
            "kind": kinds[name],
            "measures": {measure: {"value": value}},
            "num_items": (judged or {}).get(name, 10),
            "fingerprint": f"print-{student}" if name in of_student else None,
        }
        for name, value in values.items()
    ]
    comparisons = [
        {
            "row": name,
            "baseline": "BM25",
            "measure": measure,
            "difference": {"value": values[name] - values["BM25"]},
            "p_value": p_value,
        }
        for name, p_value in (p_values or {}).items()
    ]
    return {
        "report_version": REPORT_VERSION,
        "dataset": dataset,
        "split": split,
        "main_measure": measure,
        "num_items": 10,
        "baseline": "BM25",
        "rows": rows,
        "comparisons": comparisons,
        "provenance": {"student": {"name": student, "fingerprint": f"print-{student}"}},
    }


def rows_of(board):
    return {row.name: row for row in board.rows}


def test_means_are_over_the_sets_of_a_measure_and_the_best_comes_first():
    board = leaderboard(
        [
            report("a", {"BM25": 0.5, "D2LLM": 0.7}),
            report("b", {"BM25": 0.3, "D2LLM": 0.4}),
            report("c", {"BM25": 0.9, "D2LLM": 0.8}, measure="AP"),
        ]
    )
    assert [row.name for row in board.rows] == ["D2LLM", "BM25"]
    assert rows_of(board)["BM25"].means == {"nDCG@10": Mean(0.4, 2), "AP": Mean(0.9, 1)}
    assert rows_of(board)["D2LLM"].values == {"a": 0.7, "b": 0.4, "c": 0.8}
    assert board.set_counts == {"nDCG@10": 2, "AP": 1}


def test_a_system_without_some_of_the_sets_comes_after_those_with_all():
    board = leaderboard([report("a", {"BM25": 0.5, "D2LLM": 0.9}), report("b", {"BM25": 0.1})])
    assert [row.name for row in board.rows] == ["BM25", "D2LLM"]
    assert system_table(board).texts()[1][2] == "0.9000 (1)"
    assert set_table(board).texts() == [["a", "nDCG@10", "0.500", "0.900"], ["b", "nDCG@10", "0.100", "–"]]


def test_a_system_without_the_measure_of_most_sets_comes_last():
    board = leaderboard(
        [
            report("a", {"teacher": 0.5, "BM25": 0.4}),
            report("b", {"teacher": 0.3}),
            report("c", {"teacher": 0.2}),
            report("d", {"D2LLM": 0.9}, measure="AP"),
            report("e", {"D2LLM": 0.8}, measure="AP"),
        ]
    )
    assert [row.name for row in board.rows] == ["teacher", "BM25", "D2LLM"]


def test_significance_is_corrected_over_the_sets():
    # Holm over three sets: .01 -> .03, .02 -> .04, .3 -> .3.
    values = {"BM25": 0.5, "D2LLM": 0.6}
    board = leaderboard(
        [
            report("a", values, p_values={"D2LLM": 0.01}),
            report("b", {**values, "D2LLM": 0.4}, p_values={"D2LLM": 0.02}),
            report("c", values, p_values={"D2LLM": 0.3}),
        ]
    )
    row = rows_of(board)["D2LLM"]
    assert (row.above, row.below, row.num_compared) == (("a",), ("b",), 3)
    # Over six sets with .01 each, none is sure: 6 x .01 > .05.
    six = leaderboard([report(name, values, p_values={"D2LLM": 0.01}) for name in "abcdef"])
    assert rows_of(six)["D2LLM"].above == ()


def test_students_have_a_row_each_and_share_the_others():
    values = {"BM25": 0.5, "D2LLM": 0.6}
    board = leaderboard([report("a", values), report("a", {**values, "D2LLM": 0.7}, student="large")])
    assert [row.name for row in board.rows] == ["D2LLM (large)", "D2LLM (small)", "BM25"]
    assert board.notes == ()


def test_students_of_the_same_name_are_told_apart():
    other = report("a", {"BM25": 0.5, "D2LLM": 0.7})
    other["provenance"]["student"]["fingerprint"] = other["rows"][1]["fingerprint"] = "later"
    board = leaderboard([report("a", {"BM25": 0.5, "D2LLM": 0.6}), other])
    assert [row.name for row in board.rows][:2] == ["D2LLM (small later)", "D2LLM (small print-small)"]


def test_what_is_left_out_is_said():
    board = leaderboard(
        [
            report("a", {"BM25": 0.5, "teacher": 0.9, "D2LLM without words": 0.1}, judged={"teacher": 4}),
            report("a", {"BM25": 0.6}),
        ]
    )
    assert [row.name for row in board.rows] == ["BM25"]
    assert board.notes == (
        "teacher: only 4 of 10 on a, left out",
        "BM25: 0.5000 and 0.6000 on a in two reports; the first counts",
    )


def test_splits_of_a_set_are_sets_of_their_own():
    board = leaderboard([report("a", {"BM25": 0.5}), report("a", {"BM25": 0.3}, split="dev")])
    assert [one.name for one in board.sets] == ["a / test", "a / dev"]


class TestFiles:
    @pytest.fixture
    def folder(self, tmp_path):
        for name in ("a", "b"):
            written = {"verb": "evaluate", "result": report(name, {"BM25": 0.5, "D2LLM": 0.6})}
            (tmp_path / f"{name}.json").write_text(json.dumps(written))
        return tmp_path

    def test_a_folder_is_read_and_other_files_are_named(self, folder):
        (folder / "other.json").write_text('{"verb": "ablate"}')
        board = read_leaderboard([folder])
        assert [one.name for one in board.sets] == ["a", "b"]
        assert board.notes == ("not reports of an evaluation, left out: other.json",)

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("{", "not JSON"),
            ("[]", "not the report of an evaluation"),
            ('{"verb": "evaluate", "result": {"report_version": 1}}', "a report of version 1"),
        ],
    )
    def test_a_file_that_is_no_report(self, tmp_path, text, problem):
        (tmp_path / "wrong.json").write_text(text)
        with pytest.raises(DataFormatError, match=f"wrong.json: {problem}"):
            read_leaderboard([tmp_path / "wrong.json"])

    def test_no_file_and_no_report(self, tmp_path):
        with pytest.raises(InputError, match="no such file"):
            read_leaderboard([tmp_path / "missing.json"])
        with pytest.raises(InputError, match="none of these files"):
            read_leaderboard([tmp_path])

    def test_json_markdown_and_page(self, folder):
        board = read_leaderboard([folder])
        assert json.loads(json.dumps(asdict(board)))["rows"][0]["means"]["nDCG@10"] == {"value": 0.6, "num_sets": 2}
        assert "| 1 | D2LLM | **0.6000** |" in leaderboard_document(board).to_markdown()
        page = page_of(leaderboard_document(board))
        assert "<td" in page
        assert "0.6000" in page
        assert "<script" not in page
