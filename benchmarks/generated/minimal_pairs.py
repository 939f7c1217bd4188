"""Minimal pairs: a query and two passages with nearly the same words, one of which is right.

Four kinds: negation, swapped roles, numbers, and the direction of entailment. Items come in twins: the same two
passages with two queries, each of which makes the other passage right. So a scorer that looks at the passages alone is
right in exactly half of the items. The content words of train, dev and test are disjoint; the sentence templates are
shared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, get_args

import numpy as np

from d2llm.core.errors import InputError
from d2llm.core.files import new_folder, write_bytes
from d2llm.core.manifest import write_manifest

Kind = Literal["negation", "roles", "numbers", "entailment"]
Split = Literal["train", "dev", "test"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SPLITS: tuple[Split, ...] = get_args(Split)
FOLDER_KIND = "minimal-pairs"
FORMAT_VERSION = 1
DEFAULT_ITEMS: Mapping[Split, int] = {"train": 400, "dev": 100, "test": 200}
_DRAWS_PER_TWIN = 50
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class MinimalPair:
    """A query with its right and its wrong passage. Twins are adjacent and have their passages exchanged."""

    id: str
    kind: Kind
    query: str
    right: str
    wrong: str


@dataclass(frozen=True, slots=True)
class _Words:
    """Content words of one split. ``chains`` are special < middle < general."""

    names: tuple[str, ...]
    objects: tuple[str, ...]
    cities: tuple[str, ...]
    agents: tuple[str, ...]
    actions: tuple[str, ...]
    chains: tuple[tuple[str, str, str], ...]
    chain_verbs: tuple[str, ...]
    numbers: tuple[int, ...]


def make_minimal_pairs(
    *, num_items: Mapping[Split, int] = DEFAULT_ITEMS, seed: int = 0
) -> dict[Split, tuple[MinimalPair, ...]]:
    """Items of every split, kind after kind, no two alike.

    Args:
        num_items: items of each kind, by split; even numbers, because items come in twins.
        seed: of the sampling. The words of the splits do not depend on it.

    Raises:
        InputError: an odd or negative number, or more items than the words of a split can make.
    """
    for split, number in num_items.items():
        if number < 0 or number % 2:
            raise InputError(f"num_items of {split} is {number}, but items come in twins: use an even number")
    return {
        split: tuple(item for kind in KINDS for item in _items(split, kind, num_items[split] // 2, seed))
        for split in SPLITS
        if split in num_items
    }


def write_minimal_pairs(
    folder: Path, *, num_items: Mapping[Split, int] = DEFAULT_ITEMS, seed: int = 0
) -> dict[Split, tuple[MinimalPair, ...]]:
    """Write ``make_minimal_pairs`` as a pair folder, atomically.

    Each item is two lines of ``{train,dev,test}.jsonl``: ``query``, ``document``, ``label`` (1 right, 0 wrong),
    ``kind``, and ``item``, which the two lines share.

    Raises:
        InputError: numbers out of range (``make_minimal_pairs``), or ``folder`` holds something else.
    """
    pairs = make_minimal_pairs(num_items=num_items, seed=seed)
    with new_folder(folder, kind=FOLDER_KIND) as temporary:
        for split, items in pairs.items():
            lines = [
                json.dumps({"query": item.query, "document": text, "label": label, "kind": item.kind, "item": item.id})
                for item in items
                for text, label in ((item.right, 1), (item.wrong, 0))
            ]
            write_bytes(temporary / f"{split}.jsonl", "".join(line + "\n" for line in lines).encode())
        settings = {"num_items": dict(num_items), "seed": seed}
        write_manifest(temporary, FOLDER_KIND, FORMAT_VERSION, settings)
    return pairs


def content_words(split: Split) -> frozenset[str]:
    """The lower-cased words and the numbers (digits) that occur only in this split's sentences."""
    words = _WORDS[split]
    texts = (*words.names, *words.objects, *words.cities, *words.agents, *words.actions, *words.chain_verbs)
    chains = (word for chain in words.chains for word in chain)
    return frozenset(text.lower() for text in (*texts, *chains)) | {str(number) for number in words.numbers}


