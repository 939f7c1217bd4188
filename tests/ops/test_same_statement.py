"""Near duplicates say nothing beyond a better text: rows, codes, names, negations and units that differ decide."""

from __future__ import annotations

import pytest

from d2llm.ops.bm25_words import terms
from d2llm.ops.diversity import Statement

LONG = (
    "Let the kettle cool before you pour the water over green tea leaves, because boiling water makes the drink "
    "bitter, and steep it briefly in a warm pot."
)


def adds_nothing(text: str, better: str, query: str = "") -> bool:
    return Statement(text).adds_nothing_to(Statement(better), frozenset(terms(query)))


@pytest.mark.parametrize(
    ("better", "text"),
    [
        (LONG, LONG),
        (LONG, LONG.upper().replace("THE", "the").lower()),
        (LONG, f"  {LONG}\n"),
        (LONG, LONG.replace("Let", "let")),
        (LONG, LONG.replace("leaves", "leaf")),
        (LONG, LONG.replace("the drink", "drink")),
        (LONG, LONG.replace("makes", "turns").replace("pour", "put")),
        (f"{LONG} Keep it dry.", LONG),
        (f"{LONG} Never take 5 grams.", LONG),
        ("red cat", "cat red"),
        ("Prices for 2024: 12.50 EUR a piece.", "Prices for 2024: 12.50 EUR a piece"),
        ("图书馆今天开门。", "图书馆今天开门"),
        ("Caf\u00e9 in der Stra\u00dfe", "Cafe\u0301 in der Stra\u00dfe"),
    ],
)
def test_these_add_nothing(better, text):
    assert adds_nothing(text, better)


@pytest.mark.parametrize(
    ("better", "text"),
    [
        ("Screw M4 x 20, steel: 0.12 EUR", "Screw M4 x 25, steel: 0.12 EUR"),
        ("Screw M4 x 20, steel: 0.12 EUR", "Screw M4 x 20, steel: 0.21 EUR"),
        ("Apples: 3 EUR a kilo", "Pears: 3 EUR a kilo"),
        ("red widget, in stock", "blue widget, in stock"),
        ("Costs 5 of 10 points", "Costs 10 of 5 points"),
        ("Due on 01/02/2024", "Due on 02/01/2024"),
        ("Version 1.2.3 of the driver", "Version 1.23 of the driver"),
        ("You must not open the valve.", "You must open the valve."),
        ("You must open the valve.", "You must not open the valve."),
        ("The pump doesn't leak", "The pump does leak"),
        ("Das Ventil ist nicht offen", "Das Ventil ist offen"),
        ("Gains 5 mW", "Gains 5 MW"),
        ("Gains 5 %", "Gains 5 €"),
        ("Set it to -5 degrees", "Set it to 5 degrees"),
        ("Heat to 80 °C", "Heat to 80 °F"),
        ("Error code AB-17", "Error code AC-17"),
        ("Call Anna", "Call Ben"),
        (LONG, LONG.replace("bitter", "sweet, says Anna")),
        (LONG, LONG.replace("before", "after")),
        (LONG, LONG.replace("Let", "Never let")),
        (LONG, f"{LONG} Keep two grams of it dry."),
        (LONG, "Store coffee beans in a closed jar far from light, heat and damp, or freeze what is not needed soon."),
        ("张三的电话在桌子上，李四的在包里。", "王五的电话在桌子上，李四的在包里。"),
        ("राम स्कूल जाता है और सीता घर पर पढ़ती है", "मोहन स्कूल जाता है और सीता घर पर पढ़ती है"),
        ("٣ كتب على الطاولة", "٤ كتب على الطاولة"),
    ],
)
def test_these_say_something_else(better, text):
    assert not adds_nothing(text, better)


def test_what_the_query_names_counts():
    better, text = LONG, LONG.replace("pot", "glass")
    assert adds_nothing(text, better)
    assert not adds_nothing(text, better, "tea in a glass")
    assert adds_nothing(text, better, "tea in a pot")
