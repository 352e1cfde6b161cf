"""Charts as inline SVG: points, lines and steps on linear or logarithmic axes, and labelled bars.

They need no script and no library, are deterministic, a few kB each, and readable without colour, as each series has
its own marker and dash. Colours are classes `s0` to `s7`, which the page defines for light and dark.
"""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple, TypeVar

_WIDTH, _LEFT, _RIGHT, _BOTTOM = 480, 56, 14, 44
_DASHES = ("", "6 3", "2 3", "8 3 2 3", "12 4", "4 2", "1 4", "10 2 2 2")
_MARKERS = (
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0",
    "M-3.6,-3.6h7.2v7.2h-7.2z",
    "M0,-4.8L4.4,3.4H-4.4z",
    "M0,-5L5,0L0,5L-5,0z",
    "M-4.4,-3.4H4.4L0,4.8z",
    "M-4,-1.2h2.8v-2.8h2.4v2.8h2.8v2.4h-2.8v2.8h-2.4v-2.8h-2.8z",
    "M-4.6,-2h9.2v4h-9.2z",
    "M-2,-4.6h4v9.2h-4z",
)

T = TypeVar("T")


class Axis(NamedTuple):
    """An axis: its label, the format of values, its scale, and values to include."""

    label: str
    show: Callable[[float], str] = "{:g}".format
    log: bool = False
    reach: tuple[float, ...] = ()


class Point(NamedTuple):
    """A point with its intervals, its tooltip, and the radius in pixels of an area around it."""

    x: float
    y: float
    x_ci: tuple[float, float] | None = None
    y_ci: tuple[float, float] | None = None
    tip: str = ""
    radius: float | None = None


class Series(NamedTuple):
    """Named points; `kind` is line, step or dots."""

    name: str
    points: Sequence[Point]
    kind: str = "line"


class Bar(NamedTuple):
    """A bar from `base` (or the start of the axis) to a value, with an interval and a remark."""

    label: str
    value: float
    ci: tuple[float, float] | None = None
    remark: str = ""
    base: float | None = None
    style: int = 0


