"""In which order the candidates of a query are tried, and the random easy negatives."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Sampling = Literal["uniform", "top", "rank_weighted"]


@dataclass(frozen=True, slots=True)
class NegativeCandidate:
    """A passage that may become a hard negative, with its rank (from 0, positives left out) in each list it is in."""

    passage_id: str
    ranks: Mapping[str, int]

    @property
    def best_rank(self) -> int:
        """The better rank where two lists have it."""
        return min(self.ranks.values())

    @property
    def sources(self) -> str:
        """The lists it is in, as ``bm25+cosine``."""
        return "+".join(self.ranks)


def key_of(*parts: object) -> bytes:
    """A hash of the parts, the same in every process."""
    return hashlib.sha256(":".join(map(str, parts)).encode()).digest()


def random_of(*parts: object) -> random.Random:
    """Random numbers that depend on the parts alone."""
    return random.Random(key_of(*parts))


def order_candidates(
    ranked: Mapping[str, Sequence[str]],
    forbidden: Collection[str],
    first_rank: Mapping[str, int],
    sampling: Sampling,
    rng: random.Random,
) -> list[NegativeCandidate]:
    """All candidates of a query in the order in which they are tried; hard negatives are the first that pass.

    Args:
        ranked: list by its source, best first, cut at the range's end.
        forbidden: what is no negative: positives and the same texts.
        first_rank: how many others of each list are left out at its top.
        sampling: ``uniform``: a random order; ``top``: by the better rank, then by id; ``rank_weighted``: drawn one
            after the other without putting back, with chances in proportion to 1 / (rank + 1).
        rng: of the draw; the order of the sources does not matter to it.
    """
    ranks: dict[str, dict[str, int]] = {}
    skipped: set[str] = set()
    for source, found in ranked.items():
        allowed = [passage_id for passage_id in found if passage_id not in forbidden]
        # What either list puts first, another list's lower place does not make a surer negative.
        skipped.update(allowed[: first_rank[source]])
        for rank, passage_id in enumerate(allowed):
            ranks.setdefault(passage_id, {})[source] = rank
    pool = [NegativeCandidate(passage_id, ranks[passage_id]) for passage_id in sorted(ranks.keys() - skipped)]
    if sampling == "top":
        return sorted(pool, key=lambda candidate: (candidate.best_rank, candidate.passage_id))
    if sampling == "uniform":
        return rng.sample(pool, len(pool))
    # Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006: the largest u^(1/weight) first.
    keys = {candidate.passage_id: math.log(1 - rng.random()) * (1 + candidate.best_rank) for candidate in pool}
    return sorted(pool, key=lambda candidate: -keys[candidate.passage_id])


def draw_easy(corpus: Sequence[str], forbidden: Collection[str], num_easy: int, rng: random.Random) -> list[str]:
    """``num_easy`` of the corpus (ids in order), in random order."""
    # So many are drawn that enough remain even if every forbidden passage is among them.
    drawn = rng.sample(range(len(corpus)), min(len(corpus), num_easy + len(forbidden)))
    return [corpus[row] for row in drawn if corpus[row] not in forbidden][:num_easy]
