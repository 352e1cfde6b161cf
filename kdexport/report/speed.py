"""Sections on speed: variants, budget, trade-off, latency, steps."""

import math
from statistics import median

from kdexport.report.charts import Axis, Bar, Point, Series, bars, frontier, plot
from kdexport.report.page import Figure, Section, Table
from kdexport.report.table import (
    between,
    headers,
    megabytes,
    metric_of,
    ms,
    p99,
    percent,
    score,
    scored,
    signed,
    table,
    times,
    trimmed,
)  # fmt: skip
from kdexport.results import QUANTILES, Interval, Report, Variant, machine_name
from kdexport.tasks import task_class
from kdexport.tasks.metrics import Metric


def variants(r: Report) -> Section:
    """Show the table of variants, and the costs of a process of each."""
    how = r.bench
    place = next((i for i, v in enumerate(r.variants) if v.name == r.recommended), None)
    rows = [
        (*cells, v.speedup_p50.verdict if v.speedup_p50 and v.name != how.reference else "–")
        for cells, v in zip(table(r), r.variants, strict=True)
    ]
    note = (
        f"Latency is {how.clock}, at batch 1 on {how.threads} thread(s), for {how.rows} real {_rows(r)} in "
        f"turn, in {how.rounds} shuffled rounds, each variant in its own process; waiting threads "
        f"{'spin' if how.spinning else 'sleep'}, garbage collection is off. Intervals are over rounds, ratios to "
        f"{how.reference} are paired by round. p99 needs 1,000 samples; with fewer, an upper bound is shown, or none. "
        "Digits below the precision of the interval are omitted."
    )
    tables = [Table((*headers(r), "verdict"), rows, place)]
    if costs := [_costs(v) for v in r.variants if v.footprint]:
        columns = ("process of", "tokenise ms", "run ms", "p90 ms", "cold start ms", "RSS MB", "peak MB", "cores used")
        tables.append(Table(columns, costs))
    lead = f"All measured in one run, in turns, on {machine_name(r.environment)}; brackets are 95 % intervals."
    return Section("Variants", lead, tables=tables, note=note + _control(r), brief=True)


def _rows(r: Report) -> str:
    name = {"text": "texts", "image": "images", "audio": "recordings"}[task_class(r.task).modality]
    if not (found := r.bench.tokens):
        return name
    cut = f", {found['cut_percent']} % fill all {found['limit']} that are read" if found.get("cut_percent") else ""
    return f"{name} of {found['p5']} to {found['p95']} tokens (5th to 95th percentile{cut})"


def _costs(v: Variant) -> tuple[str, ...]:
    found, latency = v.footprint, v.latency_ms
    assert found
    assert latency
    return (
        v.name, ms(latency.tokenize_p50), ms(latency.model_p50), ms(latency.p90), f"{found.cold_ms:.0f}",
        f"{found.rss_mb:.0f}", f"{found.peak_rss_mb:.0f}", f"{found.cores_used:.2f}",
    )  # fmt: skip


def _control(r: Report) -> str:
    if not (r.bench.control and r.bench.control.ratio.ci95):
        return ""
    found = r.bench.control.ratio
    return (
        f" The engine's check of itself: {r.bench.control.name}, measured twice as if it were two files, came out "
        f"{found.value:.2f}× apart{between(found.ci95, found.value)}, so: {found.verdict}."
    )


def budget(r: Report) -> Section | None:
    """Show each limit, the figure found, and whether its interval crosses the limit."""
    if not r.budget.checks:
        return None
    rows = [
        (c.name, f"{c.limit:g}", "–" if c.found is None else f"{c.found:.3g}",
         ("kept" if c.met else "not kept") + ("" if c.sure else ", but the interval reaches over the limit"))
        for c in r.budget.checks
    ]  # fmt: skip
    title = f"Budget: {'kept' if r.budget.met else 'not kept'}"
    return Section(title, tables=[Table(("limit", "asked", "found", "verdict"), rows)], brief=True)