class _Scale:
    """Values → pixels."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float) -> None:
        self.axis, self._start, self._end = axis, start, end
        known = [v for v in (*values, *axis.reach) if not axis.log or v > 0]
        low, high = (min(known), max(known)) if known else (0.1, 1.0)
        if axis.log:
            self._low, self._high = math.log10(low) - 0.06, math.log10(high) + 0.06
            if self._high - self._low < 0.3:
                self._low, self._high = self._low - 0.15, self._high + 0.15
        else:
            room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
            self._low = low if low in axis.reach else low - room
            self._high = high if high in axis.reach else high + room
            if self._high <= self._low:  # one value, and the axis reaches no further
                self._low, self._high = low - room, high + room

    def __call__(self, value: float) -> float:
        if self.axis.log:
            value = math.log10(value) if value > 0 else self._low
        share = (value - self._low) / (self._high - self._low)
        return round(self._start + min(1.0, max(0.0, share)) * (self._end - self._start), 1)

    def ticks(self) -> list[float]:
        """Return about seven round values at most."""
        if self.axis.log:
            decades = range(math.floor(self._low), math.ceil(self._high) + 1)
            for steps in ((1, 2, 5), (1, 3), (1,)):
                found = [s * 10.0**d for d in decades for s in steps]
                found = [v for v in found if self._low <= math.log10(v) <= self._high]
                if len(found) <= 7:
                    return found
            return found[:: math.ceil(len(found) / 7)]
        raw = (self._high - self._low) / 5
        power = 10 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
        first = math.ceil(self._low / step - 1e-9)
        return [round(i * step, 12) for i in range(first, math.floor(self._high / step + 1e-9) + 1)]


def frontier(items: Sequence[T], cost: Callable[[T], float | None], value: Callable[[T], float]) -> list[T]:
    """Return the Pareto-optimal items by rising cost, without those whose cost is None."""
    best: list[T] = []
    for item in sorted((i for i in items if cost(i) is not None), key=lambda i: (cost(i) or 0.0, -value(i))):
        if not best or value(item) > value(best[-1]):
            best.append(item)
    return best


def plot(title: str, series: Sequence[Series], x: Axis, y: Axis, height: int = 280) -> str:
    """Draw series in one frame; `title` is for screen readers."""
    # A series without points has no legend, but counts, so that a variant looks the same in every chart.
    rows = _legend_rows([(i, one.name) for i, one in enumerate(series) if one.points]) if len(series) > 1 else []
    top = 12 + 17 * len(rows)
    total = height + top
    points = [p for one in series for p in one.points]
    across = _Scale(x, [v for p in points for v in (p.x, *(p.x_ci or ()))], _LEFT, _WIDTH - _RIGHT)
    up = _Scale(y, [v for p in points for v in (p.y, *(p.y_ci or ()))], total - _BOTTOM, top)
    body = [_legend(rows), _frame(across, up, top, total)]
    for i, one in enumerate(series):
        body.append(_line(one, i, across, up))
        marks = one.points if one.kind != "step" and len(one.points) <= 30 else []
        body += [_mark(p, i, one.name, across, up) for p in marks]
    return _svg(title, total, "".join(body))


def bars(title: str, rows: Sequence[Bar], axis: Axis) -> str:
    """Draw horizontal bars, each under its label."""
    height = 38 * len(rows) + 50
    values = [v for row in rows for v in (row.value, *(row.ci or ()), *([row.base] if row.base else []))]
    across = _Scale(axis, values, 8, _WIDTH - _RIGHT)
    bottom = height - _BOTTOM
    body = [_x_axis(across, 0, bottom, height)]
    for i, row in enumerate(rows):
        top = 38 * i + 18
        start, end = across(row.base) if row.base is not None else 8, across(row.value)
        left, width = min(start, end), abs(end - start)
        if width < 5:  # too short for a bar: a mark
            left, width = left - 2.5, 5.0
        remark = f'<tspan class="soft"> {escape(row.remark)}</tspan>' if row.remark else ""
        body.append(
            f'<text x="8" y="{top - 5}">{escape(row.label)}{remark}</text>'
            f'<rect class="fill s{row.style}" x="{left:.1f}" y="{top}" width="{width:.1f}" height="12"/>'
        )
        if row.ci:
            body.append(_whisker(across(row.ci[0]), top + 6, across(row.ci[1]), top + 6))
    return _svg(title, height, "".join(body))


def _line(one: Series, i: int, across: _Scale, up: _Scale) -> str:
    if one.kind == "dots" or len(one.points) < 2:
        return ""
    places = [(across(p.x), up(p.y)) for p in one.points]
    path = f"M{places[0][0]},{places[0][1]}"
    for px, py in places[1:]:
        path += f"H{px}V{py}" if one.kind == "step" else f"L{px},{py}"
    dash = f' stroke-dasharray="{_DASHES[i % 8]}"' if _DASHES[i % 8] else ""
    return f'<path class="line s{i % 8}" d="{path}"{dash}><title>{escape(one.name)}</title></path>'


def _mark(p: Point, i: int, name: str, across: _Scale, up: _Scale) -> str:
    px, py = across(p.x), up(p.y)
    whiskers = _whisker(across(p.x_ci[0]), py, across(p.x_ci[1]), py) if p.x_ci else ""
    whiskers += _whisker(px, up(p.y_ci[0]), px, up(p.y_ci[1])) if p.y_ci else ""
    size = f'<circle class="area s{i % 8}" cx="{px}" cy="{py}" r="{p.radius:.1f}"/>' if p.radius else ""
    tip = escape(p.tip or f"{name}: {across.axis.show(p.x)}, {up.axis.show(p.y)}")
    mark = f'<path class="fill s{i % 8}" transform="translate({px},{py})" d="{_MARKERS[i % 8]}"/>'
    return f"<g>{size}{whiskers}{mark}<title>{tip}</title></g>"


def _whisker(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path class="whisker" d="M{x1},{y1}L{x2},{y2}"/>'


def _frame(across: _Scale, up: _Scale, top: int, total: int) -> str:
    lines = [
        f'<path class="grid" d="M{_LEFT},{up(v)}H{_WIDTH - _RIGHT}"/>'
        f'<text x="{_LEFT - 6}" y="{up(v) + 4}" text-anchor="end">{escape(up.axis.show(v))}</text>'
        for v in up.ticks()
    ]
    middle = (top + total - _BOTTOM) / 2
    lines.append(
        f'<text class="soft" transform="translate(12,{middle}) rotate(-90)" text-anchor="middle">'
        f"{escape(up.axis.label)}</text>"
    )
    return "".join(lines) + _x_axis(across, top, total - _BOTTOM, total)


def _x_axis(across: _Scale, top: int, bottom: int, total: int) -> str:
    lines, last = [], ""
    for v in across.ticks():
        px, shown = across(v), across.axis.show(v)
        if shown == last:  # two ticks that round to the same text, such as half a round
            continue
        last = shown
        anchor = "end" if px > _WIDTH - 30 else "start" if px < 20 else "middle"
        lines.append(
            f'<path class="grid" d="M{px},{top}V{bottom}"/>'
            f'<text x="{px}" y="{bottom + 16}" text-anchor="{anchor}">{escape(shown)}</text>'
        )
    label = escape(across.axis.label)
    lines.append(f'<text class="soft" x="{_WIDTH - _RIGHT}" y="{total - 8}" text-anchor="end">{label}</text>')
    return "".join(lines)


def _legend_rows(names: list[tuple[int, str]]) -> list[list[tuple[int, str, int]]]:
    """Names laid out in rows: (series, name, pixel)."""
    rows: list[list[tuple[int, str, int]]] = [[]]
    at = _LEFT
    for i, name in names:
        width = 26 + round(6.6 * len(name))
        if at + width > _WIDTH and rows[-1]:
            rows, at = [*rows, []], _LEFT
        rows[-1].append((i, name, at))
        at += width
    return rows


def _legend(rows: list[list[tuple[int, str, int]]]) -> str:
    return "".join(
        f'<path class="fill s{i % 8}" transform="translate({at + 5},{12 + 17 * r})" d="{_MARKERS[i % 8]}"/>'
        f'<text x="{at + 14}" y="{16 + 17 * r}">{escape(name)}</text>'
        for r, row in enumerate(rows)
        for i, name, at in row
    )


def _svg(title: str, height: int, body: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{body}</svg>'
    )
