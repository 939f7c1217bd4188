"""The page: adding documents, entering an API key, and a server that is starting or unreachable."""

from __future__ import annotations

import json

import pytest

from page_server import search, until
from tiny_server import tiny_settings, write_tiny_index

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")

from d2llm.server.app import make_app
from live_server import serve, wait_until_ready


@pytest.fixture
def address(tmp_path):
    with serve(make_app(tiny_settings(write_tiny_index(tmp_path, 8)))) as url:
        wait_until_ready(url)
        yield url


def write_folder(folder):
    """Seven documents in files of all kinds, and six files or records that cannot be read."""
    folder.mkdir()
    (folder / "deep").mkdir()
    texts = {
        "plain.txt": "the ship of the winter sea",
        "deep/notes.md": "# Notes of noon\n\nthe train leaves at noon",
        "page.html": "<html><head><title>Bread &amp; salt</title><script>alert(1)</script></head><body><h1>Bread</h1>"
        "<p>is baked</p><img src='http://evil.example/x.png' onerror=alert(2)></body></html>",
        "table.csv": 'id,title,text,year\nc1,First,"stars, ""planets""\nand snow",2003\n'
        "c2,,rain on the roof,2004\nc3,x\n",
        "lines.jsonl": '{"id": "j1", "text": "a dog in the field", "metadata": {"year": 2010}}\n'
        '{"_id": "j2", "text": "a book about snow", "title": "Snow"}\nno json\n{"id": "j3"}\n',
        "empty.txt": " \n",
        "picture.png": "not read",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "latin.txt").write_bytes("für".encode("latin-1"))
    return folder


def test_a_folder_is_added_and_skipped_files_are_named(visit, address, tmp_path):
    # Chromium checks the event handlers even of a document that is only parsed, and logs that the policy blocks them.
    page = visit(address, expected=["Executing inline event handler violates"])
    page.locator("#folder").set_input_files(write_folder(tmp_path / "docs"))
    page.wait_for_selector("#upload-report .skipped")
    report = page.locator("#upload-report")
    assert "7 documents in 7 passages: 7 new" in report.inner_text()
    report.locator("summary").click()
    skipped = report.locator("li").all_inner_texts()
    assert len(skipped) == 6
    for part in (
        "picture.png: its file type",
        "latin.txt: it is not UTF-8",
        "empty.txt: it has no text",
        "row 3",
        "line 3",
        "line 4",
    ):
        assert any(part in line for line in skipped), part
    until(page, r"/\b15\b/.test(document.querySelector('#facts').innerText)")  # 8 passages before
    search(page, "stars and planets")
    assert page.locator('.card[data-id^="c1"]').count() == 1
    assert 'stars, "planets"' in page.locator('.card[data-id^="c1"] .text').inner_text()
    page.locator("#filters > summary").click()
    page.locator("#filter").fill("year = 2010")
    until(page, "document.querySelectorAll('.card').length === 1")
    assert page.locator(".card").get_attribute("data-id").startswith("j1")
    page.locator("#filter").fill("title = 'Bread & salt'")
    until(page, "document.querySelector('.card')?.dataset.id.includes('page.html')")
    assert page.locator(".card .text").inner_text().split() == ["Bread", "is", "baked"]


def test_a_rejected_document_does_not_stop_the_others(visit, address, tmp_path):
    records = [{"id": f"d{n}", "text": f"the cat number {n}", "metadata": {"year": 2000 + n}} for n in range(20)]
    records[5]["metadata"]["year"] = "soon"
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    page = visit(address, expected=["400 (Bad Request)"])
    page.locator("#files").set_input_files(path)
    page.wait_for_selector("#upload-report .skipped")
    report = page.locator("#upload-report").inner_text()
    assert "19 documents" in report
    assert "d5" in report


def test_dropped_files_are_added(visit, address):
    page = visit(address)
    transfer = page.evaluate_handle(
        """() => {
            const transfer = new DataTransfer();
            transfer.items.add(new File(["the house by the sea"], "dropped.txt", {type: "text/plain"}));
            return transfer;
        }"""
    )
    page.dispatch_event("#adding", "drop", {"dataTransfer": transfer})
    until(page, "document.getElementById('upload-report').textContent.includes('1 document in 1 passage: 1 new')")


def test_the_key_is_requested_used_and_kept_out_of_the_url(visit, tmp_path):
    from d2llm.server.keys import add_key

    secret = add_key(tmp_path / "keys", "reader", "read")
    settings = tiny_settings(write_tiny_index(tmp_path, 8), keys_file=tmp_path / "keys")
    with serve(make_app(settings)) as address:
        wait_until_ready(address)
        page = visit(address, expected=["401 (Unauthorized)"], ready=False)
        page.wait_for_selector("#key-dialog[open]", timeout=60_000)
        assert "API key" in page.locator("#key-message").inner_text()
        page.locator("#key").fill("wrong")
        page.keyboard.press("Enter")
        until(page, "document.getElementById('key-message').textContent.includes('not know the API key')")
        page.locator("#key").fill(secret)
        page.keyboard.press("Enter")
        page.wait_for_selector("#facts div")
        search(page, "the cat")
        assert page.locator(".card").count() == 8
        assert secret not in page.url
        assert page.evaluate("Object.keys(localStorage).length") == 0


def test_an_unreachable_server_is_reported(visit, address):
    page = visit(address, expected=["net::ERR"])
    page.route("**/v1/search", lambda route: route.abort())
    page.locator("#query").fill("cat")
    page.wait_for_selector(".message.error")
    assert "cannot be reached" in page.locator(".message").inner_text()


def test_a_page_opened_while_the_server_starts_waits_for_it(visit, tmp_path):
    with serve(make_app(tiny_settings(write_tiny_index(tmp_path, 8)))) as address:
        page = visit(f"{address}/?q=cat", expected=["503 (Service Unavailable)"])
        page.wait_for_selector(".card")
