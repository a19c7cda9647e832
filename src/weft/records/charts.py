"""Line charts as inline SVG: a few kilobytes of text that any browser draws, without a library.

chart("loss", [Line("train", {0: 1.0, 1: 0.5}), Line("dev", {0: 1.1, 1: 0.7})], "epoch", mark=1)
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

COLOURS = ("#2563eb", "#dc2626", "#059669", "#b45309", "#7c3aed", "#0891b2")
DASHES = ("", "6 3", "2 3", "8 3 2 3")
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 34, 40
ROW = 16  # of a legend
MOST_POINTS = 1200
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1080px; padding: 0 1rem; color: #1f2937; }
h1 { font-size: 1.5rem; } table { border-collapse: collapse; font-size: .9rem; margin: .5rem 0 1rem; }
th { text-align: left; font-weight: 500; color: #4b5563; padding: .15rem 1.2rem .15rem 0; vertical-align: top; }
td { padding: .15rem 1.2rem .15rem 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
summary { font-weight: 600; cursor: pointer; margin-top: 1rem; } pre { overflow-x: auto; }
.charts { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 12px; margin: 1rem 0; }
.facts { font-size: 1rem; }
svg { background: #fff; border: 1px solid #e5e7eb; border-radius: 6px; max-width: 100%; height: auto; }
svg text { font: 11px system-ui, sans-serif; fill: #4b5563; }
svg .title { font-size: 13px; font-weight: 600; fill: #111827; }
"""


@dataclass
class Line:
    """A curve: its name and its values by x. Values that are not finite leave a gap."""

    name: str
    values: Mapping[int, float]


def chart(title: str, lines: Sequence[Line], x_name: str, mark: int | None = None, wide: bool = False) -> str:
    """An SVG of `lines` over `x_name`, with a logarithmic scale where all values are positive and span a decade.

    `mark`: an x that gets a vertical line (the best epoch).
    """
    legend, below = _legend([line.name for line in lines] if len(lines) > 1 else [], 1040 if wide else 340)
    width, height = (1040, 340 + below) if wide else (340, 240 + below)
    top = TOP + below
    values = [v for line in lines for v in line.values.values() if math.isfinite(v)]
    xs = [x for line in lines for x in line.values]
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    head = f'<svg {size} role="img" aria-label="{html.escape(title)}">'
    parts = [f'<text class="title" x="{LEFT}" y="20">{html.escape(title)}</text>']
    if not values:
        return f'{head}{"".join(parts)}<text x="{LEFT}" y="{height // 2}">no finite value</text></svg>'
    log = min(values) > 0 and max(values) / min(values) > 10
    low, high = _range(values, log)
    first, last = min(xs), max(max(xs), min(xs) + 1)

    def px(x: float) -> float:
        return LEFT + (x - first) / (last - first) * (width - LEFT - RIGHT)

    def py(v: float) -> float:
        v = math.log10(v) if log else v
        return height - BOTTOM - (v - low) / (high - low) * (height - top - BOTTOM)

    parts += _axes(px, py, first, last, low, high, log, width, height, top, x_name)
    if mark is not None and first <= mark <= last:
        line = f'd="M{px(mark):.1f} {top}V{height - BOTTOM}" stroke="#9ca3af" stroke-dasharray="8 3 2 3"'
        parts.append(f"<path {line}><title>best: {x_name} {mark}</title></path>")
    for i, line in enumerate(lines):
        parts += _curve(line, i, px, py)
    return f"{head}{''.join([*parts, *legend])}</svg>"


def _range(values: Sequence[float], log: bool) -> tuple[float, float]:
    low, high = (math.log10(min(values)), math.log10(max(values))) if log else (min(values), max(values))
    pad = (high - low) * 0.05 or abs(high) * 0.05 or 0.5
    return low - pad, high + pad


