"""The sections ``[data]``, ``[mining]`` and ``[labelling]``."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from d2llm.core.registry import Registry
from d2llm.core.types import Task
from d2llm.recipe.sections import Section, SectionOfKind, StudentName


class DataConfig(Section):
    """One data set of a recipe: a retrieval set in BEIR layout, or a set of labelled pairs."""

    path: str
    """Location of the data set; the last part is its name. ``--data`` sets the location on another machine."""
    about: str = ""
    """What the data set contains, its licence and where to get it, for users who do not have it."""
    task: Task = "asymmetric"
    instruction: str | None = None
    """A text that the student reads before each query of this set, in place of ``student.backbone.query_prefix``, in
    training and on dev; it counts in ``max_query_tokens``. Give a search the same ``instruction`` (E5-instruct). A
    query with an ``instruction`` of its own in the data set has that (Gecko)."""
    max_queries: int | None = Field(default=None, ge=1)
    """Train on a random sample of this many queries."""
    max_labelled: int | None = Field(default=None, ge=1)
    """Let the teacher label this many of them, at random or as ``labelling`` says; ``training.unlabelled`` says what
    happens to the others. For a teacher that is slow compared with the student."""
    exclude_shared_passages: bool = True
    """Leave out training queries that share a positive with a dev or test query, so that dev and test passages have
    never been positives. If all splits share one small corpus (intents, FAQ), nothing would be left: set this to false,
    but note that dev and test then measure unseen queries only, not unseen passages. Of labelled pairs, only those are
    left out that dev or test have too."""


@dataclass(frozen=True, slots=True)
class NegativeCandidate:
    """A passage that may become a hard negative, with its rank (from 0, without positives) in each list it is in."""

    passage_id: str
    ranks: Mapping[str, int]

    @property
    def best_rank(self) -> int:
        """Its best rank in any list."""
        return min(self.ranks.values())

    @property
    def sources(self) -> str:
        """The names of the lists it is in, such as ``bm25+cosine``."""
        return "+".join(self.ranks)


class Sampling(SectionOfKind):
    """How hard negatives are drawn from the range of the lists.

    Example::

        class Latest(Sampling, kind="latest"):
            def order(self, pool, rng):
                return sorted(pool, key=lambda candidate: candidate.passage_id, reverse=True)
    """

    kinds: ClassVar[Registry[Any]] = Registry(
        "sampling", dict.fromkeys(("uniform", "top", "rank_weighted"), __name__), "d2llm.samplings"
    )
    default_kind: ClassVar[str] = "uniform"

    def order(self, pool: Sequence[NegativeCandidate], rng: random.Random) -> Sequence[NegativeCandidate]:
        """A query's candidates, which are sorted by id, in the order in which they are tried; all of them.

        ``rng`` depends on the recipe's seed and the query.
        """
        raise NotImplementedError


class Uniform(Sampling, kind="uniform"):
    """A random order."""

    measured = "not measured: which negatives a query gets was compared by their sources, not by their order"

    def order(self, pool: Sequence[NegativeCandidate], rng: random.Random) -> Sequence[NegativeCandidate]:
        """A random order."""
        return rng.sample(pool, len(pool))


class Top(Sampling, kind="top"):
    """The best ranks first, of the better rank of the lists, then by id."""

    measured = "not measured, as `uniform`"

    def order(self, pool: Sequence[NegativeCandidate], rng: random.Random) -> Sequence[NegativeCandidate]:
        """The best ranks first."""
        return sorted(pool, key=lambda candidate: (candidate.best_rank, candidate.passage_id))


class RankWeighted(Sampling, kind="rank_weighted"):
    """Without replacement, with probabilities proportional to 1 / (rank + 1), of the better rank of the lists."""

    measured = "not measured, as `uniform`"
    paper = "Efraimidis and Spirakis, Weighted random sampling with a reservoir, 2006"

    def order(self, pool: Sequence[NegativeCandidate], rng: random.Random) -> Sequence[NegativeCandidate]:
        """The largest u^(1/weight) first."""
        keys = {candidate.passage_id: math.log(1 - rng.random()) * (1 + candidate.best_rank) for candidate in pool}
        return sorted(pool, key=lambda candidate: -keys[candidate.passage_id])


class MiningConfig(Section):
    """How to mine negatives for the training plan. Options are named as in sentence-transformers'
    ``mine_hard_negatives``.
    """

    num_hard: int = Field(default=8, ge=0)
    num_easy: int = Field(default=2, ge=0)
    sources: tuple[Literal["bm25", "encoder"], ...] = ("bm25", "encoder")
    """Rankings that provide candidates for hard negatives: their union, without the positives."""
    student: StudentName | None = None
    """The encoder: a trained student's folder or name, which ranks by its full score. By default the recipe's backbone
    before training, which ranks by its cosine."""
    range_min: int = Field(default=0, ge=0)
    """Skip this many passages at the top of each list, not counting positives: the most likely false negatives."""
    range_max: int = Field(default=50, ge=1)
    """How many passages of each list are candidates."""
    sampling: Sampling = Uniform()
    """How to draw from the range: uniformly, the best ranks first (top), or weighted by 1 / rank (rank_weighted; the
    better rank of the two lists). Other packages can add kinds."""
    near_duplicate: float = Field(default=0.9, gt=0, le=1)
    """Drop a candidate if its text is more similar to a positive's than this (Jaccard similarity of character
    trigrams); 1 drops only identical texts."""
    relative_margin: float | None = Field(default=None, ge=0)
    """Drop a candidate if the encoder scores it above the mean score of the positives minus this fraction of that mean;
    0.05 is a common value."""
    teacher_margin: float | None = None
    """Drop a candidate if its teacher log-odds are above the mean log-odds of the positives minus this margin. Costs
    one teacher pass per candidate; the scores are kept in the label store. A run that tunes the teacher first mines
    without the margin, and afterwards with it and the tuned teacher."""

    @model_validator(mode="after")
    def _check_ranges(self) -> MiningConfig:
        if not self.sources:
            raise ValueError("sources is empty; name bm25, encoder or both")
        if self.range_min >= self.range_max:
            raise ValueError(f"range_min is {self.range_min}, but must be below range_max, which is {self.range_max}")
        return self


class LabellingConfig(Section):
    """Which queries the teacher labels, if ``max_labelled`` of a data set does not allow for all, and what it may cost.

    The limits are those of one call of ``label``, and of what one call of ``distill`` asks (``training.unjudged``,
    ``training.in_batch_labels``); the next continues where it stopped.
    """

    compared_students: tuple[StudentName, StudentName] | None = None
    """Two students, as folders or names, such as those before and after some training: the queries whose passages they
    rank most differently are labelled. By default a random sample is."""
    mistaken_student: StudentName | None = None
    """A student, a folder or a name: the queries are labelled at which it scores a hard negative farthest above all
    positives (the hard negatives of PGKD)."""
    unsure_student: StudentName | None = None
    """A student, a folder or a name: queries are drawn at which it is unsure, as far as the teacher's errors allow
    (Robust Active Distillation)."""
    teacher_errors: float = Field(default=0.2, ge=0, lt=1)
    """The fraction of queries that the teacher gets wrong, for ``unsure_student``: the more, the more evenly queries
    are drawn; with 0 the most uncertain ones are labelled."""
    max_minutes: float | None = Field(default=None, gt=0)
    max_tokens: int | None = Field(default=None, gt=0)
    """Tokens that the teacher reads and writes."""
    max_cost: float | None = Field(default=None, gt=0)
    """In the currency of the prices in ``teacher.remote``."""

    @model_validator(mode="after")
    def _check_choice(self) -> LabellingConfig:
        names = ("compared_students", "mistaken_student", "unsure_student")
        chosen = [name for name in names if getattr(self, name)]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} each choose the queries: leave only one of them")
        return self
