"""The table of variants as text cells, the same in the terminal, in Markdown and in HTML."""

from __future__ import annotations

from kdexport.results import Report, Variant

HEADERS = (
    "variant",
    "accuracy [95 %]",
    "agrees with teacher",
    "p50 ms",
    "p99 ms",
    "faster [95 %]",
    "size MB",
)


def percent(share: float | None, digits: int = 1) -> str:
    """0.9552 → 95.5 %."""
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def ms(value: float | None) -> str:
    """Milliseconds with three significant digits."""
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def times(value: float) -> str:
    """A ratio with two or three significant digits."""
    return f"{value:.0f}×" if value >= 100 else f"{value:.1f}×"


def points(value: float | None) -> str:
    """A signed difference in percentage points."""
    return "–" if value is None else f"{value:+.1f} points".replace("-", "−")


def table(report: Report) -> list[tuple[str, ...]]:
    """One tuple of cells a variant, in the order of `HEADERS`; the recommended one has a star."""
    return [_row(variant, variant.name == report.recommended) for variant in report.variants]


def _row(variant: Variant, recommended: bool) -> tuple[str, ...]:
    low, high = variant.metric.ci95
    latency, speedup = variant.latency_ms, variant.speedup_p50
    return (
        f"{variant.name}{' ★' if recommended else ''}",
        f"{percent(variant.metric.value)} [{100 * low:.1f}–{100 * high:.1f}]",
        percent(variant.agreement),
        ms(latency.p50 if latency else None),
        ms(latency.p99 if latency else None),
        f"{times(speedup.value)} [{speedup.ci95[0]:.1f}–{speedup.ci95[1]:.1f}]" if speedup else "–",
        f"{variant.size_bytes / 1e6:.1f}",
    )
