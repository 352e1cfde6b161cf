"""The section on a search: the ladder, what fell off it and why, and the frontier of what was trained."""

from __future__ import annotations

from collections.abc import Callable

from kdexport.report.charts import Axis, Point, Series, plot
from kdexport.report.page import Figure, Section, Table
from kdexport.report.table import megabytes, ms, percent, times
from kdexport.results import Report, Rung, Search

_COLUMNS = (
    "student", "p50 ms", "p99 ms", "faster", "size MB", "short trial", "in full", "kept", "seconds", "verdict",
)  # fmt: skip


def search(r: Report) -> Section | None:
    """Every student of the ladder; accuracy against p99 and against size."""
    found = r.search
    if found is None:
        return None
    rows = [_row(rung, found) for rung in found.rungs]
    best = next(i for i, rung in enumerate(found.rungs) if rung.name == found.winner)
    lead = (
        f"{found.reason}. Size and latency don't depend on the weights, so they were "
        f"measured before any training; {r.metric} here is of the validation split, where the teacher has "
        f"{percent(found.teacher)}. The test split, which judges the winner in the other sections, had no say."
    )
    figures = [
        _frontier(found, r.metric, "p99 latency, ms (log)", lambda rung: rung.p99_ms),
        _frontier(found, r.metric, "file size, MB (log)", lambda rung: rung.size_bytes / 1e6),
    ]
    tables = [Table(_COLUMNS, rows, best)]
    return Section("Search for a student", lead, [f for f in figures if f], tables, brief=True)


def frontier(rungs: list[Rung], cost: Callable[[Rung], float | None]) -> list[Rung]:
    """The rungs trained in full that no other beats in both cost and metric, by rising cost."""
    known = sorted(
        (rung for rung in rungs if rung.metric is not None and cost(rung) is not None),
        key=lambda rung: (cost(rung) or 0.0, -(rung.metric or 0.0)),
    )
    best: list[Rung] = []
    for rung in known:
        if not best or (rung.metric or 0.0) > (best[-1].metric or 0.0):
            best.append(rung)
    return best


def _frontier(found: Search, metric: str, label: str, cost: Callable[[Rung], float | None]) -> Figure | None:
    trained = [rung for rung in found.rungs if rung.metric is not None and cost(rung)]
    tried = [rung for rung in found.rungs if rung.metric is None and rung.trial is not None and cost(rung)]
    if not trained:
        return None

    def point(rung: Rung) -> Point:
        value = rung.metric if rung.metric is not None else rung.trial
        told = "trained in full" if rung.metric is not None else "after a short trial"
        return Point(cost(rung) or 0.0, value or 0.0, tip=f"{rung.name}: {percent(value)} {told}", radius=5)

    series = [Series(f"{rung.name}{'' if rung in trained else ', tried only'}", [point(rung)], "dots")
              for rung in (*trained, *tried)]  # fmt: skip
    front = frontier(found.rungs, cost)
    chart = plot(
        f"{metric} on validation against {label}",
        [*series, Series("frontier", [point(rung) for rung in front], "step")],
        Axis(label, log=True),
        Axis(f"{metric}, validation", lambda value: percent(value, 0)),
        height=320,
    )
    rows = [
        (rung.name, f"{cost(rung):.3g}", percent(rung.metric if rung in trained else rung.trial),
         "in full" if rung in trained else "short trial", "yes" if rung in front else "no")
        for rung in (*trained, *tried)
    ]  # fmt: skip
    columns = ("student", label.removesuffix(" (log)"), metric, "trained", "on the frontier")
    return Figure(f"{metric} on validation against {label}", chart, Table(columns, rows))


def _row(rung: Rung, found: Search) -> tuple[str, ...]:
    faster = found.teacher_p50_ms / rung.p50_ms if found.teacher_p50_ms else None
    seconds = [s for s in (rung.trial_seconds, rung.seconds) if s is not None]
    return (
        rung.name, ms(rung.p50_ms), ms(rung.p99_ms), times(faster) if faster else "–", megabytes(rung.size_bytes),
        percent(rung.trial), percent(rung.metric), percent(rung.retention),
        f"{sum(seconds):.0f}" if seconds else "–", _verdict(rung, found),
    )  # fmt: skip


def _verdict(rung: Rung, found: Search) -> str:
    if rung.name == found.winner:
        return "chosen" if rung.met else "the closest"
    if rung.over:
        return f"over budget: {rung.over}"
    if rung.metric is not None:
        return "meets the budget" if rung.met else "keeps too little"
    return "not needed"
