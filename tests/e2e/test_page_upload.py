"""The page: adding documents, entering an API key, and a server that is starting or unreachable."""

from __future__ import annotations

import gzip
import json
import re

import pytest

from d2llm.data.documents import find_documents
from file_cases import docx_cases, epub_cases, odt_cases, pdf_cases, pptx_cases, xlsx_cases
from page_server import search, until
from tiny_server import tiny_settings, write_tiny_index

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")

from d2llm.server.app import make_app
from live_server import patient, serve, served, wait_until_ready


@pytest.fixture
def address(tmp_path):
    with served(write_tiny_index(tmp_path, 8), ocr="none") as url:
        yield url


PHRASES = {
    "plain.txt": "the ship of the winter sea",
    "latin.txt": "für die Katze",
    "deep/notes.md": "the train leaves at noon",
    "page.html": "bread is baked in the morning",
    "word.docx": "R&D of the dog at < 5 bar",
    "text.odt": "the cat of the open document",
    "slides.pptx": "a slide about the sun",
    "sheet.xlsx": "salt from the sheet",
    "paper.pdf": "snow on the paper",
    "book.epub": "a star in the book",
    "table.csv": 'stars, "planets" and snow',
    "lines.jsonl": "a dog in the field",
    "packed.jsonl.gz": "a packed house by the sea",
}
"""Files of all kinds, each with words that are in its text."""


def write_folder(folder):
    """The files of ``PHRASES``; others that cannot be read, or in part; and hidden ones."""
    lines = {
        "packed.jsonl.gz": gzip.compress(b'{"id": "z1", "text": "a packed house by the sea"}\n'),
        "lines.jsonl": b'{"id": "j1", "text": "a dog in the field", "year": 2010}\n'
        b'{"id": "j2", "text": "a book", "year": "soon"}\n',
    }
    contents = lines | {
        "plain.txt": PHRASES["plain.txt"].encode(),
        "latin.txt": PHRASES["latin.txt"].encode("latin-1"),
        "deep/notes.md": b"# Notes of noon\n\nthe train leaves at noon",
        "page.html": b"<title>Bread &amp; salt</title><script>alert(1)</script><p>bread is baked in the morning"
        b"<img src='http://evil.example/x.png' onerror=alert(2)>",
        "word.docx": docx_cases.docx(docx_cases.p("R&amp;D of the dog at &lt; 5 bar")),
        "text.odt": odt_cases.odt(odt_cases.p("the cat of the open document")),
        "slides.pptx": pptx_cases.pptx([pptx_cases.shape(pptx_cases.p(pptx_cases.r("a slide about the sun")))]),
        "sheet.xlsx": xlsx_cases.xlsx({"One": xlsx_cases.sheet([["name"], ["salt from the sheet"]])}),
        "paper.pdf": pdf_cases.pages(pdf_cases.line("snow on the paper")),
        "book.epub": epub_cases.epub(
            {
                "one.xhtml": epub_cases.page("<p>a star in the book</p>"),
                "cover.xhtml": epub_cases.page("<img src='a.png'/>"),
            }
        ),
        "table.csv": b'id,title,text,year\nc1,First,"stars, ""planets"" and snow",2003\nc2,,rain on the roof,2004\n',
        "empty.txt": b"",
        "scan.pdf": pdf_cases.pages(b""),
        "broken.docx": b"no archive",
        "damaged.jsonl": b'{"id": "j9"}\nno json\n',
        "picture.png": b"not read",
        ".git/config.txt": b"a hidden file",
        "node_modules/a.md": b"a file of a library",
    }
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def test_a_folder_is_read_as_by_sync_and_what_was_skipped_is_named(visit, address, tmp_path):
    page = visit(address, expected=["400 (Bad Request)"])
    folder = write_folder(tmp_path / "docs")
    page.locator("#folder").set_input_files(folder)
    page.wait_for_selector("#upload-report .skipped", timeout=120_000)
    report = page.locator("#upload-report")
    assert "13 files read: 15 documents in 15 passages: 15 new" in report.inner_text()
    assert "1 value of the field year left out" in report.inner_text()  # "soon"; years of a CSV file become numbers
    assert "2 hidden files left out" in report.inner_text()
    report.locator("summary").click()
    skipped = "\n".join(report.locator("li").all_inner_texts())
    assert len(report.locator("li").all()) == 6
    for part in (
        "picture.png: files of this type cannot be read",
        "empty.txt: it is empty",
        "scan.pdf: it has no text",
        "broken.docx: ",
        "damaged.jsonl: ",
        "book.epub, ",
    ):
        assert part in skipped
    until(page, r"/\b23\b/.test(document.querySelector('#facts').innerText)")  # 8 passages before

    listed = patient.get(f"{address}/v1/documents").json()["documents"]
    uploaded = {one["id"].removeprefix("docs/"): "" for one in listed if not re.fullmatch(r"d\d", one["id"])}
    for name in uploaded:
        full = name if name in ("c1", "c2", "j1", "j2", "z1") else f"docs/{name}"
        passages = patient.get(f"{address}/v1/documents/{full}").json()["passages"]
        uploaded[name] = "\n".join(one["text"] for one in passages)
    synced = {one.id: one.text for one in find_documents([folder])}
    synced["z1"] = PHRASES["packed.jsonl.gz"]  # a packed corpus is taken by uploads alone
    assert uploaded.keys() == synced.keys()
    for name, text in synced.items():
        assert " ".join(uploaded[name].split()) == " ".join(text.split()), name
    for phrase in PHRASES.values():
        assert sum(phrase in " ".join(text.split()) for text in uploaded.values()) == 1, phrase


