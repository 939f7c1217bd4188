"""From lists to hard negatives: what ``mine`` and mining anew during training share."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from d2llm.core.errors import InputError
from d2llm.core.recipe import MiningConfig
from d2llm.core.types import Query
from d2llm.data.beir import Dataset
from d2llm.data.same_text import SameText
from d2llm.training.mining.audit import Audit
from d2llm.training.mining.draw import order_candidates, random_of
from d2llm.training.mining.ranking import EncoderRanking, Lists
from d2llm.training.mining.select import Check, Selection, near_duplicate_check, relative_margin_check, select
from d2llm.training.mining.teacher import TeacherCheck

_QUERIES_AT_ONCE = 32  # whose candidates the teacher judges together


@dataclass(frozen=True)
class Ranked:
    """Each source's list of each query, how many at its top are left out, and who made the encoder's list."""

    lists: Mapping[str, Lists]
    first_rank: Mapping[str, int]
    encoder: EncoderRanking | None = None
    encoder_name: str = "cosine"


class DatasetJudgements:
    """What the data set says of a query's passages, in any split."""

    def __init__(self, dataset: Dataset, same_text: SameText) -> None:
        self._same_text = same_text
        self._relevant: dict[str, set[str]] = {}
        self._refused: dict[str, set[str]] = {}
        for of_split in dataset.qrels.values():
            for query_id, grades in of_split.items():
                for passage_id, grade in grades.items():
                    if passage_id not in dataset.passages:
                        continue
                    kind = self._relevant if grade > 0 else self._refused
                    kind.setdefault(query_id, set()).add(passage_id)

    def relevant(self, query_id: str, positives: Sequence[str]) -> set[str]:
        """What must not be a negative for what the data set says; ``positives`` are of the plan."""
        return self._relevant.get(query_id, set()) | set(positives)

    def repeats(self, query_id: str, positives: Sequence[str]) -> set[str]:
        """Other passages with the text of one of those."""
        return self._same_text.as_any_of(self.relevant(query_id, positives))

    def negative(self, query_id: str) -> set[str]:
        """What is judged not relevant."""
        return self._refused.get(query_id, set()) - self._relevant.get(query_id, set())


def choose(
    dataset: Dataset,
    queries: Sequence[Query],
    positives: Mapping[str, tuple[str, ...]],
    forbidden: Callable[[str], set[str]],
    judged: DatasetJudgements,
    ranked: Ranked,
    config: MiningConfig,
    *,
    seeds: tuple[object, ...],
    teacher: TeacherCheck | None,
    audit: Audit,
) -> Iterator[Selection]:
    """The hard negatives of each query, one query after the other, in their order.

    Args:
        dataset: passages and judgements.
        queries: in the order of the lists.
        positives: of each query.
        forbidden: query id -> what is no candidate.
        judged: what the data set says.
        ranked: the lists.
        config: how many to draw, how, and what to drop.
        seeds: the draw of a query depends on these and its id.
        teacher: for the teacher's margin.
        audit: told of every query.
    """
    checks = _checks(dataset, ranked, config)
    for start in range(0, len(queries), _QUERIES_AT_ONCE):
        block = [
            Selection(
                query,
                positives[query.id],
                order_candidates(
                    {source: lists[place] for source, lists in ranked.lists.items()},
                    forbidden(query.id),
                    ranked.first_rank,
                    config.sampling,
                    random_of(*seeds, query.id),
                ),
                judged.negative(query.id),
                place,
            )
            for place, query in enumerate(queries[start : start + _QUERIES_AT_ONCE], start=start)
        ]
        select(block, config.num_hard, checks, teacher)
        for item in block:
            audit.add(item, _scores(item, ranked, teacher))
            if teacher is not None:
                teacher.keep(item.query.id, (*item.positives, *(c.passage_id for c in item.kept)))
            yield item
    if teacher is not None:
        teacher.write()


@contextmanager
def work_folder(work: Path | None) -> Generator[Path]:
    """A folder for the files of a run: the given one, made if missing, or one that is deleted at the end."""
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
        yield work
        return
    # On Windows a file that is still mapped cannot be deleted; the system's own cleaning takes it later.
    with tempfile.TemporaryDirectory(prefix="d2llm-mine-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _checks(dataset: Dataset, ranked: Ranked, config: MiningConfig) -> list[Check]:
    checks: list[Check] = []
    if config.near_duplicate < 1:
        checks.append(near_duplicate_check(dataset.passages, config.near_duplicate))
    if config.relative_margin is not None:
        if ranked.encoder is None:
            raise InputError("mining has a relative_margin, but no encoder ranks; add 'encoder' to mining.sources")
        checks.append(relative_margin_check(ranked.encoder, config.relative_margin))
    return checks


def _scores(item: Selection, ranked: Ranked, teacher: TeacherCheck | None) -> dict[str, dict[str, float]]:
    """What encoder and teacher say of the positives and of what was kept or dropped."""
    negatives = [c.passage_id for c in item.kept] + [drop.candidate.passage_id for drop in item.dropped]
    ids = [*item.positives, *negatives]
    scores: dict[str, dict[str, float]] = {}
    if ranked.encoder is not None:
        scores[ranked.encoder_name] = dict(zip(ids, ranked.encoder.scores(item.place, ids).tolist(), strict=True))
    if teacher is not None:
        said = ((passage_id, teacher.log_odds(item.query.id, passage_id)) for passage_id in ids)
        scores["teacher"] = {passage_id: value for passage_id, value in said if value is not None}
    return scores
