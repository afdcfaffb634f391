"""Curves as inline SVG: small, crisp, in the page's own colours, without a library."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs

Point = tuple[float, float]

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 10, 24
MOST_POINTS = 400
COLOURS = 6
"""How many colours curves have; a seventh curve reuses the first colour."""
LOG_FROM = 30.0
"""A range of positive values wider than this factor is drawn on a logarithmic scale."""


@attrs.frozen
class Curve:
    """A named series of (step, value) `points`; `dots`: whether they are drawn as dots too."""

    name: str
    points: tuple[Point, ...]
    dots: bool = False


@attrs.frozen
class Chart:
    """Curves over the same steps.

    `logarithmic`: draw a wide range of positive values on a logarithmic scale. `from_zero`: include
    0 in the range.
    """

    title: str
    curves: tuple[Curve, ...]
    logarithmic: bool = False
    from_zero: bool = False


@attrs.frozen
class Scale:
    """Maps values to pixels, linearly or logarithmically."""

    low: float
    high: float
    begin: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        low, high, value = (self._bent(v) for v in (self.low, self.high, value))
        part = (value - low) / (high - low) if high > low else 0.5
        return self.begin + part * (self.end - self.begin)

    def _bent(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value


def curve(
    name: str, records: Sequence[Mapping[str, Any]], key: str, *, dots: bool = False
) -> Curve:
    """The curve of a metric; records without it are skipped, NaN and infinities are gaps."""
    found = tuple((float(r["step"]), float(r[key])) for r in records if key in r)
    return Curve(name, found, dots)


def _is_drawn(value: float) -> bool:
    """Whether a value can be drawn: not NaN, nor infinite or close to it."""
    return abs(value) <= _FURTHEST


_FURTHEST = 1e300
"""Beyond this, a range, its margins or the next power of ten may overflow."""


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points: the lowest and the highest of each stretch.

    Values that cannot be drawn are dropped, unless a stretch has no others: there one is kept, as a
    gap.
    """
    if len(points) <= most:
        return list(points)
    stretches = most // 2
    kept: list[Point] = []
    for number in range(stretches):
        begin, end = (len(points) * n // stretches for n in (number, number + 1))
        # NaN has no order, so points could not be sorted by it.
        placed = [point for point in points[begin:end] if _is_drawn(point[1])]
        stretch = sorted(placed, key=lambda point: point[1]) or points[begin : begin + 1]
        kept += sorted({stretch[0], stretch[-1]})
    return kept


def drawn(chart: Chart) -> str:
    """The chart as an SVG element; empty if no value can be drawn."""
    values = [v for c in chart.curves for _, v in c.points if _is_drawn(v)]
    steps = [s for c in chart.curves for s, _ in c.points]
    if not values:
        return ""
    across = Scale(min(steps), max(steps), LEFT, WIDTH - RIGHT)
    shown = [*values, 0.0] if chart.from_zero else values
    low, high, logarithmic = _bounds(shown, chart.logarithmic)
    up = Scale(low, high, HEIGHT - BOTTOM, TOP, logarithmic)
    parts = [*_axes(across, up)]
    for number, each in enumerate(chart.curves):
        parts += _lines(each, across, up, number)
    title = html.escape(chart.title)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">'
        f"<title>{title}</title>{''.join(parts)}</svg>"
    )


def _bounds(values: Sequence[float], logarithmic: bool) -> tuple[float, float, bool]:
    low, high = min(values), max(values)
    if logarithmic and low > 0 and high / low > LOG_FROM:
        return low, high, True
    if low == high:
        margin = abs(low) * 0.1 or 1.0
        return low - margin, high + margin, False
    margin = 0.05 * (high - low)
    below = low - margin
    return (0.0 if low >= 0 > below else below), high + margin, False


_TICKS = 4


def ticks(low: float, high: float) -> list[float]:
    """About four round numbers within [low, high]."""
    raw = (high - low) / _TICKS
    if not raw > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * n for n in (1, 2, 5, 10) if power * n >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [step * n for n in range(first, first + _TICKS + 2) if step * n <= high + 1e-9 * step]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for kinds in ((1, 2, 5), (1, 3), (1,)):
        found = [n * 10.0**d for d in decades for n in kinds if low <= n * 10.0**d <= high]
        if len(found) <= 5:
            return found
    return found[:: math.ceil(len(found) / 5)]


def label(value: float) -> str:
    """A number short enough for an axis."""
    if value and (abs(value) >= 1e4 or abs(value) < 1e-2):
        for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= limit:
                return f"{value / limit:.4g}{unit}"
        return f"{value:.1e}".replace("e-0", "e-")
    return f"{value:.6g}"


def _axes(across: Scale, up: Scale) -> Iterator[str]:
    marks = _log_ticks(up.low, up.high) if up.logarithmic else ticks(up.low, up.high)
    for value in marks:
        y = up(value)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{label(value)}</text>'
    for value in [v for v in ticks(across.low, across.high) if v == int(v)]:
        x = across(value)
        anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
        yield f'<text x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{label(value)}</text>'


def _lines(each: Curve, across: Scale, up: Scale, number: int) -> Iterator[str]:
    number %= COLOURS
    for stretch in _unbroken(thinned(each.points), up.logarithmic):
        path = " ".join(f"{across(s):.1f},{up(v):.1f}" for s, v in stretch)
        if len(stretch) > 1:
            yield f'<polyline class="curve c{number}" points="{path}"/>'
        if each.dots or len(stretch) == 1:
            for step, value in stretch:
                yield (
                    f'<circle class="dot c{number}" cx="{across(step):.1f}" '
                    f'cy="{up(value):.1f}" r="3"/>'
                )


def _unbroken(points: Sequence[Point], positive: bool) -> Iterator[list[Point]]:
    stretch: list[Point] = []
    for point in points:
        if _is_drawn(point[1]) and (point[1] > 0 or not positive):
            stretch.append(point)
        elif stretch:
            yield stretch
            stretch = []
    if stretch:
        yield stretch
