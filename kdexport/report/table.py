"""How numbers are written, and the table of variants: the same in the terminal, in Markdown and in HTML."""

from __future__ import annotations

import math

from kdexport.results import Interval, Report, Spread, Variant
from kdexport.results import Metric as Score
from kdexport.tasks.metrics import Metric

# Metrics beside the one that counts that are numbers; all others are shares.
_NUMBERS = ("bits per byte", "perplexity")


def metric_of(report: Report) -> Metric:
    """The metric that a report counts by."""
    return Metric(report.metric, report.metric_higher_is_better, report.metric_kind)


def score(metric: Metric, value: float | None, digits: int = 1) -> str:
    """A value of a metric: a share in percent, a number with two digits more than that."""
    if value is None or metric.kind != "number":
        return percent(value, digits)
    return f"{value:.{digits + 2}f}"


def scored(metric: Metric, found: Score | None) -> str:
    """A metric's value with its interval."""
    if found is None:
        return "–"
    if metric.kind == "number":
        return f"{score(metric, found.value)} [{found.ci95[0]:.3f}–{found.ci95[1]:.3f}]"
    return f"{percent(found.value)} [{100 * found.ci95[0]:.1f}–{100 * found.ci95[1]:.1f}]"


def gained(metric: Metric, gain: float | None) -> str:
    """A gain, positive where it is better: of shares in points, of numbers in their own unit."""
    if gain is None or metric.kind != "number":
        return points(gain)
    return f"a {'loss' if gain < 0 else 'gain'} of {abs(gain):.3f} {metric.name}"


def deviation(metric: Metric, spread: Spread) -> str:
    """The standard deviation over seeds: of shares in points, of numbers in their own unit."""
    return f"{spread.deviation:.3f}" if metric.kind == "number" else f"{100 * spread.deviation:.2f} points"


def keeps(metric: Metric, retention: float, value: float | None, teacher: float | None) -> str:
    """What is left of the teacher's quality, as a verb phrase."""
    if metric.kind == "number":
        return f"has {score(metric, value)} {metric.name}, the teacher {score(metric, teacher)}"
    return f"keeps {percent(retention)} of the teacher's {metric.name}"


def percent(share: float | None, digits: int = 1) -> str:
    """0.9552 → 95.5 %."""
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def trimmed(value: float | None, ci: Interval | None = None) -> str:
    """A positive number with no more digits than its interval carries; three significant ones where there is none.

    The last digit written is the first one of the interval's half width, so 1.1326 [1.08, 1.19] is 1.13 and
    1.1326 [0.9, 1.4] is 1.1.
    """
    if value is None:
        return "–"
    digits = 2 - _power(value)
    if ci and ci[1] > ci[0]:
        digits = max(min(digits, -_power((ci[1] - ci[0]) / 2)), -_power(value))  # but at least one
    return f"{value:.{max(0, min(digits, 3))}f}"


def ms(value: float | None) -> str:
    """Milliseconds with three significant digits."""
    return trimmed(value)


def between(ci: Interval | None, value: float, unit: str = "") -> str:
    """An interval in brackets, with the digits of its value."""
    if ci is None:
        return ""
    if ci[1] > 10 * max(ci[0], 1e-12):
        return " [not known]"  # two rounds say next to nothing
    digits = len(trimmed(value, ci).partition(".")[2])
    return f" [{ci[0]:.{digits}f}–{ci[1]:.{digits}f}{unit}]"


def times(value: float) -> str:
    """A ratio with two or three significant digits."""
    return f"{value:.0f}×" if value >= 100 else f"{value:.1f}×" if value >= 2 else f"{value:.2f}×"


def points(value: float | None) -> str:
    """A signed difference in percentage points."""
    return "–" if value is None else f"{value:+.1f} points".replace("-", "−")


def signed(value: float) -> str:
    """A change on an axis: +5, −5, 0."""
    return f"{value:+g}".replace("-", "−") if value else "0"


def megabytes(size: float | None) -> str:
    """Bytes as MB (10⁶), with one digit behind the point."""
    return "–" if size is None else f"{size / 1e6:.1f}"


def p99(variant: Variant) -> str:
    """The p99, or a bound where there were too few samples for it."""
    found = variant.latency_ms
    if found is None:
        return "–"
    if found.p99 is None:
        return f"≤ {ms(found.p99_at_most)}" if found.p99_at_most else "–"
    return trimmed(found.p99, found.p99_ci95)


def speedup(variant: Variant) -> str:
    """How many times faster than the reference, with its interval."""
    found = variant.speedup_p50
    if found is None:
        return "–"
    if found.ci95 is None or found.ci95[0] == found.ci95[1]:
        return times(found.value)
    return f"{trimmed(found.value, found.ci95)}×{between(found.ci95, found.value)}"


def headers(report: Report) -> tuple[str, ...]:
    """The table's headers; what variants agree with is the teacher, or what they were measured against."""
    return (
        "variant",
        f"{report.metric or 'accuracy'} [95 %]",
        f"agrees with {'teacher' if report.distillation else report.bench.reference}",
        *(("first token ms", "tokens/s") if _writes(report) else ()),
        "p50 ms",
        "p99 ms",
        "faster [95 %]",
        "size MB",
    )


def table(report: Report) -> list[tuple[str, ...]]:
    """One tuple of cells a variant, in the order of `headers`; the recommended one has a star."""
    return [_row(report, variant) for variant in report.variants]


def further(name: str, value: float | None) -> str:
    """A metric beside the one that counts."""
    return score(Metric(name, kind="number" if name in _NUMBERS else "ratio"), value)


def _writes(report: Report) -> bool:
    return any(v.latency_ms and v.latency_ms.tokens_per_second for v in report.variants)


def _row(report: Report, variant: Variant) -> tuple[str, ...]:
    latency = variant.latency_ms
    first, rate = (latency.first_token_p50, latency.tokens_per_second) if latency else (None, None)
    return (
        f"{variant.name}{' ★' if variant.name == report.recommended else ''}",
        scored(metric_of(report), variant.metric),
        percent(variant.agreement),
        *((ms(first), "–" if rate is None else f"{rate:,.0f}") if _writes(report) else ()),
        trimmed(latency.p50, latency.p50_ci95) if latency else "–",
        p99(variant),
        speedup(variant),
        megabytes(variant.size_bytes),
    )


def _power(value: float) -> int:
    return math.floor(math.log10(abs(value))) if value else 0
