"""The values of a workbook's cells as their formats show them, but without rounding what was entered.

Dates are written as ISO does, and numbers without marks between thousands, which mean different things in different
countries; what a format adds to a number (a currency, a percent sign, a unit, leading zeros) is kept.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from decimal import Decimal
from functools import lru_cache

GENERAL = "General"
BUILT_IN = {
    1: "0", 2: "0.00", 3: "#,##0", 4: "#,##0.00", 9: "0%", 10: "0.00%", 11: "0.00E+00", 14: "m/d/yyyy", 15: "d-mmm-yy",
    16: "d-mmm", 17: "mmm-yy", 18: "h:mm AM/PM", 19: "h:mm:ss AM/PM", 20: "h:mm", 21: "h:mm:ss", 22: "m/d/yyyy h:mm",
    37: "#,##0;(#,##0)", 38: "#,##0;(#,##0)", 39: "#,##0.00;(#,##0.00)", 40: "#,##0.00;(#,##0.00)", 45: "mm:ss",
    46: "[h]:mm:ss", 47: "mm:ss.0", 48: "0.0E+0",
    **dict.fromkeys([*range(27, 32), 36, *range(50, 59)], "yyyy/m/d"), **dict.fromkeys(range(32, 36), "h:mm:ss"),
}  # fmt: skip
"""The formats that a workbook need not define, by number; those of East Asian versions differ only in signs."""
_LITERAL = re.compile(r'"([^"]*)"|\\(.)|_.|\*.|\[\$([^\]-]*)[^\]]*\]|\[[^\]]*\]')
_DIGITS = re.compile(r"[0#?][0#?,]*(?:\.[0#?]*)?|\.[0#?]+")
_PLAIN = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d*[1-9])?")
_MAX_DIGITS = 15  # of a number, as in Excel
_MORE_DECIMALS = 3  # more than a format shows are what somebody entered; longer ones were computed
_LEAP_DAY_OF_1900 = 60  # which Excel counts, though there was none
_LONGEST_TIME = 366.0  # days; a larger number that is shown as a time has a date, too


@lru_cache(maxsize=65_536)  # a column's values are often few
def shown(value: str, code: str, *, starts_1904: bool = False) -> str:
    """A number, as a workbook stores it, in a format; as it is stored if it is no number."""
    try:
        number = float(value)
        plain = plain_number(value)
    except (ValueError, ArithmeticError):
        return value
    if code == GENERAL:
        return plain
    parts = _sections(code)
    kind = _time_kind(parts[0])
    if kind:
        return _shown_time(number + (1462 if starts_1904 and kind != "elapsed" and number >= 1 else 0), kind) or plain
    section, is_own = _section_of(parts, number)
    return _shown_number(plain, section, is_own=is_own)


def plain_number(value: str) -> str:
    """A number with up to 15 digits, without an exponent unless it is very large or small."""
    if len(value) <= _MAX_DIGITS and re.fullmatch(_PLAIN, value):
        return value
    number = Decimal(f"{float(value):.{_MAX_DIGITS}g}")
    if not number.is_finite() or (number and not -10 < number.adjusted() < 21):
        return f"{float(value):.{_MAX_DIGITS}g}".upper()
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


@lru_cache(maxsize=256)
def _sections(code: str) -> tuple[str, ...]:
    """The parts of a format for positive and negative numbers, zero and text."""
    pieces = re.findall(r'(?:"[^"]*"|\\.|\[[^\]]*\]|[^;])+|(?<=;)(?=;|$)|^(?=;)', code)
    return tuple(pieces or [GENERAL])


@lru_cache(maxsize=256)
def _time_kind(section: str) -> str:
    """What a format shows: "date", "time" (of day), "elapsed" time, or "" for a number."""
    if re.search(r"\[(h+|m+|s+)\]", section, flags=re.IGNORECASE):
        return "elapsed"
    tokens = re.sub(r"general", "", re.sub(_LITERAL, "", section), flags=re.IGNORECASE).lower()
    if re.search(r"[yd]|mmm|g{1,3}e|(?<![0#?.])e(?![+-])", tokens) or re.fullmatch(r"\W*m+\W*", tokens):
        return "date"
    return "time" if re.search(r"[hs]", tokens) else ""


def _section_of(sections: tuple[str, ...], number: float) -> tuple[str, bool]:
    """The part of a format for a number, and whether that part is for negative numbers alone."""
    positive, negative, zero, *_ = (*sections, "", "", "")
    if number < 0 and len(sections) > 1:
        return negative, True
    return (zero if number == 0 and len(sections) > 2 else positive), False


def _shown_number(plain: str, section: str, *, is_own: bool) -> str:
    bare = re.sub(_LITERAL, lambda match: "\0" * len(match[0]), section)  # signs within literals are no digits
    digits = list(re.finditer(_DIGITS, bare))
    if re.sub(r"\0", "", bare).strip().lower() in ("general", "@", "") or "E" in plain:
        before, _, after = section.partition("General")
        return f"{_literal(before)}{plain}{_literal(after)}" if "General" in section else (_literal(section) or plain)
    is_scaled = any(match[0].endswith(",") for match in digits)
    if not digits or is_scaled or "/" in bare or re.search(r"[eE][+-]", bare):
        return plain
    sign = "-" if plain.startswith("-") and not (is_own and re.search(r"[-(]", section)) else ""
    value = Decimal(plain).copy_abs()
    start, end = digits[0].start(), digits[-1].end()
    is_percent = "%" in bare
    value = value * 100 if is_percent else value
    before, after = _literal(section[:start]), _literal(section[end:])
    number = _with_literals(value, section[start:end]) if len(digits) > 1 else _with_decimals(value, digits[0][0])
    return f"{sign}{before}{number}{after}".strip()


def _with_decimals(value: Decimal, pattern: str) -> str:
    """A number with at least the digits that a pattern ("000.00") asks for."""
    whole, _, part = pattern.partition(".")
    least, most = part.count("0"), len(part)
    text = f"{value:f}"
    decimals = len(text.partition(".")[2].rstrip("0"))
    if decimals > most + _MORE_DECIMALS:
        text = f"{value:.{most}f}"
        decimals = len(text.partition(".")[2].rstrip("0"))
    text = f"{value:.{max(least, decimals)}f}"
    digits, _, rest = text.partition(".")
    return digits.zfill(whole.count("0")) + (f".{rest}" if rest else "")


def _with_literals(value: Decimal, pattern: str) -> str:
    """A whole number in a pattern with signs between its digits, such as a telephone number's."""
    digits = f"{value:f}".partition(".")[0] if value == int(value) else ""
    if not digits:
        return f"{value:f}"
    result = ""
    for piece in reversed(re.findall(r'"[^"]*"|\\.|\[[^\]]*\]|.', pattern)):
        if piece in "0#?":
            result = (digits[-1:] or ("0" if piece == "0" else "")) + result
            digits = digits[:-1]
        elif piece != ",":
            result = _literal(piece) + result
    return digits + result


