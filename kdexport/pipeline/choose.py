"""Choose the files to ship and the one to recommend, and hold it against the budget, by measured figures."""

import math
from typing import NamedTuple

from kdexport import spec
from kdexport.bench.engine import Measured
from kdexport.bench.stats import ratio
from kdexport.export import Candidate
from kdexport.export.verify import Validation
from kdexport.results import Check, Interval, Latency, Ratio, Verdict
from kdexport.tasks.metrics import Metric

_CLEARLY_SMALLER = 0.97


class Choice(NamedTuple):
    """The candidates to ship, by precision; the recommended one, and the reason."""

    shipped: dict[str, Candidate]
    recommended: Candidate
    reason: str


def choose(
    candidates: list[Candidate], validation: Validation, measured: Measured, settings: spec.Export,
    sizes: dict[str, int], limit_mb: float | None = None,
) -> Choice:  # fmt: skip
    """Pick one file a precision, and recommend one of them by the validation split, never the test split.

    Of each precision the graph that measures best ships, see `better_graph`. int8 is recommended unless it is slower
    than fp32, loses more than `max_int8_loss`, or has too few of fp32's nearest vectors. If that file is over the size
    limit, the quickest smaller one with as little loss is recommended. `sizes` are bytes by candidate.
    """
    shipped = {c.precision: c for c in candidates if c.graph == "plain"}
    for other in candidates:
        plain = shipped[other.precision]
        if better_graph(other, _gain(plain, other, measured), sizes[other.name] / sizes[plain.name]):
            shipped[other.precision] = other
    metric, of_fp32 = validation.metric, validation.values[_name(shipped["fp32"])]
    losses = {precision: lost(metric, of_fp32, validation.values[_name(c)]) for precision, c in shipped.items()}
    unit = "%" if metric.kind == "number" else "points"

    def loses(precision: str) -> str:
        loss = losses[precision]
        return f"{precision} loses {f'{100 * loss:.1f} {unit}' if loss else 'nothing'} against fp32 on validation"

    shared = {p: validation.shared[_name(c)] for p, c in shipped.items() if _name(c) in validation.shared}

    def fits(precision: str) -> bool:
        return losses[precision] <= settings.max_int8_loss and shared.get(precision, 1.0) >= validation.least

    best, reason = shipped["fp32"], "int8 was not asked for"
    nearest = f"int8 has {shared['int8']:.1%} of fp32's nearest on validation" if "int8" in shared else ""
    if "int8" in shipped:
        gain = _gain(best, shipped["int8"], measured)
        if losses["int8"] > settings.max_int8_loss:
            reason = f"{loses('int8')}; {100 * settings.max_int8_loss:g} {unit} are allowed"
        elif not fits("int8"):
            reason = f"{nearest}; {validation.least:.0%} are wanted"
        elif gain and gain.verdict == "slower":
            reason = f"int8 is {1 / gain.value:.2f}× slower than fp32 on this machine"
        else:
            best, reason = shipped["int8"], f"{nearest}{'; ' if nearest else ''}{loses('int8')}{_speed(gain)}"
    if limit_mb is None or sizes[best.name] <= limit_mb * 1e6:
        return Choice(shipped, best, reason)
    small = [c for c in shipped.values() if sizes[c.name] <= limit_mb * 1e6]
    good = [c for c in small if fits(c.precision)]
    if not good:
        unfit = [f"; {loses(c.precision)}, though it is within {limit_mb:g} MB" for c in small]
        return Choice(shipped, best, reason + "".join(unfit))
    p50 = {name: latency.p50 for name, latency in measured.latency.items()}
    chosen = min(good, key=lambda c: (p50.get(_name(c), math.inf), sizes[c.name]))
    return Choice(shipped, chosen, f"{best.precision} is over {limit_mb:g} MB; {loses(chosen.precision)}")


def lost(metric: Metric, reference: float, value: float) -> float:
    """Return how much worse a value is than a reference, at least 0; of a number, as a fraction of the reference."""
    loss = 1 - metric.retention(value, reference) if metric.kind == "number" else metric.gain(value, reference)
    return max(0.0, loss)


def judge_budget(
    budget: spec.Budget, metric: Metric, value: float, teacher: float, change: Interval,
    latency: Latency | None, size: int,
) -> Verdict:  # fmt: skip
    """Check the recommended file against the budget; a limit that could not be measured is not met.

    `value` and `teacher` are the metric on the test split, `change` is the interval of their difference, paired by row.
    """
    checks = []
    if budget.p99_ms is not None:
        found, ci = (latency.p99 or latency.p99_at_most, latency.p99_ci95) if latency else (None, None)
        sure = ci is not None and (ci[1] <= budget.p99_ms or ci[0] > budget.p99_ms)
        checks.append(Check("p99_ms", budget.p99_ms, found, found is not None and found <= budget.p99_ms, sure, ci))
    if budget.size_mb is not None:
        checks.append(Check("size_mb", budget.size_mb, size / 1e6, size / 1e6 <= budget.size_mb))
    if budget.retention is not None:
        low, high = sorted(metric.retention(teacher + bound, teacher) for bound in change)
        retention = metric.retention(value, teacher)
        sure = low >= budget.retention or high < budget.retention
        checks.append(Check("retention", budget.retention, retention, retention >= budget.retention, sure, (low, high)))
    return Verdict(all(check.met for check in checks) if checks else None, checks)


def better_graph(other: Candidate, gain: Ratio | None, size: float) -> bool:
    """Return whether a precision ships as another graph than the plain one.

    It must be significantly faster, or smaller and not slower; tied embeddings are stored once in dynamo's graph. fp32
    is never the fused graph, which other runtimes than ONNX Runtime can't read.

    Args:
        gain: the speedup over the plain graph.
        size: of the file, as a fraction of the plain graph's.
    """
    if gain is None or other.graph == "plain" or (other.precision, other.graph) == ("fp32", "fused"):
        return False
    return gain.verdict == "faster" or (gain.verdict != "slower" and size < _CLEARLY_SMALLER)


def _gain(slower: Candidate, faster: Candidate, measured: Measured) -> Ratio | None:
    """Return the speedup from one candidate to another, paired by the rounds of both."""
    a, b = measured.latency.get(_name(slower)), measured.latency.get(_name(faster))
    if a is None or b is None:
        return None
    n = min(a.rounds, b.rounds)
    return ratio(a.round_p50[:n], b.round_p50[:n])


def _speed(gain: Ratio | None) -> str:
    if gain is None:
        return "; how fast they are could not be measured"
    known = {"same": " and is as fast", "unsure": "; which is faster is not sure"}
    return known.get(gain.verdict, f" and is {gain.value:.1f}× faster")


def _name(candidate: Candidate) -> str:
    return f"student-{candidate.name}"
