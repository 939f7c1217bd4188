"""The parts of a small SVG chart: scales, ticks, label placement, escaped elements.

Charts have class names instead of colours: the page's style sheet colours them for light mode, dark mode and print.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement, tostring

from markupsafe import Markup

_GAP = 9  # between a point and a label beside it

Scale = Callable[[float], float]
"""Maps a value to a coordinate."""


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in the chart's units; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """The area of the intersection."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)

    def holds(self, other: Box) -> bool:
        """Whether ``other`` lies completely within."""
        inside_x = self.left <= other.left and other.right <= self.right
        return inside_x and self.top <= other.top and other.bottom <= self.bottom


def chart(identity: str, width: float, height: float, *, title: str, description: str) -> Element:
    """An empty chart, which screen readers announce by its title and description."""
    root = Element(
        "svg",
        {
            "id": identity,
            "class": "chart",
            "viewBox": f"0 0 {width:g} {height:g}",
            "role": "img",
            "aria-labelledby": f"{identity}-title {identity}-description",
        },
    )
    add(root, "title", title, id=f"{identity}-title")
    add(root, "desc", description, id=f"{identity}-description")
    return root


def add(parent: Element, tag: str, text: str | None = None, **attributes: str | float) -> Element:
    """Append an element. ``class_`` becomes ``class``, ``stroke_width`` ``stroke-width``; coordinates are rounded."""
    values = {
        name.rstrip("_").replace("_", "-"): value if isinstance(value, str) else f"{round(value, 2):g}"
        for name, value in attributes.items()
    }
    element = SubElement(parent, tag, values)
    element.text = text
    return element


def line(parent: Element, class_: str, x1: float, y1: float, x2: float, y2: float) -> Element:
    """Draw a line from (x1, y1) to (x2, y2), in the units of the view box; the style comes from the class."""
    return add(parent, "line", class_=class_, x1=x1, y1=y1, x2=x2, y2=y2)


def label(parent: Element, class_: str, x: float, y: float, text: str, *, anchor: str = "start") -> Element:
    """Text whose baseline starts, ends or is centred at (x, y)."""
    return add(parent, "text", text, class_=class_, x=x, y=y, text_anchor=anchor)


def markup(root: Element) -> Markup:
    """The finished chart as markup for a page; ElementTree has escaped every text and attribute."""
    return Markup(tostring(root, encoding="unicode"))


def linear(low: float, high: float, start: float, end: float) -> Scale:
    """A linear scale that maps low to start and high to end."""
    return lambda value: start + (value - low) / (high - low) * (end - start)


def logarithmic(low: float, high: float, start: float, end: float) -> Scale:
    """A logarithmic scale for values above 0 that maps low to start and high to end."""
    exponents = linear(math.log10(low), math.log10(high), start, end)
    return lambda value: exponents(math.log10(value))


def linear_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """About ``about`` round values in [low, high], spaced by 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / about))
    step = min((power * factor for factor in (1, 2, 5, 10)), key=lambda step: abs((high - low) / step - about))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def logarithmic_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in [low, high]; on shorter axes also their multiples by 2 and 5, or ``linear_ticks``."""
    if high / low < 10:
        return linear_ticks(low, high)
    factors = (1, 2, 5) if math.log10(high / low) < 3 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    return [tick for tick in ticks if low <= tick <= high]


def tick_text(value: float) -> str:
    """A tick label such as 0.25, 10 or 1,000, with a true minus sign."""
    return f"{value:,.12g}".replace("-", "−")


def text_width(text: str, size: float) -> float:
    """The approximate width of text in a sans-serif font of this size; East Asian characters are square."""
    return size * sum(1.0 if unicodedata.east_asian_width(letter) in "WF" else 0.58 for letter in text)


def shortened(text: str, width: float, size: float) -> str:
    """The text on one line, truncated to a width with an ellipsis if needed."""
    text = " ".join(text.split())
    if text_width(text, size) <= width:
        return text
    while text and text_width(text + "…", size) > width:
        text = text[:-1]
    return text.rstrip() + "…"


def place_labels(
    anchors: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    obstacles: Sequence[Box],
    within: Box,
) -> list[Box]:
    """Place labels (width, height) beside their points (x, y), with little overlap of each other and the obstacles.

    Labels are placed in order; each takes the nearest position with the least overlap.
    """
    taken = list(obstacles)
    boxes: list[Box] = []
    for (x, y), (width, height) in zip(anchors, sizes, strict=True):
        candidates = [
            (distance, Box(left, middle - height / 2, left + width, middle + height / 2))
            for distance in range(0, 200, 4)
            for middle in ((y,) if not distance else (y - distance, y + distance))
            for left in (x + _GAP, x - _GAP - width, x - width / 2)
        ]
        inside = [candidate for candidate in candidates if within.holds(candidate[1])]
        # Overlap weighs far more than distance; a label too wide for the chart takes the first candidate.
        _, best = min(
            inside or candidates[:1],
            key=lambda candidate: 100 * sum(candidate[1].overlap(other) for other in taken) + candidate[0],
        )
        taken.append(best)
        boxes.append(best)
    return boxes