@pytest.mark.parametrize("name", ["word.docx", "paper.pdf", "book.epub", "sheet.xlsx"])
def test_a_file_of_each_kind_can_be_chosen_and_is_found(visit, address, tmp_path, name):
    page = visit(address)
    assert f".{name.rpartition('.')[2]}" in page.locator("#files").get_attribute("accept").split(",")
    page.locator("#files").set_input_files(write_folder(tmp_path / "docs") / name)
    until(page, "document.getElementById('upload-report').textContent.includes('1 file read: 1 document')", 120)
    page.goto(f"{address}/?q=snow&filter=id+%3D+'{name}'")
    page.wait_for_selector(".card")
    assert [PHRASES[name] in text for text in page.locator(".card .text").all_inner_texts()] == [True]
    page.locator(".open-document").click()
    page.wait_for_selector("#document .part.opened")
    assert name in page.locator("#document").inner_text()


def test_what_was_known_is_told_from_what_is_new(visit, address, tmp_path):
    page = visit(address)
    path = tmp_path / "records.jsonl"
    texts = [("the cat by the sea", 2001), ("the dog by the sea", 2002), ("the ship by the sea", 2003)]

    def add(expected):
        lines = [json.dumps({"id": f"k{n}", "text": text, "year": year}) for n, (text, year) in enumerate(texts)]
        path.write_text("\n".join(lines))
        page.locator("#files").set_input_files(path)
        until(page, f"document.getElementById('upload-report').textContent.includes('{expected}')", 120)

    add("3 documents in 3 passages: 3 new.")
    texts[1:] = [("the dog by the sea", 2010), ("the train by the sea", 2003)]
    add("3 documents in 3 passages: 1 changed, 1 with other metadata, 1 unchanged.")


def test_a_file_that_is_too_large_is_named_with_the_limit(visit, tmp_path):
    with served(write_tiny_index(tmp_path, 8), max_body_bytes=1_000_000) as address:
        (tmp_path / "large.txt").write_text("the cat " * 200_000)
        page = visit(address)
        page.locator("#files").set_input_files(tmp_path / "large.txt")
        page.wait_for_selector("#upload-report .skipped")
        assert (
            "larger than this server takes (1 MB; its setting is max_body_bytes)"
            in page.locator("#upload-report").inner_text()
        )


def test_files_that_come_while_others_are_read_are_counted(visit, address, tmp_path):
    for name in ("first.txt", "second.txt", "third.txt"):
        (tmp_path / name).write_text("the cat by the sea")
    page = visit(address)

    held = []
    page.route("**/v1/files*", lambda route: held.append(route))
    page.locator("#files").set_input_files(tmp_path / "first.txt")
    while not held:
        page.wait_for_timeout(30)
    page.locator("#files").set_input_files([tmp_path / "second.txt", tmp_path / "third.txt"])
    held.pop().continue_()
    until(page, "document.getElementById('upload-report').textContent.includes('1 file read: 1 document')", 120)
    assert (
        "2 files not added, because others were being read: add them again."
        in page.locator("#upload-report").inner_text()
    )


@pytest.mark.parametrize("target", ["#adding", "#results", "body"])
def test_files_may_be_dropped_anywhere(visit, address, target):
    page = visit(address)
    transfer = page.evaluate_handle(
        """() => {
            const transfer = new DataTransfer();
            transfer.items.add(new File(["the house by the sea"], "dropped.txt", {type: "text/plain"}));
            return transfer;
        }"""
    )
    page.dispatch_event(target, "drop", {"dataTransfer": transfer})
    until(page, "document.getElementById('upload-report').textContent.includes('1 document in 1 passage: 1 new')", 120)


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
