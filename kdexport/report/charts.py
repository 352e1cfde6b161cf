"""Charts as inline SVG: points, lines and steps on linear or logarithmic axes, and labelled bars.

They need no script and no library, are deterministic, a few kB each, and readable without colour, as each series has
its own marker and dash. Colours are classes `s0` to `s7`, which the page defines for light and dark.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from kdexport.report.page import render
from kdexport.results import Interval

_WIDTH, _EDGE, _LEFT, _RIGHT = 480, 8, 56, 466  # of the picture, where bars begin, of the frame of points; in pixels

T = TypeVar("T")


class Axis(NamedTuple):
    """An axis: its label, the format of values, its scale, values to include, and the smallest step of its ticks.

    It spans the points, whatever the noise: an interval that leaves it is clipped, with an arrow at its end.
    """

    label: str
    show: Callable[[float], str] = "{:g}".format
    log: bool = False
    reach: tuple[float, ...] = ()
    least: float = 0.0


class Point(NamedTuple):
    """A point with its intervals, its tooltip, and the radius in pixels of an area around it."""

    x: float
    y: float
    x_ci: Interval | None = None
    y_ci: Interval | None = None
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
    ci: Interval | None = None
    remark: str = ""
    base: float | None = None
    style: int = 0


class _Scale:
    """Values → pixels."""

    def __init__(self, axis: Axis, values: Iterable[float], start: float, end: float) -> None:
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
        return round(self._start + min(1.0, max(0.0, self._share(value))) * (self._end - self._start), 1)

    def ends(self, ci: Interval) -> list[tuple[float, int]]:
        """Return where an interval is drawn, each end with the direction in pixels in which it was clipped, or 0."""
        way = 1 if self._end > self._start else -1
        return [(self(v), way * ((self._share(v) > 1) - (self._share(v) < 0))) for v in ci]

    def _share(self, value: float) -> float:
        if self.axis.log:
            value = math.log10(value) if value > 0 else -math.inf
        return (value - self._low) / (self._high - self._low)

    def marks(self) -> dict[str, float]:
        """Return the place of each tick by its text."""
        return {self.axis.show(value): self(value) for value in self._ticks()}

    def _ticks(self) -> list[float]:
        """Return about seven round values at most."""
        if self.axis.log:
            decades = range(math.floor(self._low), math.ceil(self._high) + 1)
            for steps in ((1, 2, 5), (1, 3), (1,)):
                found = [s * 10.0**d for d in decades for s in steps]
                found = [v for v in found if self._low <= math.log10(v) <= self._high]
                if len(found) <= 7:
                    return found
            return found[:: math.ceil(len(found) / 7)]
        raw = max((self._high - self._low) / 5, self.axis.least)
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
    names = [(i, one.name) for i, one in enumerate(series) if one.points] if len(series) > 1 else []
    legend, top = _legend(names)
    bottom = top + height - 44
    points = [p for one in series for p in one.points]
    across = _Scale(x, [p.x for p in points], _LEFT, _RIGHT)
    up = _Scale(y, [p.y for p in points], bottom, top)
    return _draw(title, top, bottom, x=across, y=up, series=series, legend=legend)


def bars(title: str, rows: Sequence[Bar], axis: Axis) -> str:
    """Draw horizontal bars, each under its label."""
    values = [v for row in rows for v in (row.value, row.base) if v is not None]
    across = _Scale(axis, values, _EDGE, _RIGHT)
    return _draw(title, 0, 38 * len(rows) + 6, x=across, bars=rows)


def _draw(title: str, top: int, bottom: int, **parts: Any) -> str:
    frame = {"width": _WIDTH, "edge": _EDGE, "left": _LEFT, "right": _RIGHT, "top": top, "bottom": bottom}
    return render("chart.svg.j2", title=title, **{"y": None, "series": [], "bars": [], "legend": []} | frame | parts)


def _legend(names: list[tuple[int, str]]) -> tuple[list[tuple[int, str, int, int]], int]:
    """Lay out names in rows: (series, name, left, top) of each, and where the frame begins below them."""
    placed: list[tuple[int, str, int, int]] = []
    left, top = _LEFT, 0
    for i, name in names:
        width = 26 + round(6.6 * len(name))
        if left + width > _WIDTH and left > _LEFT:
            left, top = _LEFT, top + 17
        placed.append((i, name, left, top))
        left += width
    return placed, top + 12 + (17 if placed else 0)
