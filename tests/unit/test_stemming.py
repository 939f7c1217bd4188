"""Porter's stemmer on words whose stems follow from the rules of the paper."""

from __future__ import annotations

import pytest

from d2llm.index.stemming import porter_stem


@pytest.mark.parametrize(
    ("word", "stem"),
    [
        # plurals (step 1a)
        ("glasses", "glass"),
        ("skies", "ski"),
        ("moss", "moss"),
        ("hats", "hat"),
        # past and progressive (step 1b), doubled consonants, restored e
        ("freed", "freed"),  # m("fr") = 0, so "eed" stays
        ("guaranteed", "guarante"),  # "eed" -> "ee", then the last e goes
        ("planned", "plan"),
        ("bring", "bring"),  # no vowel before "ing"
        ("selling", "sell"),
        ("rated", "rate"),
        ("baking", "bake"),
        ("boxing", "box"),
        # y after a vowel-bearing stem (step 1c)
        ("puppy", "puppi"),
        ("fly", "fly"),
        # suffix chains (steps 2 to 4)
        ("organizations", "organ"),  # ization -> ize; ize falls in step 4 as m("organ") = 2
        ("hopelessness", "hopeless"),
        ("electrical", "electr"),
        ("adoption", "adopt"),  # "tion" after s or t: only "ion" goes
        ("opinion", "opinion"),  # "ion" after n stays
        ("movement", "movement"),  # m("mov") = 1 is too short for "ement"
        ("replacement", "replac"),
        # last e and double l (step 5)
        ("rate", "rate"),
        ("probate", "probat"),
        ("controlling", "control"),
        ("roll", "roll"),
        # left alone
        ("is", "is"),
        ("a", "a"),
        ("1858", "1858"),
    ],
)
def test_stem(word: str, stem: str) -> None:
    assert porter_stem(word) == stem


@pytest.mark.parametrize(
    "forms",
    [
        ("connect", "connected", "connecting", "connection", "connections"),
        ("relate", "related", "relating", "relates"),
        ("happy", "happiness"),
    ],
)
def test_forms_of_a_word_share_a_stem(forms: tuple[str, ...]) -> None:
    assert len({porter_stem(form) for form in forms}) == 1
