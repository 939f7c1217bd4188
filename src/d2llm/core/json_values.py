"""JSON that others wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from d2llm.core.errors import ModelError


def parse_json(text: str | bytes) -> Any:
    """The value of a text in JSON, as ``json.loads``, but with one kind of error.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or has a number of too many digits.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_model_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model.

    Raises:
        ModelError: it cannot be read, or is no object.
    """
    try:
        content: object = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error}); fetch or restore it") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: is not a JSON object; fetch or restore it")
    return cast("dict[str, Any]", content)
