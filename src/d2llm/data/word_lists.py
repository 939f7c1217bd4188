"""The numbers before items of lists and before headings, which Word does not store but computes."""

from __future__ import annotations

import re
from typing import Any

from d2llm.data.office_archives import attribute

Element = Any
_INDENT = "  "


class ListLabels:
    """Counts the items of each list of a document, in the order of the text."""

    def __init__(self, numbering: Element | None) -> None:
        root: Any = numbering if numbering is not None else ()
        abstract = {
            attribute(element, "abstractNumId"): element for element in root if element.tag.endswith("}abstractNum")
        }
        self._levels: dict[str, dict[int, _Level]] = {}
        self._shared: dict[str, str] = {}  # number of a list -> what it shares its counters with
        self._counters: dict[str, dict[int, int]] = {}
        for element in root:
            if not element.tag.endswith("}num"):
                continue
            list_id = attribute(element, "numId")
            link = element.find("{*}abstractNumId")
            base = attribute(link, "val") if link is not None else ""
            levels = _levels(abstract.get(base))
            overrides = list(element.iterfind("{*}lvlOverride"))
            for override in overrides:
                level = int(attribute(override, "ilvl", "0"))
                levels |= _levels(override)
                start = override.find("{*}startOverride")
                if start is not None and level in levels:
                    levels[level] = levels[level].starting_at(int(attribute(start, "val", "1")))
            self._levels[list_id] = levels
            self._shared[list_id] = f"{list_id} alone" if overrides else base

    def next(self, list_id: str, level: int) -> tuple[str, str]:
        """The indent and the label ("2. ", "- ") of the next item of a list, both empty if there is no such list."""
        levels = self._levels.get(list_id)
        if not levels or list_id == "0":
            return "", ""
        here = levels.get(level, _Level("bullet", "", 1))
        counters = self._counters.setdefault(self._shared[list_id], {})
        counters[level] = counters.get(level, here.start - 1) + 1
        for deeper in [counted for counted in counters if counted > level]:
            del counters[deeper]
        if here.kind == "bullet":
            return _INDENT * level, "- "
        if here.kind == "none":
            return "", ""

        def written(match: re.Match[str]) -> str:
            at = int(match[1]) - 1
            other = levels.get(at, here)
            return written_number(counters.get(at, other.start), "decimal" if here.is_legal else other.kind)

        label = re.sub(r"%([1-9])", written, here.text or f"%{level + 1}.").strip()
        return _INDENT * level, f"{label} " if label else ""


class _Level:
    """How the items of a level are numbered."""

    def __init__(self, kind: str, text: str, start: int, *, is_legal: bool = False) -> None:
        self.kind, self.text, self.start, self.is_legal = kind, text, start, is_legal

    def starting_at(self, start: int) -> _Level:
        return _Level(self.kind, self.text, start, is_legal=self.is_legal)


def _levels(definition: Element | None) -> dict[int, _Level]:
    levels: dict[int, _Level] = {}
    for level in definition.iterfind("{*}lvl") if definition is not None else ():

        def value(name: str, default: str, element: Element = level) -> str:
            child = element.find(f"{{*}}{name}")
            return attribute(child, "val", default) if child is not None else default

        start = value("start", "1")
        levels[int(attribute(level, "ilvl", "0"))] = _Level(
            value("numFmt", "decimal"),
            value("lvlText", ""),
            int(start) if start.isdigit() else 1,
            is_legal=level.find("{*}isLgl") is not None,
        )
    return levels


def written_number(value: int, kind: str) -> str:
    """A number as a letter, in Roman digits, or as it is, by Word's name of the kind."""
    if kind in ("lowerLetter", "upperLetter") and value > 0:
        letter = chr(ord("a") + (value - 1) % 26) * ((value - 1) // 26 + 1)
        return letter if kind == "lowerLetter" else letter.upper()
    if kind in ("lowerRoman", "upperRoman") and 0 < value < 4000:
        roman = _roman(value)
        return roman.lower() if kind == "lowerRoman" else roman
    return f"{value:02}" if kind == "decimalZero" else str(value)


def _roman(rest: int) -> str:
    text = ""
    for value, letters in zip(
        (1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1),
        ["M", "CM", "D", "CD", "C", "XC", "L", "XL", "X", "IX", "V", "IV", "I"],
        strict=True,
    ):
        text += letters * (rest // value)
        rest %= value
    return text
