"""Formats of numbers, and the table of variants, for the terminal, Markdown and HTML."""

import math

from kdexport.results import ENOUGH_ROUNDS, Check, Distillation, Interval, Latency, Report, Spread, Variant
from kdexport.results import Metric as Score
from kdexport.tasks import task_class
from kdexport.tasks.judging import AGREEMENT
from kdexport.tasks.metrics import Metric

# Further metrics that are numbers; all others are fractions or ratios.
_NUMBERS = ("bits per byte", "perplexity")
WRITING = ("first token ms", "tokens/s")


def read_by(report: Report) -> str:
    """Return the word for what is read: text, image or recording."""
    return {"text": "text", "image": "image", "audio": "recording"}[task_class(report.task).modality]


def metric_of(report: Report) -> Metric:
    """Return a report's main metric."""
    return Metric(report.metric, report.metric_higher_is_better, report.metric_kind)


def score(metric: Metric, value: float | None, digits: int = 1) -> str:
    """Format a value of a metric: in percent, or a number with two digits more."""
    if value is None or metric.kind != "number":
        return percent(value, digits)
    return f"{value:.{digits + 2}f}"


def tick(value: float, metric: Metric | None = None) -> str:
    """Format a value on an axis exactly, as axes have round values: 93.2 %, or 1.45 of a metric that is a number."""
    return f"{value:.4g}" if metric and metric.kind == "number" else f"{100 * value:.4g} %"


def scored(metric: Metric, found: Score | None) -> str:
    """Format a metric's value with its interval."""
    if found is None:
        return "–"
    if metric.kind == "number":
        return f"{score(metric, found.value)} [{found.ci95[0]:.3f}–{found.ci95[1]:.3f}]"
    return f"{percent(found.value)} [{100 * found.ci95[0]:.1f}–{100 * found.ci95[1]:.1f}]"


def gained(metric: Metric, gain: float, ci: Interval | None = None) -> str:
    """Format a gain, positive where better, with its interval: in points, of a number in its own unit."""
    digits = 3 if metric.kind == "number" else 1
    found = f" [{ci[0]:+.{digits}f}, {ci[1]:+.{digits}f}]" if ci else ""
    unit = metric.name if metric.kind == "number" else "points"
    return f"{gain:+.{digits}f} {unit}{found}".replace("-", "−")


def helped(metric: Metric, gain: float, ci: Interval | None = None) -> str:
    """Describe what distillation gained, as a verb phrase."""
    return f"{'gave' if gain > 0 else 'did not help here:'} {gained(metric, gain, ci)}"


def checked(check: Check) -> str:
    """Format the figure that was held against a limit, with its interval."""
    if check.found is None:
        return "not measurable"
    ci = f" [{check.ci95[0]:.3g}–{check.ci95[1]:.3g}]" if check.ci95 else ""
    return f"{check.found:.3g}{ci}"


def deviation(metric: Metric, spread: Spread) -> str:
    """Format the standard deviation over seeds: in points, of a number in its own unit."""
    return f"{spread.deviation:.3f}" if metric.kind == "number" else f"{100 * spread.deviation:.2f} points"


def keeps(report: Report, found: Distillation) -> str:
    """Describe how much of the teacher's quality the recommended file retains on test rows, as a verb phrase."""
    metric = metric_of(report)
    if metric.kind != "number" and metric.higher_is_better:
        if metric.name == AGREEMENT.name:  # no row has a label
            return f"gives the teacher's answer to {percent(found.retention)} of the test split"
        return f"keeps {percent(found.retention)} of the teacher's {metric.name} on the test split"
    best = report.variant(report.recommended).metric if report.recommended else None
    value = score(metric, (best or found.student).value)
    return f"has {value} {metric.name} on the test split, the teacher {score(metric, found.teacher.value)}"


def percent(share: float | None, digits: int = 1) -> str:
    """Format 0.9552 as 95.5 %."""
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def trimmed(value: float | None, ci: Interval | None = None, places: int = 3) -> str:
    """Format a positive number to the precision of its interval, or to three significant digits.

    The last digit is the first one of the interval's half width: 1.1326 [1.08, 1.19] is 1.13, [0.9, 1.4] is 1.1. There
    are at most so many decimal places.
    """
    if value is None:
        return "–"
    digits = 2 - _power(value)
    if ci and ci[1] > ci[0]:
        digits = max(min(digits, -_power((ci[1] - ci[0]) / 2)), -_power(value))  # but at least one
    return f"{value:.{max(0, min(digits, places))}f}"


