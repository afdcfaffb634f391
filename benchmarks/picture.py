"""A picture of a benchmark: bars of time and of memory, as an SVG that follows light and dark."""

from __future__ import annotations

import html
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

LABELS, BARS, VALUES, ROW, TOP = 150, 190, 70, 22, 52
PANEL = BARS + VALUES
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #22211e; } .title { font-size: 14px;
  font-weight: 600; } .soft { fill: #6d6a62; } .ours { fill: #2f6db5; } .theirs { fill: #b9b4a7; }
@media (prefers-color-scheme: dark) { text { fill: #e9e6dd; } .soft { fill: #a09b8f; }
  .ours { fill: #7db1ee; } .theirs { fill: #5b574e; } }
"""


def bars(title: str, results: Mapping[str, Sequence[Mapping[str, Any]]], ours: str) -> str:
    """Medians of `cpu` seconds and `megabytes` of each way; those that begin with `ours` in blue.

    Both scales begin at 0.
    """
    panels = (
        ("CPU seconds a step", "cpu", "{:.2f}"),
        ("MB above the model", "megabytes", "{:,.0f}"),
    )
    height, width = TOP + ROW * len(results) + 8, LABELS + 2 * PANEL
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-label="{html.escape(title)}">',
        f"<style>{STYLE}</style>",
        f'<text class="title" x="4" y="18">{html.escape(title)}</text>',
    ]
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
