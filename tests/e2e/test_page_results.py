"""The page: what it says of a result, and the whole document of one."""

from __future__ import annotations

import json
import math
import re
from datetime import datetime, timezone
from urllib.parse import parse_qs, quote

import pytest

from d2llm import Index, Passage
from d2llm.core.shipped import shipped_models
from d2llm.models.student import Student
from d2llm.recipe import InteractionConfig
from d2llm.retrieval.sync import sync_documents
from d2llm.store.index_manifest import Chunking
from e2e.small_corpus import SENTENCES
from page_server import HOSTILE, HOSTILE_QUERY, overflow, search, until
from tiny_models import tiny_student_config, write_tiny_model
from tiny_server import tiny_passages, write_tiny_index

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")

from live_server import patient, served

QUESTION = "How do I keep pasta from sticking?"
NONSENSE = ("zzz qqq", "??? !!!")
ADDRESS = "https://kitchen.example/pasta?a=1&b=2"
FAQ = "http://shop.example/faq"
PHONE = {"width": 390, "height": 844}
STUDENT = "d2llm-minilm"


def write_documents(folder):
    """A long text in a folder of a folder, a page, and a table."""
    (folder / "deep").mkdir(parents=True)
    steps = "\n\n".join(f"Step {n} of the manual: {SENTENCES[n]}" for n in range(len(SENTENCES)))
    (folder / "deep" / "manual.md").write_text(f"# Manual\n\n## Kitchen\n\n{steps}\n\n## End\n\nThe last words.\n")
    (folder / "notes.txt").write_text("Our notes say that a kettle needs descaling every month.")
    (folder / "volume.py").write_text("class Sphere:\n    def radius(self):\n        return self.volume ** (1 / 3)\n")
    (folder / "prices.csv").write_text("name,price\nTea,1.50\nCopper kettle,40\n")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def address(folder):
    """A server of synced files, with a text that names its address, and hostile texts."""

    index = Index.create(folder / "index", STUDENT)
    chunking = Chunking(chunk_tokens=64, chunk_overlap=24)
    sync_documents(index, [write_documents(folder / "docs")], chunking=chunking)
    index.upsert(
        [
            Passage("pan", "A wide pan of salted water cooks pasta well.", "Pans", metadata={"url": ADDRESS}),
            Passage("size", "The archive of recipes is large.", metadata={"size_bytes": 3_400_000, "weight": 12}),
            Passage(FAQ, "Sourdough returns are accepted.", "Returns", metadata={"source": FAQ, "language": "en"}),
            Passage("link", "A link that runs: sourdough.", metadata={"url": "javascript:alert(1)"}),
            *(
                Passage(f"h{n}", text, f"<b onclick=alert(5)>{n}</b>", "<img src=x onerror=alert(6)>", n)
                for n, text in enumerate(HOSTILE)
            ),
        ]
    )
    with served(folder / "index") as url:
        yield url


def state_of(page):
    return {name: values[0] for name, values in parse_qs(page.evaluate("location.search.slice(1)")).items()}


def card_of(page, part):
    return page.locator(f'.card[data-id*="{part}"]').first


def facts_of(page):
    return {
        fact.locator("dt").inner_text(): fact.locator("dd").inner_text() for fact in page.locator("#facts div").all()
    }


# What a score is made of --------------------------------------------------------------------------------------------


def test_an_interaction_that_adds_nothing_is_not_what_ranks(visit, address):
    facts = patient.get(f"{address}/v1/index").json()
    assert "interaction" not in facts["score_parts"]
    assert {"dot", "lexical"} <= set(facts["score_parts"])
    page = visit(f"{address}/?q={QUESTION}")
    page.wait_for_selector(".card")
    names = page.locator("#ranks label").all_inner_texts()
    score = facts_of(page)["Score"].capitalize()
    assert names == ["Vectors", score]
    assert score == "Vectors + tokens + words"
    assert page.locator(".column h2").inner_text() == f"Ranked by {score}"
    assert "IEM" not in page.locator("body").inner_text()
    page.locator(".toggle-why").first.click()
    page.wait_for_selector(".text mark.weight")
    shown = [part.locator("dt").evaluate("dt => dt.firstChild.data") for part in page.locator(".parts > div").all()]
    words = {"dot": "Vectors", "windows": "Best window", "tokens": "Tokens", "lexical": "Words"}
    assert shown == [*(words[part] for part in facts["score_parts"]), "Student’s score"]
    assert "The score has no interaction: " in page.locator(".why").inner_text()
    assert "Words that raise the score of the vectors are shaded" in page.locator(".why").inner_text()
    total = float(page.locator(".sum dd").inner_text().replace("−", "-"))
    assert total == pytest.approx(float(page.locator(".score b").first.inner_text()), abs=0.011)
    page.get_by_role("radio", name="Vectors", exact=True).check()
    until(page, "document.querySelector('.column h2').textContent === 'Ranked by Vectors'")


