"""The section on a search: all students with reasons, and the frontier of those trained."""

from collections.abc import Callable, Sequence

from kdexport.report.charts import Axis, Point, Series, frontier, plot
from kdexport.report.page import Figure, Section, Table
from kdexport.report.table import megabytes, metric_of, percent, score, times, trimmed
from kdexport.results import Report, Search, SearchCandidate
from kdexport.tasks.metrics import Metric

_COLUMNS = (
    "student", "p50 ms", "p99 ms", "faster", "size MB", "short trial", "in full", "kept", "seconds", "verdict",
)  # fmt: skip


def search(r: Report) -> Section | None:
    """Show every student; the metric against p99 and against size."""
    found, metric = r.search, metric_of(r)
    if found is None:
        return None
    rows = [_row(one, found, metric) for one in found.rungs]
    best = next(i for i, one in enumerate(found.rungs) if one.name == found.winner)
    lead = (
        f"{found.reason}. Size and latency don't depend on the weights, so they were "
        f"measured before any training; {metric.name} here is of the validation split, where the teacher has "
        f"{score(metric, found.teacher)}. The test split, which judges the winner in the other sections, had no say."
    )
    figures = [
        _frontier(found, metric, "p99 latency, ms (log)", lambda one: one.p99_ms),
        _frontier(found, metric, "file size, MB (log)", lambda one: one.size_bytes / 1e6),
    ]
    return Section("Search for a student", lead, [f for f in figures if f], [Table(_COLUMNS, rows, best)], brief=True)


def best_trained(
    candidates: Sequence[SearchCandidate], cost: Callable[[SearchCandidate], float | None], metric: Metric
) -> list[SearchCandidate]:
    """Return the Pareto-optimal students by cost and metric, of those trained in full."""
    trained = [one for one in candidates if one.metric is not None]
    return frontier(trained, cost, lambda one: metric.gain(0.0, one.metric or 0.0))


def _frontier(
    found: Search, metric: Metric, label: str, cost: Callable[[SearchCandidate], float | None]
) -> Figure | None:
    trained = [one for one in found.rungs if one.metric is not None and cost(one)]
    tried = [one for one in found.rungs if one.metric is None and one.trial is not None and cost(one)]
    if not trained:
        return None

    def value(one: SearchCandidate) -> float:
        return (one.trial if one.metric is None else one.metric) or 0.0

    def point(one: SearchCandidate) -> Point:
        how = "after a short trial" if one.metric is None else "trained in full"
        return Point(cost(one) or 0.0, value(one), tip=f"{one.name}: {score(metric, value(one))} {how}", radius=5)

    series = [Series(f"{one.name}{'' if one in trained else ', tried only'}", [point(one)], "dots")
              for one in (*trained, *tried)]  # fmt: skip
    front = best_trained(found.rungs, cost, metric)
    series.append(Series("frontier", [point(one) for one in front], "step"))
    caption = f"{metric.name} on validation against {label}"
    axes = Axis(label, log=True), Axis(f"{metric.name}, validation", lambda y: score(metric, y, 0))
    chart = plot(caption, series, *axes, height=320)
    rows = [
        (one.name, f"{cost(one):.3g}", score(metric, value(one)), "in full" if one in trained else "short trial",
         "yes" if one in front else "no")
        for one in (*trained, *tried)
    ]  # fmt: skip
    columns = ("student", label.removesuffix(" (log)"), metric.name, "trained", "on the frontier")
    return Figure(caption, chart, Table(columns, rows))


def _row(one: SearchCandidate, found: Search, metric: Metric) -> tuple[str, ...]:
    faster = found.teacher_p50_ms / one.p50_ms if found.teacher_p50_ms else None
    seconds = [s for s in (one.trial_seconds, one.seconds) if s is not None]
    return (
        one.name, trimmed(one.p50_ms), trimmed(one.p99_ms), times(faster) if faster else "–", megabytes(one.size_bytes),
        score(metric, one.trial), score(metric, one.metric), percent(one.retention),
        f"{sum(seconds):.0f}" if seconds else "–", _verdict(one, found),
    )  # fmt: skip


def _verdict(one: SearchCandidate, found: Search) -> str:
    if one.name == found.winner:
        return "chosen" if one.met else "the closest"
    if one.over:
        return f"over budget: {one.over}"
    if one.metric is not None:
        return "meets the budget" if one.met else "keeps too little"
    return "not needed"
