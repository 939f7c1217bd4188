"""The teacher on the page: the cascade beside the student's rankings, verdicts on request, slowness and failures."""

from __future__ import annotations

import contextlib
import itertools

import httpx2
import numpy as np
import pytest

import waiting
from d2llm.core.errors import ModelError
from d2llm.retrieval.reranker import OpenReranker, Reranker
from page_server import WatchedTeacher, asked, until, write_taught_index
from tiny_server import tiny_settings

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")

from d2llm.server.app import make_app
from d2llm.store.index_manifest import change_manifest, read_errors, write_errors
from live_server import serve, wait_until_ready

QUERY = "the cat by the sea"
BESIDE = "?q=the+cat+by+the+sea&beside=1"
READING, JUDGING = "Reading again …", "The teacher is reading …"
RANKINGS = ["none", "iem", "cascade"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return write_taught_index(tmp_path_factory.mktemp("taught"))


@contextlib.contextmanager
def serving(settings, **changes):
    app = make_app(tiny_settings(**(settings | changes)))
    with serve(app) as address:
        wait_until_ready(address)
        yield address, app.state.serving.indexes["index"]


@pytest.fixture(scope="module")
def taught(settings):
    """The address of a server, and its teacher."""
    with serving(settings) as (address, index):
        index.slow.teacher = WatchedTeacher(index.slow.teacher)
        yield address, index.slow.teacher


@pytest.fixture
def address(taught):
    return taught[0]


@pytest.fixture
def teacher(taught):
    yield taught[1]
    taught[1].reset()


def search_api(address, rescore, query=QUERY):
    answer = httpx2.post(f"{address}/v1/search", json={"query": query, "rescore": rescore, "explain": True}, timeout=60)
    return answer.raise_for_status().json()


def wait_for_columns(page, number=3):
    page.locator(f".columns-{number} .column").nth(number - 1).locator(".card").first.wait_for()
    assert page.locator(".column").count() == number


def ids_of(column):
    """The passage ids of a column, best first."""
    return [card.get_attribute("data-id") for card in column.locator(".card").all()]


def lines_of(page):
    """For each line: the column of its left end, the ids of the cards at its ends, its direction and its own id."""
    return page.evaluate(
        """() => {
            const columns = [...document.querySelectorAll(".column")];
            const touched = (end, edge) => {
                const box = end.getBoundingClientRect();
                const [x, y] = [box.left + box.width / 2, box.top + box.height / 2];
                return [...document.querySelectorAll(".card")].find((card) => {
                    const at = card.getBoundingClientRect();
                    return Math.abs(at[edge] - x) < 2 && at.top < y && y < at.bottom;
                });
            };
            return [...document.querySelectorAll("svg.lines .line")].map((line) => {
                const [left, right] = line.querySelectorAll("circle");
                const cards = [touched(left, "right"), touched(right, "left")];
                const column = columns.indexOf(cards[0]?.closest(".column"));
                const kind = line.classList[1];
                return [column, ...cards.map((card) => card?.dataset.id ?? ""), kind, line.dataset.id];
            });
        }"""
    )


def test_the_cascade_column_matches_the_api(visit, address):
    page = visit(f"{address}/{BESIDE}")
    wait_for_columns(page)
    columns = page.locator(".column")
    assert columns.locator("h2").all_inner_texts() == [
        "Ranked by Vectors",
        "Ranked by Vectors + IEM",
        "Ranked by Cascade",
    ]
    answers = [search_api(address, rescore) for rescore in RANKINGS]
    ids = [[passage["id"] for passage in answer["passages"]] for answer in answers]
    assert [ids_of(column) for column in columns.all()] == ids
    assert ids[2] != ids[1]  # otherwise this shows nothing
    cards = columns.nth(2).locator(".card")
    for card, passage in zip(cards.all(), answers[2]["passages"], strict=True):
        name = "expected log-odds" if passage["log_odds"] is None else "teacher’s log-odds"
        assert card.locator(".score").inner_text() == f"{name} {passage['score']:.3f}"
        before = ids[1].index(passage["id"]) + 1 if passage["id"] in ids[1] else None
        expected = "new" if before is None else "=" if before == passage["rank"] else f"{before} → {passage['rank']}"
        assert expected in card.locator(".moved").inner_text()
    num_read = len(answers[2]["reranking"]["read"])
    assert f"{num_read} passages that the student was unsure of were read" in page.locator(".note").inner_text()
    assert "rerank" in columns.nth(2).locator(".latency").inner_text()


def test_lines_join_equal_passages_and_show_their_direction(visit, address):
    page = visit(f"{address}/{BESIDE}")
    wait_for_columns(page)
    ids = [[passage["id"] for passage in search_api(address, rescore)["passages"]] for rescore in RANKINGS]
    expected = []
    for column, (left, right) in enumerate(itertools.pairwise(ids)):
        for after, name in enumerate(right):
            if name in left:
                before = left.index(name)
                kind = "up" if after < before else "down" if after > before else "same"
                expected.append([column, name, name, kind, name])
    assert sorted(lines_of(page)) == sorted(expected)
    assert {"up", "down"} <= {line[3] for line in expected if line[0] == 1}
    # Opening a card pushes others down, and their lines follow.
    page.locator(".column").nth(2).locator(".toggle-why").first.click()
    page.wait_for_selector(".why .sources")
    waiting.until(lambda: sorted(lines_of(page)) == sorted(expected), "the lines of the cards that moved")


def test_the_last_column_can_show_the_teacher(visit, address):
    page = visit(f"{address}/{BESIDE}")
    wait_for_columns(page)
    for name, checked, disabled in (
        ("Vectors", False, True),
        ("Vectors + IEM", False, True),
        ("Teacher", False, False),
        ("Cascade", True, False),
    ):
        radio = page.get_by_role("radio", name=name, exact=True)
        assert (radio.is_checked(), radio.is_disabled()) == (checked, disabled)
    page.get_by_role("radio", name="Teacher").check()
    page.get_by_role("heading", name="Ranked by Teacher").wait_for()
    wait_for_columns(page)
    assert ids_of(page.locator(".column").nth(2)) == [
        passage["id"] for passage in search_api(address, "teacher")["passages"]
    ]
    page.get_by_label("Side by side").uncheck()
    until(page, "document.querySelectorAll('.column').length === 1")
    assert page.get_by_role("radio", name="Teacher").is_checked()
    assert page.get_by_role("radio", name="Vectors + IEM").is_enabled()


def test_the_verdict_matches_the_api(visit, address):
    page = visit(f"{address}/{BESIDE}")
    wait_for_columns(page)
    card = page.locator(".column").nth(2).locator(".card").first
    card.focus()
    page.keyboard.press("Enter")
    button = card.get_by_role("button", name="Ask the teacher")
    button.focus()
    page.keyboard.press("Enter")
    verdict = card.locator(".verdict")
    until(page, "document.querySelector('.verdict').textContent.includes('%')")
    body = {"query": QUERY, "passage_id": card.get_attribute("data-id"), "teacher": True}
    result = httpx2.post(f"{address}/v1/explain", json=body, timeout=60).json()["teacher"]
    sign = "−" if result["log_odds"] < 0 else "+"
    expected = f"{result['probability']:.0%} that it answers the query (log-odds {sign}{abs(result['log_odds']):.2f}, "
    assert verdict.inner_text().startswith(expected)
    assert verdict.get_attribute("role") == "status"
    assert button.evaluate("button => button === document.activeElement")


def test_a_slow_teacher_delays_only_its_own_column(visit, address, teacher):
    teacher.may_answer.clear()
    page = visit(f"{address}/{BESIDE}")
    waiting_column = page.locator(".column.waiting")
    waiting_column.get_by_text(READING).wait_for()
    assert waiting_column.locator("h2").inner_text() == "Ranked by Cascade"
    ids = [[passage["id"] for passage in search_api(address, rescore)["passages"]] for rescore in RANKINGS[:2]]
    columns = page.locator(".column")
    assert [ids_of(columns.nth(number)) for number in (0, 1)] == ids
    assert READING in page.locator("#status").inner_text()
    card = columns.nth(1).locator(".card").first
    card.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(".why .sources")
    teacher.may_answer.set()
    wait_for_columns(page)
    assert card.locator(".why").is_visible()  # the opened explanation and the focus are kept
    assert card.evaluate("card => card === document.activeElement")
    assert waiting_column.count() == 0
    assert {line[0] for line in lines_of(page)} == {0, 1}


def test_a_slow_teacher_shows_that_it_is_reading(visit, address, teacher):
    page = visit(f"{address}/?q=the+cat+by+the+sea")
    page.wait_for_selector(".card")
    teacher.may_answer.clear()
    page.get_by_role("radio", name="Cascade").check()
    page.locator("#results > .working", has_text=READING).wait_for()
    assert page.locator("#results").get_attribute("aria-busy") == "true"
    assert page.locator(".card").count() == 10  # of the previous ranking
    assert page.locator("#status").inner_text() == READING
    teacher.may_answer.set()
    page.wait_for_selector("#results:not([aria-busy]) .note")
    assert page.locator(".working").count() == 0
    assert ids_of(page.locator(".column")) == [passage["id"] for passage in search_api(address, "cascade")["passages"]]


def test_a_slow_verdict_shows_progress_and_is_requested_once(visit, address, teacher):
    page = visit(f"{address}/?q=snow+on+the+old+house")
    page.locator(".toggle-why").first.click()
    page.wait_for_selector(".text mark.weight")
    teacher.may_answer.clear()
    button = page.get_by_role("button", name="Ask the teacher").first
    button.click()
    page.locator(".verdict.working", has_text=JUDGING).wait_for()
    assert button.get_attribute("aria-disabled") == "true"
    button.dispatch_event("click")
    other = page.locator(".card").nth(1)  # the page stays usable meanwhile
    other.locator(".toggle-why").click()
    other.locator(".text mark.weight").first.wait_for()
    teacher.may_answer.set()
    until(page, "document.querySelector('.verdict').textContent.includes('%')")
    assert button.get_attribute("aria-disabled") == "false"
    assert teacher.queries.count("snow on the old house") == 1  # an earlier test may have left a search


def test_a_late_ranking_of_an_old_query_is_never_shown(visit, address, teacher):
    teacher.may_answer.clear()
    page = visit(f"{address}/{BESIDE}")
    page.locator(".column.waiting").wait_for()
    newer = "rain on the old house"
    with page.expect_response(lambda response: asked(response.request).get("query") == newer):
        page.locator("#query").fill(newer)
    ids = [passage["id"] for passage in search_api(address, "iem", newer)["passages"]]
    until(page, f"document.querySelectorAll('.column')[1]?.querySelector('.card').dataset.id === '{ids[0]}'")
    assert page.locator(".column.waiting").count() == 1
    teacher.may_answer.set()
    wait_for_columns(page)
    expected = [passage["id"] for passage in search_api(address, "cascade", newer)["passages"]]
    assert ids_of(page.locator(".column").nth(2)) == expected


def test_words_that_arrive_during_a_press_do_not_move_the_button(visit, address, teacher):
    page = visit(f"{address}/{BESIDE}")
    wait_for_columns(page)
    explanations = []
    page.route("**/v1/explain", lambda route: explanations.append(route), times=1)
    card = page.locator(".column").nth(1).locator(".card").first
    card.locator(".toggle-why").click()
    waiting.until(lambda: page.wait_for_timeout(10) or explanations, "the request to weigh words")
    num_calls = len(teacher.queries)
    button = card.get_by_role("button", name="Ask the teacher")
    button.scroll_into_view_if_needed()
    box = button.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    explanations[0].continue_()
    card.locator(".text mark.weight").first.wait_for()
    page.mouse.up()
    until(page, "document.querySelector('.verdict').textContent.includes('%')")
    assert len(teacher.queries) == num_calls + 1


def test_a_failing_teacher_is_reported_and_the_page_works_on(visit, address, teacher):
    teacher.error = ModelError("the teacher's memory is full")
    page = visit(f"{address}/{BESIDE}", expected=["500 (Internal Server Error)"])
    problem = page.locator(".column").nth(2).locator(".problem")
    problem.wait_for()
    assert "server's log has the reason" in problem.inner_text()
    assert "Request " in page.locator(".column").nth(2).inner_text()
    assert "memory" not in page.locator("main").inner_text()  # the cause is only in the server's log
    assert [len(ids_of(page.locator(".column").nth(number))) for number in (0, 1)] == [10, 10]
    page.locator(".column").nth(1).locator(".toggle-why").first.click()
    button = page.get_by_role("button", name="Ask the teacher")
    button.click()
    page.locator(".verdict.problem", has_text="The teacher did not answer: ").wait_for()
    assert "(request " in page.locator(".verdict").inner_text()
    teacher.error = None
    button.click()
    until(page, "document.querySelector('.verdict').textContent.includes('%')")
    assert "problem" not in page.locator(".verdict").get_attribute("class")
    page.locator("#query").fill("the cat")
    wait_for_columns(page)
    assert page.locator(".problem:not(:empty)").count() == 0


def test_a_teacher_without_any_time_says_so(visit, settings):
    with serving(settings, teacher_ms=0) as (address, _):
        page = visit(f"{address}/?q=the+cat+by+the+sea&rank=teacher")
        page.wait_for_selector(".card")
        note, scores = page.locator(".note").inner_text(), page.locator(".card .score").all_inner_texts()
        page.get_by_role("radio", name="Cascade").check()
        page.locator(".note", has_text="Time ran out before any passage was read: ").wait_for()
    assert note.startswith("The first 8 passages were read, in ")  # one batch is always read, whatever the limit
    assert note.endswith("Then time ran out: the others follow in the student’s order.")
    assert [score.startswith("teacher’s log-odds") for score in scores] == [True] * 8 + [False] * 2


def test_a_teacher_that_runs_out_of_time_says_so(visit, settings):
    with serving(settings, teacher_ms=300) as (address, index):
        index.slow.teacher = WatchedTeacher(index.slow.teacher)
        index.slow.teacher.seconds = 0.4
        page = visit(f"{address}/?q=the+cat+by+the+sea&rank=cascade")
        page.wait_for_selector(".card")
        note, scores = page.locator(".note").inner_text(), page.locator(".card .score").all_inner_texts()
    assert note.startswith("1 passage that the student was unsure of was read, in ")
    assert note.endswith("Then time ran out: the others are ranked by the student’s estimate.")
    assert {score.rsplit(" ", 1)[0] for score in scores} <= {"teacher’s log-odds", "expected log-odds"}


def test_a_server_without_a_teacher_offers_none(visit, settings):
    with serving(settings, teacher=None) as (address, _):
        page = visit(f"{address}/{BESIDE}&rank=cascade")  # a link from a server that has one
        wait_for_columns(page, 2)
        assert page.get_by_role("radio").count() == 2
        assert facts_of(page)["Teacher"] == "none"
        page.locator(".toggle-why").first.click()
        page.wait_for_selector(".text mark.weight")
        assert page.get_by_role("button", name="teacher").count() == 0


@pytest.fixture
def longest():
    """A reranker of another package, which the page does not know."""

    class LongestFirst(Reranker, kind="longest"):
        score_name = "length"

        def open(self, *, device=None, dtype=None):
            return OpenLongestFirst(self)

    yield "longest"
    Reranker.kinds._classes.pop("longest")
    del LongestFirst


class OpenLongestFirst(OpenReranker):
    def rerank(self, query, candidates):
        return np.array([len(text) for text in candidates.texts(np.arange(len(candidates.scores)))], np.float64)


def test_a_reranker_of_another_package_can_be_chosen(visit, settings, longest):
    with serving(settings, reranker=longest) as (address, _):
        page = visit(f"{address}/?q=the+cat+by+the+sea")
        page.wait_for_selector(".card")
        page.get_by_role("radio", name="Longest").check()
        page.locator(".note", has_text="were read, in ").wait_for()
        passages = search_api(address, longest)["passages"]
        scores = [f"length {passage['score']:.3f}" for passage in passages]
        assert page.locator(".card .score").all_inner_texts() == scores
        assert scores == sorted(scores, key=lambda score: -float(score.split()[1]))


def test_an_uncalibrated_teacher_has_no_cascade(visit, address, settings):
    content = read_errors(settings["index"])
    change_manifest(settings["index"], student_errors={})
    try:
        page = visit(f"{address}/{BESIDE}")
        wait_for_columns(page, 2)
        assert page.get_by_role("radio", name="Cascade").count() == 0
        assert facts_of(page)["Teacher"].endswith(", not calibrated: no cascade")
        page.get_by_role("radio", name="Teacher").check()
        wait_for_columns(page)
    finally:
        write_errors(settings["index"], content)


def facts_of(page):
    names, values = (page.locator(f"#facts {part}").all_inner_texts() for part in ("dt", "dd"))
    return dict(zip(names, values, strict=True))
