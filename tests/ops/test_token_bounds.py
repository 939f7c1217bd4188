"""A limit of tokens is one of text: counts of a tokenizer against those of a model that reads every byte."""

from __future__ import annotations

import base64
import random
import string

import pytest

from d2llm.core.errors import ModelNotFoundError
from d2llm.models.length_limit import TextLengths
from d2llm.models.sources import find_model, load_tokenizer
from d2llm.models.tokens import token_ends
from d2llm.ops.token_bounds import bounded_ends

_random = random.Random(0)
TEXTS = {
    "one letter": "a" * 8000,
    "letters": "".join(_random.choice(string.ascii_lowercase) for _ in range(8000)),
    "base64": base64.b64encode(bytes(_random.randrange(256) for _ in range(6000))).decode(),
    "digits": "".join(_random.choice(string.digits) for _ in range(4000)),
    "address": "https://example.com/" + "".join(_random.choice(string.ascii_letters + "/-_%") for _ in range(2000)),
    "blank lines": "\n" * 8000,
    "emoji": "😀🎉🚀👩\u200d💻" * 300,
    "Chinese": "图书馆今天开门,我们在北京读书。" * 100,
    "Hindi": "हिन्दी भारत की राजभाषा है और देवनागरी लिपि में लिखी जाती है। " * 40,
    "Thai": "ภาษาไทยเป็นภาษาราชการของประเทศไทย" * 40,
    "marks": "a\u0301\u0302\u0303\u0304" * 500,
    "without width": "\u200b\u200d" * 2000,
    "English": "Let the kettle cool before you pour the water over green tea leaves. " * 60,
    "Russian": "Библиотека сегодня открыта до вечера. " * 60,
    "code": "    for i in range(10):\n        if x[i] >= 3:\n            print(f'{x}: {y}')\n" * 40,
}
FACTOR = 2.5  # an undercount by more than this is too much
MAX_OVERCOUNT = 4.0  # and so is an overcount of plain text by more than this


def tokenizer_of(name: str):
    try:
        return load_tokenizer(find_model(name))
    except ModelNotFoundError:
        pytest.skip(f"the model {name} is not installed")


def read_by_a_model(text: str) -> int:
    return len(tokenizer_of("smollm2")(text, add_special_tokens=False, verbose=False)["input_ids"])


@pytest.mark.parametrize("kind", TEXTS)
def test_no_tokenizer_undercounts_badly(kind):
    text = TEXTS[kind]
    least = read_by_a_model(text) / FACTOR
    assert len(token_ends(tokenizer_of("minilm"), text)) >= least
    assert len(token_ends(tokenizer_of("smollm2"), text)) == read_by_a_model(text)
    assert TextLengths(None, characters_per_token=3.0).estimate(text) >= least


@pytest.mark.parametrize("kind", ["English", "Russian", "code"])
def test_plain_text_is_counted_as_before(kind):
    text, tokenizer = TEXTS[kind], tokenizer_of("minilm")
    assert len(token_ends(tokenizer, text)) == len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert TextLengths(None, characters_per_token=3.0).estimate(text) <= MAX_OVERCOUNT * read_by_a_model(text)


def test_ends_are_places_of_the_text():
    tokenizer = tokenizer_of("minilm")
    text = f"See {'x' * 500} and 😀😀 here.\n{' ' * 200}End"
    ends = token_ends(tokenizer, text)
    assert ends == sorted(ends)
    assert ends[-1] == len(text)
    inside = [end for end in ends if 4 < end <= 504]
    assert len(inside) == 250
    assert inside[:3] == [6, 8, 10]


def test_what_is_in_no_token_counts():
    assert bounded_ends("ab\u0301 c", [(0, 2), (4, 5)], [False, False]) == [2, 3, 4, 5]
    assert bounded_ends("", [], []) == []
    assert bounded_ends("short", [(0, 5)], [True]) == [5]
    assert bounded_ends("a b", [(0, 1), (2, 3)], [False, True]) == [1, 3]


def test_a_text_is_cut_by_what_it_is_worth():
    lengths = TextLengths(None, characters_per_token=3.0)
    ((_, plain),) = lengths.cut([("", TEXTS["English"])], lengths.room(100))
    assert len(plain) == 300
    ((_, chinese),) = lengths.cut([("", TEXTS["Chinese"])], lengths.room(100))
    assert 30 <= len(chinese) <= 60
