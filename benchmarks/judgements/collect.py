"""Joins the answers to packets (``lists.py``) with their keys into ``SET.jsonl``, one line a graded list.

    python benchmarks/judgements/collect.py KEYS ANSWERS --date 2026-11-27 --out benchmarks/judgements/SET.jsonl

A line: ``query_id``, ``split``, ``judging`` (1, or 2 for the second time in another order), ``task``, ``passages`` (ids
in the order in which they were shown), ``grades`` (0 to 100), ``date``. Packets without an answer are counted and left
out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def collect(keys: Path, answers: Path, *, task: str, date: str) -> tuple[list[dict[str, Any]], int]:
    """The graded lists, and the number of packets without an answer; ``ValueError`` if an answer does not fit."""
    lines: list[dict[str, Any]] = []
    num_open = 0
    for key_file in sorted(keys.glob("*.json")):
        answer_file = answers / key_file.name
        if not answer_file.is_file():
            num_open += 1
            continue
        _, split, judging, _ = key_file.stem.rsplit("-", 3)
        key, grades = (json.loads(path.read_text(encoding="utf-8")) for path in (key_file, answer_file))
        for position, (shown, values) in enumerate(zip(key, grades, strict=True), start=1):
            number = len(shown.get("pairs", shown.get("passages")))
            if len(values) != number or not all(type(value) is int and 0 <= value <= 100 for value in values):
                raise ValueError(f"{answer_file}: its part {position} has {values}, not {number} grades from 0 to 100")
            lists = _lists(shown, values)
            same = {"split": split, "judging": int(judging), "task": task}
            lines += [
                {"query_id": query_id, **same, "passages": passages, "grades": graded, "date": date}
                for query_id, passages, graded in lists
            ]
    return lines, num_open


def _lists(shown: dict[str, Any], grades: list[int]) -> list[tuple[str, list[str], list[int]]]:
    """The lists of a part of a packet: one, or for pairs one a pair."""
    if "pairs" in shown:
        return [(query, [passage], [grade]) for (query, passage), grade in zip(shown["pairs"], grades, strict=True)]
    return [(shown["query_id"], shown["passages"], grades)]


def main() -> None:
    """Collect the lists of one data set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("keys", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--task", default="asymmetric")
    parser.add_argument("--date", required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    lines, num_open = collect(given.keys, given.answers, task=given.task, date=given.date)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    given.out.write_text(text, encoding="utf-8")
    print(f"{given.out}: {len(lines)} lists, {num_open} packets without an answer")


if __name__ == "__main__":
    main()
