"""The limit set: a generated retrieval task in which every pair of n passages is the answer of one query.

It tests how many different answers a scorer can give from vectors of a given width, with very plain texts: persons
and what they like. After Weller, Boratko, Naim and Lee, "On the Theoretical Limitations of Embedding-Based Retrieval"
(2025, arXiv 2508.21038), sections 4 and 5 (LIMIT). All words and sentences here are d2llm's own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from d2llm.core.errors import InputError
from d2llm.core.files import new_folder, write_bytes
from d2llm.core.manifest import write_manifest
from d2llm.core.types import Passage, Query

KIND = "limit-set"
FORMAT_VERSION = 1
SPLITS = ("train", "dev", "test")
_DEV_FRACTION, _TEST_FRACTION = 0.1, 0.3
_NUM_DISTRACTOR_THINGS = 100
_LEAST_PERSONS = 5  # ten queries: one for dev, three for test


def _words(text: str) -> list[str]:
    return text.split()


_FIRST_NAMES = _words("""
Anna Boris Clara David Elena Felix Greta Henry Irene Jonas Karen Louis Maria Niels Olga Peter Quentin Rosa Simon Tessa
Ulrich Vera Walter Xenia Yvonne Zoltan Alma Bruno Celia Dario Edith Frank Gloria Hugo Ida Julian Katja Leo Mona Oscar
""")
_LAST_NAMES = _words("""
Reed Novak Ito Schmidt Okafor Rossi Jensen Moreau Silva Kowalski Haddad Lindqvist Byrne Castro Dubois Eriksen Fischer
Garcia Horvath Ivanov Jansen Kaya Lopez Meyer Nakamura Olsen Petrov Quinn Rahman Santos Tanaka Urban Vargas Weber Yilmaz
Zeman Alvarez Becker Cohen Duarte
""")
_THINGS = _words("""
aardvarks albatrosses alligators alpacas antelopes armadillos baboons badgers barracudas beavers bison bluebirds boars
bumblebees butterflies camels canaries capybaras caribou cheetahs chickadees chimpanzees chipmunks cicadas cobras
cockatoos condors cormorants coyotes crabs cranes crickets crocodiles crows cuckoos dachshunds deer dingoes dolphins
donkeys dragonflies ducks eagles echidnas eels elephants falcons ferrets finches fireflies flamingos foxes frogs
gazelles geckos geese gerbils giraffes goats goldfish gorillas grasshoppers guppies hamsters hawks hedgehogs herons
hippos hornets hummingbirds hyenas ibises iguanas jackals jaguars jellyfish kangaroos kingfishers kiwis koalas ladybugs
larks lemurs leopards lions lizards llamas lobsters lynxes macaws magpies manatees mantises meerkats mongooses moose
moths mules narwhals newts nightingales ocelots octopuses opossums orangutans orcas ospreys ostriches otters owls
oysters pandas panthers parrots peacocks pelicans penguins pheasants piranhas platypuses porcupines puffins pumas
pythons quails quokkas rabbits raccoons ravens reindeer rhinos salamanders scorpions seahorses seals sharks sheep
shrews skunks sloths snails sparrows spiders squid squirrels starlings storks swallows swans tapirs tarantulas termites
tigers toads toucans trout turkeys turtles vipers vultures wallabies walruses wasps weasels whales wolves wombats
woodpeckers yaks zebras almonds apples apricots artichokes asparagus avocados bagels bananas basil beans beetroot
biscuits blackberries blueberries bread broccoli brownies burritos butter cabbage caramel carrots cashews cauliflower
celery cheese cherries chestnuts chickpeas chocolate cider cinnamon coconuts coffee cookies couscous cranberries
croissants cucumbers currants curry custard dates doughnuts dumplings eggplants falafel fennel figs fudge garlic ginger
gooseberries grapefruit guacamole gumbo hazelnuts honey hummus kale ketchup lasagna lavender leeks lemonade lentils
lettuce licorice limes lychees macaroni mangoes marmalade marshmallows marzipan mayonnaise melons milkshakes mint
molasses muffins mushrooms mustard nectarines noodles nougat nutmeg oatmeal olives omelettes onions oranges oregano
pancakes papayas paprika parsley parsnips pasta peaches peanuts pears peas pecans pepper pesto pickles pineapples
pistachios pizza plums polenta pomegranates popcorn porridge potatoes pretzels pudding pumpkins quiche quinoa radishes
raisins ramen raspberries ravioli rhubarb rice risotto rosemary saffron salad salami salmon sauerkraut sausages scones
seaweed sesame sherbet shrimp sorbet spinach strawberries sushi tacos tangerines tea thyme toffee tofu tomatoes
truffles turnips vanilla vinegar waffles walnuts watermelons yoghurt zucchini accordions acrobatics acupuncture
aerobics airplanes algebra anagrams anthems aquariums archery architecture astronomy badminton bagpipes ballads ballet
balloons banjos baseball basketball beaches bells bicycles billiards biology blacksmithing bonfires bonsai bowling
boxing bridges calligraphy camping candles canoes canyons caravans cards carnivals carpentry castles cathedrals caves
cellos ceramics charades chemistry chess choirs circuses clarinets clocks coins comets comics concerts cooking crochet
crosswords cryptography cycling dancing darts deserts dominoes drums dungeons embroidery engines etching fables fairs
fencing festivals fiddles fireworks fishing flutes football forests fossils fountains gardening geography geology
glaciers gliders gloves golf graffiti guitars gymnastics handball harbours harmonicas harps hats heraldry hiking
history hockey horoscopes igloos islands jazz jewellery jigsaws juggling jungles karate kayaks kites knitting lacrosse
lanterns lakes lighthouses limericks linguistics locomotives lullabies magic mandolins maps marathons marbles
marionettes masks meadows medals meditation meteors microscopes mime mirrors mosaics motorcycles mountains museums
musicals mythology novels oboes operas orchestras orchids origami paddling paintings parachutes parades pendulums
perfume philosophy photography pianos picnics pinball planets poetry poker pottery puppets puzzles pyramids quilts
quizzes radios railways rainbows riddles rivers robots rowing rugby sailing sandcastles satellites saunas saxophones
scarves sculpture shipwrecks singing skating skiing skyscrapers sledges snorkelling snow soccer sonnets squash stamps
statues steamboats submarines sundials sunsets surfing swimming symphonies tambourines tapestries tattoos telescopes
tennis theatre thunderstorms trains trampolines trombones trumpets tulips tunnels typewriters ukuleles umbrellas
unicycles valleys violins volcanoes volleyball waltzes waterfalls weaving windmills wrestling xylophones yachts yoga
zeppelins
""")


@dataclass(frozen=True)
class LimitSet:
    """Passages (the persons first, then the distractors), queries, and split -> query_id -> passage_id -> 1."""

    passages: tuple[Passage, ...]
    queries: tuple[Query, ...]
    qrels: dict[str, dict[str, dict[str, int]]]


def all_pairs(num_passages: int) -> list[tuple[int, int]]:
    """The answers of the limit set's queries: every pair i < j of ``num_passages`` passages, n (n - 1) / 2 of them."""
    return list(combinations(range(num_passages), 2))