def spelled(number: int) -> str:
    """The English words of a number from 10 to 99.

    Raises:
        ValueError: another number.
    """
    if not 10 <= number <= 99:
        raise ValueError(f"only numbers from 10 to 99 are spelled, got {number}")
    if number < 20:
        return _TEENS[number - 10]
    tens, ones = _TENS[number // 10 - 2], number % 10
    return f"{tens}-{_ONES[ones - 1]}" if ones else tens


@dataclass(frozen=True, slots=True)
class _Twin:
    """Two passages, and for each the query that makes it right."""

    passages: tuple[str, str]
    queries: tuple[str, str]


def _items(split: Split, kind: Kind, num_twins: int, seed: int) -> list[MinimalPair]:
    generator = np.random.default_rng([seed, SPLITS.index(split), KINDS.index(kind)])
    twins: dict[frozenset[str], _Twin] = {}
    for _ in range(_DRAWS_PER_TWIN * num_twins):
        if len(twins) == num_twins:
            break
        twin = _MAKERS[kind](_WORDS[split], generator)
        twins.setdefault(frozenset((*twin.passages, *twin.queries)), twin)
    if len(twins) < num_twins:
        raise InputError(
            f"{split}, {kind}: {num_twins * 2} items were asked for, but the words of this split make only about "
            f"{len(twins) * 2}; ask for fewer"
        )
    items: list[MinimalPair] = []
    for number, twin in enumerate(twins.values()):
        (first, second), queries = twin.passages, twin.queries
        items.append(MinimalPair(f"{split}-{kind}-{number}a", kind, queries[0], first, second))
        items.append(MinimalPair(f"{split}-{kind}-{number}b", kind, queries[1], second, first))
    return items


def _negation(words: _Words, generator: np.random.Generator) -> _Twin:
    subject = _one(words.names, generator)
    frames, thing = _NEGATION_OWNING, _with_article(_one(words.objects, generator))
    if generator.random() < 0.5:
        frames, thing = _NEGATION_TRAVEL, _one(words.cities, generator)
    query_frame, passage_frame = _two(frames, generator)

    def fill(frame: str) -> str:
        return _sentence(frame.format(name=subject, thing=thing, bare=thing.partition(" ")[2]))

    return _Twin((fill(passage_frame[0]), fill(passage_frame[1])), (fill(query_frame[0]), fill(query_frame[1])))


def _roles(words: _Words, generator: np.random.Generator) -> _Twin:
    first, second = _two(words.agents, generator)
    action = _one(words.actions, generator)
    query_frame, passage_frame = _two(_ROLES, generator)

    def fill(frame: str, agent: str, patient: str) -> str:
        return _sentence(frame.format(agent=agent, patient=patient, action=action))

    return _Twin(
        (fill(passage_frame, first, second), fill(passage_frame, second, first)),
        (fill(query_frame, first, second), fill(query_frame, second, first)),
    )


def _numbers(words: _Words, generator: np.random.Generator) -> _Twin:
    values = _one(_confusable(words.numbers), generator)
    frames, thing = _NUMBERS_PRICE, _one(words.objects, generator)
    if generator.random() < 0.5:
        frames, thing = _NUMBERS_AGE, _one(words.names, generator)
    query_frame, passage_frame = _two(frames, generator)
    query_form, passage_form = (_one((str, spelled), generator) for _ in range(2))

    def fill(frame: str, form: Callable[[int], str], value: int) -> str:
        return _sentence(frame.format(thing=thing, number=form(value)))

    first, second = values
    return _Twin(
        (fill(passage_frame, passage_form, first), fill(passage_frame, passage_form, second)),
        (fill(query_frame, query_form, first), fill(query_frame, query_form, second)),
    )


def _entailment(words: _Words, generator: np.random.Generator) -> _Twin:
    """The passages own a special or a general thing; one proves owning the middle thing, the other follows from it."""
    subject, verb = _one(words.names, generator), _one(words.chain_verbs, generator)
    special, middle, general = (_with_article(word) for word in _one(words.chains, generator))
    proves, follows = _one(_ENTAILMENT, generator)
    statement = f"{subject} {verb} {middle}"
    return _Twin(
        (f"{subject} {verb} {special}.", f"{subject} {verb} {general}."),
        (proves.format(statement=statement), follows.format(statement=statement)),
    )


def _confusable(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs with swapped digits (15, 51), or that differ in one digit by one (15, 16; 15, 25)."""
    return [
        (low, high)
        for low in numbers
        for high in numbers
        if low < high and (str(low) == str(high)[::-1] or high - low in (1, 10))
    ]


def _one(values: Sequence[_T], generator: np.random.Generator) -> _T:
    return values[int(generator.integers(len(values)))]


def _two(values: Sequence[_T], generator: np.random.Generator) -> tuple[_T, _T]:
    first, second = generator.choice(len(values), 2, replace=False).tolist()
    return values[first], values[second]


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


_TEENS = ("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_ONES = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# Each template with its negation. Query and passages use different templates, so that words alone reveal nothing.
_NEGATION_OWNING = (
    ("{name} owns {thing}.", "{name} does not own {thing}."),
    ("{name} has {thing}.", "{name} lacks {thing}."),
    ("{thing} belongs to {name}.", "no {bare} belongs to {name}."),
    ("{name} is the owner of {thing}.", "{name} is not the owner of {thing}."),
    ("there is {thing} in the hands of {name}.", "there is no {bare} in the hands of {name}."),
)
_NEGATION_TRAVEL = (
    ("{name} visited {thing}.", "{name} did not visit {thing}."),
    ("{name} has been to {thing}.", "{name} has never been to {thing}."),
    ("{name} made a trip to {thing}.", "{name} made no trip to {thing}."),
    ("{thing} is a place that {name} knows.", "{thing} is a place unknown to {name}."),
)
_ROLES = (
    "the {agent} {action} the {patient}.",
    "the {patient} was {action} by the {agent}.",
    "it was the {agent} who {action} the {patient}.",
    "it was the {patient} who was {action} by the {agent}.",
)
_NUMBERS_PRICE = (
    "the {thing} costs {number} euros.",
    "the price of the {thing} is {number} euros.",
    "{number} euros were paid for the {thing}.",
)
_NUMBERS_AGE = (
    "{thing} is {number} years old.",
    "the age of {thing} is {number}.",
    "{thing} was born {number} years ago.",
)
_ENTAILMENT = (
    ("What proves that {statement}?", "What follows from this: {statement}?"),
    ("Because of what can we be sure that {statement}?", "What can we be sure of because {statement}?"),
    ("Which statement implies that {statement}?", "Which statement is implied if {statement}?"),
)
_MAKERS: Mapping[Kind, Callable[[_Words, np.random.Generator], _Twin]] = {
    "negation": _negation,
    "roles": _roles,
    "numbers": _numbers,
    "entailment": _entailment,
}


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _chains(text: str) -> tuple[tuple[str, str, str], ...]:
    """Lines of the form ``general > middle: special special; middle: ...``."""
    chains: list[tuple[str, str, str]] = []
    for line in text.strip().splitlines():
        general, middles = line.split(" > ")
        for part in middles.split("; "):
            middle, specials = part.split(": ")
            chains.extend((special, middle, general) for special in specials.split())
    return tuple(chains)


def _with_lowest_digit(*digits: int) -> tuple[int, ...]:
    """Numbers whose lower digit is one of ``digits``, so that 15 and 51, or 15 and 16, are in the same split."""
    return tuple(number for number in range(10, 100) if min(number // 10, number % 10) in digits)


_WORDS: Mapping[Split, _Words] = {
    "train": _Words(
        names=_words("""
            Anna Boris Clara David Elena Felix Greta Henry Irene Jonas Karen Louis Maria Niels Olga Peter Rosa Simon
            Tessa Walter Yvonne Bruno Celia Dario"""),
        objects=_words("""
            kettle ladder piano tent wallet lamp mirror guitar carpet candle basket blanket bottle bucket pillow
            radio razor ribbon ring robe saddle scooter shovel stove suitcase teapot telescope towel trumpet umbrella
            vase violin whistle anchor balloon barrel bench brush cushion drum"""),
        cities=_words("""
            Paris Oslo Madrid Vienna Prague Lisbon Dublin Athens Warsaw Helsinki Cairo Lima Quito Tokyo Seoul Hanoi
            Delhi Nairobi Accra Toronto Boston Chicago Denver Sydney"""),
        agents=_words("""
            nurse pilot baker farmer lawyer waiter tailor painter banker butcher dentist doctor gardener hunter judge
            librarian mechanic miner monk plumber poet priest sailor singer soldier student teacher thief
            barber"""),
        actions=_words("""
            chased followed helped watched called pushed pulled praised blamed thanked attacked warned hired invited
            tricked trained greeted ignored accused defeated"""),
        chains=_chains("""
animal > dog: poodle beagle terrier bulldog dalmatian; bird: sparrow parrot eagle owl; horse: pony stallion mustang
plant > tree: oak birch maple willow; flower: rose tulip daisy orchid; herb: basil thyme
vehicle > car: limousine convertible taxi; boat: canoe kayak ferry; plane: glider jet
weapon > sword: sabre rapier; gun: rifle pistol musket; knife: dagger machete"""),
        chain_verbs=_words("kept bought drew"),
        numbers=_with_lowest_digit(0, 1, 2, 5, 7, 8, 9),
    ),
    "dev": _Words(
        names=_words("Gloria Hugo Ida Julian Katja Leo Mona Oscar"),
        objects=_words("bracelet calculator camera clock compass envelope fan globe harp helmet kite lantern"),
        cities=_words("Rome Riga Kyiv Tunis Bogota Manila Austin Perth"),
        agents=_words("actor chef clerk dancer editor guard historian porter"),
        actions=_words("kicked admired insulted rescued questioned tackled"),
        chains=_chains("""
tool > saw: hacksaw jigsaw; hammer: mallet sledgehammer gavel
building > house: cottage bungalow villa; church: cathedral chapel"""),
        chain_verbs=_words("sold rented"),
        numbers=_with_lowest_digit(4),
    ),
    "test": _Words(
        names=_words("Ulrich Vera Xenia Zoltan Alma Edith Frank Quentin Agnes Bertha Conrad Doris"),
        objects=_words("""
            microphone necklace notebook oven painting pencil purse puppet racket sofa scarf shield sledge spoon
            stapler statue sweater table thermometer trophy trunk typewriter wardrobe zither"""),
        cities=_words("""
            Berlin London Geneva Naples Seville Zagreb Havana Santiago Bangkok Jakarta Dakar Lagos Montreal Seattle
            Houston Auckland"""),
        agents=_words("""
            architect astronaut blacksmith carpenter detective engineer fisherman journalist king magician merchant
            musician philosopher prisoner shepherd surgeon"""),
        actions=_words("arrested betrayed comforted deceived hugged interviewed mocked outran photographed recognised"),
        chains=_chains("""
garment > hat: beret bonnet sombrero turban; shoe: sandal slipper loafer clog; coat: parka raincoat anorak
instrument > horn: bugle tuba cornet; flute: piccolo recorder
container > box: crate casket carton; jar: urn amphora; bag: backpack satchel briefcase"""),
        chain_verbs=_words("found borrowed stole"),
        numbers=_with_lowest_digit(3, 6),
    ),
}
