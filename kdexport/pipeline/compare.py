"""What changed between two reports, and gates on it that only decide when the whole interval does.

Times of two reports were taken apart, so drift of the machine is between them. They are compared by their
ratios to one and the same teacher, measured in each run, where there is one; else as they are, on equal hardware
only. Best of all, and for a gate that is unsure, both files are measured here, in turns.
"""

from __future__ import annotations

import math
import re
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from kdexport import spec
from kdexport.bench import stats
from kdexport.bench.engine import bench, read_rounds
from kdexport.bench.subjects import Target
from kdexport.errors import KdexportError, RunError, SpecError
from kdexport.files import hash_file
from kdexport.pipeline.bench import read_texts
from kdexport.progress import say
from kdexport.report.exchange import read_any
from kdexport.results import Change, Comparison, Gate, Interval, Latency, Metric, Ratio, Report, Variant
from kdexport.runtime import artifact
from kdexport.tasks.metrics import Array, paired_difference, wilson_interval

# Rounds a look; the level of each look is shared out (Bonferroni), because a gate may stop at any of them.
_LOOKS = (6, 6, 12, 24)
_LOOK_LEVEL = 1 - 0.05 / len(_LOOKS)
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
_TIMES, _SIZES, _SHARES = (
    {"": 1.0, "ms": 1.0, "s": 1e3, "us": 1e-3},
    {"": 1.0, "mb": 1.0, "kb": 1e-3},
    {"": 1.0, "%": 0.01},
)
# metric → the units that a gate on its value may have
_METRICS: dict[str, dict[str, float]] = {
    "p50": _TIMES, "p90": _TIMES, "p99": _TIMES, "cold": _TIMES, "size": _SIZES, "memory": _SIZES,
    "speedup": {"": 1.0, "x": 1.0}, "accuracy": _SHARES, "agreement": _SHARES,
}  # fmt: skip


class Condition(NamedTuple):
    """A parsed gate: fails if `metric` is above (or below) the bound; relative ones are of the change."""

    expression: str
    metric: str
    above: bool
    relative: bool
    bound: float


def parse_gate(text: str) -> Condition:
    """`p99>+10%` (change), `accuracy<-0.5` (points), `size>5MB`, `accuracy<95%` (B itself).

    Raises:
        SpecError: it says nothing that can be held against a report.
    """
    found = re.fullmatch(r"\s*([a-z0-9_]+)\s*([<>])\s*([+-]?)(\d+(?:\.\d+)?)\s*(%|[a-z]*)\s*", text.lower())
    if not found or found[1] not in _METRICS:
        raise SpecError(
            f"--fail-if {text!r} can't be read",
            f"Write it like 'p99>+10%', 'accuracy<-0.5' or 'size>5MB'; known: {', '.join(_METRICS)}",
        )
    metric, relation, sign, number, unit = found.groups()
    share, bound = _METRICS[metric] is _SHARES, float(number)
    if sign:
        allowed = ("", "points", "%") if share else ("%",)
        if unit not in allowed:
            how = f"'{metric}{relation}{sign}0.5' (points)" if share else f"'{metric}{relation}{sign}10%'"
            raise SpecError(f"--fail-if {text!r}: a change of {metric} has no such unit", f"Write it like {how}")
        bound *= -1 if sign == "-" else 1
    elif unit not in _METRICS[metric]:
        known = ", ".join(filter(None, _METRICS[metric])) or "no unit"
        raise SpecError(
            f"--fail-if {text!r}: {metric} is not in {unit!r} but in {known}",
            f"For a change write a sign: '{metric}{relation}+{number}%'",
        )
    else:
        bound *= 0.01 if share and not unit and bound > 1 else _METRICS[metric][unit]
    return Condition(text.strip(), metric, relation == ">", bool(sign), bound)


