"""The charts of a report, as functions from its values to SVG. Every mark has a tooltip with its values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal
from xml.etree.ElementTree import Element

from markupsafe import Markup

from d2llm.evaluation.report import Calibration, Estimate
from d2llm.ops.calibration import ScoreHistogram
from d2llm.reports.html import svg
from d2llm.reports.phrases import quantity

_TEXT = 12.5  # the font size of the style sheet's svg text, in the charts' units
_WIDE, _NARROW = 760.0, 360.0  # for desktops and for phones

Role = Literal["subject", "baseline", "other"]


@dataclass(frozen=True, slots=True)
class Point:
    """One system's quality and cost. ``on_sample``: measured on fewer items than the others."""

    name: str
    milliseconds: float
    quality: Estimate
    role: Role
    on_sample: bool


@dataclass(frozen=True, slots=True)
class Difference:
    """How much better the subject is than the baseline for one item."""

    id: str
    value: float


def quality_cost(points: Sequence[Point], measure: str, item: str, *, narrow: bool = False) -> Markup:
    """Quality with its interval against time on a logarithmic axis, with a label for each point; at least one point.

    ``item`` is the noun for what is scored: query or pair. A stepped line joins the systems that no other system beats
    in both.
    """
    width, height = _NARROW if narrow else _WIDE, 430.0
    frame = svg.Box(58, 14, width - 14, height - 48)
    times = [point.milliseconds for point in points]
    low_x, high_x = min(times) / 1.6, max(times) * 1.6
    low_y, high_y = min(point.quality.low for point in points), max(point.quality.high for point in points)
    margin = 0.08 * (high_y - low_y) or 0.05
    low_y, high_y = low_y - margin, high_y + margin
    x = svg.logarithmic(low_x, high_x, frame.left, frame.right)
    y = svg.linear(low_y, high_y, frame.bottom, frame.top)

    names = ", ".join(point.name for point in points)
    root = svg.chart(
        "plot-quality-cost-narrow" if narrow else "plot-quality-cost",
        width,
        height,
        title=f"{measure} against milliseconds per {item}",
        description=f"One point for each system: {names}. Higher is better, further left is faster.",
    )
    _grid(root, frame, x, y, svg.logarithmic_ticks(low_x, high_x), svg.linear_ticks(low_y, high_y, 6))
    _axis_titles(root, frame, f"milliseconds per {item}, median (logarithmic)", measure)
    _front(root, points, x, y, frame)

    order = sorted(points, key=lambda point: (point.role == "other", -point.quality.value))
    anchors = [(x(point.milliseconds), y(point.quality.value)) for point in order]
    texts = [svg.shortened(point.name, width * 0.36, _TEXT) for point in order]
    sizes = [(svg.text_width(text, _TEXT) + 4, _TEXT * 1.25) for text in texts]
    obstacles = [svg.Box(left - 7, top - 7, left + 7, top + 7) for left, top in anchors]
    for point, (left, _) in zip(order, anchors, strict=True):
        obstacles.append(svg.Box(left - 5, y(point.quality.high), left + 5, y(point.quality.low)))
    boxes = svg.place_labels(anchors, sizes, obstacles, frame)
    for point, anchor, text, box in zip(order, anchors, texts, boxes, strict=True):
        _point(root, point, anchor, text, box, measure, y)
    return svg.markup(root)


