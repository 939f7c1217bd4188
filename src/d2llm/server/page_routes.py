"""The search page at ``/``, the API documentation at ``/docs``, and the evaluation report at ``/evaluation``.

The pages are static files beside this module. They load nothing from other hosts, which their content security policy
enforces. They contain nothing about the index: they get their data from the API, with a key if needed.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse, Response

from d2llm.core.errors import InputError
from d2llm.data.documents import EXCLUDED
from d2llm.retrieval.reranker import Reranker, TeacherReranker
from d2llm.server.errors import NotFoundError
from d2llm.server.schemas import SearchRequest
from d2llm.server.uploads import file_types

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
# A report is shown in a frame inside this page. It has inline styles, and the frame inherits the page's policy.
_FRAMING_POLICY = _PAGE_POLICY.format(styles="'self' 'unsafe-inline'")
_BEGINNING = 1_000  # characters of a report that are checked
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
    """The search page. Its links are relative, so ``/indexes/NAME`` is sent to ``/indexes/NAME/``."""
    name = request.scope["raw_path"].decode("ascii").rpartition("/")[2]
    if name:
        return RedirectResponse(f"./{name}/?{request.url.query}".removesuffix("?"))
    return _response(request, "index.html")


@router.api_route("/docs", methods=["GET", "HEAD"])
def api_pages(request: Request) -> Response:
    """The API documentation, rendered from ``/openapi.json``."""
    return _response(request, "docs.html")


@router.get("/page/settings.json")
def page_settings(request: Request) -> JSONResponse:
    """What the page needs before its first API request: limits, which files are read, and whether there is a report."""
    settings = request.app.state.settings
    facts = {
        "has_report": settings.report is not None,
        "max_body_bytes": settings.max_body_bytes,
        "max_texts": settings.max_texts,
        "max_text_chars": settings.max_text_chars,
        "search": _search_fields(settings.max_top_k),
        "rerankers": _rerankers(),
        "max_top_k": settings.max_top_k,
        "max_num_candidates": settings.max_num_candidates,
        "file_types": file_types(settings),
        "excluded": EXCLUDED,
    }
    return JSONResponse(facts, headers=_headers(_POLICY) | {"Cache-Control": "no-store"})


def _search_fields(max_top_k: int) -> dict[str, dict[str, Any]]:
    """The fields of a search request, of which the page makes controls: help texts, defaults, bounds, choices."""
    fields = SearchRequest.model_json_schema()["properties"].items()
    described = {name: {**field.get("anyOf", [{}])[0], **field} for name, field in fields}
    top_k = described["top_k"]
    top_k["maximum"] = min(max_top_k, top_k.get("maximum", max_top_k))
    return described


def _rerankers() -> dict[str, dict[str, Any]]:
    """What the page says of each kind of reranker; one of another package that cannot be imported is left out."""
    described: dict[str, dict[str, Any]] = {}
    for kind in Reranker.kinds.kinds:
        with contextlib.suppress(ValueError):
            cls = Reranker.kinds.find(kind)
            needs_calibration = issubclass(cls, TeacherReranker) and cls.uses_error
            described[kind] = {"score_name": cls.score_name, "needs_calibration": needs_calibration}
    return described


@router.api_route("/page/{name}", methods=["GET", "HEAD"])
def page_file(name: str, request: Request) -> Response:
    """A file of the page."""
    if name not in _files():
        raise NotFoundError(f"the page has no file {name!r}")
    return _response(request, name)


@router.get("/evaluation")
def evaluation(request: Request) -> Response:
    """The report of `d2llm evaluate --html` named in the settings, with scripts disabled."""
    path: Path | None = request.app.state.settings.report
    if path is None:
        raise NotFoundError("this server has no report; start it with --report and a page of `d2llm evaluate --html`")
    if not path.is_file():
        raise NotFoundError("the report of this server no longer exists; see its setting report")
    headers = _headers(_REPORT_POLICY) | {"Cache-Control": "no-store"}
    return FileResponse(path, media_type="text/html; charset=utf-8", headers=headers)


def check_report(path: Path) -> None:
    """Check that a file is an HTML page.

    Raises:
        InputError: it cannot be read, or is not HTML.
    """
    remedy = "give the page that `d2llm evaluate --html` wrote, or leave report out"
    try:
        begin = path.read_text(encoding="utf-8")[:_BEGINNING].lstrip("\ufeff \t\r\n").lower()
    except OSError as error:
        raise InputError(f"report {path}: cannot be read ({error.strerror}); {remedy}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"report {path}: is not UTF-8 text; {remedy}") from error
    if not begin.startswith(("<!doctype html", "<html")):
        raise InputError(f"report {path}: is not an HTML page; {remedy}")


@cache
def _files() -> Mapping[str, _PageFile]:
    """All files of the page by name; no other path on disk can be requested."""
    files: dict[str, _PageFile] = {}
    for path in sorted(_FOLDER.iterdir()):
        if path.suffix in _TYPES:
            content = path.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            files[path.name] = _PageFile(content, _TYPES[path.suffix], etag)
    return files


def _response(request: Request, name: str) -> Response:
    file = _files()[name]
    headers = _headers(_FRAMING_POLICY if name == _FRAMING_PAGE else _POLICY)
    # Revalidated on every request, so that page and scripts match, but sent only if they have changed.
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
