"""The section on a search: all students with reasons, and the frontier of those trained."""

from collections.abc import Callable, Sequence

from kdexport.report.charts import Axis, Point, Series, frontier, plot
from kdexport.report.page import Figure, Section, Table
from kdexport.report.table import megabytes, metric_of, percent, score, tick, times, trimmed
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
    rows = []
    for one in found.rungs:
        faster = found.teacher_p50_ms / one.p50_ms if found.teacher_p50_ms else None
        seconds = [s for s in (one.trial_seconds, one.seconds) if s is not None]
        rows.append((
            one.name, trimmed(one.p50_ms), trimmed(one.p99_ms), times(faster) if faster else "–",
            megabytes(one.size_bytes), score(metric, one.trial), score(metric, one.metric), percent(one.retention),
            f"{sum(seconds):.0f}" if seconds else "–", _verdict(one, found),
        ))  # fmt: skip
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
    known = [one for one in found.rungs if cost(one) and (one.metric is not None or one.trial is not None)]
    known.sort(key=lambda one: one.metric is None)
    if not known or known[0].metric is None:
        return None
    front = best_trained(found.rungs, cost, metric)
    spots, series, rows = {}, [], []
    for one in known:
        trained = one.metric is not None
        value = (one.metric if trained else one.trial) or 0.0
        tip = f"{one.name}: {score(metric, value)} {'trained in full' if trained else 'after a short trial'}"
        spots[one.name] = Point(cost(one) or 0.0, value, tip=tip, radius=5)
        series.append(Series(f"{one.name}{'' if trained else ', tried only'}", [spots[one.name]], "dots"))
        how, on_it = "in full" if trained else "short trial", "yes" if one in front else "no"
        rows.append((one.name, f"{cost(one):.3g}", score(metric, value), how, on_it))
    series.append(Series("frontier", [spots[one.name] for one in front], "step"))
    caption = f"{metric.name} on validation against {label}"
    axes = Axis(label, log=True), Axis(f"{metric.name}, validation", lambda y: tick(y, metric))
    chart = plot(caption, series, *axes, height=320)
    columns = ("student", label.removesuffix(" (log)"), metric.name, "trained", "on the frontier")
    return Figure(caption, chart, Table(columns, rows))


def _verdict(one: SearchCandidate, found: Search) -> str:
    if one.name == found.winner:
        return "chosen" if one.met else "the closest"
    if one.over:
        return f"over budget: {one.over}"
    if one.metric is not None:
        return "meets the budget" if one.met else "keeps too little"
    return "not needed"