def test_an_interaction_that_counts_is_named(visit, tmp_path):
    with served(write_tiny_index(tmp_path, 8)) as url:
        assert patient.get(f"{url}/v1/index").json()["score_parts"] == ["dot", "interaction"]
        page = visit(f"{url}/?q=cat")
        page.wait_for_selector(".card")
        assert page.locator("#ranks label").all_inner_texts() == ["Vectors", "Vectors + IEM"]
        assert page.locator(".column h2").inner_text() == "Ranked by Vectors + IEM"


def test_a_score_that_is_the_inner_product_is_offered_once(visit, tmp_path):
    config = tiny_student_config(write_tiny_model(tmp_path / "bert", "bert"))
    config = config.model_copy(update={"interaction": InteractionConfig(head="cosine")})
    student = Student.create(config, dtype="float32")
    student.save(tmp_path / "student")
    Index.create(tmp_path / "index", tmp_path / "student", dtype="float32").upsert(tiny_passages(8))
    with served(tmp_path / "index") as url:
        assert patient.get(f"{url}/v1/index").json()["score_parts"] == ["dot"]
        page = visit(f"{url}/?q=cat&rank=none&beside=1")
        page.wait_for_selector(".card")
        assert page.locator("#ranking").is_hidden()
        assert page.locator("#beside-label").is_hidden()
        assert page.locator(".column").get_attribute("aria-label") == "Ranked by Vectors"
        assert facts_of(page)["Candidates"] == "vectors"


@pytest.mark.parametrize(
    ("choice", "sources"),
    [
        ("", ["vectors", "bm25"]),
        ("source=vectors", ["vectors"]),
        ("source=bm25", ["bm25"]),
        ("rank=none", ["vectors"]),
        ("hybrid=40", ["vectors", "bm25"]),
        ("exact=1", []),
    ],
)
def test_sources_of_candidates_are_named_as_they_were(visit, address, choice, sources):
    page = visit(address)
    with page.expect_response("**/v1/search") as response:
        page.goto(f"{address}/?q={QUESTION}&{choice}")
    page.wait_for_selector(".card")
    assert response.value.json()["candidate_sources"] == sources
    text = page.locator(".count").inner_text()
    if sources:
        assert text.endswith(f"candidates by {' and '.join(sources).replace('bm25', 'BM25')}.")
    else:
        assert "of all" in text
    assert page.locator("#sources").is_visible() == (choice not in ("hybrid=40", "exact=1"))
    if not choice:
        assert page.locator("#source option").first.inner_text() == "vectors and BM25"
    assert ("fused with BM25 (40%)" in page.locator(".column h2").inner_text()) == (choice == "hybrid=40")


# What a card says ---------------------------------------------------------------------------------------------------


def test_a_path_is_said_once_and_sizes_and_times_can_be_read(visit, address):
    page = visit(f"{address}/?q=step+of+the+manual+pasta")
    page.wait_for_selector(".card")
    card = card_of(page, "manual.md#")
    text = card.inner_text()
    assert text.count("manual.md") == 1
    assert "deep/manual.md" in text
    assert re.search(r"passage \d+ of \d+", text)
    assert re.search(r"\b\d\.\d KB\b", text)
    assert re.search(rf"changed {datetime.now(timezone.utc):%Y}-\d\d-\d\d \d\d:\d\d(?!:)", text)
    for name in ("path", "modified", "file_bytes", "num_passages", "document_id", "heading"):
        assert name not in text
    assert card.locator("h3").inner_text() == "Manual > Kitchen"
    assert text.count("Kitchen") == 1
    body = page.locator("body").inner_text()
    assert not re.search(r"\d\d:\d\d:\d\d\.\d+|µs|\bkB\b|\bB\b", body)
    stages = page.locator(".latency li").all_inner_texts()
    assert stages
    assert all(re.fullmatch(r"\w+ ([\d,.]+|under 0\.1) ms", stage) for stage in stages)
    assert re.match(r"[\d.,]+ [KMG]B, [\d.,]+ KB per passage", facts_of(page)["On disk"])