def max_persons(num_distractors: int = 0) -> int:
    """The largest number of persons for which there are enough things: each pair needs its own."""
    available = len(_THINGS) - (_NUM_DISTRACTOR_THINGS if num_distractors else 0)
    persons = _LEAST_PERSONS
    while (persons + 1) * persons // 2 <= available:
        persons += 1
    return persons


def make_limit_set(num_persons: int = 32, *, num_distractors: int = 0, seed: int = 0) -> LimitSet:
    """Persons of whom each two share one thing that nobody else likes, with a query for each thing.

    Each person likes ``num_persons - 1`` things, named in random order. A distractor likes as many, of 100 other things
    that no query mentions. 60 % of the queries, chosen at random, are for training, 10 % for dev and 30 % for test; the
    things of the splits are disjoint, the passages are the same.

    Args:
        num_persons: n, at least 5. The limit set has n (n - 1) / 2 queries, each with 2 relevant passages.
        num_distractors: passages that answer no query.
        seed: seed for names, things, order and splits.

    Raises:
        InputError: fewer than 5 persons, or more than there are words for (``max_persons``), or a negative number.
    """
    most = max_persons(num_distractors)
    if not _LEAST_PERSONS <= num_persons <= most:
        raise InputError(
            f"num_persons is {num_persons}, but must be from {_LEAST_PERSONS} to {most}: "
            "each pair of persons needs its own thing"
        )
    most_names = len(_FIRST_NAMES) * len(_LAST_NAMES) - num_persons
    if not 0 <= num_distractors <= most_names:
        raise InputError(
            f"num_distractors is {num_distractors}, but must be from 0 to {most_names}, the number of names available"
        )
    generator = np.random.default_rng(seed)
    pairs = all_pairs(num_persons)
    things = [_THINGS[index] for index in generator.permutation(len(_THINGS))]
    queried, others = things[: len(pairs)], things[len(pairs) : len(pairs) + _NUM_DISTRACTOR_THINGS]

    liked: list[list[str]] = [[] for _ in range(num_persons)]
    for thing, pair in zip(queried, pairs, strict=True):
        for person in pair:
            liked[person].append(thing)
    num_liked = min(num_persons - 1, len(others))
    liked.extend(_drawn(others, num_liked, generator) for _ in range(num_distractors))
    passages = tuple(
        Passage(f"p{index}", f"{name} likes {_listed(_drawn(things, len(things), generator))}.")
        for index, (name, things) in enumerate(zip(_names(len(liked), generator), liked, strict=True))
    )
    queries = tuple(Query(f"q{index}", f"Who likes {thing}?") for index, thing in enumerate(queried))
    return LimitSet(passages, queries, _splits(pairs, generator))


