"""Changes from one report to another, figure by figure, with intervals."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kdexport.bench import stats
from kdexport.report.table import metric_of, trimmed
from kdexport.results import Change, Footprint, Interval, Latency, Metric, Ratio, Report, Variant
from kdexport.runtime import artifact
from kdexport.tasks import judging, load_task, metrics
from kdexport.tasks.metrics import Array, paired_difference, wilson_interval

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


class Figure(NamedTuple):
    """A measured value, with its interval if there is one."""

    value: float
    ci95: Interval | None


def both(one: Variant, other: Variant) -> str:
    """Name a pair of variants."""
    return one.name if one.name == other.name else f"{one.name} → {other.name}"


def changes_of(
    a: Report, b: Report, one: Variant, other: Variant, apart: str, folders: Sequence[Path] = ()
) -> list[Change]:
    """Return the change of every figure from one variant of A to another of B.

    `apart` is the reason why milliseconds can't be compared, or empty; `folders` are those of the reports.
    """
    name = both(one, other)
    busy = any(v.footprint and v.footprint.starved(r.bench.threads) for r, v in ((a, one), (b, other)))
    found = [change for metric in QUANTILES if (change := _time_change(metric, name, a, b, one, other, apart, busy))]
    if one.speedup_p50 and other.speedup_p50 and one.name != a.bench.reference:
        how = "ratio in each run" + ("" if _same_teacher(a, b) else ", to teachers that differ")
        found.append(ratio_change(name, "speedup", one.speedup_p50, other.speedup_p50, how, more_is_better=True))
    if one.metric and other.metric and a.metric == b.metric:
        found.append(_metric_change(a, b, one, other, folders))
    if one.agreement is not None and other.agreement is not None and one.metric and other.metric:
        x, y = _fraction(one.agreement, one.metric.n), _fraction(other.agreement, other.metric.n)
        found.append(_points(name, metrics.Metric("agreement"), x, y, _unpaired(x, y), "unpaired"))
    if one.size_bytes and other.size_bytes:
        mb, new_mb = one.size_bytes / 1e6, other.size_bytes / 1e6
        found.append(ratio_change(name, "size", Figure(mb, (mb, mb)), Figure(new_mb, (new_mb, new_mb)), "exact"))
    for metric, field in (("memory", "rss_mb"), ("cold", "cold_ms")):
        f, g = _figure(one.footprint, field), _figure(other.footprint, field)
        if metric == "memory" and f and g:
            found.append(ratio_change(name, metric, f, g, "fresh processes"))
        elif f and g and not apart:
            found.append(_apart(name, metric, f, g, busy, "fresh processes"))
    return found


def _time_change(
    metric: str, name: str, a: Report, b: Report, one: Variant, other: Variant, apart: str, busy: bool
) -> Change | None:
    x, y = _figure(one.latency_ms, metric), _figure(other.latency_ms, metric)
    if x is None and y is None:
        return None
    if apart or x is None or y is None:
        return Change(
            variant=name, metric=metric, a=x and x.value, b=y and y.value, b_ci95=y and y.ci95, change=None, ci95=None,
            unit="%", verdict="not comparable", how=apart or f"{'A' if x is None else 'B'} has no {metric}",
        )  # fmt: skip
    ratios = {"p50": (one.speedup_p50, other.speedup_p50), "p99": (one.speedup_p99, other.speedup_p99)}
    sa, sb = ratios.get(metric, (None, None))
    if sa and sb and one.name != a.bench.reference and _same_teacher(a, b):
        times = [_figure(report.variant(report.bench.reference).latency_ms, metric) for report in (a, b)]
        took = " and ".join(f"{trimmed(found.value)} ms" for found in times if found)
        how = "by ratios to the same teacher" + (f", which took {took}" if all(times) else "")
        return ratio_change(name, metric, x, y, how, _quotient(sa, sb))
    return _apart(name, metric, x, y, busy, "measured apart")


def _apart(name: str, metric: str, a: Figure, b: Figure, busy: bool, how: str) -> Change:
    """Compare times of two runs; without an interval where a machine was busy, as rounds of one run share that."""
    if busy:
        return ratio_change(name, metric, a, b, f"{how}, on a busy machine", Figure(b.value / a.value, None))
    return ratio_change(name, metric, a, b, how)


def _same_teacher(a: Report, b: Report) -> bool:
    sums = {v.sha256 for report in (a, b) for v in report.variants if v.name == report.bench.reference}
    return len(sums) == 1 and None not in sums


def _figure(record: Latency | Footprint | None, field: str) -> Figure | None:
    value = getattr(record, field, None)
    return None if value is None else Figure(value, getattr(record, f"{field}_ci95"))


def _quotient(top: Figure | Ratio, bottom: Figure | Ratio) -> Figure:
    """Divide independent figures: the log half widths add as squares."""
    value = top.value / bottom.value
    if top.ci95 is None or bottom.ci95 is None:
        return Figure(value, None)
    halves = (math.log(ci[1] / ci[0]) / 2 for ci in (top.ci95, bottom.ci95))
    half = math.sqrt(sum(h * h for h in halves))
    return Figure(value, (value * math.exp(-half), value * math.exp(half)))


def ratio_change(
    name: str, metric: str, a: Figure | Ratio, b: Figure | Ratio, how: str,
    ratio: Figure | Ratio | None = None, *, more_is_better: bool = False,
) -> Change:  # fmt: skip
    """Return the change from A to B in %; `ratio` is B ÷ A where it is not that of independent figures."""
    ratio = ratio or _quotient(b, a)
    ci = None if ratio.ci95 is None else (100 * (ratio.ci95[0] - 1), 100 * (ratio.ci95[1] - 1))
    above_or_below = "unsure" if ratio.ci95 is None else stats.verdict(ratio.ci95)
    up, down = ("better", "worse") if more_is_better else ("worse", "better")
    # stats.verdict calls a ratio above 1 "faster"; here it only means that B is more than A
    verdict = {"faster": up, "slower": down}.get(above_or_below, above_or_below)
    if how == "exact":
        verdict = "same" if ratio.value == 1 else up if ratio.value > 1 else down
    return Change(
        variant=name, metric=metric, a=a.value, b=b.value, b_ci95=b.ci95, change=100 * (ratio.value - 1), ci95=ci,
        unit="%", verdict=verdict, how=how,
    )  # fmt: skip


def _metric_change(a: Report, b: Report, one: Variant, other: Variant, folders: Sequence[Path]) -> Change:
    """Compare the main metric, paired by row where both have the same test rows and statistics of each."""
    assert one.metric
    assert other.metric
    name, metric = both(one, other), metric_of(a)
    data = [(r.data.get("sha256") or {}).get("test.jsonl") for r in (a, b)]
    if data[0] is not None and data[0] == data[1] and one.metric.n == other.metric.n:
        paired = "the same test rows, paired"
        if metric.kind == "fraction" and one.wrong_rows is not None and other.wrong_rows is not None:
            right = [~np.isin(np.arange(one.metric.n), v.wrong_rows or []) for v in (one, other)]
            return _points(name, metric, one.metric, other.metric, paired_difference(*right)[1], paired)
        parts = [s for place, v in zip(folders, (one, other), strict=False) if (s := _row_stats(place, v)) is not None]
        if len(parts) == 2 and {len(part) for part in parts} == {one.metric.n}:
            ci = judging.difference_of_stats(load_task(artifact.resolve(folders[0])), *parts)[1]
            return _points(name, metric, one.metric, other.metric, ci, paired)
    return _points(name, metric, one.metric, other.metric, _unpaired(one.metric, other.metric), "unpaired")


def _row_stats(folder: Path, variant: Variant) -> Array | None:
    """Read the metric's sufficient statistics of each test row, if the run's folder has them."""
    try:
        with np.load(folder / "verify" / "stats.npz") as stats:
            name = "teacher" if variant.model == "teacher" else variant.name
            return np.asarray(stats[name]) if name in stats.files else None
    except (OSError, ValueError):
        return None


def _points(name: str, metric: metrics.Metric, x: Metric, y: Metric, ci: Interval, how: str) -> Change:
    """Return B − A with its interval: in points, or in % of A for a metric that is a number."""
    scale, unit = (100 / x.value if x.value else math.nan, "%") if metric.kind == "number" else (100, "points")
    low, high = sorted((scale * ci[0], scale * ci[1]))
    up, down = ("better", "worse") if metric.higher_is_better else ("worse", "better")
    verdict = up if low > 0 else down if high < 0 else "same" if max(-low, high) <= 1 else "unsure"
    return Change(
        variant=name, metric=metric.name, a=x.value, b=y.value, b_ci95=y.ci95, change=scale * (y.value - x.value),
        ci95=(low, high), unit=unit, verdict=verdict, how=how,
    )  # fmt: skip


def _unpaired(one: Metric, other: Metric) -> Interval:
    """Return the interval of a difference from the interval of each (Newcombe 1998, method 10; Zou and Donner 2008)."""
    d = other.value - one.value
    low = math.hypot(other.value - other.ci95[0], one.ci95[1] - one.value)
    high = math.hypot(other.ci95[1] - other.value, one.value - one.ci95[0])
    return d - low, d + high


def _fraction(value: float, n: int) -> Metric:
    return Metric(value, wilson_interval(round(value * n), n), n)
