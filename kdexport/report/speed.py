"""Sections on speed: variants, budget, trade-off, latency, steps."""

import math
from statistics import median

from kdexport.errors import counted
from kdexport.report.charts import Axis, Bar, Point, Series, bars, frontier, plot
from kdexport.report.page import Figure, Section, Table
from kdexport.report.table import (
    WRITING,
    between,
    bound_of_p99,
    checked,
    headers,
    megabytes,
    metric_of,
    p50,
    p99,
    read_by,
    score,
    scored,
    signed,
    starred,
    table,
    tick,
    times,
    trimmed,
    writing,
)  # fmt: skip
from kdexport.results import QUANTILES, Report, machine_name


def variants(r: Report) -> Section:
    """Show the table of variants, and the costs of a process of each."""
    how = r.bench
    place = next((i for i, v in enumerate(r.variants) if v.name == r.recommended), None)
    rows = [
        (*cells, v.speedup_p50.verdict if v.speedup_p50 and v.name != how.reference else "–")
        for cells, v in zip(table(r), r.variants, strict=True)
    ]
    note = (
        f"Latency is {how.clock}, at batch 1 on {counted(how.threads, 'thread')}, for {how.rows} real {_rows(r)} in "
        f"turn, in {how.rounds} shuffled rounds, each variant in its own process; waiting threads "
        f"{'spin' if how.spinning else 'sleep'}, garbage collection is off. Intervals are over rounds, from three on; "
        f"ratios to {how.reference} are paired by round. p99 needs 1,000 samples; with fewer, an upper bound "
        "is shown, or none. Digits below the precision of the interval are omitted."
    )
    if how.durations:
        note += " The real-time factor is the seconds of computing for a second of recording."
    tables = [Table((*headers(r), "verdict"), rows, place)]
    costs = [
        (v.name, trimmed(time.tokenize_p50), trimmed(time.model_p50), trimmed(time.p90), f"{found.cold_ms:.0f}",
         f"{found.rss_mb:.0f}", f"{found.peak_rss_mb:.0f}", f"{found.cores_used:.2f}")
        for v in r.variants if (found := v.footprint) and (time := v.latency_ms)
    ]  # fmt: skip
    if costs:
        columns = ("process of", "tokenise ms", "run ms", "p90 ms", "cold start ms", "RSS MB", "peak MB", "cores used")
        tables.append(Table(columns, costs))
    parts = [
        (v.name, trimmed(time.encoder_p50), trimmed(time.decoder_p50), *writing(time))
        for v in r.variants if (time := v.latency_ms) and time.encoder_p50
    ]  # fmt: skip
    if parts:
        tables.append(Table(("run of", "encoder ms", "decoder ms", *WRITING), parts))
    lead = f"All measured in one run, in turns, on {machine_name(r.environment)}; brackets are 95 % intervals."
    return Section("Variants", lead, tables=tables, note=note + _control(r), brief=True)


def _rows(r: Report) -> str:
    name = f"{read_by(r)}s"
    if lasted := r.bench.durations:
        return f"{name} of {lasted['p5']:.3g} to {lasted['p95']:.3g} s (5th to 95th percentile)"
    if not (found := r.bench.tokens):
        return name
    cut = f", {found['cut_percent']} % fill all {found['limit']} that are read" if found.get("cut_percent") else ""
    return f"{name} of {found['p5']} to {found['p95']} tokens (5th to 95th percentile{cut})"


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
        (c.name, f"{c.limit:g}", checked(c),
         ("kept" if c.met else "not kept") + ("" if c.sure else ", but not for sure"))
        for c in r.budget.checks
    ]  # fmt: skip
    title = f"Budget: {'kept' if r.budget.met else 'not kept'}"
    lead = "A verdict is sure where the whole 95 % interval is on one side of the limit."
    if any(c.name == "retention" for c in r.budget.checks):
        lead += " That of the retention is of the difference from the teacher on the same rows, paired."
    return Section(title, lead, tables=[Table(("limit", "asked", "found [95 %]", "verdict"), rows)], brief=True)


