"""``mining.sampling``: in which order candidates for hard negatives are tried; the first that pass are kept."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from d2llm.core.registry import Registry
from d2llm.recipe.kinds import SectionOfKind


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

    def order(self, pool: Sequence[NegativeCandidate], rng: random.Random) -> Sequence[NegativeCandidate]:
        """A random order."""
        return rng.sample(pool, len(pool))


class Top(Sampling, kind="top"):
    """The best ranks first, of the better rank of the lists, then by id."""

    def order(self, pool: Sequence[NegativeCandidate], rng: random.Random) -> Sequence[NegativeCandidate]:  # noqa: ARG002
        """The best ranks first."""
        return sorted(pool, key=lambda candidate: (candidate.best_rank, candidate.passage_id))


class RankWeighted(Sampling, kind="rank_weighted"):
    """Without replacement, with probabilities proportional to 1 / (rank + 1), of the better rank of the lists."""

    paper = "Efraimidis and Spirakis, Weighted random sampling with a reservoir, 2006"

    def order(self, pool: Sequence[NegativeCandidate], rng: random.Random) -> Sequence[NegativeCandidate]:
        """The largest u^(1/weight) first."""
        keys = {candidate.passage_id: math.log(1 - rng.random()) * (1 + candidate.best_rank) for candidate in pool}
        return sorted(pool, key=lambda candidate: -keys[candidate.passage_id])
