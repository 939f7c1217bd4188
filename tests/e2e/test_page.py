"""The page in a browser: the real server and a real index, in headless Chromium."""

from __future__ import annotations

import json
import time
from urllib.parse import parse_qs, urlsplit

import pytest

from d2llm.core.settings import setting
from d2llm.reports.html import render_html
from d2llm.retrieval.shard import shard
from d2llm.server.schemas import SearchRequest
from page_server import HOSTILE_QUERY, PHONE, asked, overflow, search, until, write_page_index
from report_samples import retrieval_report
from tiny_server import tiny_settings, write_tiny_index

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")

from d2llm.server.app import make_app
from live_server import serve, served, wait_until_ready

QUESTION = "How do I keep pasta from sticking?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def address(folder):
    report = folder / "report.html"
    report.write_text(render_html(retrieval_report(12)), encoding="utf-8")
    with served(write_page_index(folder), report=report) as url:
        yield url


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A server of a read-only index, whose student has random heads, so that its IEM moves passages far."""
    index = write_tiny_index(tmp_path_factory.mktemp("tiny"))
    with served(index, writable=False) as url:
        yield url


def state_of(page):
    return {name: values[0] for name, values in parse_qs(urlsplit(page.url).query).items()}


def test_search_as_you_type(visit, address):
    page = visit(address)
    assert page.locator(".message h2").inner_text() == "Ask a question"
    search(page, QUESTION)
    first = page.locator(".card").first
    assert "Boiling pasta in plenty of salted water" in first.locator(".text").inner_text()
    assert {mark.lower() for mark in first.locator("mark").all_inner_texts()} >= {"pasta", "sticking"}
    assert first.locator(".rank").inner_text().endswith("1")
    assert first.locator(".metadata").inner_text().split() == ["subject", "kitchen", "year", "2002", "checked", "true"]
    assert page.locator("#status").inner_text().startswith("10 passages, the first: ")
    assert {"encode", "candidates", "score"} <= set(
        page.locator(".latency li").first.locator("..").inner_text().split()
    )
    assert state_of(page) == {"q": QUESTION}
    page.locator("#query").fill("")
    page.wait_for_selector(".message")
    assert urlsplit(page.url).query == ""


def test_a_new_page_suggests_queries_that_find_their_passages(visit, address):
    page = visit(address)
    shown = page.locator(".example").all_inner_texts()
    assert len(shown) == 3
    assert "are ranked by vectors + tokens + words" in page.locator(".message").inner_text()
    page.locator(".example").nth(1).focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(".card")
    assert page.locator("#query").input_value() == shown[1]
    assert shown[1] in page.locator(".card").first.inner_text()
    assert page.evaluate("document.activeElement.id") == "results"  # so that Tab goes on at the first card
    assert state_of(page) == {"q": shown[1]}


def test_what_was_corrected_is_said(visit, address):
    page = visit(f"{address}/?q=boiling+wattter+pastta")
    page.wait_for_selector(".card")
    assert page.locator(".note").all_inner_texts() == ["No passage has “pastta”: “pasta” was searched."]


def test_a_late_answer_never_replaces_a_newer_one(visit, address):
    page = visit(address)

    def delay_the_first(route):
        if asked(route.request).get("query") == "trains":
            time.sleep(0.8)
        route.continue_()

    page.route("**/v1/search", delay_the_first)
    page.locator("#query").fill("trains")
    page.wait_for_timeout(300)
    page.locator("#query").fill(QUESTION)
    page.wait_for_selector(".card")
    page.wait_for_timeout(1500)
    assert "pasta" in page.locator(".card .text").first.inner_text()
    assert page.locator("#query").input_value() == QUESTION


def test_a_missing_shard_is_named(visit, tmp_path):
    shard(write_tiny_index(tmp_path), tmp_path / "sharded", 3)
    (tmp_path / "sharded" / "shard-0001").rename(tmp_path / "away")
    with served(tmp_path / "sharded", allow_missing_shards=True) as url:
        page = visit(url)
        search(page, "the cat by the sea")
        assert page.locator(".note").all_inner_texts() == [
            "1 shard of the index gave no answer: its passages are not among these."
        ]
        facts = page.locator("#facts div").all_text_contents()
        assert "Shards3, 1 of them missing" in facts


def test_typing_sends_one_query_after_a_pause(visit, address):
    page = visit(address)
    queries = []
    page.on("request", lambda request: queries.append(asked(request).get("query")))
    page.locator("#query").evaluate(
        """box => { for (let end = 1; end <= 11; end++) {
            box.value = "pasta water".slice(0, end);
            box.dispatchEvent(new Event("input", { bubbles: true }));
        } }"""
    )
    page.wait_for_selector(".card")
    assert [query for query in queries if query] == ["pasta water"]


class EditedRequest(SearchRequest):
    """As if its fields had been edited where they are declared."""

    top_k: int = setting(3, "How many to show.", ge=2, le=7, title="How many")
    hybrid: float | None = setting(None, "A weight.", ge=0.1, le=0.9, title="Mixed")


def test_the_page_shows_as_many_as_a_search_does_by_default(visit, address, monkeypatch):
    monkeypatch.setattr("d2llm.server.page_routes.SearchRequest", EditedRequest)
    page = visit(address)
    search(page, QUESTION)
    assert page.locator(".card").count() == 3
    assert state_of(page) == {"q": QUESTION}
    assert page.locator("#options-chosen").inner_text() == ""
    page.reload()
    page.wait_for_selector(".card")
    assert page.locator(".card").count() == int(page.locator("#k").input_value()) == 3
    assert visit(f"{address}/?q=pasta&k=2").locator("#k").input_value() == "2"


def test_the_controls_are_made_of_the_settings_of_a_search(visit, address, monkeypatch):
    monkeypatch.setattr("d2llm.server.page_routes.SearchRequest", EditedRequest)
    page = visit(address)
    search(page, QUESTION)
    count, fraction = page.locator("#k"), page.locator("#hybrid")
    assert [count.get_attribute(name) for name in ("min", "max")] == ["2", "7"]
    assert page.locator("label", has=count).get_attribute("title") == "How many to show."
    assert [fraction.get_attribute(name) for name in ("min", "max")] == ["10", "90"]
    assert page.get_by_label("How many").get_attribute("id") == "k"
    assert page.get_by_role("checkbox", name="Mixed").get_attribute("id") == "hybrid-on"
    assert fraction.get_attribute("aria-label") == "Mixed: BM25 in percent"
    for name, control in (("sources", "source"), ("exact", "exact"), ("filter", "filter")):
        label = page.locator(f"[data-of={control}]").last.text_content()
        assert label == SearchRequest.model_fields[name].title
    assert page.locator("legend").first.inner_text() == SearchRequest.model_fields["rescore"].title
    exact = SearchRequest.model_fields["exact"].description
    assert page.locator("label", has=page.locator("#exact")).get_attribute("title") == exact
    assert page.locator("#filter").get_attribute("placeholder") == "year >= 2020 AND language = 'en'"
    count.fill("1")
    count.dispatch_event("change")
    until(page, "document.getElementById('k').value === '2'")
    assert visit(f"{address}/?q=pasta&k=9").locator("#k").input_value() == "7"


def test_a_link_shows_the_same_search(visit, address):
    page = visit(f"{address}/?q=flowers&filter=year+%3E%3D+2010&k=3&exact=1")
    page.wait_for_selector(".card")
    assert page.locator(".card").count() == 3
    assert page.locator("#filter").input_value() == "year >= 2010"
    assert "All 3 places are proved" in page.locator(".note").last.inner_text()
    assert page.title() == "flowers – d2llm"


def test_filters_are_set_with_controls_and_from_results(visit, address):
    page = visit(f"{address}/?q=water")
    page.wait_for_selector(".card")
    page.locator("#filters > summary").click()
    page.locator("#field").select_option("subject")
    page.locator("#value").fill("garden")
    page.locator("#add").click()
    until(page, "[...document.querySelectorAll('.metadata')].every(one => one.textContent.includes('garden'))")
    page.locator("#field").select_option("year")
    page.locator("#operator").select_option(">=")
    page.locator("#value").fill("2012")
    page.locator("#value").press("Enter")
    assert page.locator("#filter").input_value() == "subject = 'garden' AND year >= 2012"
    until(page, "document.querySelectorAll('.card').length === 3")
    page.locator("#clear").click()
    until(page, "document.querySelectorAll('.card').length === 10")
    page.locator(".metadata .value").first.click()
    subject = page.locator(".metadata .value").first.inner_text()
    assert page.locator("#filter").input_value() == f"subject = '{subject}'"
    page.locator("#filter").fill("(year < 2003) OR (year > 2010)")
    until(page, "!document.querySelector('.card').textContent.includes('2005')")
    page.locator(".metadata .value").first.click()
    subject = page.locator(".metadata .value").first.inner_text()
    until(page, "document.getElementById('filter').value.includes('AND')")
    joined = page.locator("#filter").input_value()
    assert joined.startswith("((year < 2003) OR (year > 2010)) AND ")


def test_a_wrong_filter_shows_an_error_beside_its_box(visit, address):
    page = visit(f"{address}/?q=water", expected=["400 (Bad Request)"])
    page.wait_for_selector(".card")
    page.locator("#filters > summary").click()
    page.locator("#filter").fill("colour = 'red'")
    until(page, "document.getElementById('filter-error').textContent.includes('colour')")
    assert page.locator("#filter").get_attribute("aria-invalid") == "true"
    page.locator("#filter").fill("subject LIKE '%it''s%'")
    page.wait_for_selector(".column .quiet")
    assert page.locator("#filter-error").inner_text() == ""
    assert "No passage matches the filter." in page.locator(".column").inner_text()


def test_quotes_and_wildcards_in_values_are_escaped(visit, address):
    page = visit(f"{address}/?q=bread")
    page.wait_for_selector(".card")
    page.locator("#filters > summary").click()
    page.locator("#field").select_option("note")
    page.locator("#operator").select_option("contains")
    page.locator("#value").fill("it's <b>")
    page.locator("#add").click()
    until(page, "document.querySelectorAll('.card').length === 1")
    assert page.locator("#filter").input_value() == "note LIKE '%it''s <b>%'"
    assert "it's <b>bold</b>" in page.locator(".metadata").inner_text()
    page.locator("#clear").click()
    page.locator("#value").fill("100%_")
    page.locator("#add").click()
    assert page.locator("#filter").input_value() == r"note LIKE '%100\%\_%'"
    page.wait_for_selector(".column .quiet")


def test_facets_filter_and_no_longer(visit, address):
    page = visit(f"{address}/?q=water+and+bread")
    page.wait_for_selector(".card")
    assert page.locator("#facets").is_hidden()
    with page.expect_response(
        lambda response: asked(response.request).get("facets") == ["subject", "year", "checked", "note"]
    ):
        page.locator("#filters > summary").click()
    kitchen = page.locator("#facets").get_by_role("button", name="kitchen")
    kitchen.wait_for()
    assert [group.inner_text() for group in page.locator("#facets dt").all()] == ["subject", "year", "checked"]
    assert kitchen.inner_text().split() == ["kitchen", "5"]
    assert kitchen.get_attribute("aria-pressed") == "false"
    kitchen.focus()
    page.keyboard.press("Enter")
    until(page, "document.querySelector('#facets [aria-pressed=true]') !== null")
    assert page.evaluate("document.activeElement.innerText.startsWith('kitchen')")
    assert page.locator("#filter").input_value() == "subject = 'kitchen'"
    assert page.locator(".card").count() == 5
    assert page.locator("#facets").get_by_role("button", name="true").inner_text().split() == ["true", "3"]
    page.locator("#facets").get_by_role("button", name="true").click()
    until(page, "document.querySelectorAll('.card').length === 3")
    assert page.locator("#filter").input_value() == "subject = 'kitchen' AND checked IS TRUE"
    page.locator("#facets").get_by_role("button", name="kitchen").click()
    until(page, "document.querySelectorAll('.card').length === 10")
    assert page.locator("#filter").input_value() == "checked IS TRUE"


def test_an_explanation_has_parts_words_and_sources(visit, address):
    page = visit(f"{address}/?q={QUESTION}")
    card = page.locator(".card").first
    card.locator(".toggle-why").click()
    page.wait_for_selector(".text mark.weight")
    assert card.locator(".toggle-why").get_attribute("aria-expanded") == "true"
    parts = card.locator(".parts").inner_text()
    assert "Vectors" in parts
    assert "Words" in parts
    strongest = card.locator(".text mark.for.level-5").all_inner_texts()
    assert {"pasta", "sticking"} & {word.lower() for word in strongest}
    assert "vectors: rank 1" in card.locator(".sources").inner_text()
    assert card.get_by_role("button", name="Ask the teacher").count() == 0  # this server has no teacher
    card.locator(".toggle-why").click()
    assert card.locator(".why").count() == 0
    assert card.locator("mark.weight").count() == 0


def test_words_are_marked_correctly_after_surrogate_pairs(visit, address):
    page = visit(f"{address}/?q={HOSTILE_QUERY}")
    card = page.locator(".card", has_text="🦓").first
    card.locator(".toggle-why").click()
    card.locator(".text mark.weight").first.wait_for()
    words = {word for word in card.locator(":is(h3, .text) mark.weight").all_inner_texts() if word.isascii()}
    assert words <= {"b", "onclick", "alert", "zebra", "hostile", "4", "5", "7"}
    assert "zebra" in words


def test_two_rankings_side_by_side_show_what_moved(visit, tiny):
    page = visit(f"{tiny}/?q=the+cat+by+the+sea&beside=1")
    page.wait_for_selector(".columns-2 .card")
    columns = page.locator(".column")
    assert columns.locator("h2").all_inner_texts() == ["Ranked by Vectors", "Ranked by Vectors + IEM"]
    ranks = [
        {card.get_attribute("data-id"): n for n, card in enumerate(column.locator(".card").all(), 1)}
        for column in columns.all()
    ]
    both = set(ranks[0]) & set(ranks[1])
    assert both
    assert any(ranks[0][name] != ranks[1][name] for name in both)
    lines = page.locator("svg.lines .line")
    assert {line.get_attribute("data-id") for line in lines.all()} == both
    for name, rank in ranks[1].items():
        move = columns.nth(1).locator(f'.card[data-id="{name}"] .moved').inner_text()
        before = ranks[0].get(name)
        expected = "new" if before is None else "=" if before == rank else f"{before} → {rank}"
        assert expected in move
    for name in both:  # a line starts at the height of the higher of its two cards
        path = page.locator(f'.line[data-id="{name}"] path').bounding_box()
        tops = [columns.nth(n).locator(f'.card[data-id="{name}"]').bounding_box()["y"] for n in (0, 1)]
        assert min(tops) <= path["y"] <= min(tops) + 60
    columns.nth(1).locator(".card").first.focus()
    assert page.locator(".line.traced").count() <= 1
    assert page.locator("svg.lines").get_attribute("aria-hidden") == "true"
    assert state_of(page)["beside"] == "1"


def test_one_ranking_at_a_time(visit, tiny):
    page = visit(f"{tiny}/?q=the+cat+by+the+sea")
    page.wait_for_selector(".card")
    order = "[...document.querySelectorAll('.card')].map(card => card.dataset.id).join()"
    by_iem = page.evaluate(order)
    page.get_by_role("radio", name="Vectors", exact=True).check()
    until(page, f"{order} !== '{by_iem}'")
    assert state_of(page)["rank"] == "none"
    assert not page.locator("#adding").is_visible()  # the index of this server is read-only


def test_the_hybrid_slider_sets_the_share_of_bm25(visit, address):
    page = visit(f"{address}/?q=pasta")
    page.wait_for_selector(".card")
    with page.expect_response(lambda response: asked(response.request).get("hybrid") == 0.5):
        page.get_by_role("checkbox", name="Hybrid").check()
    page.locator("#hybrid").focus()
    with page.expect_response(lambda response: asked(response.request).get("hybrid") == 0.55):
        page.keyboard.press("ArrowRight")
    assert page.locator("#hybrid-share").inner_text() == "55% BM25"
    assert state_of(page)["hybrid"] == "55"


def test_the_page_can_be_used_by_keyboard(visit, address):
    page = visit(address)
    page.locator("#theme").focus()
    page.keyboard.press("/")
    focused = "document.activeElement.id || document.activeElement.dataset.id"
    assert page.evaluate(focused) == "query"
    page.keyboard.type("pasta")
    page.wait_for_selector(".card")
    ids = [card.get_attribute("data-id") for card in page.locator(".card").all()]
    page.keyboard.press("ArrowDown")
    assert page.evaluate(focused) == ids[0]
    page.keyboard.press("j")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("k")
    assert page.evaluate(focused) == ids[1]
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Enter")
    page.wait_for_selector(".why")
    page.keyboard.press("Escape")
    assert page.locator(".why").count() == 0
    assert page.evaluate(focused) == ids[1]
    page.keyboard.press("/")
    page.keyboard.press("Escape")
    assert page.locator("#query").input_value() == ""


def test_every_control_is_reached_by_tab(visit, address):
    page = visit(f"{address}/?q=pasta")
    page.wait_for_selector(".card")
    page.locator("#filters > summary").click()
    reached = set()
    for _ in range(80):  # the ten cards have up to six each
        page.keyboard.press("Tab")
        identity = page.evaluate("document.activeElement.id || document.activeElement.className")
        reached.add(identity)
    expected = {
        *("field", "operator", "value", "filter", "add", "exact", "beside", "hybrid-on", "source", "k"),
        *("card", "theme"),
    }
    assert expected <= reached


def test_a_chosen_theme_overrides_the_system_and_is_kept(visit, address):
    background = "getComputedStyle(document.body).backgroundColor"
    page = visit(address, colours="dark")
    assert sum(map(int, page.evaluate(background)[4:-1].split(","))) < 150
    page.locator("#theme").click()
    assert page.locator("#theme").inner_text() == "Theme: light"
    page.reload()
    assert page.evaluate(background) == "rgb(251, 250, 246)"


def test_hostile_texts_make_no_element_and_run_nothing(visit, address):
    page = visit(f"{address}/?q={HOSTILE_QUERY}", width=PHONE)
    page.wait_for_selector(".card")
    texts = page.locator(".card .text").all_text_contents()
    assert any("<script>alert('run')</script>" in text for text in texts)
    assert sum("hostile zebra" in text for text in texts) == 6
    for button in page.locator(".toggle-why").all():
        button.click()
    until(page, "document.querySelectorAll('.text mark.weight').length > 10")
    assert page.locator("#results :is(script, img, iframe, style, a, b[onclick], [onerror], [onload])").count() == 0
    assert overflow(page) == 0


def test_motion_can_be_turned_off(visit, address):
    page = visit(address)
    page.emulate_media(reduced_motion="reduce")
    assert page.evaluate("getComputedStyle(document.getElementById('results')).transitionProperty") == "none"


def test_the_api_page_describes_operations_and_calls_them(visit, address):
    page = visit(f"{address}/docs", ready=False)
    page.wait_for_selector(".operation")
    paths = set(page.locator(".operation > summary .path").all_inner_texts())
    assert {"/v1/search", "/v1/documents", "/v1/passages/{passage_id}", "/health"} <= paths
    search_operation = page.locator(".operation", has=page.locator(".path", has_text="/v1/search")).first
    search_operation.locator("summary").first.click()
    fields = search_operation.locator("dl.fields").first.inner_text()
    assert "num_candidates" in fields
    assert "required" in fields
    search_operation.locator("textarea").fill('{"query": "pasta", "top_k": 1}')
    search_operation.get_by_role("button", name="Send").click()
    until(page, "document.querySelector('.output:not([hidden])') !== null")
    assert json.loads(search_operation.locator(".output").inner_text())["query"] == "pasta"
    assert page.locator(".problem").count() == 0
    page.set_viewport_size({"width": PHONE, "height": 800})
    assert overflow(page) == 0


def test_the_report_is_in_a_frame_with_its_own_styles(visit, address):
    page = visit(address)
    page.get_by_role("link", name="Evaluation").click()
    frame = page.frame_locator("iframe.report")
    frame.locator("svg#plot-quality-cost").wait_for()
    assert page.locator("iframe.report").get_attribute("sandbox") == ""
    assert frame.locator("body").evaluate("body => getComputedStyle(body).maxWidth") == "1088px"  # the report's style
    assert overflow(page) == 0


def test_the_index_is_chosen_if_there_are_several_also_behind_a_proxy(visit, tiny, tmp_path):
    folders = {"guide": write_tiny_index(tmp_path, 12), "small one": write_tiny_index(tmp_path, 4, "small")}
    app = make_app(tiny_settings(folders))

    async def below_texts(scope, receive, send):
        if scope["type"] == "http":
            assert scope["path"].startswith("/texts/"), scope["path"]
            raw_path = scope["raw_path"].removeprefix(b"/texts")
            scope = {**scope, "path": scope["path"].removeprefix("/texts"), "raw_path": raw_path}
        await app(scope, receive, send)

    with serve(below_texts) as host:
        wait_until_ready(url := f"{host}/texts")
        page = visit(f"{url}/?q=water")
        page.wait_for_selector(".card")
        assert urlsplit(page.url).path == "/texts/indexes/guide/"
        assert page.locator("#index option").all_inner_texts() == ["guide", "small one"]
        assert page.locator("#index-name").is_hidden()
        page.locator("#filters > summary").click()
        page.locator("#filter").fill("year < 2010")
        until(page, "location.search.includes('2010')")
        page.locator("#index").select_option("small one")
        page.wait_for_url("**/indexes/small%20one/?q=water")
        page.wait_for_selector(".card")
        assert page.locator("#index").input_value() == "small one"
        assert page.locator(".card").count() == 4
        page.locator(".toggle-why").first.click()
        page.wait_for_selector(".why mark")
        page.locator("nav a", has_text="API").click()
        page.wait_for_url("**/indexes/small%20one/docs")
        page.locator(".operation", has_text="/v1/index").filter(has_text="Facts about the index").locator(
            "summary"
        ).first.click()
        page.locator(".operation[open] .trial button").click()
        page.wait_for_selector(".operation[open] .output:not([hidden])")
        assert json.loads(page.locator(".operation[open] .output").inner_text())["name"] == "small one"
        page.locator(".brand a").click()
        page.wait_for_url("**/indexes/small%20one/")
        page.wait_for_selector("#facts div", state="attached")  # before the server stops
    page = visit(tiny)
    assert page.locator("#index").is_hidden()
    assert page.locator("#index-name").inner_text() == "index"