def _literal(text: str) -> str:
    """What a part of a format adds to a number."""

    def written(match: re.Match[str]) -> str:
        return next((group for group in match.groups() if group is not None), " " if match[0].startswith("_") else "")

    return re.sub(_LITERAL, written, text)


def _shown_time(days: float, kind: str) -> str:
    """A date (ISO), a time of day or a duration (hours:minutes:seconds); "" if it is beyond the calendar."""
    if kind == "elapsed" or (kind == "time" and 1 <= abs(days) < _LONGEST_TIME) or days < 0:
        milliseconds = round(abs(days) * 86_400_000)
        seconds, rest = divmod(milliseconds, 1000)
        text = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        return ("-" if days < 0 else "") + text + (f".{rest:03}".rstrip("0") if rest else "")
    start = datetime(1899, 12, 31) if days < _LEAP_DAY_OF_1900 else datetime(1899, 12, 30)
    try:
        moment = start + timedelta(milliseconds=round(days * 86_400_000))
    except OverflowError:
        return ""
    time = moment.strftime("%H:%M:%S" if moment.second or moment.microsecond else "%H:%M")
    if moment.microsecond:
        time += f".{moment.microsecond // 1000:03}".rstrip("0")
    if kind == "time" and days < 1:
        return time
    date = f"{moment.year:04}-{moment.month:02}-{moment.day:02}"
    return (
        date
        if kind == "date" and not (moment.hour or moment.minute or moment.second or moment.microsecond)
        else f"{date} {time}"
    )
