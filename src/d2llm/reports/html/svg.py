"""The parts of a small SVG chart: scales, ticks, places for labels, escaped elements.

Charts carry class names, no colours: the page's style sheet colours them for light, dark and paper.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement, tostring

from markupsafe import Markup

Scale = Callable[[float], float]
"""From a figure to a coordinate."""


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in the chart's units; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """The area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)

    def holds(self, other: Box) -> bool:
        """Whether all of ``other`` lies within."""
        return (
            self.left <= other.left
            and self.top <= other.top
            and self.right >= other.right
            and self.bottom >= other.bottom
        )


def chart(identity: str, width: float, height: float, *, title: str, description: str) -> Element:
    """An empty chart that a screen reader announces by its title and description."""
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
    written = {
        name.rstrip("_").replace("_", "-"): value if isinstance(value, str) else f"{round(value, 2):g}"
        for name, value in attributes.items()
    }
    element = SubElement(parent, tag, written)
    element.text = text
    return element


def line(parent: Element, class_: str, x1: float, y1: float, x2: float, y2: float) -> Element:
    """A straight line."""
    return add(parent, "line", class_=class_, x1=x1, y1=y1, x2=x2, y2=y2)


def label(parent: Element, class_: str, x: float, y: float, text: str, *, anchor: str = "start") -> Element:
    """Text whose baseline begins, ends or is centred at (x, y)."""
    return add(parent, "text", text, class_=class_, x=x, y=y, text_anchor=anchor)


def markup(root: Element) -> Markup:
    """The finished chart, to be put into a page as it is: ElementTree has escaped every text and attribute."""
    return Markup(tostring(root, encoding="unicode"))


def linear(low: float, high: float, start: float, end: float) -> Scale:
    """Straight from low -> start to high -> end."""
    return lambda value: start + (value - low) / (high - low) * (end - start)


def logarithmic(low: float, high: float, start: float, end: float) -> Scale:
    """As ``linear``, for figures above 0 on a logarithmic axis."""
    straight = linear(math.log10(low), math.log10(high), start, end)
    return lambda value: straight(math.log10(value))


def linear_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round figures in [low, high], about as many as requested, 1, 2 or 5 times a power of ten apart."""
    power = 10.0 ** math.floor(math.log10((high - low) / about))
    step = min((power * factor for factor in (1, 2, 5, 10)), key=lambda step: abs((high - low) / step - about))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{place * step:.12g}") for place in range(first, last + 1)]


def logarithmic_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in [low, high]; with their 2 and 5 times, or plain round figures, where the axis is short."""
    if high / low < 10:
        return linear_ticks(low, high)
    factors = (1, 2, 5) if math.log10(high / low) < 3 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    return [tick for tick in ticks if low <= tick <= high]


def tick_text(value: float) -> str:
    """0.25, 10, 1,000, with a true minus."""
    return f"{value:,.12g}".replace("-", "−")


def text_width(text: str, size: float) -> float:
    """The approximate width of text in a sans-serif font of this size; East Asian letters are square."""
    return size * sum(1.0 if unicodedata.east_asian_width(letter) in "WF" else 0.58 for letter in text)


def shortened(text: str, width: float, size: float) -> str:
    """A text cut to a width, on one line, with an ellipsis if it was cut."""
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
    *,
    gap: float = 9,
) -> list[Box]:
    """Where to write labels (width, height) beside their points (x, y) so that they cover neither each other nor more
    of the obstacles than must be. The first labels choose first; each takes the nearest place with the least overlap.
    """
    taken = list(obstacles)
    places: list[Box] = []
    for (x, y), (width, height) in zip(anchors, sizes, strict=True):
        candidates = [
            (distance, Box(left, middle - height / 2, left + width, middle + height / 2))
            for distance in range(0, 200, 4)
            for middle in ((y,) if not distance else (y - distance, y + distance))
            for left in (x + gap, x - gap - width, x - width / 2)
        ]
        inside = [candidate for candidate in candidates if within.holds(candidate[1])]
        # Overlap counts far above distance; a label too wide for the chart keeps its first place.
        _, best = min(
            inside or candidates[:1],
            key=lambda candidate: 100 * sum(candidate[1].overlap(other) for other in taken) + candidate[0],
        )
        taken.append(best)
        places.append(best)
    return places
