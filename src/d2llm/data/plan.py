"""The training plan: the passages each query is trained on. Written by ``mine``, read by ``label`` and ``distill``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from d2llm.core.errors import DataFormatError, DuplicateIdError
from d2llm.core.files import new_folder
from d2llm.core.fingerprint import fingerprint_files
from d2llm.core.manifest import read_manifest, write_manifest

PLAN_FILE = "plan.jsonl"
_KIND = "plan"
_FORMAT_VERSION = 1
_REMEDY = "make the plan again"


@dataclass(frozen=True)
class PlanEntry:
    """The passages of one query, by id: known positives, mined hard negatives, random easy negatives."""

    query_id: str
    positives: tuple[str, ...]
    hard_negatives: tuple[str, ...]
    easy_negatives: tuple[str, ...]
    targets: tuple[float, ...] = ()
    """For labelled pairs: the data set's probability of a yes for each positive and hard negative."""
    preferred: tuple[str, ...] = ()
    """The positives to learn from, if not all; the others are still no negatives. Not stored in a plan."""

    @property
    def passage_ids(self) -> tuple[str, ...]:
        """All passages of the query: positives, then hard, then easy negatives."""
        return self.positives + self.hard_negatives + self.easy_negatives

    @property
    def drawn_positives(self) -> tuple[str, ...]:
        """The positives to learn from."""
        return self.preferred or self.positives


@dataclass(frozen=True)
class TrainingPlan:
    """The entries of a plan and the manifest that describes how it was made."""

    entries: tuple[PlanEntry, ...]
    manifest: dict[str, Any]


def write_plan(
    folder: Path,
    entries: Iterable[PlanEntry],
    content: Mapping[str, Any],
    *,
    documents: Mapping[str, bytes] | None = None,
) -> None:
    """Write ``plan.jsonl`` and ``manifest.json`` (with ``content``) to ``folder``; an older plan there is replaced.

    ``documents`` (name -> content) are additional files for people to read; the library does not read them back.
    """
    fields = ("query_id", "positives", "hard_negatives", "easy_negatives")
    with new_folder(Path(folder)) as temporary:
        num_entries = 0
        with (temporary / PLAN_FILE).open("w", encoding="utf-8", newline="\n") as file:
            for entry in entries:
                record = {name: getattr(entry, name) for name in fields}
                if entry.targets:
                    record["targets"] = entry.targets
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                num_entries += 1
        for name, document in (documents or {}).items():
            (temporary / name).write_bytes(document)
        # Merged last, so that ``content`` cannot override the hash that reading checks.
        identity = {"num_entries": num_entries, "content_hash": fingerprint_files([temporary / PLAN_FILE])}
        write_manifest(temporary, _KIND, _FORMAT_VERSION, {**content, **identity})


def read_plan(folder: Path) -> TrainingPlan:
    """Read a plan folder.

    Raises:
        DataFormatError: there is no plan, a line is malformed, or the file does not match its manifest.
        DuplicateIdError: a query has two entries.
    """
    folder = Path(folder)
    manifest = read_manifest(folder, _KIND, _FORMAT_VERSION)
    path = folder / PLAN_FILE
    if not path.is_file():
        raise DataFormatError(path, f"not found beside its manifest; {_REMEDY}")
    entries: dict[str, PlanEntry] = {}
    for line_number, raw in enumerate(path.read_bytes().splitlines(), start=1):
        entry = _parse(path, line_number, raw)
        if entry.query_id in entries:
            raise DuplicateIdError(path, f"query '{entry.query_id}' has a second entry; {_REMEDY}", line=line_number)
        entries[entry.query_id] = entry
    if fingerprint_files([path]) != manifest.get("content_hash"):
        raise DataFormatError(path, f"was changed after it was made (its hash is not the manifest's); {_REMEDY}")
    return TrainingPlan(tuple(entries.values()), manifest)


def _parse(path: Path, line_number: int, raw: bytes) -> PlanEntry:
    try:
        value: object = json.loads(raw)
    except ValueError as error:  # UnicodeDecodeError is one too
        raise DataFormatError(path, f"not valid JSON ({error}); {_REMEDY}", line=line_number) from error
    record = cast("dict[str, object]", value) if isinstance(value, dict) else {}
    query_id = record.get("query_id")
    if not isinstance(query_id, str):
        raise DataFormatError(path, f"'query_id' must be a string; {_REMEDY}", line=line_number)
    lists: list[tuple[str, ...]] = []
    for name in ("positives", "hard_negatives", "easy_negatives"):
        ids = record.get(name)
        if not isinstance(ids, list) or not all(isinstance(item, str) for item in cast("list[object]", ids)):
            raise DataFormatError(path, f"'{name}' must be a list of passage ids; {_REMEDY}", line=line_number)
        lists.append(tuple(cast("list[str]", ids)))
    targets = record.get("targets", [])
    items = cast("list[object]", targets) if isinstance(targets, list) else [None]
    if not all(isinstance(item, (int, float)) and 0 <= item <= 1 for item in items):
        raise DataFormatError(path, f"'targets' must be a list of numbers from 0 to 1; {_REMEDY}", line=line_number)
    entry = PlanEntry(query_id, *lists, targets=tuple(float(cast("float", item)) for item in items))
    if entry.targets and len(entry.targets) != len(entry.positives) + len(entry.hard_negatives):
        raise DataFormatError(
            path, f"'targets' must have a number for each positive and hard negative; {_REMEDY}", line=line_number
        )
    return entry