def compare(
    a: str,
    b: str,
    gates: list[Condition],
    *,
    variant: str | None = None,
    side_by_side: bool | None = None,
    time_limit_s: float = 120.0,
) -> Comparison:
    """Compare two runs, bench folders, report.json or pytest-benchmark files: the older, then the newer one.

    A variant may follow each (`runs/demo:int8`); else the recommended ones are compared, or all where none is. Both
    files are measured here while a gate on a time is unsure, or when `side_by_side` says so.
    """
    (left, first), (right, second) = artifact.split_name(a), artifact.split_name(b)
    reports = read_any(left), read_any(right)
    if name := variant or first or second:
        pairs = [(_variant(reports[0], left, first or name), _variant(reports[1], right, second or name))]
    else:
        pairs = _pairs(*reports)
    notes = []
    apart = _differing(*reports)
    if apart:
        notes.append(f"{apart}: times are not compared, ratios in each run are")
    if any(report.task == "pytest-benchmark" for report in reports):
        notes.append(
            "pytest-benchmark times one process; processes differ by some 5 %, which its intervals here include"
        )
    changes = [c for one, other in pairs for c in _changes(*reports, one, other, apart)]
    found = [_judge(gate, changes) for gate in gates]
    timed = [g for g in gates if g.metric in _QUANTILES and g.relative]
    undecided = {"unsure", "refused"}  # what reports can't decide, or may not, both files side by side can
    doubt = any(gate.status in undecided for gate, want in zip(found, gates, strict=True) if want in timed)
    if side_by_side or (side_by_side is None and doubt):
        try:
            threads = reports[1].bench.threads
            measured = _measure_in_turns(left, right, pairs, timed, threads, time_limit_s)
            changes = [c for c in changes if (c.variant, c.metric) not in {(m.variant, m.metric) for m in measured}]
            changes = measured + changes
            found = [_judge(gate, changes) for gate in gates]
        except KdexportError as error:
            if side_by_side:
                raise
            notes.append(f"both files could not be measured side by side: {error}")
    for gate, want in zip(found, gates, strict=True):
        if gate.status == "refused":
            raise SpecError(
                f"--fail-if {gate.expression!r}: {gate.why}", _instead(want) if "was measured" in gate.why else ""
            )
    return Comparison(a=a, b=b, changes=changes, gates=found, notes=notes)


def _differing(a: Report, b: Report) -> str:
    """Why milliseconds of the two can't be compared, or nothing."""
    if a.environment.get("hardware") != b.environment.get("hardware"):
        return f"A was measured on {_machine(a)}, B on {_machine(b)}"
    if a.bench.threads != b.bench.threads:
        return f"A was measured with {a.bench.threads} thread(s), B with {b.bench.threads}"
    if a.bench.texts and b.bench.texts and a.bench.texts != b.bench.texts:
        return "A and B were measured on different texts"
    return ""


def _variant(report: Report, place: Path, name: str) -> Variant:
    """The variant of this name, or the file that ships in this precision."""
    found = [v for v in report.variants if v.name == name]
    found += [v for v in report.variants if v.precision == name and v.file]
    if not found:
        raise RunError(f"{place} has no variant {name!r}", f"It has: {', '.join(v.name for v in report.variants)}")
    return found[0]


def _pairs(a: Report, b: Report) -> list[tuple[Variant, Variant]]:
    ours, theirs = ({v.name: v for v in report.variants} for report in (a, b))
    if a.recommended in ours and b.recommended in theirs:
        return [(ours[str(a.recommended)], theirs[str(b.recommended)])]
    both = [(v, theirs[name]) for name, v in ours.items() if name in theirs]
    if not both:
        raise RunError("the reports have no variant in common", f"A has {', '.join(ours)}; B has {', '.join(theirs)}")
    return both


