"""Pictures of benchmarks, as SVG in light or dark colours: bars, or curves of growth."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

LABELS, BARS, VALUES, ROW, TOP = 150, 190, 70, 22, 52
PANEL = BARS + VALUES
COLUMNS, SIDE, GAP, BELOW = 3, 150, 60, 88
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #22211e; } .title { font-size: 14px;
  font-weight: 600; } .soft { fill: #6d6a62; } .ours { fill: #2f6db5; } .theirs { fill: #b9b4a7; }
.small { font-size: 10px; } .middle { text-anchor: middle; } .end { text-anchor: end; }
path { fill: none; stroke: #d9d5ca; } path.time { stroke: #2f6db5; stroke-width: 2; }
path.memory { stroke: #a8651f; stroke-width: 2; } path.linear { stroke: #8d897e;
  stroke-dasharray: 3 4; } circle.time { fill: #2f6db5; } circle.memory { fill: #a8651f; }
@media (prefers-color-scheme: dark) { text { fill: #e9e6dd; } .soft { fill: #a09b8f; }
  .ours { fill: #7db1ee; } .theirs { fill: #5b574e; } path { stroke: #45423b; }
  path.time { stroke: #7db1ee; } path.memory { stroke: #e0a35c; } path.linear { stroke: #7a766b; }
  circle.time { fill: #7db1ee; } circle.memory { fill: #e0a35c; } }
"""


def bars(title: str, results: Mapping[str, Sequence[Mapping[str, Any]]], ours: str) -> str:
    """Bars of each way's median `cpu` seconds and `megabytes`; names beginning with `ours` in blue.

    Both scales begin at 0.
    """
    panels = (
        ("CPU seconds a step", "cpu", "{:.2f}"),
        ("MB above the model", "megabytes", "{:,.0f}"),
    )
    height, width = TOP + ROW * len(results) + 8, LABELS + 2 * PANEL
    parts = _begun(title, width, height)
    for number, (name, key, form) in enumerate(panels):
        left = LABELS + number * PANEL
        medians = {
            kind: statistics.median(r[key] for r in found) for kind, found in results.items()
        }
        most = max(medians.values())
        parts.append(f'<text class="soft" x="{left}" y="{TOP - 12}">{name}</text>')
        for row, (kind, value) in enumerate(medians.items()):
            top, long = TOP + row * ROW, BARS * value / most
            kinds = "ours" if kind.startswith(ours) else "theirs"
            if not number:
                parts.append(f'<text x="4" y="{top + 12}">{html.escape(kind)}</text>')
            parts.append(
                f'<rect class="{kinds}" x="{left}" y="{top}" width="{long:.1f}" height="15"/>'
                f'<text class="soft" x="{left + long + 6:.1f}" y="{top + 12}">'
                f"{form.format(value)}</text>"
            )
    return "\n".join([*parts, "</svg>", ""])


@attrs.frozen(kw_only=True)
class Growth:
    """How a step's time and memory grow in one dimension: what it takes at each size."""

    name: str
    sizes: Sequence[float]
    milliseconds: Sequence[float]
    megabytes: Sequence[float]

    @property
    def kinds(self) -> dict[str, tuple[Sequence[float], str]]:
        """What grows, with its unit."""
        return {"time": (self.milliseconds, "ms"), "memory": (self.megabytes, "MB")}

    @property
    def exponents(self) -> dict[str, float]:
        """The exponents of time and of memory; 1 is linear growth."""
        return {kind: exponent(self.sizes, values) for kind, (values, _) in self.kinds.items()}


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of a least-squares line through the logarithms of sizes and values."""
    x, y = ([math.log(v) for v in each] for each in (sizes, values))
    return statistics.linear_regression(x, y).slope


def growth(title: str, panels: Sequence[Growth]) -> str:
    """A panel per dimension, on logarithmic axes, with values relative to those at the least size.

    A decade has the same length on every axis, so that linear growth (dashed) is the diagonal of
    each panel, and slopes can be compared. Each curve's first and last value are written below it.
    """
    every = [
        _times(values)
        for each in panels
        for values in (each.sizes, each.milliseconds, each.megabytes)
    ]
    low = min(0.0, *(min(each) for each in every))
    high = max(0.5, *(max(each) for each in every))
    columns = min(COLUMNS, len(panels))
    width = max(columns * (SIDE + GAP) + GAP, 420)  # the legend's
    height = TOP + 24 - (-len(panels) // columns) * (SIDE + BELOW)
    parts = [*_begun(title, width, height), *_legend()]
    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        left, top = GAP + column * (SIDE + GAP), TOP + 24 + row * (SIDE + BELOW)
        parts += _panel(panel, left, top, low, high)
    return "\n".join([*parts, "</svg>", ""])


def _times(values: Sequence[float]) -> list[float]:
    """The growth since the first value, in decades."""
    return [math.log10(value / values[0]) for value in values]


def _begun(title: str, width: int, height: int) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-label="{html.escape(title)}">',
        f"<style>{STYLE}</style>",
        f'<text class="title" x="4" y="18">{html.escape(title)}</text>',
    ]


def _legend() -> list[str]:
    names = {"time": "CPU time", "memory": "memory above the model", "linear": "linear"}
    found, left = [], 4
    for kind, name in names.items():
        found.append(
            f'<path class="{kind}" d="M{left} 34h20"/>'
            f'<text class="soft" x="{left + 26}" y="38">{name}</text>'
        )
        left += 50 + 7 * len(name)
    return found


def _panel(panel: Growth, left: int, top: int, low: float, high: float) -> list[str]:
    unit = SIDE / (high - low)
    bottom = top + SIDE

    def at(across: float, up: float) -> tuple[float, float]:
        return left + across * unit, bottom - (up - low) * unit

    powers = [f"{kind} ^{power:.2f}" for kind, power in panel.exponents.items()]
    found = [
        f'<text x="{left}" y="{top - 20}">{html.escape(panel.name)}</text>',
        f'<text class="soft" x="{left}" y="{top - 6}">{", ".join(powers)}</text>',
        f'<path d="M{left} {top}v{SIDE}"/>',
    ]
    for decade in range(math.ceil(low), math.floor(high) + 1):
        _, y = at(0, decade)
        found.append(
            f'<path d="M{left - 4} {y:.1f}h{SIDE + 4}"/><text class="soft small end" '
            f'x="{left - 8}" y="{y + 3:.1f}">{_number(10.0**decade)}×</text>'
        )
    across = _times(panel.sizes)
    found.append(f'<path class="linear" d="{_line([at(0, 0), at(across[-1], across[-1])])}"/>')
    for size, decades in zip(panel.sizes, across, strict=True):
        x, _ = at(decades, 0)
        found.append(
            f'<path d="M{x:.1f} {bottom}v4"/><text class="soft small middle" x="{x:.1f}" '
            f'y="{bottom + 16}">{_number(size)}</text>'
        )
    for kind, (values, measure) in panel.kinds.items():
        points = [at(x, up) for x, up in zip(across, _times(values), strict=True)]
        found.append(f'<path class="{kind}" d="{_line(points)}"/>')
        found += [f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in points]
        ends = f"{kind}: {values[0]:,.0f} to {values[-1]:,.0f} {measure}"
        y = bottom + (30 if kind == "time" else 42)
        found.append(f'<text class="soft small" x="{left}" y="{y}">{ends}</text>')
    return found


def _line(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _number(value: float) -> str:
    """A number with at most three digits: 0.1, 12, 4.1k, 1.62M."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"
