from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from d2llm.demo.report import (
    DemoAnswer,
    DemoResult,
    MessageReport,
    MessageSystem,
    QuestionReport,
    ScoredResult,
    ScoreReport,
)
from d2llm.demo.view import MAX_WIDTH, DemoView, excerpt

LONG = "library.module.Class.method(" + ", ".join(f"parameter_{n}=None" for n in range(6)) + ")"


def demo_result(rank, passage_id, other_rank, *, right=False, title=None, text="Turn a crank until the music plays."):
    return DemoResult(rank, passage_id, title or f"{passage_id}()", text, 1.0 / rank, right, other_rank)


ANSWER = DemoAnswer(
    question="How do I turn the crank?",
    right_ids=("b",),
    baseline=(demo_result(1, "a", 2), demo_result(2, "b", 1, right=True), demo_result(3, "c", None, title=LONG)),
    d2llm=(demo_result(1, "b", 2, right=True), demo_result(2, "a", 1), demo_result(3, "d", 17, title=LONG)),
)
QUESTIONS = QuestionReport((ANSWER,), (True,), num_candidates=12)
MESSAGE = DemoAnswer(
    question="My card is gone.",
    right_ids=("card lost 2",),
    baseline=(demo_result(1, "a", 2), demo_result(2, "b", 4), demo_result(3, "c", 3)),
    d2llm=(demo_result(1, "card lost 2", 9, right=True), demo_result(2, "a", 1), demo_result(3, "c", 3)),
)
MESSAGES = MessageReport(
    num_messages=96,
    num_requests=24,
    interaction_weight=1.0,
    systems=(MessageSystem("cosine, untuned", 0.25, 0.5), MessageSystem("D2LLM", 0.75, 0.875)),
    p_value=0.0123,
    num_better=7,
    num_worse=2,
    examples=(MESSAGE,),
)
SCORE = ScoreReport(
    question="How do I turn the crank?",
    passages=(
        ScoredResult("b", "b()", True, 11.25, 8.0, 1.25, None, 2.0, 0.0),
        ScoredResult("c", LONG, False, 9.5, 9.0, 0.0, None, 0.5, 0.0),
    ),
    interaction_weight=0.0,
)


def rendered(draw, *, encoding="utf-8", width=MAX_WIDTH, colours=False) -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
    draw(DemoView(Console(file=file, width=width, force_terminal=colours, color_system="256" if colours else None)))
    file.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("width", [60, 80, 100, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_nothing_is_wider_than_the_terminal_or_100_columns(width, encoding):
    def draw(view):
        view.step("The answers")
        view.answers(QUESTIONS, "minilm", depth=100)
        view.messages(MESSAGES, "tiny", "minilm")
        view.score(SCORE, "tiny")

    lines = rendered(draw, width=width, encoding=encoding).splitlines()
    assert max(map(len, lines)) == min(width, MAX_WIDTH)


def test_places_show_rank_changes_and_right_answers():
    lines = rendered(lambda view: view.answers(QUESTIONS, "minilm", depth=100)).splitlines()
    titles = [
        [cell.strip() for cell in (line[:50], line[50:])] for line in lines if line.lstrip()[:2] in ("1 ", "2 ", "3 ")
    ]
    assert titles[0] == ["1 a()", "1 ✓ ▲1 b()"]
    assert titles[1] == ["2 ✓ b()", "2 ▼1 a()"]
    assert titles[2][0].startswith("3 library.module.Class.method(parameter_0=None")
    assert titles[2][0].endswith("…")
    assert titles[2][1].startswith("3 new (17) library.module.Class.method(")
    assert sum("Turn a crank until the music plays." in line for line in lines) == 3


@pytest.mark.parametrize(("other_rank", "mark"), [(3, "="), (1, "▼2"), (4, "new (4)"), (None, "new (>100)")])
def test_marks_of_rank_changes(other_rank, mark):
    answer = DemoAnswer("Why?", (), ANSWER.baseline, (*ANSWER.d2llm[:2], demo_result(3, "e", other_rank)))
    report = replace(QUESTIONS, answers=(answer,))
    assert f"3 {mark} e()" in rendered(lambda view: view.answers(report, "minilm", depth=100))


def test_right_answers_are_counted():
    wrong = DemoAnswer("Why?", (), ANSWER.baseline, tuple(demo_result(n, "x", None) for n in (1, 2, 3)))
    report = QuestionReport((ANSWER, wrong), (False, False), num_candidates=12)
    text = " ".join(rendered(lambda view: view.answers(report, "minilm", depth=100)).split())
    assert "A right answer in the top 3: BM25 2/2, D2LLM 1/2; the cosine of untuned minilm, among the 12" in text
    assert "rank first, 0/2." in text


@pytest.mark.parametrize(
    ("weight", "words"), [(0.0, "The interaction has the weight 0 for questions"), (0.25, "has the weight 0.25 here")]
)
def test_the_parts_of_a_score_and_the_weight_of_the_interaction_are_shown(weight, words):
    text = rendered(lambda view: view.score(replace(SCORE, interaction_weight=weight), "tiny"))
    assert words in " ".join(text.split())
    rows = [line.split() for line in text.splitlines()]
    assert any(row[-4:] == ["product", "words", "tokens", "interaction"] for row in rows)
    assert ["✓", "b()", "11.25", "8.00", "1.25", "2.00", "0.00"] in rows
    assert "sentences:" not in text  # this score has no vectors of sentences


def test_missing_places_of_bm25_stay_blank():
    report = replace(QUESTIONS, answers=(replace(ANSWER, baseline=ANSWER.baseline[:1]),))
    lines = rendered(lambda view: view.answers(report, "minilm", depth=100)).splitlines()
    assert any((line[:50].strip(), line[50:].strip()) == ("", "2 ▼1 a()") for line in lines)


def test_messages_show_the_interactions_gain_and_an_example():
    text = rendered(lambda view: view.messages(MESSAGES, "tiny", "minilm"))
    rows = [line.split() for line in text.splitlines()]
    assert ["cosine,", "untuned", "25%", "50%"] in rows
    assert ["D2LLM", "75%", "88%"] in rows
    words = " ".join(text.split())
    assert "improves the first 3 of 7 messages and worsens those of 2 (p = 0.012)" in words
    assert "My card is gone. [card lost]" in words
    assert "1 ✓ new (9) card lost 2()" in words


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"interaction_weight": 0.0}, "The interaction of 'tiny' has the weight 0 here too"),
        ({"p_value": None}, "'tiny' scores by its interaction alone"),
    ],
)
def test_a_missing_comparison_is_explained(changes, words):
    report = replace(MESSAGES, examples=(), **changes)
    assert words in " ".join(rendered(lambda view: view.messages(report, "tiny", "minilm")).split())


