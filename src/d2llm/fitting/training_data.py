"""Turns reviewed queries, and the user's own, into data sets to train and measure on.

Documents are split into train, dev and test, and a written query belongs to the split of its document. So no passage
that answers a dev or test query has ever been a positive in training; searches still rank the whole corpus.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from d2llm.core.errors import DataFormatError, InputError
from d2llm.core.files import new_folder
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.manifest import write_manifest
from d2llm.core.types import Passage, Query, Task
from d2llm.data.lines import read_lines
from d2llm.fitting.critic import KeptQuery
from d2llm.retrieval.index import Index
from d2llm.retrieval.search import Searcher
from d2llm.retrieval.settings import SearchSettings

SPLITS = ("train", "dev", "test")
KIND, FORMAT_VERSION = "training data", 1
HELD_OUT_QUERIES = 200
"""How many written queries dev and test should each have; together they get between a tenth and two fifths of all."""
FEW_DOCUMENTS = 30
"""With fewer documents, parts of documents are split instead of whole ones."""
_PART_PASSAGES = 8  # passages of one part
_USER_SHARES = {"dev": 0.2, "test": 0.3}  # the rest is for training
_DOCUMENT_DEPTH = 200  # results in which the passage of a clicked document is looked for

Judged = tuple[str, str, int]
"""Query text, id of a passage or document, grade."""


@dataclass(frozen=True, slots=True)
class DataReport:
    """What a data set holds: queries by split; queries left out because positives are in several splits."""

    queries: Mapping[str, int]
    num_shared: int = 0
    num_unknown: int = 0


def write_written_data(
    folder: Path, passages: Sequence[Passage], kept: Sequence[KeptQuery], *, seed: int
) -> DataReport:
    """Write the reviewed queries as a data set in BEIR layout, split by document.

    A query of the train split is left out if one of its positives belongs to dev or test.

    Raises:
        InputError: there are too few queries for three splits.
    """
    split_of = split_passages(passages, len(kept), seed)
    qrels: dict[str, list[tuple[str, str, int]]] = {split: [] for split in SPLITS}
    queries: list[Query] = []
    num_shared = 0
    for query in sorted(kept, key=lambda each: each.written.id):
        splits = {split_of[name] for name in query.positives}
        split = split_of[query.written.passage_id]
        if split == "train" and len(splits) > 1:
            num_shared += 1
            continue
        queries.append(Query(query.written.id, query.written.text))
        qrels[split] += [(query.written.id, name, 1) for name in query.positives]
    counts = {split: len({query_id for query_id, _, _ in rows}) for split, rows in qrels.items()}
    if not all(counts.values()):
        raise InputError(
            f"the {len(kept):,} queries that the critic kept make {counts['train']} to train on, {counts['dev']} for "
            f"dev and {counts['test']} for test; none of the three may be empty. Write more queries (more hours), or "
            "give more documents"
        )
    _write(folder, passages, queries, qrels)
    return DataReport(counts, num_shared)


def split_passages(passages: Sequence[Passage], num_queries: int, seed: int) -> dict[str, str]:
    """The split of each passage: the same for all passages of a document, or of a part of one if there are few."""
    documents = {passage.document_id or passage.id for passage in passages}
    by_part = len(documents) < FEW_DOCUMENTS
    held_out = min(0.2, max(0.05, HELD_OUT_QUERIES / max(1, num_queries)))
    split_of: dict[str, str] = {}
    for passage in passages:
        name = passage.document_id or passage.id
        part = passage.position // _PART_PASSAGES if by_part else 0
        draw = random.Random(f"{seed}:{name}:{part}").random()
        split_of[passage.id] = "test" if draw < held_out else "dev" if draw < 2 * held_out else "train"
    return split_of


def read_judged(path: Path) -> list[Judged]:
    """Read what users searched for and what they chose: lines ``query <tab> id [<tab> grade]``, in UTF-8.

    The id is that of a passage or a document; without a grade it is 1. Empty lines are skipped.

    Raises:
        DataFormatError: a line has another form.
    """
    judged: list[Judged] = []
    for number, line in read_lines(path):
        if not line.strip():
            continue
        fields = [field.strip() for field in line.split("\t")]
        if len(fields) not in (2, 3) or not fields[0] or not fields[1]:
            problem = f"must be 'query<TAB>id' or 'query<TAB>id<TAB>grade', found {line[:80]!r}"
            raise DataFormatError(path, problem, line=number)
        try:
            judged.append((fields[0], fields[1], int(fields[2]) if len(fields) == 3 else 1))
        except ValueError as error:
            problem = f"the grade must be a whole number, found {fields[2]!r}"
            raise DataFormatError(path, problem, line=number) from error
    if not judged:
        raise DataFormatError(path, "holds no queries; each line must be 'query<TAB>id' or 'query<TAB>id<TAB>grade'")
    return judged


def read_examples(path: Path) -> tuple[tuple[str, str], ...]:
    """Read examples for a writer: lines ``passage <tab> query``, in UTF-8; empty lines are skipped.

    Raises:
        DataFormatError: a line has another form.
    """
    examples: list[tuple[str, str]] = []
    for number, line in read_lines(path):
        if not line.strip():
            continue
        passage, _, query = (field.strip() for field in line.partition("\t"))
        if not passage or not query:
            raise DataFormatError(path, f"must be 'passage<TAB>query', found {line[:80]!r}", line=number)
        examples.append((passage, query))
    return tuple(examples)


def write_users_data(
    folder: Path, passages: Sequence[Passage], judged: Sequence[Judged], index: Index, *, task: Task, seed: int
) -> DataReport:
    """Write the user's own queries as a data set in BEIR layout, split at random by query.

    If a whole document was judged, its passage that a search for the query ranks first gets the grade. Ids that are
    not in the corpus are counted.

    Raises:
        InputError: no judgement is of a passage or document of the corpus, or a split would be empty.
    """
    texts = list(dict.fromkeys(text for text, _, _ in judged))
    query_ids = {text: f"u-{fingerprint_json(text)}" for text in texts}
    rows, num_unknown = _resolve(passages, judged, query_ids, index, task)
    if not rows:
        raise InputError(
            f"none of the {len(judged):,} judged ids is a passage or document of this corpus, such as "
            f"{judged[0][1]!r}; an id is the path of a file below its folder, or what the index shows"
        )
    split_of = _split_queries({query_id for query_id, _, _ in rows}, seed)
    qrels: dict[str, list[tuple[str, str, int]]] = {split: [] for split in SPLITS}
    for query_id, passage_id, grade in rows:
        qrels[split_of[query_id]].append((query_id, passage_id, grade))
    counts = Counter(split_of.values())
    if len(counts) < len(SPLITS):
        raise InputError(f"{len(split_of):,} queries of users are too few for train, dev and test; give ten or more")
    judged_ids = {query_id for query_id, _, _ in rows}
    queries = [Query(query_ids[text], text) for text in texts if query_ids[text] in judged_ids]
    _write(folder, passages, queries, qrels)
    return DataReport(dict(counts), num_unknown=num_unknown)


def _split_queries(query_ids: Iterable[str], seed: int) -> dict[str, str]:
    """The split of each query: shares of a random order."""
    ordered = sorted(query_ids, key=lambda query_id: random.Random(f"{seed}:{query_id}").random())
    num_dev, num_test = (round(_USER_SHARES[split] * len(ordered)) for split in ("dev", "test"))
    splits = ["dev"] * num_dev + ["test"] * num_test + ["train"] * (len(ordered) - num_dev - num_test)
    return dict(zip(ordered, splits, strict=True))


def _resolve(
    passages: Sequence[Passage], judged: Sequence[Judged], query_ids: Mapping[str, str], index: Index, task: Task
) -> tuple[list[tuple[str, str, int]], int]:
    """Rows (query id, passage id, grade), each pair once, and the number of ids that are not in the corpus."""
    ids = {passage.id for passage in passages}
    parts: dict[str, list[str]] = {}
    for passage in passages:
        parts.setdefault(passage.document_id or passage.id, []).append(passage.id)
    of_documents = dict.fromkeys(text for text, name, _ in judged if name not in ids and name in parts)
    searcher = Searcher(index.view, index.student, SearchSettings(task=task, top_k=_DOCUMENT_DEPTH))
    rankings = searcher.rank_ids([Query(query_ids[text], text) for text in of_documents]) if of_documents else []
    rank_of = {
        ranking.query.id: {name: rank for rank, (name, _) in enumerate(ranking.passages)} for ranking in rankings
    }
    grades: dict[tuple[str, str], int] = {}
    num_unknown = 0
    for text, name, grade in judged:
        query_id = query_ids[text]
        if name in ids:
            chosen = name
        elif name in parts:
            ranks = rank_of[query_id]
            chosen = min(parts[name], key=lambda passage_id: ranks.get(passage_id, len(ranks)))
        else:
            num_unknown += 1
            continue
        grades[query_id, chosen] = max(grade, grades.get((query_id, chosen), grade))
    return [(query_id, passage_id, grade) for (query_id, passage_id), grade in grades.items()], num_unknown


def _write(
    folder: Path,
    passages: Sequence[Passage],
    queries: Sequence[Query],
    qrels: Mapping[str, Sequence[tuple[str, str, int]]],
) -> None:
    with new_folder(folder, kind=KIND) as temporary:
        _write_lines(
            temporary / "corpus.jsonl",
            (json.dumps({"_id": p.id, "title": p.title, "text": p.text}, ensure_ascii=False) for p in passages),
        )
        _write_lines(
            temporary / "queries.jsonl",
            (json.dumps({"_id": query.id, "text": query.text}, ensure_ascii=False) for query in queries),
        )
        (temporary / "qrels").mkdir()
        for split, rows in qrels.items():
            lines = ("\t".join(map(str, row)) for row in rows)
            _write_lines(temporary / "qrels" / f"{split}.tsv", ["query-id\tcorpus-id\tscore", *lines])
        counts = Counter({split: len(rows) for split, rows in qrels.items()})
        write_manifest(temporary, KIND, FORMAT_VERSION, {"num_passages": len(passages), "judgements": dict(counts)})


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(line + "\n" for line in lines)