def trade_off(r: Report) -> Section | None:
    """Plot the metric against p99, with size as area."""
    known = [v for v in r.variants if v.metric and v.latency_ms and _tail(v)]
    if len(known) < 2:
        return None
    metric, largest = metric_of(r), max(v.size_bytes or 0 for v in known) or 1
    best = frontier(known, _tail, lambda v: metric.gain(0.0, v.metric.value) if v.metric else -math.inf)
    spots = {v.name: _spot(v, metric, 26 * math.sqrt((v.size_bytes or 0) / largest)) for v in known}
    series = [Series(name, [spot], "dots") for name, spot in spots.items()]
    series.append(Series("frontier", [spots[v.name]._replace(radius=None) for v in best], "step"))
    axes = Axis("p99 latency, ms (log)", log=True), Axis(r.metric, lambda v: score(metric, v, 0))
    chart = plot(f"{r.metric} against p99 latency", series, *axes, height=320)
    left_out = [v.name for v in r.variants if v not in known]
    rows = [
        (v.name, scored(metric, v.metric), p99(v), megabytes(v.size_bytes), "yes" if v in best else "no") for v in known
    ]
    columns = ("variant", f"{r.metric} [95 %]", "p99 ms", "size MB", "on the frontier")
    lead = (
        f"{'Up' if metric.higher_is_better else 'Down'} is better, left is faster, the pale area is the file's size, "
        "lines are 95 % intervals. No other variant beats one on the frontier in both. Where p99 is unknown, its upper "
        "bound is drawn." + (f" Without a metric or a p99, so not drawn: {', '.join(left_out)}." if left_out else "")
    )
    return Section("Accuracy against latency", lead, [Figure("Accuracy, p99 and size", chart, Table(columns, rows))])


def _tail(v: Variant) -> float | None:
    return (v.latency_ms.p99 or v.latency_ms.p99_at_most) if v.latency_ms else None


def _spot(v: Variant, metric: Metric, radius: float) -> Point:
    assert v.metric
    assert v.latency_ms
    tail = _tail(v) or 0.0
    tip = f"{v.name}: {score(metric, v.metric.value)}, p99 {p99(v)} ms, {megabytes(v.size_bytes)} MB"
    return Point(tail, v.metric.value, v.latency_ms.p99_ci95, v.metric.ci95, tip, radius)


def latency(r: Report) -> Section | None:
    """Plot the distribution, and latency by length, batch, threads, load and round."""
    timed = {v.name: v.latency_ms for v in r.variants if v.latency_ms and v.latency_ms.quantiles}
    if not timed:
        return None
    spread = [Series(name, [Point(x, q) for x, q in zip(found.quantiles, QUANTILES, strict=True)], "step")
              for name, found in timed.items()]  # fmt: skip
    time = Axis("ms from text to answer (log)", log=True)
    fraction = Axis("fraction of answers", lambda v: percent(v, 0), reach=(0.0, 1.0))
    chart = plot("Fraction of answers within a time, by variant", spread, time, fraction)
    shown = [QUANTILES.index(q) for q in (0.05, 0.5, 0.9, 0.99, 1.0)]
    rows = [(name, *(ms(t.quantiles[i]) for i in shown), f"{t.samples:,}") for name, t in timed.items()]
    columns = ("variant", "p5", "p50", "p90", "p99 seen", "slowest", "samples")
    figures = [Figure("How latency spreads", chart, Table(columns, rows))]
    figures += _by_cell(r, "length", "The model alone by length", "tokens", "ms a run")
    figures += _by_cell(r, "batch", "Throughput by batch", "texts a batch", "texts a second", rate=True)
    figures += _by_cell(r, "threads", "By threads", "threads", "p50 ms")
    figures += _by_cell(r, "closed", "Closed loop: p50 by connections", "connections", "p50 ms")
    figures += _by_cell(r, "closed", "Closed loop: throughput", "connections", "requests a second", rate=True)
    figures += _by_cell(r, "open", "Open loop: p50 by rate", "requests a second", "p50 ms")
    if any(len(found.round_p50) > 1 for found in timed.values()):
        figures.append(_by_round({name: found.round_p50 for name, found in timed.items()}))
    lead = (
        "Batches have texts of similar length, and are timed from text to answers; by length the model alone is timed, "
        "on real texts cut to one length. In an open loop latency counts from the time when a request was due."
    )
    return Section("Latency", lead, figures)


