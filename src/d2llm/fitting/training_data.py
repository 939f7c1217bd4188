"""Turns reviewed queries, and the user's own, into data sets to train and measure on.

Documents are split into train, dev and test, and a written query belongs to the split of its document. So no passage
that answers a dev or test query has ever been a positive in training; searches still rank the whole corpus.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from d2llm.core.errors import DataFormatError, InputError
from d2llm.core.files import new_folder
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.manifest import write_manifest
from d2llm.core.types import Passage, Query, Task
from d2llm.data.lines import read_lines, whole_number
from d2llm.fitting.critic import KeptQuery
from d2llm.retrieval.index import Index
from d2llm.retrieval.search import Searcher
from d2llm.retrieval.settings import SearchSettings

SPLITS = ("train", "dev", "test")
KIND, FORMAT_VERSION = "training data", 1
HELD_OUT_QUERIES = 200
"""How many written queries dev and test should each have, if that is not more than a fifth of all."""
MIN_FRACTIONS = {"test": 0.15, "dev": 0.05}
"""The least fraction of all queries that they get. Test has more, because a small gain of a training is not significant
on two hundred queries, and hundreds more of thousands are hardly missed in training."""
MIN_HELD_OUT = 10
"""How many documents (or parts) with queries dev and test should each have at least, but never more than a fifth."""
FEW_DOCUMENTS = 50
"""With fewer documents, parts of documents are split instead of whole ones."""
PART_PASSAGES = 8
"""Passages of one part of a document."""

_USER_FRACTIONS = {"dev": 0.2, "test": 0.3}  # the rest is for training
_DOCUMENT_DEPTH = 200  # results in which the passage of a clicked document is looked for

Judged = tuple[str, str, int]
"""Query text, id of a passage or document, grade."""


@dataclass(frozen=True, slots=True)
class DataReport:
    """What a data set holds: queries by split; queries left out because training and a held-out split share positives.

    ``num_unknown`` judged ids are not in the corpus.
    """

    queries: Mapping[str, int]
    num_shared: int = 0
    num_unknown: int = 0


def write_written_data(
    folder: Path,
    passages: Sequence[Passage],
    kept: Sequence[KeptQuery],
    *,
    trained_on: Collection[str] = (),
    seed: int,
) -> DataReport:
    """Write the reviewed queries as a data set in BEIR layout, split by document.

    A query of dev or test is left out if one of its positives is in ``trained_on``: passages that another data set
    trains on. A query of the train split is left out if one of its positives belongs to dev or test, or is a positive
    of one of their queries; that may leave none to train on.

    Raises:
        InputError: there are too few queries for three splits.
    """
    split_of = split_passages(passages, [query.written.passage_id for query in kept], seed)
    qrels: dict[str, list[tuple[str, str, int]]] = {split: [] for split in SPLITS}
    queries: list[Query] = []
    num_shared = 0
    trained = set(trained_on)
    reserved = {name for name, split in split_of.items() if split != "train"}
    held_out = reserved.union(*(query.positives for query in kept if query.written.passage_id in reserved))
    for query in sorted(kept, key=lambda kept_query: kept_query.written.id):
        split = split_of[query.written.passage_id]
        if not (held_out if split == "train" else trained).isdisjoint(query.positives):
            num_shared += 1
            continue
        queries.append(Query(query.written.id, query.written.text, query.written.instruction))
        qrels[split] += [(query.written.id, name, 1) for name in query.positives]
    counts = {split: len({query_id for query_id, _, _ in rows}) for split, rows in qrels.items()}
    if not (counts["dev"] and counts["test"] and (counts["train"] or num_shared)):
        raise InputError(
            f"the {len(kept):,} queries that the critic kept make {counts['train']} to train on, {counts['dev']} for "
            f"dev and {counts['test']} for test; none of the three may be empty. Write more queries (more hours), or "
            "give more documents"
        )
    _write(folder, passages, queries, qrels)
    return DataReport(counts, num_shared)


def split_passages(passages: Sequence[Passage], source_ids: Sequence[str], seed: int) -> dict[str, str]:
    """The split of each passage: the same for all passages of a document, or of a part of one if there are few.

    Test and dev get documents in a random order, until they have their fraction of the queries and enough documents.

    Args:
        passages: the corpus.
        source_ids: for each query, the id of the passage that it was written for.
        seed: of the order.
    """
    documents = {_document_of(passage) for passage in passages}
    name_of = part_of if len(documents) < FEW_DOCUMENTS else _document_of
    names = {passage.id: name_of(passage) for passage in passages}
    num_queries = Counter(names[passage_id] for passage_id in source_ids)
    fewest = min(MIN_HELD_OUT, len(num_queries) // 5)
    waiting = sorted(num_queries, key=lambda name: random.Random(f"{seed}:{name}").random(), reverse=True)
    split_of: dict[str, str] = {}
    for split, least in MIN_FRACTIONS.items():
        fraction = min(0.2, max(least, HELD_OUT_QUERIES / max(1, len(source_ids))))
        num_documents = num_taken = 0
        while waiting and (num_documents < fewest or num_taken < fraction * len(source_ids)):
            name = waiting.pop()
            split_of[name] = split
            num_documents, num_taken = num_documents + 1, num_taken + num_queries[name]
    return {passage_id: split_of.get(name, "train") for passage_id, name in names.items()}


def part_of(passage: Passage) -> str:
    """The name of the part of its document that a passage is in."""
    return f"{_document_of(passage)}:{passage.position // PART_PASSAGES}"


def _document_of(passage: Passage) -> str:
    return passage.document_id or passage.id


def read_judged(path: Path) -> list[Judged]:
    """Read what users searched for and what they chose: lines ``query <tab> id [<tab> grade]``, in UTF-8.

    The id is that of a passage or a document; without a grade it is 1. Empty lines are skipped.

    Raises:
        DataFormatError: a line has another form.
    """
    judged: list[Judged] = []
    for line_number, line in read_lines(path):
        if not line.strip():
            continue
        fields = [field.strip() for field in line.split("\t")]
        if len(fields) not in (2, 3) or not fields[0] or not fields[1]:
            problem = f"must be 'query<TAB>id' or 'query<TAB>id<TAB>grade', found {line[:80]!r}"
            raise DataFormatError(path, problem, line=line_number)
        grade = whole_number(path, line_number, "the grade", fields[2]) if len(fields) == 3 else 1
        judged.append((fields[0], fields[1], grade))
    if not judged:
        raise DataFormatError(path, "holds no queries; each line must be 'query<TAB>id' or 'query<TAB>id<TAB>grade'")
    return judged


def read_examples(path: Path) -> tuple[tuple[str, str], ...]:
    """Read examples for a writer: lines ``passage <tab> query``, in UTF-8; empty lines are skipped.

    Raises:
        DataFormatError: a line has another form.
    """
    examples: list[tuple[str, str]] = []
    for line_number, line in read_lines(path):
        if not line.strip():
            continue
        passage, _, query = (field.strip() for field in line.partition("\t"))
        if not passage or not query:
            raise DataFormatError(path, f"must be 'passage<TAB>query', found {line[:80]!r}", line=line_number)
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
    """The split of each query: fractions of a random order."""
    ordered = sorted(query_ids, key=lambda query_id: random.Random(f"{seed}:{query_id}").random())
    num_dev, num_test = (round(_USER_FRACTIONS[split] * len(ordered)) for split in ("dev", "test"))
    splits = ["dev"] * num_dev + ["test"] * num_test + ["train"] * (len(ordered) - num_dev - num_test)
    return dict(zip(ordered, splits, strict=True))


def _resolve(
    passages: Sequence[Passage], judged: Sequence[Judged], query_ids: Mapping[str, str], index: Index, task: Task
) -> tuple[list[tuple[str, str, int]], int]:
    """Rows (query id, passage id, grade), each pair once, and the number of ids that are not in the corpus."""
    ids = {passage.id for passage in passages}
    by_document: dict[str, list[str]] = {}
    for passage in passages:
        by_document.setdefault(_document_of(passage), []).append(passage.id)
    of_documents = dict.fromkeys(text for text, name, _ in judged if name not in ids and name in by_document)
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
        elif name in by_document:
            ranks = rank_of[query_id]
            chosen = min(by_document[name], key=lambda passage_id: ranks.get(passage_id, len(ranks)))
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
            (json.dumps(_record(query), ensure_ascii=False) for query in queries),
        )
        (temporary / "qrels").mkdir()
        for split, rows in qrels.items():
            lines = ("\t".join(map(str, row)) for row in rows)
            _write_lines(temporary / "qrels" / f"{split}.tsv", ["query-id\tcorpus-id\tscore", *lines])
        counts = Counter({split: len(rows) for split, rows in qrels.items()})
        write_manifest(temporary, KIND, FORMAT_VERSION, {"num_passages": len(passages), "judgements": dict(counts)})


def _record(query: Query) -> dict[str, str]:
    instruction = {} if query.instruction is None else {"instruction": query.instruction}
    return {"_id": query.id, "text": query.text, **instruction}


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(line + "\n" for line in lines)
