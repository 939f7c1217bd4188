"""Rendering of all pages: escaping templates, and one style sheet that the page's security policy allows."""

from __future__ import annotations

import base64
import functools
import hashlib

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from d2llm.core.document import Document


def page(document: Document) -> str:
    """A document as a page to open in a browser, mail or print; it loads nothing and runs no script."""
    return render("document.html.j2", document=document)


def render(template: str, **values: object) -> str:
    """Render a template; every value is escaped."""
    sheet = _environment().get_template("style.css").render()
    style_hash = base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode()
    page = _environment().get_template(template).render(style=Markup(sheet), style_hash=style_hash, **values)
    # Truncated JSON texts may contain lone surrogates, which are replaced.
    return page.encode("utf-8", "replace").decode("utf-8")


@functools.cache
def _environment() -> Environment:
    """The environment of the templates, created once per process."""
    return Environment(
        loader=PackageLoader("d2llm.reports.html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
