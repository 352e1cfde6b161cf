"""Sections on speed: variants, budget, trade-off, latency, steps."""

from __future__ import annotations

import math

from kdexport.report.charts import Axis, Bar, Point, Series, bars, plot
from kdexport.report.page import Figure, Section, Table
from kdexport.report.table import accuracy, between, headers, megabytes, ms, p99, percent, signed, table, times
from kdexport.results import QUANTILES, Report, Variant


def variants(r: Report) -> Section:
    """The table of variants, and what a process of each costs."""
    how, tokens = r.bench, r.bench.tokens
    place = next((i for i, v in enumerate(r.variants) if v.name == r.recommended), None)
    rows = [
        (*cells, v.speedup_p50.verdict if v.speedup_p50 and v.name != how.reference else "–")
        for cells, v in zip(table(r), r.variants, strict=True)
    ]
    lengths = f" of {tokens['p5']} to {tokens['p95']} tokens (5th to 95th percentile)" if tokens else ""
    note = (
        f"Latency is {how.clock}, at batch 1 on {how.threads} thread(s), for {how.rows} real test texts{lengths} in "
        f"turn, in {how.rounds} shuffled rounds, each variant in a process of its own; waiting threads "
        f"{'spin' if how.spinning else 'sleep'}, garbage is not collected meanwhile. Intervals are over rounds, "
        f"ratios to {how.reference} are paired by round. p99 stands from 1,000 samples on; before that a bound of it, "
        "or nothing. Digits that the interval does not carry are left out."
    )
    tables = [Table((*headers(r), "verdict"), rows, place)]
    if costs := [_costs(v) for v in r.variants if v.footprint]:
        columns = ("process of", "tokenise ms", "run ms", "p90 ms", "cold start ms", "RSS MB", "peak MB", "cores used")
        tables.append(Table(columns, costs))
    lead = "All measured in one run, in turns; brackets are 95 % intervals. How is said below the tables."
    return Section("Variants", lead, tables=tables, note=note + _control(r), brief=True)


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
    """Each limit, what was found, and whether the interval leaves a doubt."""
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
    """Accuracy against p99, size as area."""
    known = [v for v in r.variants if v.metric and v.latency_ms and _tail(v)]
    if len(known) < 2:
        return None
    largest = max(v.size_bytes or 0 for v in known) or 1
    series = [
        Series(v.name, [_spot(v, 26 * math.sqrt((v.size_bytes or 0) / largest))], "dots") for v in known
    ]  # fmt: skip
    front = [_spot(v, None) for v in _frontier(known)]
    chart = plot(
        f"{r.metric} against p99 latency",
        [*series, Series("frontier", front, "step")],
        Axis("p99 latency, ms (log)", log=True),
        Axis(r.metric, lambda v: percent(v, 0)),
        height=320,
    )
    best = {v.name for v in _frontier(known)}
    rows = [(v.name, accuracy(v), p99(v), megabytes(v.size_bytes), "yes" if v.name in best else "no") for v in known]
    columns = ("variant", f"{r.metric} [95 %]", "p99 ms", "size MB", "on the frontier")
    lead = (
        "Up is better, left is faster, the pale area is the file's size; lines are 95 % intervals. Nothing on the "
        "frontier is beaten in both. Where a p99 could not be taken, its upper bound stands."
    )
    return Section("Accuracy against latency", lead, [Figure("Accuracy, p99 and size", chart, Table(columns, rows))])


def _tail(v: Variant) -> float | None:
    return (v.latency_ms.p99 or v.latency_ms.p99_at_most) if v.latency_ms else None


def _spot(v: Variant, radius: float | None) -> Point:
    assert v.metric
    assert v.latency_ms
    tail = _tail(v) or 0.0
    tip = f"{v.name}: {percent(v.metric.value)}, p99 {p99(v)} ms, {megabytes(v.size_bytes)} MB"
    return Point(tail, v.metric.value, v.latency_ms.p99_ci95, v.metric.ci95, tip, radius)


def _frontier(known: list[Variant]) -> list[Variant]:
    found: list[Variant] = []
    for v in sorted(known, key=lambda v: (_tail(v) or 0, -(v.metric.value if v.metric else 0))):
        if v.metric and (not found or v.metric.value > found[-1].metric.value):  # type: ignore[union-attr]
            found.append(v)
    return found