def trade_off(r: Report) -> Section | None:
    """Plot the metric against p99, with size as area."""
    known = [
        (v, v.metric, time, tail)
        for v in r.variants
        if v.metric and (time := v.latency_ms) and (tail := time.p99 or bound_of_p99(time))
    ]
    if len(known) < 2:
        return None
    metric, largest = metric_of(r), max(v.size_bytes or 0 for v, *_ in known) or 1
    best = [v.name for v, *_ in frontier(known, lambda one: one[3], lambda one: metric.gain(0.0, one[1].value))]
    spots, rows = {}, []
    for v, found, time, tail in known:
        tip = f"{v.name}: {score(metric, found.value)}, p99 {p99(v)} ms, {megabytes(v.size_bytes)} MB"
        radius = 26 * math.sqrt((v.size_bytes or 0) / largest)
        spots[v.name] = Point(tail, found.value, time.p99_ci95, found.ci95, tip, radius)
        on_it = "yes" if v.name in best else "no"
        rows.append((v.name, scored(metric, found), p99(v), megabytes(v.size_bytes), on_it))
    series = [Series(name, [spot], "dots") for name, spot in spots.items()]
    series.append(Series("frontier", [spots[name] for name in best], "step"))
    bounds = tuple(bound for _, found, *_ in known for bound in found.ci95)
    axes = Axis("p99 latency, ms (log)", log=True), Axis(r.metric, lambda v: tick(v, metric), reach=bounds)
    chart = plot(f"{r.metric} against p99 latency", series, *axes, height=320)
    columns = ("variant", f"{r.metric} [95 %]", "p99 ms", "size MB", "on the frontier")
    left_out = [v.name for v in r.variants if v.name not in spots]
    lead = (
        f"{'Up' if metric.higher_is_better else 'Down'} is better, left is faster, the pale area is the file's size, "
        "lines are 95 % intervals. No other variant beats one on the frontier in both. Where p99 is unknown, its upper "
        "bound is drawn." + (f" Without a metric or a p99, so not drawn: {', '.join(left_out)}." if left_out else "")
    )
    return Section("Accuracy against latency", lead, [Figure("Accuracy, p99 and size", chart, Table(columns, rows))])


def latency(r: Report) -> Section | None:
    """Plot the distribution, and latency by length, batch, threads, load and round."""
    timed = {v.name: v.latency_ms for v in r.variants if v.latency_ms and v.latency_ms.quantiles}
    if not timed:
        return None
    spread = [Series(name, [Point(x, q) for x, q in zip(found.quantiles, QUANTILES, strict=True)], "step")
              for name, found in timed.items()]  # fmt: skip
    time, many = Axis(f"ms from {read_by(r)} to answer (log)", log=True), f"{read_by(r)}s"
    fraction = Axis("fraction of answers", tick, reach=(0.0, 1.0))
    chart = plot("Fraction of answers within a time, by variant", spread, time, fraction)
    shown = [QUANTILES.index(q) for q in (0.05, 0.5, 0.9, 0.99, 1.0)]
    rows = [(name, *(trimmed(t.quantiles[i]) for i in shown), f"{t.samples:,}") for name, t in timed.items()]
    columns = ("variant", "p5", "p50", "p90", "p99 seen", "slowest", "samples")
    figures = [Figure("How latency spreads", chart, Table(columns, rows))]
    figures += _by_cell(r, "length", "The model alone by length", "tokens", "ms a run")
    figures += _by_cell(r, "duration", "By duration of the recording", "seconds, up to", "p50 ms")
    figures += _by_cell(
        r, "batch", "Throughput by batch", f"{read_by(r)}s a batch", f"{read_by(r)}s a second", rate=True
    )
    figures += _by_cell(r, "threads", "By threads", "threads", "p50 ms")
    figures += _by_cell(r, "closed", "Closed loop: p50 by connections", "connections", "p50 ms")
    figures += _by_cell(r, "closed", "Closed loop: throughput", "connections", "requests a second", rate=True)
    figures += _by_cell(r, "open", "Open loop: p50 by rate", "requests a second", "p50 ms")
    if any(len(found.round_p50) > 1 for found in timed.values()):
        figures.append(_by_round({name: found.round_p50 for name, found in timed.items()}))
    lead = (
        f"Batches have {many} of similar length, and are timed from these to answers; by length the model alone is "
        f"timed, on real {many} cut to one length. In an open loop latency counts from the time when a request was due."
    )
    if any(c.scenario == "duration" for v in r.variants for c in v.cells):
        lead += " By duration, the rows of the table above are taken in quarters, each shown at its longest recording."
    return Section("Latency", lead, figures)