def _changes(a: Report, b: Report, one: Variant, other: Variant, apart: str) -> list[Change]:
    name = one.name if one.name == other.name else f"{one.name} → {other.name}"
    found = [change for metric in _QUANTILES if (change := _time_change(metric, name, a, b, one, other, apart))]
    if one.speedup_p50 and other.speedup_p50 and one.name != a.bench.reference:
        sa, sb = one.speedup_p50, other.speedup_p50
        how = "ratio in each run" + ("" if _same_teacher(a, b) else ", to teachers that differ")
        change = _ratio_change(name, "speedup", sa.value, sb.value, _quotient(sb, sa), True, how)
        found.append(msgspec.structs.replace(change, b_ci95=sb.ci95))
    if one.metric and other.metric:
        found.append(_share_change(name, a.metric, a, b, one, other))
    if one.agreement is not None and other.agreement is not None and one.metric and other.metric:
        x, y = _share(one.agreement, one.metric.n), _share(other.agreement, other.metric.n)
        found.append(_points(name, "agreement", x, y, _unpaired(x, y), "unpaired"))
    if one.size_bytes and other.size_bytes:
        mb, new_mb = one.size_bytes / 1e6, other.size_bytes / 1e6
        ratio = new_mb / mb
        change = _ratio_change(name, "size", mb, new_mb, Ratio(ratio, (ratio, ratio)), False, "exact")
        found.append(msgspec.structs.replace(change, b_ci95=(new_mb, new_mb)))
    if (f := one.footprint) and (g := other.footprint):
        how = "fresh processes"
        found.append(_pair(name, "memory", (f.rss_mb, f.rss_mb_ci95), (g.rss_mb, g.rss_mb_ci95), how))
        if not apart:
            found.append(_pair(name, "cold", (f.cold_ms, f.cold_ms_ci95), (g.cold_ms, g.cold_ms_ci95), how))
    return found


def _pair(
    name: str, metric: str, a: tuple[float, Interval | None], b: tuple[float, Interval | None], how: str
) -> Change:
    """B against A of two figures that were measured apart."""
    change = _ratio_change(name, metric, a[0], b[0], _quotient(Ratio(*b), Ratio(*a)), False, how)
    return msgspec.structs.replace(change, b_ci95=b[1])


def _time_change(
    metric: str, name: str, a: Report, b: Report, one: Variant, other: Variant, apart: str
) -> Change | None:
    (x, x_ci), (y, y_ci) = _time(one.latency_ms, metric), _time(other.latency_ms, metric)
    if x is None and y is None:
        return None
    if apart or x is None or y is None:
        how = apart or f"{'A' if x is None else 'B'} has no {metric}"
        return Change(
            variant=name, metric=metric, a=x, b=y, b_ci95=y_ci, change=None, ci95=None, unit="%",
            verdict="not comparable", how=how,
        )  # fmt: skip
    ratios = {"p50": (one.speedup_p50, other.speedup_p50), "p99": (one.speedup_p99, other.speedup_p99)}
    sa, sb = ratios.get(metric, (None, None))
    if sa and sb and one.name != a.bench.reference and _same_teacher(a, b):
        how = "by ratios to the same teacher in each run"
        change = _ratio_change(name, metric, x, y, _quotient(sa, sb), False, how)
        return msgspec.structs.replace(change, b_ci95=y_ci)
    return _pair(name, metric, (x, x_ci), (y, y_ci), "measured apart")


def _same_teacher(a: Report, b: Report) -> bool:
    sums = {v.sha256 for report in (a, b) for v in report.variants if v.name == report.bench.reference}
    return len(sums) == 1 and None not in sums


def _time(latency: Latency | None, metric: str) -> tuple[float | None, Interval | None]:
    return (None, None) if latency is None else (getattr(latency, metric), getattr(latency, f"{metric}_ci95"))


def _quotient(top: Ratio, bottom: Ratio) -> Ratio:
    """top ÷ bottom of independent figures: the log half widths add as squares."""
    value = top.value / bottom.value
    if top.ci95 is None or bottom.ci95 is None:
        return Ratio(value, None)
    halves = (math.log(ci[1] / ci[0]) / 2 for ci in (top.ci95, bottom.ci95))
    half = math.sqrt(sum(h * h for h in halves))
    return Ratio(value, (value * math.exp(-half), value * math.exp(half)))


