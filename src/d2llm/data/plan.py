"""Training plans, the passages that each query is trained on, and data sets with their plans.

A plan is written by ``mine``, and read by ``label`` and ``distill``.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from d2llm.core.errors import DataFormatError, DuplicateIdError, InputError, MismatchError
from d2llm.core.files import new_folder
from d2llm.core.fingerprint import fingerprint_files
from d2llm.core.json_values import parse_json
from d2llm.core.manifest import read_manifest, write_manifest
from d2llm.core.types import Task
from d2llm.data.beir import Dataset
from d2llm.data.pairs import PairDataset

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
        value: object = parse_json(raw)
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


@dataclass(frozen=True, slots=True)
class TrainingSource:
    """One data set of a training run.

    Raises:
        MismatchError: the plan names queries or passages that the data set does not have.
        InputError: an entry has no positive, or contains a passage twice.
    """

    dataset: Dataset
    plan: TrainingPlan
    task: Task
    max_labelled: int | None = None
    """How many queries the teacher labels; None means all of the plan."""
    label_first: tuple[str, ...] | None = None
    """Queries of the plan, the ones to label first; by default all of them in a random order."""
    pairs: PairDataset | None = None
    """The labelled pairs that ``dataset`` was built from, if it is not a retrieval set."""
    instruction: str | None = None
    """What the student reads before each query that has none of its own, in place of its prefix."""

    def __post_init__(self) -> None:
        for entry in self.plan.entries:
            _check_entry(entry, self.dataset)

    @property
    def entries_to_label(self) -> list[PlanEntry]:
        """The queries that the teacher labels: the first of ``label_first``, or of an order by the hash of the id.

        A larger sample contains a smaller one.
        """
        order = self.label_first or sorted(
            (entry.query_id for entry in self.plan.entries), key=lambda name: hashlib.sha256(name.encode()).digest()
        )
        chosen = set(order[: self.max_labelled])
        return [entry for entry in self.plan.entries if entry.query_id in chosen]

    def query_text(self, query_id: str) -> str:
        """A query as the data set has it, without the prefix that a model may add."""
        return self.dataset.queries[query_id].text

    def instructed_queries(self, query_ids: Iterable[str], prefix: str) -> list[str]:
        """Queries as a student reads them: each after its own instruction, or that of the set, or the ``prefix``."""
        usual = prefix if self.instruction is None else self.instruction
        queries = [self.dataset.queries[query_id] for query_id in query_ids]
        return [(usual if query.instruction is None else query.instruction) + query.text for query in queries]

    def passage_text(self, passage_id: str) -> str:
        """Title and text of a passage as one string."""
        return self.dataset.passages[passage_id].full_text


@dataclass(frozen=True, slots=True)
class TrainingPair:
    """A query and a passage with the data set's own judgement of whether they match.

    ``target`` is the probability of a yes: 1 or 0, or in between if the data set has grades.
    """

    query: str
    passage: str
    task: Task
    target: float

    @property
    def is_positive(self) -> bool:
        """Whether a yes is likelier than a no."""
        return self.target > 0.5


def check_sources(sources: Sequence[TrainingSource]) -> None:
    """Raise an ``InputError`` if two sources of a run, and so their labels, have the same name."""
    names = [source.dataset.name for source in sources]
    if len(set(names)) < len(names):
        raise InputError(f"two data sets have the same name: {', '.join(sorted(names))}; rename the folder of one")


def labelled_pairs(
    sources: Sequence[TrainingSource], *, num_negatives: int, max_queries: int | None, seed: int
) -> list[TrainingPair]:
    """One positive and ``num_negatives`` negatives of each query, in an order fixed by ``seed``.

    A quarter of the negatives (at least one) are easy ones, so that a teacher tuned on them also learns to recognise
    clearly irrelevant passages; the rest are hard. The draw of a query depends only on the query and the seed. For a
    set of labelled pairs, exactly the judged pairs of a query are taken. With ``max_queries``, a random sample of this
    many queries of each source is used.
    """
    pairs: list[TrainingPair] = []
    for source in sources:
        entries = sorted(source.plan.entries, key=lambda entry: entry.query_id)
        random.Random(f"{seed}:{source.dataset.name}").shuffle(entries)
        for entry in entries[:max_queries]:
            pairs.extend(_pairs_of(entry, source, num_negatives, seed))
    random.Random(seed).shuffle(pairs)
    return pairs


def _check_entry(entry: PlanEntry, dataset: Dataset) -> None:
    where = f"the plan for '{dataset.name}', query '{entry.query_id}'"
    if entry.query_id not in dataset.queries:
        raise MismatchError(f"{where}: {dataset.path} has no such query; make the plan again from this data set")
    unknown = [passage_id for passage_id in entry.passage_ids if passage_id not in dataset.passages]
    if unknown:
        raise MismatchError(
            f"{where}: {dataset.path} has no passage '{unknown[0]}'; make the plan again from this data set"
        )
    if not entry.positives and not entry.targets:
        raise InputError(f"{where}: there is no positive; make the plan again, or leave the query out")
    if len(set(entry.passage_ids)) < len(entry.passage_ids):
        raise InputError(f"{where}: a passage is named twice; make the plan again")


def _pairs_of(entry: PlanEntry, source: TrainingSource, num_negatives: int, seed: int) -> list[TrainingPair]:
    query = source.query_text(entry.query_id)
    if entry.targets:
        judged = zip(entry.positives + entry.hard_negatives, entry.targets, strict=True)
        return [TrainingPair(query, source.passage_text(p), source.task, target) for p, target in judged]
    rng = random.Random(f"{seed}:{entry.query_id}")
    num_easy = min(len(entry.easy_negatives), max(1, num_negatives // 4))
    hard = rng.sample(entry.hard_negatives, min(len(entry.hard_negatives), num_negatives - num_easy))
    easy = rng.sample(entry.easy_negatives, min(len(entry.easy_negatives), num_negatives - len(hard)))
    positive = rng.choice(entry.positives)
    return [
        TrainingPair(query, source.passage_text(passage_id), source.task, float(passage_id == positive))
        for passage_id in (positive, *hard, *easy)
    ]
