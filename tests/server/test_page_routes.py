"""The page's static files: content types, security headers, no external resources and no other files."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")

from fastapi import FastAPI
from fastapi.testclient import TestClient

from d2llm.data.documents import EXCLUDED
from d2llm.data.file_contents import SUFFIXES
from d2llm.data.ocr import PICTURES
from d2llm.retrieval.settings import SearchSettings
from d2llm.server import page_routes
from d2llm.server.errors import install_error_handlers
from d2llm.server.schemas import SearchRequest, sent_fields

FOLDER = Path(page_routes.__file__).parent / "page"
SETTINGS = {
    "report": None,
    "max_body_bytes": 1_000_000,
    "max_texts": 64,
    "max_text_chars": 1_000,
    "max_top_k": 100,
    "max_num_candidates": 1_000,
}


def client(**settings) -> TestClient:
    app = FastAPI(docs_url=None)
    app.state.settings = SimpleNamespace(**SETTINGS | {"ocr": None} | settings)
    install_error_handlers(app)
    app.include_router(page_routes.router)
    return TestClient(app)


def directives(response) -> dict[str, str]:
    parts = (part.strip().partition(" ") for part in response.headers["content-security-policy"].split(";"))
    return {name: value for name, _, value in parts}


@pytest.mark.parametrize("path", ["/", "/docs", "/page/main.js", "/page/style.css", "/page/icon.svg"])
def test_the_content_policy_allows_only_the_pages_own_files(path):
    response = client().get(path)
    assert response.status_code == 200
    policy = directives(response)
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_every_file_has_its_content_type_and_an_etag(path):
    http_client = client()
    response = http_client.get(f"/page/{path.name}")
    assert response.content == path.read_bytes()
    content_types = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml"}
    assert response.headers["content-type"].partition(";")[0] == content_types[path.suffix]
    assert response.headers["cache-control"] == "no-cache"
    unchanged = http_client.get(f"/page/{path.name}", headers={"If-None-Match": response.headers["etag"]})
    assert (unchanged.status_code, unchanged.content) == (304, b"")
    assert http_client.get(f"/page/{path.name}", headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    "path", ["/page/none.js", "/page/..%2fpage_routes.py", "/page/%2e%2e/app.py", "/page//etc/passwd", "/page/"]
)
def test_no_other_file_is_served(path):
    response = client().get(path)
    assert response.status_code == 404
    assert response.json()["error"]["kind"] == "not_found"


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_files_use_no_external_hosts_and_no_raw_html(path):
    text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|(?:src|href)=[\"']//|@import", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
    if path.suffix == ".html":  # the content security policy would block them
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*src=)", text)


def test_scripts_import_existing_files():
    for path in FOLDER.glob("*.js"):
        for name in re.findall(r'from "\./([^"]+)"', path.read_text(encoding="utf-8")):
            assert (FOLDER / name).is_file(), f"{path.name} imports {name}"


def test_scripts_are_short():
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in FOLDER.glob("*.js")}
    assert {name: length for name, length in lengths.items() if length >= 400} == {}


def test_the_page_settings_contain_the_limits_and_the_files_that_are_read():
    settings = client().get("/page/settings.json").json()
    file_types, excluded = settings.pop("file_types"), settings.pop("excluded")
    search, rerankers = settings.pop("search"), settings.pop("rerankers")
    assert [*rerankers] == search["rescore"]["enum"][2:]
    assert {kind for kind, each in rerankers.items() if each["needs_calibration"]} == {"cascade"}
    assert search["top_k"]["default"] == SearchSettings().top_k
    assert (search["top_k"]["minimum"], search["top_k"]["maximum"]) == (1, SETTINGS["max_top_k"])
    assert search["hybrid"]["maximum"] == 1
    assert search["rescore"]["enum"] == ["none", "iem", "cascade", "listwise", "teacher"]
    for name, field in sent_fields(SearchRequest).items():
        assert search[name]["description"] == field.description
    assert settings == {"has_report": False, **{name: value for name, value in SETTINGS.items() if name != "report"}}
    assert {*SUFFIXES, ".jsonl.gz"} == {*file_types} - PICTURES
    assert {".pdf", ".docx", ".odt", ".pptx", ".xlsx", ".epub", ".csv", ".parquet"} <= {*file_types}
    assert excluded == [*EXCLUDED]


def test_a_report_may_not_run_scripts(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("<style>p { color: red }</style><p>über</p>", encoding="utf-8")
    http_client = client(report=path)
    assert http_client.get("/page/settings.json").json()["has_report"] is True
    response = http_client.get("/evaluation")
    assert response.text == path.read_text(encoding="utf-8")
    policy = directives(response)
    assert policy["sandbox"] == ""
    assert policy["default-src"] == "'none'"
    assert "script-src" not in policy
    path.unlink()
    assert http_client.get("/evaluation").status_code == 404


def test_without_a_report_the_error_names_the_option():
    response = client().get("/evaluation")
    assert response.status_code == 404
    assert "--report" in response.json()["error"]["message"]


def test_only_the_page_around_the_report_allows_inline_styles():
    names = [path.name for path in FOLDER.glob("*.html")]
    pages = [
        name for name in names if "unsafe-inline" in client().get(f"/page/{name}").headers["content-security-policy"]
    ]
    assert pages == ["evaluation.html"]