def _by_cell(r: Report, scenario: str, caption: str, at: str, shown: str, rate: bool = False) -> list[Figure]:
    found = {v.name: [c for c in v.cells if c.scenario == scenario] for v in r.variants}
    found = {name: cells for name, cells in found.items() if cells and (not rate or cells[0].per_second)}
    if not found:
        return []
    series = []
    for v in r.variants:
        cells, single = found.get(v.name, []), v.latency_ms
        points = [Point(c.at, c.per_second or 0.0) if rate else Point(c.at, c.p50_ms, None, c.p50_ci95) for c in cells]
        if points and single and scenario == "batch":
            points.insert(0, Point(1, 1e3 / single.p50))
        if points and single and scenario == "threads":
            points.insert(0, Point(r.bench.threads, single.p50, None, single.p50_ci95))
        series.append(Series(v.name, points))
    across = Axis(at) if scenario == "duration" else Axis(f"{at} (log)", log=True)
    chart = plot(caption, series, across, Axis(f"{shown} (log)", log=True))
    rows = [
        (name, f"{c.at:g}", trimmed(c.p50_ms) + between(c.p50_ci95, c.p50_ms), trimmed(c.p99_ms),
         trimmed(c.per_second), str(c.errors))
        for name, cells in found.items() for c in cells
    ]  # fmt: skip
    return [Figure(caption, chart, Table(("variant", at, "p50 ms [95 %]", "p99 ms", "a second", "errors"), rows))]


def _by_round(rounds: dict[str, list[float]]) -> Figure:
    series = [Series(name, [Point(i + 1, 100 * (x / median(p50) - 1)) for i, x in enumerate(p50)])
              for name, p50 in rounds.items()]  # fmt: skip
    caption = "p50 of each round against the variant's median round"
    axes = Axis("round", least=1.0), Axis("difference, %", signed, reach=(-5.0, 5.0))
    rows = [(name, ", ".join(map(trimmed, p50))) for name, p50 in rounds.items()]
    return Figure(caption, plot(caption, series, *axes), Table(("variant", "p50 ms of each round"), rows))


# The source of each file or model.
_MADE_FROM = {
    "student-torch": "teacher-torch", "student-fp32": "student-torch", "student-fp32-fused": "student-fp32",
    "student-fp16": "student-fp32", "student-int8": "student-fp32", "student-int8-fused": "student-fp32-fused",
    "student-fp32-dynamo": "student-fp32", "student-int8-dynamo": "student-fp32-dynamo",
}  # fmt: skip


def steps(r: Report) -> Section | None:
    """Show the gain of each step: teacher → student → ONNX → fused, int8."""
    known = {v.name: (v, v.latency_ms, v.speedup_p50) for v in r.variants if v.latency_ms and v.speedup_p50}
    made = [name for name, source in _MADE_FROM.items() if name in known and source in known]
    if len(made) < 2 or made[0] != "student-torch":
        return None
    drawn, rows = [], []
    for name in ("teacher-torch", *made):
        v, latency, speedup = known[name]
        gain, base, style = "the start", None, 0
        if source := _MADE_FROM.get(name):
            _, before, slower = known[source]
            gain, base, style = f"{_faster(speedup.value / slower.value)} than {source}", before.p50, 1
        drawn.append(Bar(name, latency.p50, latency.p50_ci95, f"{p50(v)} ms, {gain}", base, style))
        rows.append((starred(r, v), p50(v), gain, megabytes(v.size_bytes), scored(metric_of(r), v.metric)))
    chart = bars("p50 latency after each step", drawn, Axis("p50 ms (log)", log=True))
    columns = ("step", "p50 ms", "gain", "size MB", f"{r.metric} [95 %]")
    lead = "Each bar is from the source of a model or file to itself; gains are paired by round."
    return Section("What each step gave", lead, [Figure("p50 latency, step by step", chart, Table(columns, rows))])


def _faster(ratio: float) -> str:
    if times(max(ratio, 1 / ratio)) == times(1):
        return "no faster"
    return f"{times(ratio)} faster" if ratio >= 1 else f"{times(1 / ratio)} slower"
