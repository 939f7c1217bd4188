"""Minimal pairs: twin items, disjoint vocabularies, and the property that each kind promises."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from generated import minimal_pairs as module
from generated.minimal_pairs import KINDS, SPLITS, content_words, make_minimal_pairs, spelled, write_minimal_pairs

from d2llm.core.errors import InputError

PAIRS = make_minimal_pairs()


def items(split, kind):
    return [item for item in PAIRS[split] if item.kind == kind]


def twins(split, kind):
    kind_items = items(split, kind)
    return list(zip(kind_items[::2], kind_items[1::2], strict=True))


def words(text):
    return Counter(re.findall(r"[\w-]+", text.lower()))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_twins_swap_passages_so_passages_alone_reveal_nothing(split, kind):
    assert len(items(split, kind)) == {"train": 400, "dev": 100, "test": 200}[split]
    for first, second in twins(split, kind):
        assert (first.right, first.wrong) == (second.wrong, second.right)
        assert first.query != second.query
        assert first.right != first.wrong
    keys = {frozenset((a.query, a.right, a.wrong, b.query)) for a, b in twins(split, kind)}
    assert len(keys) == len(twins(split, kind))
    assert len({item.id for item in items(split, kind)}) == len(items(split, kind))


def test_no_query_is_its_own_answer():
    assert all(item.query not in (item.right, item.wrong) for split in SPLITS for item in PAIRS[split])


def test_splits_share_no_content_words():
    def texts(split):
        return " ".join(text for item in PAIRS[split] for text in (item.query, item.right, item.wrong)).lower()

    for split in SPLITS:
        vocabulary = content_words(split)
        used = set(re.findall(r"\w+", texts(split)))
        assert len(vocabulary & used) > 0.9 * len(vocabulary)
        for other in SPLITS:
            if other != split:
                assert not vocabulary & content_words(other)
                assert not vocabulary & set(re.findall(r"\w+", texts(other)))


def test_splits_share_no_spelled_numbers():
    words_by_split = {
        split: set(re.findall(r"\b(?:[a-z]+ty|[a-z]+teen|ten|eleven|twelve)\b(?:-[a-z]+)?", _numbers_text(split)))
        for split in SPLITS
    }
    values = {spelled(number): number for number in range(10, 100)}
    numbers_by_split = {split: {values[word] for word in words_by_split[split]} for split in SPLITS}
    assert all(len(numbers) >= 8 for numbers in numbers_by_split.values())
    assert not numbers_by_split["train"] & numbers_by_split["test"]
    assert not numbers_by_split["train"] & numbers_by_split["dev"]
    assert not numbers_by_split["dev"] & numbers_by_split["test"]


def _numbers_text(split):
    return " ".join(f"{item.query} {item.right}" for item in items(split, "numbers")).lower()


def test_swapped_roles_are_the_same_words_in_another_order():
    for item in items("test", "roles"):
        assert words(item.right) == words(item.wrong)


def test_roles_by_an_independent_parser():
    patterns = [
        (r"The (\w+) was (\w+) by the (\w+)\.", (3, 2, 1)),
        (r"It was the (\w+) who was (\w+) by the (\w+)\.", (3, 2, 1)),
        (r"It was the (\w+) who (\w+) the (\w+)\.", (1, 2, 3)),
        (r"The (\w+) (\w+) the (\w+)\.", (1, 2, 3)),
    ]

    def read(text):
        for pattern, order in patterns:
            if match := re.fullmatch(pattern, text):
                return tuple(match[group] for group in order)
        raise AssertionError(text)

    for item in items("train", "roles"):
        assert read(item.query) == read(item.right)
        agent, action, patient = read(item.right)
        assert read(item.wrong) == (patient, action, agent)


def test_negation_by_an_independent_parser():
    negated = re.compile(r"\b(not|no|never|lacks|unknown)\b", re.IGNORECASE)
    for split in SPLITS:
        for item in items(split, "negation"):
            polarity = [bool(negated.search(text)) for text in (item.query, item.right, item.wrong)]
            assert polarity[0] == polarity[1] != polarity[2], item


def test_numbers_by_an_independent_parser():
    values = {spelled(number): number for number in range(10, 100)}

    def value(text):
        tokens = [values.get(word, word) for word in re.findall(r"[\w-]+", text.lower())]
        (number,) = {int(word) for word in tokens if str(word).isdigit()}
        return number

    for item in items("train", "numbers"):
        assert value(item.query) == value(item.right) != value(item.wrong)
        difference = abs(value(item.right) - value(item.wrong))
        assert difference in (1, 10) or str(value(item.right)) == str(value(item.wrong))[::-1]


def test_entailment_goes_from_special_to_general():
    chains = {
        (special, middle): general for split in SPLITS for special, middle, general in module._WORDS[split].chains
    }

    def noun(text):
        return re.findall(r"\w+", text)[-1]

    for split in SPLITS:
        for proves, follows in twins(split, "entailment"):
            special, middle = noun(proves.right), noun(proves.query)
            assert chains[special, middle] == noun(proves.wrong) == noun(follows.right)
            assert noun(follows.query) == middle
            assert re.match("What proves|Because of what|Which statement implies", proves.query)
            assert re.match("What follows|What can we be sure|Which statement is implied", follows.query)


def test_spelled_by_hand():
    assert [spelled(number) for number in (10, 15, 50, 51, 99)] == [
        "ten",
        "fifteen",
        "fifty",
        "fifty-one",
        "ninety-nine",
    ]
    with pytest.raises(ValueError, match="got 9"):
        spelled(9)


def test_articles_fit_their_nouns():
    for split in SPLITS:
        for item in PAIRS[split]:
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", f"{item.query} {item.right} {item.wrong}")


def test_the_seed_determines_the_pairs():
    few = {"test": 10}
    assert make_minimal_pairs(num_items=few, seed=1) == make_minimal_pairs(num_items=few, seed=1)
    assert make_minimal_pairs(num_items=few, seed=1) != make_minimal_pairs(num_items=few, seed=2)


def test_written_as_a_pair_folder(tmp_path: Path):
    pairs = write_minimal_pairs(tmp_path / "pairs", num_items={"train": 4, "dev": 2, "test": 2}, seed=1)
    for split in SPLITS:
        lines = (tmp_path / "pairs" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        assert records == [
            {"query": item.query, "document": text, "label": label, "kind": item.kind, "item": item.id}
            for item in pairs[split]
            for text, label in ((item.right, 1), (item.wrong, 0))
        ]
        assert len(records) == 2 * len(KINDS) * {"train": 4, "dev": 2, "test": 2}[split]


def test_impossible_sizes_are_rejected():
    with pytest.raises(InputError, match="num_items of dev is 3"):
        make_minimal_pairs(num_items={"dev": 3})
    with pytest.raises(
        InputError, match="dev, entailment: 1000 items were asked for, but the words of this split make"
    ):
        module._items("dev", "entailment", 500, 0)