def write_limit_set(folder: Path, *, num_persons: int = 32, num_distractors: int = 0, seed: int = 0) -> LimitSet:
    """Write ``make_limit_set`` as a BEIR folder that ``read_beir`` and ``d2llm evaluate`` read, atomically.

    Raises:
        InputError: numbers out of range (``make_limit_set``), or ``folder`` holds something else.
    """
    limit_set = make_limit_set(num_persons, num_distractors=num_distractors, seed=seed)
    with new_folder(folder, kind=KIND) as temporary:
        corpus = [{"_id": p.id, "title": p.title, "text": p.text} for p in limit_set.passages]
        _write_lines(temporary / "corpus.jsonl", [json.dumps(record) for record in corpus])
        _write_lines(
            temporary / "queries.jsonl", [json.dumps({"_id": q.id, "text": q.text}) for q in limit_set.queries]
        )
        for split, judged in limit_set.qrels.items():
            lines = [f"{query}\t{passage}\t1" for query, grades in judged.items() for passage in grades]
            _write_lines(temporary / "qrels" / f"{split}.tsv", ["query-id\tcorpus-id\tscore", *lines])
        settings = {"num_persons": num_persons, "num_distractors": num_distractors, "seed": seed}
        write_manifest(temporary, KIND, FORMAT_VERSION, settings)
    return limit_set


def _splits(pairs: list[tuple[int, int]], generator: np.random.Generator) -> dict[str, dict[str, dict[str, int]]]:
    num_dev, num_test = round(_DEV_FRACTION * len(pairs)), round(_TEST_FRACTION * len(pairs))
    order = generator.permutation(len(pairs)).tolist()
    split_pairs = order[num_dev + num_test :], order[:num_dev], order[num_dev : num_dev + num_test]
    return {
        split: {f"q{index}": {f"p{person}": 1 for person in pairs[index]} for index in sorted(part)}
        for split, part in zip(SPLITS, split_pairs, strict=True)
    }


def _names(count: int, generator: np.random.Generator) -> list[str]:
    drawn = generator.choice(len(_FIRST_NAMES) * len(_LAST_NAMES), count, replace=False).tolist()
    return [f"{_FIRST_NAMES[index % len(_FIRST_NAMES)]} {_LAST_NAMES[index // len(_FIRST_NAMES)]}" for index in drawn]


def _drawn(values: list[str], count: int, generator: np.random.Generator) -> list[str]:
    return [values[index] for index in generator.choice(len(values), count, replace=False)]


def _listed(things: list[str]) -> str:
    return f"{', '.join(things[:-1])} and {things[-1]}"


def _write_lines(path: Path, lines: list[str]) -> None:
    write_bytes(path, "".join(line + "\n" for line in lines).encode())