def _axes(px, py, first, last, low, high, log, width, height, top, x_name) -> list[str]:  # type: ignore[no-untyped-def]
    parts = []
    for tick in _decades(low, high) if log else _ticks(low, high):
        y = py(tick)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{width - RIGHT}" stroke="#e5e7eb"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_label(tick)}</text>')
    for tick in _ticks(first, last, whole=True, count=8 if width > 500 else 4):
        parts.append(f'<text x="{px(tick):.1f}" y="{height - BOTTOM + 16}" text-anchor="middle">{_label(tick)}</text>')
        parts.append(f'<path d="M{px(tick):.1f} {height - BOTTOM}v4" stroke="#9ca3af"/>')
    parts.append(f'<path d="M{LEFT} {top}V{height - BOTTOM}H{width - RIGHT}" fill="none" stroke="#9ca3af"/>')
    parts.append(
        f'<text x="{(LEFT + width - RIGHT) / 2:.0f}" y="{height - 8}" text-anchor="middle">{html.escape(x_name)}</text>'
    )
    return parts


def _curve(line: Line, number: int, px, py) -> list[str]:  # type: ignore[no-untyped-def]
    colour, dash = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
    points = thinned([(x, v) for x, v in sorted(line.values.items())])
    runs: list[list[str]] = [[]]
    for x, v in points:
        if math.isfinite(v):
            runs[-1].append(f"{px(x):.1f} {py(v):.1f}")
        elif runs[-1] and not _is_sparse(line):
            runs.append([])
    path = "".join("M" + "L".join(run) for run in runs if len(run) > 1)
    style = f'fill="none" stroke="{colour}" stroke-width="1.6"' + (f' stroke-dasharray="{dash}"' if dash else "")
    parts = [f'<path class="curve" d="{path}" {style}><title>{html.escape(line.name)}</title></path>'] if path else []
    lonely = [run[0].split() for run in runs if len(run) == 1]
    return parts + [f'<circle class="curve" cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>' for x, y in lonely]


def _is_sparse(line: Line) -> bool:
    """Whether the gaps are epochs without validation, to be drawn over."""
    return sum(math.isnan(v) for v in line.values.values()) * 2 > len(line.values)


def thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most about MOST_POINTS points that look the same: the lowest and the highest of each stretch."""
    if len(points) <= MOST_POINTS:
        return points
    stretch = math.ceil(len(points) / (MOST_POINTS / 2))
    kept: list[tuple[int, float]] = []
    for i in range(0, len(points), stretch):
        part = points[i : i + stretch]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept


def _legend(names: Sequence[str], width: int) -> tuple[list[str], int]:
    """The legend, in rows between the title and the axes, and how much room the rows take."""
    parts, x, row = [], LEFT, 0
    most = (width - LEFT - RIGHT - 26) // 7  # characters in a row of its own
    for i, name in enumerate(names):
        shown = name if len(name) <= most else "…" + name[-(most - 1) :]
        if x > LEFT and x + 26 + 7 * len(shown) > width - RIGHT:
            x, row = LEFT, row + 1
        dash = f' stroke-dasharray="{DASHES[i % 4]}"' if DASHES[i % 4] else ""
        colour = f'stroke="{COLOURS[i % len(COLOURS)]}"'
        parts.append(f'<path d="M{x} {34 + ROW * row}h20" {colour} stroke-width="2"{dash}/>')
        parts.append(f'<text x="{x + 26}" y="{38 + ROW * row}">{html.escape(shown)}</text>')
        x += 40 + 7 * len(shown)
    return parts, ROW * (row + 1) if names else 0


def _decades(low: float, high: float) -> list[float]:
    powers = range(math.ceil(low), math.floor(high) + 1)
    if len(powers) >= 2:
        return [10.0**p for p in list(powers)[:: math.ceil(len(powers) / 7)]]
    inner = [m * 10.0**p for p in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
    return [v for v in inner if low <= math.log10(v) <= high]


def _ticks(low: float, high: float, whole: bool = False, count: int = 5) -> list[float]:
    """Round numbers between low and high, about `count` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    step = max(1.0, round(step)) if whole else step
    start = math.ceil(low / step - 1e-9)
    return [n * step for n in range(start, math.floor(high / step + 1e-9) + 1)]


def _label(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.6g}"
    mantissa, _, exponent = f"{value:.0e}".partition("e")
    return f"{mantissa}e{int(exponent)}"