def latency(r: Report) -> Section | None:
    """The distribution, by length, by batch, by threads or load, and by round."""
    timed = [v for v in r.variants if v.latency_ms and v.latency_ms.quantiles]
    if not timed:
        return None
    spread = [Series(v.name, [Point(x, q) for x, q in zip(v.latency_ms.quantiles, QUANTILES, strict=True)], "step")
              for v in timed if v.latency_ms]  # fmt: skip
    chart = plot(
        "Share of answers given within a time, by variant",
        spread,
        Axis("ms from text to answer (log)", log=True),
        Axis("share of answers", lambda v: percent(v, 0), reach=(0.0, 1.0)),
    )
    rows = [
        (v.name, *(ms(v.latency_ms.quantiles[QUANTILES.index(q)]) for q in (0.05, 0.5, 0.9, 0.99, 1.0)),
         f"{v.latency_ms.samples:,}")
        for v in timed if v.latency_ms
    ]  # fmt: skip
    columns = ("variant", "p5", "p50", "p90", "p99 seen", "slowest", "samples")
    figures = [Figure("How latency spreads", chart, Table(columns, rows))]
    figures += _by_cell(r, "length", "The model's run by length", "tokens", "ms a run")
    figures += _by_cell(r, "batch", "Throughput by batch", "texts a batch", "texts a second", rate=True)
    figures += _by_cell(r, "threads", "By threads", "threads", "p50 ms")
    figures += _by_cell(r, "closed", "Closed loop: p50 by connections", "connections", "p50 ms")
    figures += _by_cell(r, "closed", "Closed loop: throughput", "connections", "requests a second", rate=True)
    figures += _by_cell(r, "open", "Open loop: p50 by rate", "requests a second", "p50 ms")
    if any(len(v.latency_ms.round_p50) > 1 for v in timed if v.latency_ms):
        figures.append(_by_round(timed))
    lead = (
        "Batches are of texts of similar length, as offline work sorts them, from text to answers; runs by length are "
        "the model alone, on real texts cut to one length. In an open loop latency counts from when a request was due."
    )
    return Section("Latency", lead, figures)


def _by_cell(r: Report, scenario: str, caption: str, at: str, shown: str, rate: bool = False) -> list[Figure]:
    found = {v.name: [c for c in v.cells if c.scenario == scenario] for v in r.variants}
    found = {name: cells for name, cells in found.items() if cells and (not rate or cells[0].per_second)}
    if not found:
        return []
    series = []
    for v in r.variants:
        cells = found.get(v.name, [])
        spots = [Point(c.at, c.per_second or 0.0) if rate else Point(c.at, c.p50_ms, None, c.p50_ci95) for c in cells]
        if scenario in ("batch", "threads") and v.latency_ms and spots:
            single = v.latency_ms
            spots.insert(
                0, Point(1, 1e3 / single.p50) if rate else Point(r.bench.threads, single.p50, None, single.p50_ci95)
            )
        series.append(Series(v.name, spots))
    chart = plot(caption, series, Axis(f"{at} (log)", log=True), Axis(f"{shown} (log)", log=True))
    rows = [
        (name, f"{c.at:g}", ms(c.p50_ms) + between(c.p50_ci95, c.p50_ms), ms(c.p99_ms), ms(c.per_second), str(c.errors))
        for name, cells in found.items()
        for c in cells
    ]
    return [Figure(caption, chart, Table(("variant", at, "p50 ms [95 %]", "p99 ms", "a second", "errors"), rows))]


def _by_round(timed: list[Variant]) -> Figure:
    rounds = {v.name: v.latency_ms.round_p50 for v in timed if v.latency_ms}
    series = [
        Series(name, [Point(i + 1, 100 * (x / sorted(found)[len(found) // 2] - 1)) for i, x in enumerate(found)])
        for name, found in rounds.items()
    ]
    caption = "Round by round: p50 against each variant's own middle"
    axis = Axis("difference, %", signed, reach=(-5.0, 5.0))
    chart = plot(caption, series, Axis("round", "{:.0f}".format), axis)
    return Figure(
        caption,
        chart,
        Table(("variant", "p50 ms of each round"), [(n, ", ".join(map(ms, x))) for n, x in rounds.items()]),
    )


def steps(r: Report) -> Section | None:
    """Teacher → student → ONNX → fused → int8: what each step gave."""
    named = {v.name: v for v in r.variants if v.latency_ms}
    chain = [named[n] for n in ("teacher-torch", "student-torch", "student-fp32", "student-fp32-fused") if n in named]
    best = named.get(r.recommended or "")
    if best and best not in chain:
        chain.append(best)
    if len(chain) < 3:
        return None
    drawn: list[Bar] = []
    rows = []
    for before, v in zip([None, *chain[:-1]], chain, strict=True):
        now, then = v.latency_ms, before.latency_ms if before else None
        assert now
        gain = f"{_faster(then.p50 / now.p50)} than {before.name}" if then and before else "the start"
        drawn.append(
            Bar(
                v.name,
                now.p50,
                now.p50_ci95,
                f"{ms(now.p50)} ms, {gain}",
                then.p50 if then else None,
                min(len(drawn), 1),
            )
        )
        rows.append((v.name, ms(now.p50), gain, megabytes(v.size_bytes), accuracy(v)))
    chart = bars("p50 latency after each step", drawn, Axis("p50 ms (log)", log=True))
    columns = ("step", "p50 ms", "gain", "size MB", f"{r.metric} [95 %]")
    lead = "Each bar runs from the step before to this one."
    return Section("What each step gave", lead, [Figure("p50 latency, step by step", chart, Table(columns, rows))])


def _faster(ratio: float) -> str:
    return f"{times(ratio)} faster" if ratio >= 1 else f"{times(1 / ratio)} slower"
