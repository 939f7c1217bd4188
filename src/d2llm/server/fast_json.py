"""Answers with many numbers, made into JSON by pydantic's own writer."""

from __future__ import annotations

from typing import Any

from pydantic_core import to_json
from starlette.responses import JSONResponse


class FastJSONResponse(JSONResponse):
    """``JSONResponse``, several times faster on vectors; takes numpy arrays as they are."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return to_json(content, fallback=_plain)


def _plain(value: Any) -> Any:
    return value.tolist()