def test_a_file_name_that_is_the_title_is_said_once(visit, address):
    page = visit(f"{address}/?q=kettle+descaling")
    page.wait_for_selector(".card")
    assert card_of(page, "notes.txt").inner_text().count("notes.txt") == 1
    search(page, "radius of a sphere")
    assert card_of(page, "volume.py").locator("h3").inner_text().startswith("volume.py > ")
    assert card_of(page, "volume.py").inner_text().count("volume.py") == 1
    assert "0.1 KB" in card_of(page, "volume.py").inner_text()
    search(page, "price of a kettle")
    row = card_of(page, "prices.csv")
    assert row.inner_text().count("prices.csv") == 1
    assert re.search(r"row [12] of 2", row.inner_text())


def test_fields_that_are_sizes_have_units_and_filter_by_their_value(visit, address):
    page = visit(f"{address}/?q=The+archive+of+recipes")
    card = card_of(page, "size")
    card.wait_for()
    assert card.locator(".metadata").inner_text().split("\n") == ["size_bytes", "3.4 MB", "weight", "12"]
    card.locator(".value", has_text="3.4 MB").click()
    assert page.locator("#filter").input_value() == "size_bytes = 3400000"


# Weak matches -------------------------------------------------------------------------------------------------------


def test_probabilities_are_those_of_the_students_calibration(address):
    file = shipped_models("students")[STUDENT] / "probabilities.json"
    fitted = json.loads(file.read_text())["tasks"]["asymmetric"]
    for query in (QUESTION, NONSENSE[0]):
        answer = patient.post(f"{address}/v1/search", json={"query": query, "explain": True}).json()
        for passage in answer["passages"]:
            own = passage["explanation"]["dot"] + passage["explanation"]["interaction"]
            expected = 1 / (1 + math.exp(-(fitted["slope"] * own + fitted["offset"])))
            assert passage["probability"] == pytest.approx(expected, rel=1e-6)
            words = passage["explanation"]["terms"]
            assert passage["weak"] is (expected < (0.15 if words else 0.5))
    answer = patient.post(f"{address}/v1/search", json={"query": "sourdough", "explain": True}).json()
    with_word = [passage["weak"] for passage in answer["passages"] if "sourdough" in passage["text"].lower()]
    assert with_word  # a passage with all of the query's words is not weak, whatever the student says
    assert not any(with_word)
    plain = patient.post(f"{address}/v1/search", json={"query": QUESTION}).json()["passages"][0]
    assert (plain["probability"], plain["weak"]) == (None, None)


@pytest.mark.parametrize("query", NONSENSE)
def test_nonsense_fits_nothing(visit, address, query):
    page = visit(f"{address}/?q={quote(query)}")
    page.wait_for_selector(".card")
    assert page.locator(".note.nothing").inner_text().startswith("Nothing in this index seems to fit.")
    assert page.locator(".card .weak").count() == page.locator(".card").count()
    assert "nothing seems to fit" in page.locator("#status").inner_text()


def test_a_good_match_is_not_weak_and_a_poor_one_is(visit, address):
    page = visit(f"{address}/?q={QUESTION}")
    page.wait_for_selector(".card")
    assert page.locator(".note.nothing").count() == 0
    assert page.locator(".card").first.locator(".weak").count() == 0
    assert page.locator(".card").last.locator(".weak").inner_text() == "weak match"
    page.locator(".toggle-why").first.click()
    assert re.search(r"estimate that it fits the query: (over )?\d\d%\.", page.locator(".why").inner_text())


def test_a_student_without_calibration_calls_nothing_weak(visit, tmp_path):
    with served(write_tiny_index(tmp_path, 8)) as url:
        page = visit(f"{url}/?q=zzz")
        page.wait_for_selector(".card")
        assert page.locator(".weak, .nothing").count() == 0