def _ratio_change(name: str, metric: str, x: float, y: float, ratio: Ratio, more_is_better: bool, how: str) -> Change:
    """A change in %, from B ÷ A."""
    ci = None if ratio.ci95 is None else (100 * (ratio.ci95[0] - 1), 100 * (ratio.ci95[1] - 1))
    said = "unsure" if ratio.ci95 is None else stats.verdict(ratio.ci95)
    up, down = ("better", "worse") if more_is_better else ("worse", "better")
    # stats.verdict calls a ratio above 1 "faster"; here it only means that B is more than A
    verdict = {"faster": up, "slower": down}.get(said, said)
    if how == "exact":
        verdict = "same" if ratio.value == 1 else up if ratio.value > 1 else down
    change = 100 * (ratio.value - 1)
    return Change(variant=name, metric=metric, a=x, b=y, change=change, ci95=ci, unit="%", verdict=verdict, how=how)


def _share_change(name: str, metric: str, a: Report, b: Report, one: Variant, other: Variant) -> Change:
    """Accuracy, row by row where both answered the same test rows."""
    assert one.metric
    assert other.metric
    data = [(r.data.get("sha256") or {}).get("test.jsonl") for r in (a, b)]
    paired = data[0] is not None and data[0] == data[1] and one.metric.n == other.metric.n
    if paired and one.wrong_rows is not None and other.wrong_rows is not None:
        right = [_right(v.wrong_rows or [], one.metric.n) for v in (one, other)]
        _, ci = paired_difference(*right)
        return _points(name, metric, one.metric, other.metric, ci, "the same test rows, paired")
    return _points(name, metric, one.metric, other.metric, _unpaired(one.metric, other.metric), "unpaired")


def _points(name: str, metric: str, x: Metric, y: Metric, ci: Interval, how: str) -> Change:
    low, high = 100 * ci[0], 100 * ci[1]
    verdict = "better" if low > 0 else "worse" if high < 0 else "same" if max(-low, high) <= 1 else "unsure"
    return Change(
        variant=name, metric=metric, a=x.value, b=y.value, b_ci95=y.ci95, change=100 * (y.value - x.value),
        ci95=(low, high), unit="points", verdict=verdict, how=how,
    )  # fmt: skip


def _unpaired(one: Metric, other: Metric) -> Interval:
    """Newcombe's interval of a difference of two shares (1998, method 10)."""
    d = other.value - one.value
    low = math.hypot(other.value - other.ci95[0], one.ci95[1] - one.value)
    high = math.hypot(other.ci95[1] - other.value, one.value - one.ci95[0])
    return d - low, d + high


def _share(share: float, n: int) -> Metric:
    return Metric(share, wilson_interval(round(share * n), n), n)


def _right(wrong: list[int], n: int) -> Array:
    right = np.ones(n, dtype=bool)
    right[wrong] = False
    return right


def _measure_in_turns(
    a: Path, b: Path, pairs: list[tuple[Variant, Variant]], gates: list[Condition], threads: int, time_limit_s: float
) -> list[Change]:
    """Both files in turns on this machine, in more and more rounds, until every gate on a time is sure."""
    started, changes = time.monotonic(), list[Change]()
    for one, other in pairs:
        targets = [_file_of(a, one, "A"), _file_of(b, other, "B")]
        rows = read_texts(None, [str(a), str(b)])
        rounds: dict[str, list[Array]] = {"A": [], "B": []}
        name = one.name if one.name == other.name else f"{one.name} → {other.name}"
        for look, n in enumerate(_LOOKS):
            left = time_limit_s - (time.monotonic() - started)
            if look and left <= 0:
                break
            settings = spec.Bench(
                threads=(threads,),
                rounds=n,
                round_seconds=0.5,
                precision=None,
                batch_sizes=(),
                time_limit_s=max(left, 1.0),
            )
            with tempfile.TemporaryDirectory() as work:
                done = bench(settings, targets, rows, "A", look, Path(work), sweep=False)
                for side, reason in done.conditions.failed.items():
                    raise RunError(f"{side}'s file can't be measured: it {reason}", "Run kdexport run again")
                for side in rounds:
                    rounds[side] += read_rounds(Path(work), side)
            found = [_turns_change(name, metric, rounds) for metric in _QUANTILES]
            mine = [c for c in found if c]
            if all(_judge(gate, mine).status in ("passed", "failed") for gate in gates):
                break
            say(f"compare: unsure after {len(rounds['A'])} rounds")
        changes += mine
    return changes