SLOW = (
    "200 of the 500 passages (the modules with an answer to the questions below, and others at random) are encoded by "
    "the student 'tiny'. This machine encodes 20 passages per second now and would take 25 s for all of them; the "
    "limit of the demo is 10 s."
)


@pytest.mark.parametrize(
    ("number", "rate", "words"),
    [
        (500, 20.0, "All 500 passages are encoded by the student 'tiny'."),
        (200, 20.0, SLOW),
        (200, None, "are encoded by the student 'tiny'. An earlier demo chose this part."),
    ],
)
def test_the_number_of_encoded_passages_is_explained(number, rate, words, tmp_path):
    def draw(view):
        view.announce_index("tiny", number, 500, rate=rate, seconds=10, folder=tmp_path)

    assert words in " ".join(rendered(draw).split())


def test_ascii_output_gets_ascii_marks():
    text = rendered(lambda view: view.answers(QUESTIONS, "minilm", depth=100), encoding="ascii")
    assert "1 * ^1 b()" in text
    assert "2 v1 a()" in text
    assert "?" not in text.replace("crank?", "")


def test_only_words_of_the_question_are_highlighted():
    text = rendered(lambda view: view.answers(QUESTIONS, "minilm", depth=100), colours=True)
    assert "\x1b[1;33mTurn\x1b[0m a \x1b[1;33mcrank\x1b[0m until the music plays." in text


def test_without_colours_there_are_no_escape_codes():
    assert "\x1b" not in rendered(lambda view: view.answers(QUESTIONS, "minilm", depth=100))


WORDS = {"crank", "music", "box"}


def test_excerpt_of_a_short_text_joins_its_lines():
    assert excerpt("Turn it.\n\n    Then\nwait.", WORDS) == "Turn it. Then wait."


def test_excerpt_starts_later_only_for_two_more_words():
    beginning = "This function does something. "
    assert excerpt(beginning + "It has a crank.", WORDS, length=30) == "This function does something. …"
    assert excerpt(beginning + "The crank of a box.", WORDS, length=30) == "… The crank of a box."
    assert excerpt("A box. " + "The crank of a box plays music.", WORDS, length=24) == "A box. The crank of a …"


def test_excerpt_of_one_long_word_is_cut():
    assert excerpt("x" * 300, WORDS, length=10) == "x" * 10 + " …"
