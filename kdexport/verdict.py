"""Decisions, made from what was measured: which files ship, which one is recommended, is the budget kept."""

from __future__ import annotations

from typing import NamedTuple

from kdexport import spec
from kdexport.bench.engine import Measured, ratio
from kdexport.export import Candidate
from kdexport.results import Check, Latency, Quality, Verdict


class Choice(NamedTuple):
    """The candidates that ship, by precision; the recommended one, and why."""

    shipped: dict[str, Candidate]
    recommended: Candidate
    reason: str


def choose(
    candidates: list[Candidate], quality: dict[str, Quality], measured: Measured, settings: spec.Export
) -> Choice:
    """Pick one file a precision, and recommend one of them.

    fp32 ships as the plain graph, which runs everywhere. int8 is the fused graph where it is faster than the plain
    one beyond doubt (the whole 95 % interval of their ratio), for it has operators that only ONNX Runtime knows.
    int8 is recommended unless its metric is more than `max_int8_loss` below fp32's or it is slower.
    """
    measurable = [c for c in candidates if f"student-{c.name}" in quality]
    shipped = {"fp32": next(c for c in measurable if c.name == "fp32")}
    int8 = [c for c in measurable if c.precision == "int8"]
    if int8:
        shipped["int8"] = _plain_or_fused(int8, measured)
    fp32, best = shipped["fp32"], shipped.get("int8")
    if best is None:
        return Choice(shipped, fp32, "int8 was not asked for")
    loss = quality[_name(fp32)].metric.value - quality[_name(best)].metric.value
    gain = measured.latency[_name(fp32)].p50 / measured.latency[_name(best)].p50
    if loss > settings.max_int8_loss:
        allowed = f"{100 * settings.max_int8_loss:g} points are allowed"
        return Choice(shipped, fp32, f"int8 loses {100 * loss:.1f} points against fp32; {allowed}")
    if gain < 1:
        return Choice(shipped, fp32, f"int8 is {1 / gain:.2f}× slower than fp32 on this machine")
    kept = f"loses {100 * loss:.1f} points" if loss > 0 else "loses nothing"
    return Choice(shipped, best, f"int8 {kept} against fp32 and is {gain:.1f}× faster")


def judge_budget(budget: spec.Budget, quality: Quality, teacher: Quality, latency: Latency, size: int) -> Verdict:
    """Hold the recommended file against the budget; a limit that could not be measured is not met."""
    retention = quality.metric.value / teacher.metric.value if teacher.metric.value else 0.0
    checks = []
    for name, limit, found in (
        ("p99_ms", budget.p99_ms, latency.p99),
        ("size_mb", budget.size_mb, size / 1e6),
    ):
        if limit is not None:
            checks.append(Check(name, limit, found, found is not None and found <= limit))
    if budget.retention is not None:
        checks.append(Check("retention", budget.retention, retention, retention >= budget.retention))
    return Verdict(all(check.met for check in checks) if checks else None, checks)


def _plain_or_fused(candidates: list[Candidate], measured: Measured) -> Candidate:
    plain, *others = sorted(candidates, key=lambda c: c.graph != "plain")
    for other in others:
        gain = ratio(measured.round_p50_ms[_name(plain)], measured.round_p50_ms[_name(other)])
        if gain.ci95[0] > 1:
            return other
    return plain


def _name(candidate: Candidate) -> str:
    return f"student-{candidate.name}"