def _turns_change(name: str, metric: str, rounds: dict[str, list[Array]]) -> Change | None:
    q = _QUANTILES[metric]
    found = stats.pooled_ratio(rounds["B"], rounds["A"], q, _LOOK_LEVEL)
    if found is None:
        return None
    (x, _), (y, y_ci) = (stats.pooled(rounds[side], q, _LOOK_LEVEL) for side in "AB")
    assert x is not None
    assert y is not None
    change = _ratio_change(name, metric, x, y, found, False, f"in turns, {len(rounds['A'])} rounds")
    return msgspec.structs.replace(change, b_ci95=y_ci)


def _file_of(place: Path, variant: Variant, name: str) -> Target:
    """The file that was measured: in the artifact, in the run's export, or where `kdexport bench` found it."""
    folder, named = artifact.resolve(place), Path(variant.file or "none")
    places = [(folder / named, folder)]
    for file in place.glob("export*/*.onnx"):  # of a search, export-<student> beside student-<student>
        places.append((file, place / file.parent.name.replace("export", "student", 1)))
    for file, task in [*places, (named, named.parent.parent)]:
        if file.is_file() and hash_file(file) == variant.sha256:
            return Target(name, "onnxruntime", str(task), str(file))
    raise RunError(f"{place} does not hold the file of {variant.name}", "Give run folders, with their artifacts")


def _judge(gate: Condition, changes: list[Change]) -> Gate:
    """Hold a gate against every variant compared: any failure fails it, any doubt leaves it unsure."""
    about = [c for c in changes if c.metric == gate.metric or (gate.metric == "accuracy" and _is_metric(c.metric))]
    if not about:
        return Gate(expression=gate.expression, status="refused", why=f"neither report has {gate.metric}")
    verdicts = [_judge_one(gate, change) for change in about]
    for status in ("refused", "failed", "unsure", "passed"):
        if reasons := [why for found, why in verdicts if found == status]:
            return Gate(expression=gate.expression, status=status, why="; ".join(reasons))
    raise AssertionError(verdicts)


def _is_metric(name: str) -> bool:
    return name not in _METRICS


def _judge_one(gate: Condition, change: Change) -> tuple[str, str]:
    if gate.relative:
        if change.change is None:
            return "refused", f"{change.metric} is not comparable: {change.how}"
        value, ci, unit = change.change, change.ci95, change.unit
        text = f"{change.variant}: {value:+.2f} {unit}"
    else:
        if change.b is None:
            return "refused", f"B has no {change.metric}"
        value, ci = change.b, change.b_ci95
        text = f"{change.variant}: {value:.4g}"
    if ci is None:
        return "unsure", f"{text}, no interval"
    text += f" [{ci[0]:.4g}, {ci[1]:.4g}] ({change.how})"
    low, high = ci
    beyond, within = (low > gate.bound, high <= gate.bound) if gate.above else (high < gate.bound, low >= gate.bound)
    return ("failed" if beyond else "passed" if within else "unsure"), text


def _instead(gate: Condition) -> str:
    return "Compare ratios to the teacher: 'speedup<-10%'" if gate.metric in _QUANTILES else ""


def _machine(report: Report) -> str:
    facts: dict[str, Any] = report.environment
    return f"{facts.get('cpu', 'an unknown machine')}, {facts.get('cores_allowed', '?')} core(s)"
