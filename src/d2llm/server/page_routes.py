"""The web page at ``/``, the pages of the API at ``/docs``, and the report of an evaluation at ``/evaluation``.

The pages are plain files beside this module. They load nothing from elsewhere, and their content security policy
allows nothing else. They tell nothing of the index: what they show they ask the API for, with a key where needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse, Response

from d2llm.core.errors import InputError
from d2llm.server.errors import NotFoundError

_FOLDER = Path(__file__).parent / "page"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src {styles}; img-src 'self' data:; connect-src 'self'; "
    "frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_POLICY = _PAGE_POLICY.format(styles="'self'")
# A report stands in a frame inside this page, whose policy the frame inherits, and has its styles within itself.
_FRAMING_POLICY = _PAGE_POLICY.format(styles="'self' 'unsafe-inline'")
_BEGINNING = 1_000  # characters of a report that are looked at
_FRAMING_PAGE = "evaluation.html"
_REPORT_POLICY = (
    "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True, slots=True)
class _PageFile:
    content: bytes
    media_type: str
    etag: str


@router.api_route("/", methods=["GET", "HEAD"])
def page(request: Request) -> Response:
    """The page to search with."""
    return _answer(request, "index.html")


@router.api_route("/docs", methods=["GET", "HEAD"])
def api_pages(request: Request) -> Response:
    """The API, read from ``/openapi.json``."""
    return _answer(request, "docs.html")


@router.get("/page/settings.json")
def page_settings(request: Request) -> JSONResponse:
    """What the page has to know before it asks for anything: limits, and whether there is a report."""
    settings = request.app.state.settings
    facts = {
        "has_report": settings.report is not None,
        "max_body_bytes": settings.max_body_bytes,
        "max_texts": settings.max_texts,
        "max_text_chars": settings.max_text_chars,
        "max_top_k": settings.max_top_k,
        "max_num_candidates": settings.max_num_candidates,
    }
    return JSONResponse(facts, headers=_headers(_POLICY) | {"Cache-Control": "no-store"})


@router.api_route("/page/{name}", methods=["GET", "HEAD"])
def page_file(name: str, request: Request) -> Response:
    """A file of the page."""
    if name not in _files():
        raise NotFoundError(f"the page has no file {name!r}")
    return _answer(request, name)


@router.get("/evaluation")
def evaluation(request: Request) -> Response:
    """The report of `d2llm evaluate --html` that the settings name. It may run no script, whatever is in it."""
    path: Path | None = request.app.state.settings.report
    if path is None:
        raise NotFoundError("this server shows no report; start it with --report and a page of `d2llm evaluate --html`")
    if not path.is_file():
        raise NotFoundError("the report of this server is not there any more; see its setting report")
    headers = _headers(_REPORT_POLICY) | {"Cache-Control": "no-store"}
    return FileResponse(path, media_type="text/html; charset=utf-8", headers=headers)


def check_report(path: Path) -> None:
    """Make sure that a file is a page that can be shown.

    Raises:
        InputError: it cannot be read, or is no HTML.
    """
    remedy = "give the page that `d2llm evaluate --html` wrote, or leave report out"
    try:
        begin = path.read_text(encoding="utf-8")[:_BEGINNING].lstrip("\ufeff \t\r\n").lower()
    except OSError as error:
        raise InputError(f"report {path}: cannot be read ({error.strerror}); {remedy}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"report {path}: is no text in UTF-8; {remedy}") from error
    if not begin.startswith(("<!doctype html", "<html")):
        raise InputError(f"report {path}: is no HTML page; {remedy}")


@cache
def _files() -> Mapping[str, _PageFile]:
    """All files of the page by name; no other path of the disk can be asked for."""
    files: dict[str, _PageFile] = {}
    for path in sorted(_FOLDER.iterdir()):
        if path.suffix in _TYPES:
            content = path.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            files[path.name] = _PageFile(content, _TYPES[path.suffix], etag)
    return files


def _answer(request: Request, name: str) -> Response:
    file = _files()[name]
    headers = _headers(_FRAMING_POLICY if name == _FRAMING_PAGE else _POLICY)
    # Asked for anew every time, so that page and scripts are of one version, but sent only when they have changed.
    headers |= {"Cache-Control": "no-cache", "ETag": file.etag}
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if file.etag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)


def _headers(policy: str) -> dict[str, str]:
    return {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    }