def differences(
    changes: Sequence[Difference], measure: str, subject: str, baseline: str, *, narrow: bool = False
) -> Markup:
    """The subject minus the baseline for every item, the largest win first; at least one item.

    If there are more items than bars fit, a bar is the mean of adjacent items, and the chart says of how many.
    """
    width, height = _NARROW if narrow else _WIDE, 300.0
    frame = svg.Box(58, 34, width - 14, height - 34)
    ordered = sorted(changes, key=lambda item: -item.value)
    won, lost = sum(item.value > 0 for item in ordered), sum(item.value < 0 for item in ordered)
    low, high = min(0.0, ordered[-1].value), max(0.0, ordered[0].value)
    if low == high:
        low, high = -1.0, 1.0
    x = svg.linear(0, len(ordered), frame.left, frame.right)
    y = svg.linear(low, high, frame.bottom, frame.top)

    root = svg.chart(
        "plot-differences-narrow" if narrow else "plot-differences",
        width,
        height,
        title=f"{measure} of {subject} minus {baseline}, item by item",
        description=f"{won:,} won, {len(ordered) - won - lost:,} equal, {lost:,} lost, sorted from win to loss.",
    )
    _grid(root, frame, x, y, [], svg.linear_ticks(low, high, 5))
    _axis_titles(root, frame, "", f"difference in {measure}")
    top = frame.top - 14
    svg.label(root, "won strong", frame.left, top, f"{won:,} won")
    svg.label(
        root, "muted", (frame.left + frame.right) / 2, top, f"{len(ordered) - won - lost:,} equal", anchor="middle"
    )
    svg.label(root, "lost strong", frame.right, top, f"{lost:,} lost", anchor="end")
    step = math.ceil(len(ordered) / (frame.right - frame.left))
    for start in range(0, len(ordered), step):
        group = ordered[start : start + step]
        mean = sum(item.value for item in group) / len(group)
        names = group[0].id if len(group) == 1 else f"{len(group)} from {group[0].id} to {group[-1].id}, on average"
        left, right = x(start), x(start + len(group))
        bar = _titled(root, "bar", f"{names}: {mean:+.4f}")
        # The whole height shows the tooltip, however small the difference.
        svg.add(bar, "rect", class_="hit", x=left, y=frame.top, width=right - left, height=frame.bottom - frame.top)
        if mean:
            side = "won" if mean > 0 else "lost"
            upper, lower = sorted((y(mean), y(0)))
            svg.add(bar, "rect", class_=f"mark {side}", x=left, y=upper, width=right - left, height=lower - upper)
    svg.line(root, "axis", frame.left, y(0), frame.right, y(0))
    if step > 1:
        svg.label(
            root, "muted", sum((frame.left, frame.right)) / 2, height - 12, f"up to {step} per bar", anchor="middle"
        )
    for name, edge, anchor in ((subject, frame.left, "start"), (baseline, frame.right, "end")):
        text = svg.shortened(f"for {name}", width * 0.3, _TEXT)
        svg.label(root, "muted", edge, height - 12, text, anchor=anchor)
    return svg.markup(root)


def reliability(calibration: Calibration, identity: str) -> Markup:
    """The true share against the predicted probability, a dot for each bin, with the number of pairs in each below."""
    width, height = 360.0, 420.0
    frame = svg.Box(50, 12, width - 12, 310)
    x = svg.linear(0, 1, frame.left, frame.right)
    y = svg.linear(0, 1, frame.bottom, frame.top)
    root = svg.chart(
        identity,
        width,
        height,
        title=f"Calibration of {calibration.name}",
        description=f"Fraction of yes pairs against the predicted probability, in {len(calibration.bins)} bins. "
        f"Expected error {calibration.expected_error:.4f} over {calibration.num_pairs:,} pairs.",
    )
    ticks = [0, 0.2, 0.4, 0.6, 0.8, 1]
    _grid(root, frame, x, y, ticks, ticks)
    _axis_titles(root, frame, "predicted probability of yes", "actual fraction of yes")
    svg.line(root, "diagonal", x(0), y(0), x(1), y(1))
    most = max(part.count for part in calibration.bins)
    floor, tallest = height - 4, 38.0
    for part in calibration.bins:
        predicted, true = x(part.mean_probability), y(part.fraction_positive)
        text = f"predicted {part.mean_probability:.3f}, actual {part.fraction_positive:.3f}: {part.count:,} pairs"
        mark = _titled(root, "bin", text)
        tall = max(1.0, tallest * part.count / most)
        left, right = x(part.low) + 1, x(part.high) - 1
        svg.add(mark, "rect", class_="mark count", x=left, y=floor - tall, width=right - left, height=tall)
        svg.label(mark, "small muted", (left + right) / 2, floor - tall - 4, _short_count(part.count), anchor="middle")
        svg.line(mark, "gap", predicted, y(part.mean_probability), predicted, true)
        svg.add(mark, "circle", class_="mark dot", cx=predicted, cy=true, r=3 + 5 * (part.count / most) ** 0.5)
    return svg.markup(root)