def test_what_a_teacher_has_judged_is_not_called_weak_by_the_student(address, folder, tmp_path):
    teacher = str(write_tiny_model(tmp_path / "teacher", "llama"))
    with served(folder / "index", teacher=teacher, prompt="short", teacher_ms=60_000) as url:
        request = {"query": NONSENSE[0], "explain": True, "top_k": 2, "teacher_passages": 2}
        weak = {}
        for rescore in ("iem", "teacher"):
            passages = patient.post(f"{url}/v1/search", json=request | {"rescore": rescore}).json()["passages"]
            assert [passage["log_odds"] is not None for passage in passages] == [rescore == "teacher"] * 2
            weak[rescore] = [passage["weak"] for passage in passages]
        assert weak == {"iem": [True, True], "teacher": [None, None]}


# The document -------------------------------------------------------------------------------------------------------


def open_manual(page):
    card_of(page, "manual.md#").locator(".open-document").click()
    page.wait_for_selector("#document .part.opened")


def test_a_result_opens_its_whole_document_with_the_passage_marked(visit, address):
    page = visit(f"{address}/?q=Step+28+of+the+manual")
    page.wait_for_selector(".card")
    identity = card_of(page, "manual.md#").get_attribute("data-id")
    open_manual(page)
    view = page.locator("#document")
    assert view.locator("#document-title").inner_text() == "Manual"
    facts = view.locator("#document-facts").inner_text()
    assert "deep/manual.md" in facts
    assert re.search(r"\d KB", facts)
    text = " ".join(view.locator("#document-text .text").all_inner_texts())
    for n, sentence in enumerate(SENTENCES):  # each once, though passages overlap
        assert text.count(f"Step {n} of the manual: {sentence}") == 1, n
    assert view.locator("h3").all_inner_texts() == ["Kitchen", "End"]
    assert view.locator(".opened").get_attribute("data-id") == identity
    assert "This result" in view.locator(".opened").inner_text()
    assert view.locator(".opened").evaluate(
        "one => { const box = one.getBoundingClientRect(), text = one.parentElement.getBoundingClientRect();"
        " return box.bottom > text.top && box.top < text.bottom }"
    )
    assert {"manual", "step"} <= {mark.lower() for mark in view.locator(".opened mark").all_inner_texts()}
    assert state_of(page)["open"] == identity


def test_other_results_in_the_document_are_marked_and_reached(visit, address):
    page = visit(f"{address}/?q=Step+of+the+manual")
    page.wait_for_selector(".card")
    in_manual = page.locator('.card[data-id*="manual.md#"]').count()
    assert in_manual > 1
    open_manual(page)
    view = page.locator("#document")
    assert view.locator(".marked").count() == in_manual
    labels = {view.locator("#document-position").inner_text()}
    for _ in range(in_manual):
        page.locator("#document-next").click()
        labels.add(view.locator("#document-position").inner_text())
    assert labels == {f"Result {n} of {in_manual} in this document" for n in range(1, in_manual + 1)}


def test_a_link_opens_the_document_and_closing_it_leaves_the_search(visit, address):
    page = visit(f"{address}/?q=Step+28+of+the+manual")
    page.wait_for_selector(".card")
    open_manual(page)
    page.reload()
    page.wait_for_selector("#document .part.opened")
    page.keyboard.press("Escape")
    assert page.locator("#document").is_hidden()
    page.wait_for_url(lambda url: "open=" not in url)  # the closed dialog tells so after it is hidden
    assert state_of(page) == {"q": "Step 28 of the manual"}
    for parameters in (f"q={QUESTION}&k=1&open=notes.txt", "open=notes.txt"):  # no result of this search, no search
        page.goto(f"{address}/?{parameters}")
        page.wait_for_selector("#document .part.opened")
        assert "descaling" in page.locator("#document-text").inner_text()


def test_a_document_is_opened_by_keyboard_and_searched_alone(visit, address):
    page = visit(f"{address}/?q=water")
    page.wait_for_selector(".card")
    card_of(page, "manual.md#").focus()
    page.keyboard.press("o")
    page.wait_for_selector("#document .part.opened")
    page.locator("#document-only").click()
    until(page, "[...document.querySelectorAll('.card')].every(card => card.dataset.id.includes('manual.md'))")
    assert page.locator("#filter").input_value() == "document_id = 'deep/manual.md'"


