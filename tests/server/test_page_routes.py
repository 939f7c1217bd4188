"""The files of the page: types, headers, nothing from elsewhere, nothing but these files."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")

from fastapi import FastAPI
from fastapi.testclient import TestClient

from d2llm.server import page_routes
from d2llm.server.errors import install_error_handlers

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
    app.state.settings = SimpleNamespace(**SETTINGS | settings)
    install_error_handlers(app)
    app.include_router(page_routes.router)
    return TestClient(app)


def directives(answer) -> dict[str, str]:
    parts = (part.strip().partition(" ") for part in answer.headers["content-security-policy"].split(";"))
    return {name: value for name, _, value in parts}


@pytest.mark.parametrize("path", ["/", "/docs", "/page/main.js", "/page/style.css", "/page/icon.svg"])
def test_pages_allow_nothing_but_their_own_files(path):
    answer = client().get(path)
    assert answer.status_code == 200
    policy = directives(answer)
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_every_file_is_served_with_its_type_and_kept_only_while_it_is_the_same(path):
    asked = client()
    answer = asked.get(f"/page/{path.name}")
    assert answer.content == path.read_bytes()
    kinds = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml"}
    assert answer.headers["content-type"].partition(";")[0] == kinds[path.suffix]
    assert answer.headers["cache-control"] == "no-cache"
    again = asked.get(f"/page/{path.name}", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert asked.get(f"/page/{path.name}", headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    "path", ["/page/none.js", "/page/..%2fpage_routes.py", "/page/%2e%2e/app.py", "/page//etc/passwd", "/page/"]
)
def test_no_other_file_can_be_asked_for(path):
    answer = client().get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["kind"] == "not_found"


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_files_name_no_other_host_and_write_no_markup(path):
    text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|(?:src|href)=[\"']//|@import", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
    if path.suffix == ".html":  # the policy would refuse them
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*src=)", text)


def test_imports_between_scripts_are_files_that_are_there():
    for path in FOLDER.glob("*.js"):
        for name in re.findall(r'from "\./([^"]+)"', path.read_text(encoding="utf-8")):
            assert (FOLDER / name).is_file(), f"{path.name} imports {name}"


def test_scripts_are_short():
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in FOLDER.glob("*.js")}
    assert {name: length for name, length in lengths.items() if length >= 400} == {}


def test_limits_are_told_before_anything_is_asked():
    assert client().get("/page/settings.json").json() == {
        "has_report": False,
        **{name: value for name, value in SETTINGS.items() if name != "report"},
    }


def test_a_report_may_run_nothing(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("<style>p { color: red }</style><p>über</p>", encoding="utf-8")
    asked = client(report=path)
    assert asked.get("/page/settings.json").json()["has_report"] is True
    answer = asked.get("/evaluation")
    assert answer.text == path.read_text(encoding="utf-8")
    policy = directives(answer)
    assert policy["sandbox"] == ""
    assert policy["default-src"] == "'none'"
    assert "script-src" not in policy
    path.unlink()
    assert asked.get("/evaluation").status_code == 404


def test_without_a_report_it_says_how_to_show_one():
    answer = client().get("/evaluation")
    assert answer.status_code == 404
    assert "--report" in answer.json()["error"]["message"]


def test_only_the_page_around_the_report_allows_inline_styles():
    names = [path.name for path in FOLDER.glob("*.html")]
    allowing = [
        name for name in names if "unsafe-inline" in client().get(f"/page/{name}").headers["content-security-policy"]
    ]
    assert allowing == ["evaluation.html"]