def histogram(counts: ScoreHistogram, identity: str, *, name: str, labels: tuple[str, str]) -> Markup:
    """Score distributions of the two labels, each normalised to shares; ``labels`` are their names."""
    width, height = 360.0, 250.0
    frame = svg.Box(50, 12, width - 12, height - 44)
    fractions = [_fractions(counts.positive), _fractions(counts.negative)]
    highest = max([*fractions[0], *fractions[1]]) or 1.0
    low, high = counts.edges[0], counts.edges[-1]
    x = svg.linear(low, high, frame.left, frame.right)
    y = svg.linear(0, highest * 1.05, frame.bottom, frame.top)
    root = svg.chart(
        identity,
        width,
        height,
        title=f"Scores of {name}",
        description=f"Histogram of {sum(counts.positive):,} {labels[0]} and {sum(counts.negative):,} {labels[1]}.",
    )
    _grid(root, frame, x, y, svg.linear_ticks(low, high, 5), svg.linear_ticks(0, highest * 1.05, 4), percent=True)
    _axis_titles(root, frame, "score", "fraction")
    for side, values in (("negative", fractions[1]), ("positive", fractions[0])):
        steps = [
            f"H{x(right):.2f}V{y(after):.2f}" for right, after in zip(counts.edges[1:], [*values[1:], 0], strict=True)
        ]
        svg.add(root, "path", class_=f"mark {side}", d=f"M{x(low):.2f} {y(0):.2f}V{y(values[0]):.2f}{''.join(steps)}Z")
    for index, (left, right) in enumerate(pairwise(counts.edges)):
        text = f"{left:.3g} to {right:.3g}: " + ", ".join(
            f"{label} {side[index]:,} ({side_fractions[index]:.1%})"
            for label, side, side_fractions in zip(labels, (counts.positive, counts.negative), fractions, strict=True)
        )
        bin_ = _titled(root, "bin", text)
        wide, high = x(right) - x(left), frame.bottom - frame.top
        svg.add(bin_, "rect", class_="hit", x=x(left), y=frame.top, width=wide, height=high)
    return svg.markup(root)


def _fractions(counts: Sequence[int]) -> list[float]:
    total = sum(counts) or 1
    return [count / total for count in counts]


def _short_count(count: int) -> str:
    """A count that fits above a bar: 940, 1.2k, 35k."""
    if count < 1000:
        return str(count)
    return f"{count / 1000:.1f}k" if count < 9950 else f"{count / 1000:,.0f}k"


def _titled(parent: Element, class_: str, text: str) -> Element:
    """A group with a tooltip."""
    group = svg.add(parent, "g", class_=class_)
    svg.add(group, "title", text)
    return group


def _grid(
    root: Element,
    frame: svg.Box,
    x: svg.Scale,
    y: svg.Scale,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    *,
    percent: bool = False,
) -> None:
    for tick in x_ticks:
        svg.line(root, "grid", x(tick), frame.top, x(tick), frame.bottom)
        svg.label(root, "tick", x(tick), frame.bottom + 16, svg.tick_text(tick), anchor="middle")
    for tick in y_ticks:
        svg.line(root, "grid", frame.left, y(tick), frame.right, y(tick))
        text = f"{svg.tick_text(round(tick * 100, 6))} %" if percent else svg.tick_text(tick)
        svg.label(root, "tick", frame.left - 7, y(tick) + 4, text, anchor="end")


def _axis_titles(root: Element, frame: svg.Box, below: str, beside: str) -> None:
    middle_x, middle_y = (frame.left + frame.right) / 2, (frame.top + frame.bottom) / 2
    if below:
        svg.label(root, "axis-title", middle_x, frame.bottom + 36, below, anchor="middle")
    turned = svg.label(root, "axis-title", 0, 0, beside, anchor="middle")
    turned.set("transform", f"translate(13 {middle_y:g}) rotate(-90)")


def _front(root: Element, points: Sequence[Point], x: svg.Scale, y: svg.Scale, frame: svg.Box) -> None:
    """Draw the stepped line through the systems that are better than all cheaper ones."""
    path, best = "", float("-inf")
    comparable = [point for point in points if not point.on_sample]
    for point in sorted(comparable, key=lambda point: (point.milliseconds, -point.quality.value)):
        if point.quality.value > best:
            left, top = x(point.milliseconds), y(point.quality.value)
            path += f"H{left:.2f}V{top:.2f}" if path else f"M{left:.2f} {top:.2f}"
            best = point.quality.value
    if path:
        svg.add(root, "path", class_="front", d=f"{path}H{frame.right:g}")


def _point(
    root: Element,
    point: Point,
    anchor: tuple[float, float],
    text: str,
    box: svg.Box,
    measure: str,
    y: svg.Scale,
) -> None:
    left, top = anchor
    quality = point.quality
    title = (
        f"{point.name}: {measure} {quality.value:.4f} [{quality.low:.4f}, {quality.high:.4f}], "
        f"{quantity(point.milliseconds)} ms"
    )
    group = _titled(root, f"point {point.role}{' sample' if point.on_sample else ''}", title)
    svg.line(group, "whisker", left, y(quality.low), left, y(quality.high))
    for end in (quality.low, quality.high):
        svg.line(group, "whisker", left - 4, y(end), left + 4, y(end))
    if abs((box.top + box.bottom) / 2 - top) > _TEXT:  # a distant label: draw a line to its point
        near = min(max(left, box.left), box.right)
        svg.line(group, "leader", left, top, near, box.bottom if box.bottom < top else box.top)
    svg.add(group, "circle", class_="mark dot", cx=left, cy=top, r=5.5)
    svg.label(group, "name", box.left + 2, box.bottom - 4, text)
