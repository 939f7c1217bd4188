"""Values of rows that come from NumPy, pandas, Arrow or JSON, as plain Python has them."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import Any

_PLAIN = frozenset({str, int, bool, datetime, type(None)})
_MISSING = frozenset({"NAType", "NaTType"})  # pandas.NA and pandas.NaT, which is also a datetime


class UntypedText(str):
    """A value of a file without types, such as CSV: a field that is declared as a number reads it as one."""

    __slots__ = ()


def plain_value(value: Any) -> Any:
    """A NumPy number, text or time as Python's; None for a missing value (NaN, NaT, pandas.NA); others unchanged.

    A time that is finer than a microsecond is unchanged, because Python has no such time.
    """
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind.__name__ in _MISSING:
        return None
    if isinstance(value, str):
        return str(value)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # NumPy's scalars, and arrays of one
        if str(value.dtype).startswith("datetime64"):
            return _plain_time(value)
        value = value.item()
    is_number = isinstance(value, float | Decimal)
    return None if is_number and value != value else value  # only NaN differs from itself


def _plain_time(value: Any) -> Any:
    if value != value:
        return None
    rounded = value.astype("datetime64[us]")
    moment = rounded.item()
    return moment if rounded == value and isinstance(moment, datetime) else value
