"""Shipped students on what words decide: rows of a price list in a context, and texts in many scripts."""

from __future__ import annotations

import unicodedata

import pytest

from d2llm import Index, Passage

SIZES = [(thread, length) for thread in (3, 4, 5, 6, 8) for length in (10, 12, 16, 20, 25, 30, 40, 50, 60, 80)]
ROWS = {
    f"m{thread}x{length}": f"Hexagon screw M{thread} x {length}, steel, zinc plated: {thread * length / 100:.2f} EUR"
    for thread, length in SIZES
}
STATUTE = (
    "The tenant must not sublet the flat without the landlord's written consent, and has to pay the rent by the third "
    "working day of each month."
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    index = Index.create(tmp_path_factory.mktemp("rows") / "index", "d2llm-minilm")
    index.upsert(
        [
            *(Passage(name, text) for name, text in ROWS.items()),
            Passage("statute", STATUTE),
            Passage("statute-copy", STATUTE),
            Passage("statute-spaced", STATUTE.replace(", and", ",  and").replace("The tenant", "the tenant")),
            Passage("statute-may", STATUTE.replace("must not", "must")),
            Passage("statute-fifth", STATUTE.replace("third", "fifth")),
        ]
    )
    return index


def test_a_context_has_every_row_of_a_price_list(rows):
    context = rows.context("What does a screw M5 x 25 cost?", max_tokens=4000, top_k=50)
    included = {name for source in context.sources for name in source.passage_ids}
    assert len(included & ROWS.keys()) >= 46  # some texts of the statute may be among the first 50
    assert "m5x25" in included
    assert ROWS.keys().isdisjoint(context.ranking.selection.near_duplicates)
    assert context.left_out == ()


def test_copies_are_left_out_and_reported_and_contradictions_are_not(rows):
    context = rows.context("May a tenant sublet a flat?", max_tokens=2000, top_k=10)
    included = {name for source in context.sources for name in source.passage_ids}
    copies = {"statute", "statute-copy", "statute-spaced"}
    (kept,) = copies & included
    assert {"statute-may", "statute-fifth"} <= included
    selection = context.ranking.selection
    assert selection.near_duplicates == dict.fromkeys(copies - {kept}, kept)
    assert selection.num_near_duplicates == 2


def test_a_long_string_is_cut_by_the_limit(tmp_path):
    index = Index.create(tmp_path / "index", "d2llm-minilm")
    index.upsert([Passage("long", "x" * 8000), Passage("short", "Tea is made of leaves.")])
    context = index.context("tea", max_tokens=100, top_k=2)
    assert "long" in context.left_out
    assert len(context.text) < 100
    index.delete(["short"])
    alone = index.context("tea", max_tokens=100, top_k=1)
    assert alone.truncated
    assert len(alone.text) < 250
    assert alone.num_tokens <= 100


TEXTS = {
    "hindi": "हिन्दी भारत की राजभाषा है और देवनागरी लिपि में लिखी जाती है।",
    "tamil-in-hindi": "तमिल दक्षिण भारत की एक प्राचीन भाषा है।",
    "thai": "ภาษาไทยเป็นภาษาราชการของประเทศไทย",
    "lao": "ພາສາລາວເປັນພາສາທາງການຂອງປະເທດລາວ",
    "khmer": "ភាសាខ្មែរជាភាសាផ្លូវការរបស់ប្រទេសកម្ពុជា",
    "arabic": "يَدْرُسُ الطَّالِبُ في المَدْرَسَةِ",
    "arabic-cat": "القطة تنام على السرير",
    "turkish": "İstanbul Boğazı iki kıtayı ayırır.",
    "german": "Die Straßenbahn fährt über die Brücke.",
    "greek": "Η Ελλάδα είναι χώρα της Ευρώπης.",
    "japanese": "東京タワーは333メートルの高さです。",
    "korean": "한국어 문법 입문",
}


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_the_right_passage_wins_in_every_script(multilingual, form):
    for query, expected in [
        ("हिन्दी", "hindi"),
        ("ภาษาไทย", "thai"),
        ("ພາສາລາວ", "lao"),
        ("ខ្មែរ", "khmer"),
        ("المدرسة", "arabic"),
        ("ISTANBUL", "turkish"),
        ("STRASSENBAHN", "german"),
        ("ΕΛΛΑΔΑ", "greek"),
        ("東京ﾀﾜｰ", "japanese"),
        ("한국어", "korean"),
    ]:
        ranking = multilingual.search(unicodedata.normalize(form, query), top_k=2, explain=True)
        best = ranking.passages[0]
        assert best.passage.id == expected, query
        assert best.explanation.terms, query
        spans_by_term = best.explanation.term_spans
        assert {term: len(spans) for term, spans in spans_by_term.items()} == dict(best.explanation.terms)
        assert all(best.passage.full_text[start:end] for spans in spans_by_term.values() for start, end in spans)


@pytest.fixture(scope="module")
def multilingual(tmp_path_factory):
    index = Index.create(tmp_path_factory.mktemp("scripts") / "index", "d2llm-multilingual")
    index.upsert(Passage(name, text) for name, text in TEXTS.items())
    return index
