"""Inline SVG for reports: memory against batch size, and stacked bars. Colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 620, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 130, 18, 46
_LABEL_GAP = 14  # pixels between the labels at the ends of two lines
_STEPS = (1, 2, 5)  # ticks per decade
_BAR, _BAR_GAP, _BAR_LEFT, _BAR_RIGHT = 18, 6, 250, 90


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line: (x, y, fits) points; ``kind`` names its colour class, ``marker`` is an index into the shapes."""

    name: str
    kind: str
    marker: int
    points: Sequence[tuple[float, float, bool]]


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A stacked bar: (category, amount) segments, left to right."""

    name: str
    segments: Sequence[tuple[str, float]]
    fits: bool


class _Scale:
    """Logarithmic, from values to pixels."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        if self.high <= self.low:
            return (self.start + self.end) / 2
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)


def ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, 20, ... from the last one at or below ``low`` to the first one at or above ``high``."""
    found = [s * 10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for s in _STEPS]
    first = max((t for t in found if t <= low), default=found[0])
    last = min((t for t in found if t >= high), default=found[-1])
    return [t for t in found if first <= t <= last]


def line_chart(series: Sequence[Series], *, limit: float, limit_name: str, unit: str, title: str) -> str:
    """Memory against batch size, both axes logarithmic, with a line where memory ends.

    Args:
        series: the lines.
        limit: where memory ends, in ``unit``.
        limit_name: what stands at that line.
        unit: of the vertical axis.
        title: read out by screen readers.
    """
    batches = sorted({x for line in series for x, *_ in line.points})
    values = [y for line in series for _, y, _ in line.points]
    marks = ticks(min(*values, limit), max(*values, limit))
    x = _Scale(batches[0], batches[-1], _LEFT + 14, _WIDTH - _RIGHT)
    y = _Scale(marks[0], marks[-1], _HEIGHT - _BOTTOM, _TOP)
    parts = [*_axes(x, y, batches, marks, unit), *_limit(y(limit), limit_name)]
    labels = _spread([y(line.points[-1][1]) for line in series])
    for line, label in zip(series, labels, strict=True):
        parts += _line(line, x, y, unit, label)
    return _svg(_WIDTH, _HEIGHT, title, parts)


def bar_chart(bars: Sequence[Bar], *, limit: float, unit: str, title: str) -> str:
    """Stacked horizontal bars over a linear axis, with a line where memory ends."""
    widest = max([limit, *(sum(amount for _, amount in bar.segments) for bar in bars)])
    room = 900 - _BAR_LEFT - _BAR_RIGHT
    height = len(bars) * (_BAR + _BAR_GAP) + 24
    parts = []
    for i, bar in enumerate(bars):
        parts += _bar(bar, top=i * (_BAR + _BAR_GAP) + 4, scale=room / widest, unit=unit)
    where = _BAR_LEFT + limit * room / widest
    parts.append(f'<line class="limit" x1="{where:.1f}" x2="{where:.1f}" y1="0" y2="{height - 18}"/>')
    parts.append(_text(where, height - 4, f"{limit:g} {unit}", "limit-name", "middle"))
    return _svg(900, height, title, parts)


def marker(shape: int, x: float, y: float, css: str, size: float = 4.5) -> str:
    """A marker: circle, square, triangle, diamond, then these again."""
    corners = (
        [],
        [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        [(0, -1.3), (1.2, 1), (-1.2, 1)],
        [(0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)],
    )[shape % 4]
    if not corners:
        return f'<circle class="{css}" cx="{x:.1f}" cy="{y:.1f}" r="{size}"/>'
    points = " ".join(f"{x + size * a:.1f},{y + size * b:.1f}" for a, b in corners)
    return f'<polygon class="{css}" points="{points}"/>'


def _axes(x: _Scale, y: _Scale, batches: Sequence[float], marks: Sequence[float], unit: str) -> list[str]:
    parts = []
    for mark in marks:
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT + 14}" y1="{y(mark):.1f}" y2="{y(mark):.1f}"/>'
        )
        parts.append(_text(_LEFT - 8, y(mark) + 4, f"{mark:g}", "tick", "end"))
    parts += [_text(x(b), _HEIGHT - _BOTTOM + 18, f"{b:g}", "tick", "middle") for b in batches]
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, "global batch, clips", "axis", "middle"))
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(
        f'<text class="axis" text-anchor="middle" transform="translate(14 {middle}) rotate(-90)">{unit} per GPU</text>'
    )
    return parts


def _limit(height: float, name: str) -> list[str]:
    return [
        f'<line class="limit" x1="{_LEFT}" x2="{_WIDTH - _RIGHT + 14}" y1="{height:.1f}" y2="{height:.1f}"/>',
        _text(_LEFT + 4, height - 5, name, "limit-name", "start"),
    ]


def _line(line: Series, x: _Scale, y: _Scale, unit: str, label: float) -> list[str]:
    path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b, _ in line.points)
    parts = [f'<polyline class="line {line.kind}" points="{path}"/>']
    for batch, value, fits in line.points:
        shape = marker(line.marker, x(batch), y(value), f"mark {line.kind}{'' if fits else ' oom'}")
        note = f"{line.name}, batch {batch:g}: {value:.1f} {unit} per GPU{'' if fits else ', out of memory'}"
        parts.append(f"<g>{shape}<title>{escape(note)}</title></g>")
    parts.append(_text(_WIDTH - _RIGHT + 20, label + 4, line.name, f"name {line.kind}", "start"))
    return parts


def _bar(bar: Bar, *, top: float, scale: float, unit: str) -> list[str]:
    parts = [_text(_BAR_LEFT - 8, top + _BAR - 5, bar.name, "tick", "end")]
    left, total = float(_BAR_LEFT), 0.0
    for category, amount in bar.segments:
        note = f"{bar.name}: {category} {amount:.2f} {unit}"
        parts.append(
            f'<rect class="{css_class(category)}" x="{left:.1f}" y="{top}" width="{amount * scale:.2f}" '
            f'height="{_BAR}"><title>{escape(note)}</title></rect>'
        )
        left, total = left + amount * scale, total + amount
    text = f"{total:.1f}" + ("" if bar.fits else " OOM")
    parts.append(_text(left + 6, top + _BAR - 5, text, "tick" if bar.fits else "limit-name", "start"))
    return parts


def css_class(category: str) -> str:
    """The style class of a category of memory."""
    return "part-" + "".join(c if c.isalnum() else "-" for c in category.lower())


def _spread(heights: Sequence[float]) -> list[float]:
    """Move labels apart that would overlap, keeping their order."""
    placed = dict.fromkeys(range(len(heights)), 0.0)
    last = -math.inf
    for i in sorted(placed, key=lambda i: heights[i]):
        last = max(heights[i], last + _LABEL_GAP)
        placed[i] = last
    over = max(0.0, last - (_HEIGHT - _BOTTOM))
    return [placed[i] - over for i in range(len(heights))]


def _text(x: float, y: float, text: str, css: str, anchor: str) -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title, quote=True)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )
