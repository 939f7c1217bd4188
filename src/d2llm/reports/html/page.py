"""What every page is made with: escaping templates, and one style sheet that the page's security policy knows."""

from __future__ import annotations

import base64
import functools
import hashlib

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


@functools.cache
def environment() -> Environment:
    """The templates, compiled once for all pages of a process; everything put into them is escaped."""
    return Environment(
        loader=PackageLoader("d2llm.reports.html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def styling(more: str = "") -> dict[str, Markup | str]:
    """``style``, the style sheet with ``more`` at its end, and ``style_hash``, by which a page's policy allows it."""
    style = environment().get_template("style.css").render() + more
    return {
        "style": Markup(style),
        "style_hash": base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
    }