def test_the_file_of_a_row_is_searched_alone(visit, address):
    page = visit(f"{address}/?q=Copper+kettle+price")
    page.wait_for_selector(".card")
    card_of(page, "prices.csv").locator(".open-document").click()
    page.wait_for_selector("#document .part.opened")
    assert page.locator("#document-title").inner_text() == "prices.csv"
    assert re.match(r"row [12] of 2\n", page.locator("#document-facts").inner_text())
    page.get_by_role("button", name="Search only this file").click()
    until(page, "document.querySelectorAll('.card').length === 2")
    assert page.locator("#filter").input_value() == "path = 'prices.csv'"


def test_the_address_of_a_document_is_a_link_and_no_script_is(visit, address):
    page = visit(f"{address}/?q=A+wide+pan+of+salted+water")
    card_of(page, "pan").locator(".open-document").click()
    page.wait_for_selector("#document .part.opened")
    link = page.locator("#document-facts a")
    assert link.get_attribute("href") == ADDRESS
    assert link.get_attribute("rel") == "noopener noreferrer"
    assert link.get_attribute("target") == "_blank"
    page.locator("#document-close").click()
    search(page, "A link that runs: sourdough")
    card_of(page, "link").locator(".open-document").click()
    page.wait_for_selector("#document .part.opened")
    assert page.locator("#document a").count() == 0


def test_an_address_that_is_the_id_is_said_once(visit, address):
    page = visit(f"{address}/?q=Sourdough+returns")
    card = page.locator(f'.card[data-id="{FAQ}"]')
    card.wait_for()
    assert card.inner_text().count(FAQ) == 1
    assert card.locator(".metadata").inner_text().split() == ["language", "en"]
    card.locator(".open-document").click()
    page.wait_for_selector("#document .part.opened")
    assert page.locator("#document").inner_text().count(FAQ) == 1
    assert page.locator("#document-facts a").get_attribute("href") == FAQ


def test_a_hostile_document_is_only_text(visit, address):
    page = visit(f"{address}/?q={HOSTILE_QUERY}")
    page.wait_for_selector(".card")
    card_of(page, "h0").locator(".open-document").click()
    page.wait_for_selector("#document .part.opened")
    assert page.locator("#document .part").count() == len(HOSTILE)
    assert page.locator("#document :is(script, img, iframe, style, a, b[onclick], [onerror], [onload])").count() == 0
    assert "<script>alert('run')</script>" in page.locator("#document-text").inner_text()
    page.set_viewport_size(PHONE)
    assert overflow(page) == 0


# The first screen ---------------------------------------------------------------------------------------------------


def bottom_of(page, selector):
    box = page.locator(selector).first.bounding_box()
    return box["y"] + box["height"]


@pytest.mark.parametrize("query", ["", f"?q={QUESTION}"])
def test_adding_documents_is_on_the_first_screen(visit, address, query):
    page = visit(f"{address}/{query}")
    page.wait_for_selector(".card, .message")
    assert bottom_of(page, "#adding .choose") < 900
    page.set_viewport_size(PHONE)
    page.wait_for_selector("#adding[open]", state="detached")
    assert bottom_of(page, "#adding > summary") < 300
    page.locator("#adding > summary").click()
    assert bottom_of(page, "#adding .choose") < PHONE["height"]


def test_controls_fold_away_on_a_phone(visit, address):
    page = visit(f"{address}/?q={QUESTION}&filter=1+%3D+1", width=PHONE["width"], expected=["400 (Bad Request)"])
    page.set_viewport_size(PHONE)
    page.wait_for_selector(".message.error")
    assert page.locator("#filter-error").is_visible()  # an error unfolds what it is about
    page.goto(f"{address}/?q={QUESTION}&k=5")
    page.wait_for_selector(".card")
    assert page.locator(".controls").is_hidden()
    assert page.locator("#facts").is_hidden()
    assert page.locator("#options > summary").inner_text() == "Options: 5 shown"
    assert bottom_of(page, ".card") < PHONE["height"]
    assert page.locator("#results").bounding_box()["y"] < 250
    page.locator("#options > summary").click()
    assert page.locator(".controls").is_visible()
    assert page.locator("#filters").is_visible()
    page.set_viewport_size({"width": 1280, "height": 900})
    page.wait_for_selector("#options > summary", state="hidden")
    assert page.locator(".controls").is_visible()
