"""What an evaluation has measured is kept, so that an interrupted one goes on and a repeated one is quick."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from d2llm.core.files import write_bytes
from d2llm.core.fingerprint import fingerprint_json
from d2llm.evaluation.systems import System

_VERSION = 2  # of what is kept; raised when a system's rankings or times come to mean something else


class MeasuredStore:
    """Measured values by what they depend on, one JSON file each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_found = 0
        """Values that an earlier run had measured."""

    def values(self, key: object, make: Callable[[], Any]) -> Any:
        """The plain JSON values kept under ``key``, or those that ``make`` gives, kept."""
        path = self.folder / f"{fingerprint_json([_VERSION, key])}.json"
        if path.is_file():
            self.num_found += 1
            return json.loads(path.read_text(encoding="utf-8"))
        made = make()
        write_bytes(path, json.dumps(made, ensure_ascii=False).encode())
        return made

    def system(self, key: object, make: Callable[[], System]) -> System:
        """The system measured under ``key``, or the one that ``make`` measures, kept."""
        return _system(self.values(key, lambda: asdict(make())))


def _system(values: Mapping[str, Any]) -> System:
    rankings = {
        query_id: tuple((passage_id, score) for passage_id, score in ranking)
        for query_id, ranking in values["rankings"].items()
    }
    seconds = {name: tuple(times) for name, times in values["probe_seconds"].items()}
    restored: dict[str, Any] = {"rankings": rankings, "probe_seconds": seconds, "notes": tuple(values["notes"])}
    return System(**(dict(values) | restored))
