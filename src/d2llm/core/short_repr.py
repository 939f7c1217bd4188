"""The ``repr`` of values in one line: fields at their defaults are left out, long texts and lists are cut."""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from reprlib import Repr
from typing import Any


class _Short(Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring, self.maxother = 60, 120
        self.maxtuple = self.maxlist = self.maxdict = self.maxset = self.maxfrozenset = 3

    def repr_instance(self, x: Any, level: int) -> str:
        """Of a section or settings inside of others, the name alone."""
        return f"{type(x).__name__}(...)" if hasattr(type(x), "model_fields") else super().repr_instance(x, level)


short = _Short().repr
"""The ``repr`` of any value, cut."""


def short_repr(self: Any) -> str:
    """``__repr__`` of a dataclass or a class of pydantic."""
    if is_dataclass(self):
        defaults = {
            attribute.name: attribute.default if attribute.default_factory is MISSING else attribute.default_factory()
            for attribute in fields(self)
            if attribute.repr
        }
    else:
        kinds = type(self).model_fields.items()
        defaults = {name: field.get_default(call_default_factory=True) for name, field in kinds}
    values = {name: getattr(self, name) for name in defaults}
    changed = [f"{name}={short(value)}" for name, value in values.items() if value is not defaults[name] != value]
    return f"{type(self).__name__}({', '.join(changed)})"
