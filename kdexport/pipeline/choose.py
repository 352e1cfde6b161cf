"""Decisions, made from what was measured: which files ship, which one is recommended, is the budget kept."""

from __future__ import annotations

from typing import NamedTuple

from kdexport import spec
from kdexport.bench.engine import Measured
from kdexport.bench.stats import ratio
from kdexport.export import Candidate
from kdexport.results import Check, Interval, Latency, Quality, Ratio, Verdict


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
    int8 is recommended unless its metric is more than `max_int8_loss` below fp32's or it is slower. fp16 is for
    GPUs: it ships beside them.
    """
    measurable = [c for c in candidates if f"student-{c.name}" in quality]
    shipped = {c.precision: c for c in measurable if c.graph == "plain"}
    int8 = [c for c in measurable if c.precision == "int8"]
    if int8:
        shipped["int8"] = _plain_or_fused(int8, measured)
    fp32, best = shipped["fp32"], shipped.get("int8")
    if best is None:
        return Choice(shipped, fp32, "int8 was not asked for")
    loss = quality[_name(fp32)].metric.value - quality[_name(best)].metric.value
    if loss > settings.max_int8_loss:
        allowed = f"{100 * settings.max_int8_loss:g} points are allowed"
        return Choice(shipped, fp32, f"int8 loses {100 * loss:.1f} points against fp32; {allowed}")
    kept = f"int8 loses {100 * loss:.1f} points" if loss > 0 else "int8 loses nothing"
    gain = _gain(fp32, best, measured)
    if gain is None:
        return Choice(shipped, best, f"{kept} against fp32; how fast they are could not be measured")
    if gain.verdict == "slower":
        return Choice(shipped, fp32, f"int8 is {1 / gain.value:.2f}× slower than fp32 on this machine")
    told = {"same": "is as fast", "unsure": "is about as fast"}.get(gain.verdict, f"is {gain.value:.1f}× faster")
    return Choice(shipped, best, f"{kept} against fp32 and {told}")


def judge_budget(
    budget: spec.Budget, quality: Quality, teacher: Quality, lost: Interval, latency: Latency | None, size: int
) -> Verdict:
    """Hold the recommended file against the budget; a limit that could not be measured is not met.

    Args:
        lost: interval of the student's metric less the teacher's, on the same rows.
    """
    checks = []
    if budget.p99_ms is not None:
        found, ci = (latency.p99 or latency.p99_at_most, latency.p99_ci95) if latency else (None, None)
        sure = ci is not None and (ci[1] <= budget.p99_ms or ci[0] > budget.p99_ms)
        checks.append(Check("p99_ms", budget.p99_ms, found, found is not None and found <= budget.p99_ms, sure))
    if budget.size_mb is not None:
        checks.append(Check("size_mb", budget.size_mb, size / 1e6, size / 1e6 <= budget.size_mb))
    if budget.retention is not None:
        whole = teacher.metric.value or 1.0
        low, high = ((whole + bound) / whole for bound in lost)
        retention = quality.metric.value / whole
        sure = low >= budget.retention or high < budget.retention
        checks.append(Check("retention", budget.retention, retention, retention >= budget.retention, sure))
    return Verdict(all(check.met for check in checks) if checks else None, checks)


def _plain_or_fused(candidates: list[Candidate], measured: Measured) -> Candidate:
    plain, *others = sorted(candidates, key=lambda c: c.graph != "plain")
    for other in others:
        gain = _gain(plain, other, measured)
        if gain and gain.ci95 and gain.ci95[0] > 1:
            return other
    return plain


def _gain(slower: Candidate, faster: Candidate, measured: Measured) -> Ratio | None:
    """How many times faster one candidate is than another, by the rounds that both had."""
    a, b = measured.latency.get(_name(slower)), measured.latency.get(_name(faster))
    if a is None or b is None:
        return None
    n = min(a.rounds, b.rounds)
    return ratio(a.round_p50[:n], b.round_p50[:n])


def _name(candidate: Candidate) -> str:
    return f"student-{candidate.name}"
