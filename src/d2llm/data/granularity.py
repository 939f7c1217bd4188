"""A generated retrieval task whose queries name what a passage is about, a thing in it, or a detail of that thing.

A vector that holds the gist of a passage may lose its details. After Xu et al., "Dense Retrievers Can Fail on Simple
Queries: Revealing The Granularity Dilemma of Embeddings", EMNLP Findings 2025 (arXiv 2506.08592), whose passages are
captions of images, judged by people. Here the passages are made from parts, so that all judgements are known; the words
and sentences are d2llm's own.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from d2llm.core.errors import InputError
from d2llm.core.types import Passage, Query

Granularity = Literal["scene", "entity", "detail"]
_SCENES = {
    "a wedding": "The bride and the groom cut the cake while their guests applaud.",
    "a football match": "The goalkeeper dives, but the striker scores just before half-time.",
    "a school lesson": "The teacher writes on the blackboard, and two pupils raise their hands.",
    "a visit to the doctor": "The nurse measures the patient's blood pressure and writes it down.",
    "cooking dinner": "She chops onions, stirs the soup and salts the boiling pasta.",
    "a concert": "The violinists tune up before the conductor lifts his baton.",
    "a day at the beach": "Children dig in the sand while their parents swim in the waves.",
    "camping": "They pitch the tent by the forest and light a fire for the night.",
    "a train journey": "The conductor checks tickets while fields rush past the carriage.",
    "a court trial": "The judge listens to the witness, and the lawyer objects twice.",
    "gardening": "He pulls weeds, prunes the roses and waters the seedlings.",
    "a house fire": "Smoke pours from the roof as the brigade unrolls its hoses.",
    "shopping for groceries": "The cashier scans milk and bread as the queue grows longer.",
    "a funeral": "The mourners stand silently around the open grave.",
    "a flight": "The pilot announces turbulence, and the cabin crew sit down.",
    "harvest on a farm": "The combine cuts the wheat, and trailers bring the grain to the barn.",
}
"""What a passage is about, as a query names it, and its first sentence, which does not use these words."""
_THINGS = (
    *("umbrella", "bicycle", "suitcase", "ladder", "balloon", "scarf", "kettle", "lantern", "basket", "guitar"),
    *("armchair", "bucket", "candle", "clock", "curtain", "drum", "envelope", "feather", "glove", "hammer"),
    *("jacket", "kite", "mirror", "notebook", "pillow", "ribbon", "rope", "teapot", "vase", "wallet"),
)
_COLOURS = ("red", "blue", "green", "yellow", "purple", "orange", "white", "grey")
_PLACES = ("in the corner", "on the left", "behind them", "near the edge", "on a wall", "by the door")
_THINGS_PER_PASSAGE = 3


@dataclass(frozen=True)
class GranularitySet:
    """Passages, queries, query_id -> passage_id -> 1, and of which granularity each query is."""

    passages: tuple[Passage, ...]
    queries: tuple[Query, ...]
    qrels: dict[str, dict[str, int]]
    granularity: dict[str, Granularity]


def make_granularity(num_passages: int = 200, *, seed: int = 0) -> GranularitySet:
    """Passages of a scene with three coloured things, and a query for each scene, thing and coloured thing.

    Args:
        num_passages: at least 20.
        seed: seed of scenes, things and colours.

    Raises:
        InputError: there are fewer than 20 passages.
    """
    if num_passages < 20:
        raise InputError(f"num_passages is {num_passages}, but must be at least 20")
    rng = random.Random(seed)
    passages: list[Passage] = []
    relevant: dict[tuple[Granularity, str], dict[str, int]] = {}
    for index in range(num_passages):
        scene = [*_SCENES][index % len(_SCENES)]
        things = [(rng.choice(_COLOURS), thing) for thing in rng.sample(_THINGS, _THINGS_PER_PASSAGE)]
        locations = rng.sample(_PLACES, _THINGS_PER_PASSAGE)
        rest = [
            f"There is a {colour} {thing} {location}."
            for (colour, thing), location in zip(things, locations, strict=True)
        ]
        passages.append(Passage(f"p{index}", " ".join([_SCENES[scene], *rest])))
        views: list[tuple[Granularity, str]] = [("scene", scene)]
        for colour, thing in things:
            views.append(("entity", f"the {thing}"))
            views.append(("detail", f"the {colour} {thing}"))
        for one in views:
            relevant.setdefault(one, {})[f"p{index}"] = 1
    order: tuple[Granularity, ...] = ("scene", "entity", "detail")
    named = sorted(relevant, key=lambda one: (order.index(one[0]), one[1]))
    ids = {one: f"q{index}" for index, one in enumerate(named)}
    return GranularitySet(
        tuple(passages),
        tuple(Query(identifier, text) for (_, text), identifier in ids.items()),
        {ids[one]: judged for one, judged in relevant.items()},
        {identifier: granularity for (granularity, _), identifier in ids.items()},
    )