def between(ci: Interval | None, value: float, places: int = 3) -> str:
    """Format an interval in brackets, with as many digits as its value."""
    if ci is None:
        return ""
    if ci[1] > 10 * max(ci[0], 1e-12):
        return " [not known]"  # of two rounds, too wide to be of use
    digits = len(trimmed(value, ci, places).partition(".")[2])
    return f" [{ci[0]:.{digits}f}–{ci[1]:.{digits}f}]"


def times(value: float) -> str:
    """Format a ratio with two or three significant digits."""
    return f"{value:.0f}×" if value >= 100 else f"{value:.1f}×" if value >= 2 else f"{value:.2f}×"


def signed(value: float) -> str:
    """Format a change on an axis: +5, −5, 0."""
    return f"{value:+g}".replace("-", "−") if value else "0"


def megabytes(size: float | None) -> str:
    """Format bytes as MB (10⁶), with one decimal."""
    return "–" if size is None else f"{size / 1e6:.1f}"


def starred(report: Report, variant: Variant) -> str:
    """Return a variant's name, with a star if it is the recommended one."""
    return f"{variant.name}{' ★' if variant.name == report.recommended else ''}"


def p50(variant: Variant) -> str:
    """Format the p50 to the precision of its interval."""
    found = variant.latency_ms
    return trimmed(found.p50, found.p50_ci95) if found else "–"


def p99(variant: Variant) -> str:
    """Format the p99, or its upper bound where samples are too few."""
    found = variant.latency_ms
    if found is None:
        return "–"
    if found.p99 is None:
        return f"≤ {trimmed(bound)}" if (bound := bound_of_p99(found)) else "–"
    return trimmed(found.p99, found.p99_ci95)


def bound_of_p99(found: Latency) -> float | None:
    """Return the upper bound of a p99, if there were rounds enough for one."""
    return found.p99_at_most if found.rounds >= ENOUGH_ROUNDS else None


def speedup(variant: Variant) -> str:
    """Format the speedup over the reference, with its interval."""
    found = variant.speedup_p50
    if found is None:
        return "–"
    if found.ci95 is None or found.ci95[0] == found.ci95[1]:
        return times(found.value)
    return f"{trimmed(found.value, found.ci95)}×{between(found.ci95, found.value)}"


def real_time(variant: Variant) -> str:
    """Format the real-time factor, with its interval."""
    found = variant.latency_ms
    if found is None or found.real_time_factor is None:
        return "–"
    value, ci = found.real_time_factor, found.real_time_factor_ci95
    return f"{trimmed(value, ci, 6)}{between(ci, value, 6)}"


def writing(found: Latency | None) -> tuple[str, str]:
    """Format the columns `WRITING`."""
    first, rate = (found.first_token_p50, found.tokens_per_second) if found else (None, None)
    return trimmed(first), "–" if rate is None else f"{rate:,.0f}"


def headers(report: Report) -> tuple[str, ...]:
    """Return the table's headers; agreement is with the teacher, or the reference of the bench."""
    return (
        "variant", f"{report.metric or 'accuracy'} [95 %]",
        f"agrees with {'teacher' if report.distillation else report.bench.reference}",
        *(WRITING if _generates(report) else ()),
        "p50 ms", "p99 ms", *(("real-time factor",) if _lasts(report) else ()), "faster [95 %]", "size MB",
    )  # fmt: skip


def table(report: Report) -> list[tuple[str, ...]]:
    """Return the cells of each variant, in the order of `headers`; the recommended one has a star."""
    return [_row(report, variant) for variant in report.variants]


def further(name: str, value: float | None) -> str:
    """Format a further metric."""
    return score(Metric(name, kind="number" if name in _NUMBERS else "ratio"), value)


def _generates(report: Report) -> bool:
    found = [v.latency_ms for v in report.variants if v.latency_ms and v.latency_ms.tokens_per_second]
    return any(latency.encoder_p50 is None for latency in found)


def _lasts(report: Report) -> bool:
    return any(v.latency_ms and v.latency_ms.real_time_factor for v in report.variants)


def _row(report: Report, variant: Variant) -> tuple[str, ...]:
    latency = variant.latency_ms
    return (
        starred(report, variant), scored(metric_of(report), variant.metric), percent(variant.agreement),
        *(writing(latency) if _generates(report) else ()),
        p50(variant), p99(variant), *((real_time(variant),) if _lasts(report) else ()), speedup(variant),
        megabytes(variant.size_bytes),
    )  # fmt: skip


def _power(value: float) -> int:
    return math.floor(math.log10(abs(value))) if value else 0