def _by_cell(r: Report, scenario: str, caption: str, at: str, shown: str, rate: bool = False) -> list[Figure]:
    found = {v.name: [c for c in v.cells if c.scenario == scenario] for v in r.variants}
    found = {name: cells for name, cells in found.items() if cells and (not rate or cells[0].per_second)}
    if not found:
        return []

    def point(at: float, p50: float, ci: Interval | None, per_second: float) -> Point:
        return Point(at, per_second) if rate else Point(at, p50, None, ci)

    series = []
    for v in r.variants:
        points = [point(c.at, c.p50_ms, c.p50_ci95, c.per_second or 0.0) for c in found.get(v.name, [])]
        if scenario in ("batch", "threads") and points and (one := v.latency_ms):
            points.insert(0, point(1 if rate else r.bench.threads, one.p50, one.p50_ci95, 1e3 / one.p50))
        series.append(Series(v.name, points))
    chart = plot(caption, series, Axis(f"{at} (log)", log=True), Axis(f"{shown} (log)", log=True))
    rows = [
        (name, f"{c.at:g}", ms(c.p50_ms) + between(c.p50_ci95, c.p50_ms), ms(c.p99_ms), ms(c.per_second), str(c.errors))
        for name, cells in found.items()
        for c in cells
    ]
    return [Figure(caption, chart, Table(("variant", at, "p50 ms [95 %]", "p99 ms", "a second", "errors"), rows))]


def _by_round(rounds: dict[str, list[float]]) -> Figure:
    series = [Series(name, [Point(i + 1, 100 * (x / median(p50) - 1)) for i, x in enumerate(p50)])
              for name, p50 in rounds.items()]  # fmt: skip
    caption = "p50 of each round against the variant's median round"
    axes = Axis("round", "{:.0f}".format), Axis("difference, %", signed, reach=(-5.0, 5.0))
    rows = [(name, ", ".join(map(ms, p50))) for name, p50 in rounds.items()]
    return Figure(caption, plot(caption, series, *axes), Table(("variant", "p50 ms of each round"), rows))


# The source of each file or model.
_MADE_FROM = {
    "student-torch": "teacher-torch", "student-fp32": "student-torch", "student-fp32-fused": "student-fp32",
    "student-fp16": "student-fp32", "student-int8": "student-fp32", "student-int8-fused": "student-fp32-fused",
}  # fmt: skip


def steps(r: Report) -> Section | None:
    """Show the gain of each step: teacher → student → ONNX → fused, int8."""
    named = {v.name: v for v in r.variants if v.latency_ms and v.speedup_p50}
    chain = [(named[made], named[source]) for made, source in _MADE_FROM.items() if made in named and source in named]
    if len(chain) < 2 or chain[0][0].name != "student-torch":
        return None
    start = chain[0][1]
    drawn, rows = [_bar(start, None, "the start")], [_step(start, "the start", r)]
    for v, before in chain:
        gain = f"{_faster(_speed(v) / _speed(before))} than {before.name}"
        drawn.append(_bar(v, before, gain))
        rows.append(_step(v, gain, r))
    chart = bars("p50 latency after each step", drawn, Axis("p50 ms (log)", log=True))
    columns = ("step", "p50 ms", "gain", "size MB", f"{r.metric} [95 %]")
    lead = "Each bar is from the source of a model or file to itself; gains are paired by round."
    return Section("What each step gave", lead, [Figure("p50 latency, step by step", chart, Table(columns, rows))])


def _bar(v: Variant, before: Variant | None, gain: str) -> Bar:
    assert v.latency_ms
    base = before.latency_ms.p50 if before and before.latency_ms else None
    remark, style = f"{_p50(v)} ms, {gain}", 1 if before else 0
    return Bar(v.name, v.latency_ms.p50, v.latency_ms.p50_ci95, remark, base, style)


def _step(v: Variant, gain: str, r: Report) -> tuple[str, ...]:
    star = " ★" if v.name == r.recommended else ""
    return (f"{v.name}{star}", _p50(v), gain, megabytes(v.size_bytes), scored(metric_of(r), v.metric))


def _speed(v: Variant) -> float:
    return v.speedup_p50.value if v.speedup_p50 else math.nan


def _p50(v: Variant) -> str:
    return trimmed(v.latency_ms.p50, v.latency_ms.p50_ci95) if v.latency_ms else "–"


def _faster(ratio: float) -> str:
    return f"{times(ratio)} faster" if ratio >= 1 else f"{times(1 / ratio)} slower"
