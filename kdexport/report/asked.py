"""The section on a teacher that was asked: how much, what its answers cost and are worth, and the student's instead."""

from kdexport.errors import counted
from kdexport.report.charts import Axis, Point, Series, plot
from kdexport.report.page import Figure, Section, Table
from kdexport.report.table import metric_of, p50, p99, percent, scored, tick, times, trimmed
from kdexport.results import Asked, Report, Trust, Variant
from kdexport.tasks.metrics import Metric

_BY = {
    "letters": "by the letters of options",
    "words": "by the labels' own words",
    "scores": "by scores of each whole label",
    "samples": "by several answers to each",
}
_PAIRS = 8
_SHARE = Metric("agreement", kind="fraction")


def asked(r: Report) -> Section | None:
    """Show what was asked and answered, whether the answers can be trusted, and what the student saves."""
    found = r.asked
    if found is None:
        return None
    orders = f", in {found.orders} orders of the options" if found.orders > 1 else ""
    judged = [f"{counted(n, 'text')} of {split}" for split, n in found.texts.items() if split != "train" and n]
    lead = (
        f"{found.model} at {found.host} labelled {found.texts.get('train', 0):,} of "
        f"{counted(found.pool, 'text')} of train"
        f"{', and ' + ', '.join(judged) if judged else ''}; it was asked {_BY.get(found.by, found.by)}{orders}."
    )
    if found.guessed:
        lead += (
            f" A quick first student labelled {counted(found.guessed, 'more text', 'more texts')}, being sure of them."
        )
    lead += f" Asking ended: {found.stopped}." if found.stopped else ""
    tables = [Table(("asked", "found"), _calls(found))]
    tables += [Table(("can it be trusted?", "found"), rows)] if (rows := _trust(metric_of(r), found.trust)) else []
    tables += [_costs(r, found)]
    note = " ".join((*found.not_known, saves(r)))
    figures = [_curve(found)] if len(found.rounds) > 1 else []
    return Section("The teacher that was asked", lead, figures, tables, note, brief=True)


def saves(r: Report) -> str:
    """Say after how many answers of the student asking has paid for itself; empty where there are no prices."""
    spent, million = (r.asked.cost(), r.asked.cost_of_million()) if r.asked else (None, None)
    if not spent or not million:
        return ""
    own = _own_cost(r) or 0.0
    said = f"All answers cost {trimmed(spent)}, in the currency of the prices"
    if own >= million:
        return f"{said}; the student's answers are no cheaper."
    free = "" if own else ", its own time not counted, as bench.price_per_hour is absent"
    return f"{said}: as much as the student saves in {counted(round(1e6 * spent / (million - own)), 'answer')}{free}."


def _calls(found: Asked) -> list[tuple[str, str]]:
    rows = [
        ("calls sent", f"{found.sent:,}"),
        ("answers of an earlier run", f"{found.cached:,}"),
        ("calls repeated after an error", f"{found.retries:,}"),
        ("calls without an answer", f"{found.failed:,}"),
        ("texts that it declined", f"{found.refused:,}"),
        ("texts whose answer is no label", f"{found.unparsable:,}"),
        *([("texts shortened to what it reads", f"{found.shortened:,}")] if found.shortened else []),
        ("tokens in, out", f"{found.tokens_in:,}, {found.tokens_out:,}"),
    ]
    if (cost := found.cost()) is not None and found.price:
        rows.append(("cost", f"{trimmed(cost)}, at {found.price[0]:g} and {found.price[1]:g} a million tokens"))
    return [*rows, ("the server", found.abilities)] if found.abilities else rows


def _trust(metric: Metric, found: Trust) -> list[tuple[str, str]]:
    rows = []
    if found.accuracy:
        rows.append((f"{metric.name} on {counted(found.accuracy.n, 'labelled row')}", scored(metric, found.accuracy)))
    if found.by_words:
        rows.append(("the same rows, asked by the labels' own words", scored(metric, found.by_words)))
    if found.temperature is not None:
        rows.append(("temperature, fitted on these rows", trimmed(found.temperature)))
    if found.ece_before is not None and found.ece_after is not None:
        rows.append(("calibration error, before and after", f"{found.ece_before:.3f}, {found.ece_after:.3f}"))
    if found.mass is not None:
        rows.append(("its probability that is on labels", percent(found.mass)))
    if same := found.same_in_another_order:
        rows.append((f"same answer in another order, of {counted(same.n, 'row')}", scored(_SHARE, same)))
    if found.position:
        rows.append(("place", found.position))
    pairs = [f"{one.first} and {one.second} ({counted(one.rows, 'row')})" for one in found.alike]
    if pairs:
        more = f" and {len(pairs) - _PAIRS} more pairs" if len(pairs) > _PAIRS else ""
        rows.append(("do these labels mean the same?", "; ".join(pairs[:_PAIRS]) + more))
    return rows


def _costs(r: Report, found: Asked) -> Table:
    price, rows = found.cost_of_million(), []
    each = (found.sent + found.cached) / max(1, sum(found.texts.values()))
    per = f" ({each:.2g} calls a text; times of one)" if each > 1.05 else ""
    rows.append((f"{found.model}{per}", trimmed(price), trimmed(found.p50_ms), trimmed(found.p99_ms), "–"))
    best = _best(r)
    if best and best.latency_ms:
        faster = times(found.p50_ms / best.latency_ms.p50) if found.p50_ms else "–"
        rows.append((best.name, trimmed(_own_cost(r)), p50(best), p99(best), faster))
    return Table(("answers of", "cost of a million", "p50 ms", "p99 ms", "faster"), rows)


def _best(r: Report) -> Variant | None:
    return r.variant(r.recommended) if r.recommended else None


def _own_cost(r: Report) -> float | None:
    """Return the price of a million of the student's answers, one by one, with no idle time."""
    best = _best(r)
    if not best or not best.latency_ms or not r.bench.price_per_hour:
        return None
    return best.latency_ms.p50 / 3.6 * r.bench.price_per_hour * r.bench.threads


def _curve(found: Asked) -> Figure:
    caption = "A quick first student's agreement with the teacher, by texts asked"
    chosen = [Point(one.chosen + one.random, one.agreement) for one in found.rounds]
    alone = {one.random: one.random_agreement for one in found.rounds if one.random_agreement is not None}
    series = [Series("chosen texts and random ones", chosen)]
    series += [Series("random ones alone", [Point(n, value) for n, value in alone.items()])] if alone else []
    chart = plot(caption, series, Axis("texts of train"), Axis("agreement, validation", tick))
    rows = [
        (f"{one.chosen + one.random:,}", f"{one.chosen:,}", f"{one.random:,}", percent(one.agreement),
         percent(one.random_agreement))
        for one in found.rounds
    ]  # fmt: skip
    return Figure(caption, chart, Table(("texts", "chosen", "random", "agreement", "on the random ones alone"), rows))
