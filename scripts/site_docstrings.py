"""Griffe's extension for the site: docstrings as ``help`` shows them, with examples as code."""

from __future__ import annotations

import inspect
import pkgutil
import re
from typing import Any

from griffe import Class, Docstring, Extension, Object

from d2llm.core.settings import Settings


class Docstrings(Extension):
    """Reads the attributes of settings from their fields, and examples as examples."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Let ``Example:`` be a section of examples, which Griffe calls ``Examples:``."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)

    def on_class(self, *, cls: Class, **_: Any) -> None:
        """Give a class of settings the docstring that it has when it is imported."""
        if not cls.docstring or not any("Settings" in str(base) for base in cls.bases):
            return
        imported = pkgutil.resolve_name(cls.path)
        if issubclass(imported, Settings):
            text = re.sub(r"^Example:$", "Examples:", inspect.getdoc(imported) or "", flags=re.MULTILINE)
            cls.docstring = Docstring(text, parent=cls, lineno=cls.docstring.lineno, endlineno=cls.docstring.endlineno)
