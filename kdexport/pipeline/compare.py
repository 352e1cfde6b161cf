"""What changed between two reports, and gates on it that only decide when the whole interval does.

Times of two reports were taken apart, so drift of the machine is between them. They are compared by their
ratios to one and the same teacher, measured in each run, where there is one; else as they are, on equal hardware
only. Best of all, and for a gate that is unsure, both files are measured here, in turns.
"""

from __future__ import annotations

import re
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import msgspec

from kdexport import spec
from kdexport.bench import stats
from kdexport.bench.engine import bench, read_rounds
from kdexport.bench.subjects import Target
from kdexport.errors import KdexportError, RunError, SpecError
from kdexport.files import hash_file
from kdexport.pipeline.bench import read_texts
from kdexport.pipeline.changes import QUANTILES, both, changes_of, ratio_change
from kdexport.progress import say
from kdexport.report.exchange import read_any
from kdexport.results import Change, Comparison, Gate, Report, Variant, machine_name
from kdexport.runtime import artifact
from kdexport.tasks.metrics import Array

# Rounds a look; the level of each look is shared out (Bonferroni), because a gate may stop at any of them.
_LOOKS = (6, 6, 12, 24)
_LOOK_LEVEL = 1 - 0.05 / len(_LOOKS)
_TIMES, _SIZES, _SHARES = (
    {"": 1.0, "ms": 1.0, "s": 1e3, "us": 1e-3},
    {"": 1.0, "mb": 1.0, "kb": 1e-3},
    {"": 1.0, "%": 0.01},
)
# metric → the units that a gate on its value may have
_METRICS: dict[str, dict[str, float]] = {
    "p50": _TIMES, "p90": _TIMES, "p99": _TIMES, "cold": _TIMES, "size": _SIZES, "memory": _SIZES,
    "speedup": {"": 1.0, "x": 1.0}, "accuracy": _SHARES, "agreement": _SHARES, "metric": _SHARES,
}  # fmt: skip
# Names of gates on the metric that counts, whatever its name is.
_METRIC_GATES = ("accuracy", "metric")


class Condition(NamedTuple):
    """A parsed gate: fails if `metric` is above (or below) the bound; relative ones are of the change, in `unit`."""

    expression: str
    metric: str
    above: bool
    relative: bool
    bound: float
    unit: str


def parse_gate(text: str) -> Condition:
    """`p99>+10%` (change), `accuracy<-0.5` (points), `size>5MB`, `accuracy<95%` (B itself).

    `metric` is the metric that counts, whatever its name; a number such as bits per byte changes in per cent.

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
        bound *= 0.01 if metric != "metric" and share and not unit and bound > 1 else _METRICS[metric][unit]
    return Condition(text.strip(), metric, relation == ">", bool(sign), bound, unit)


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
        notes.append("pytest-benchmark times one process; its intervals here include the 5 % by which processes differ")
    if all(report.metric for report in reports) and reports[0].metric != reports[1].metric:
        notes.append(f"A is judged by {reports[0].metric}, B by {reports[1].metric}, so these are not compared")
    folders = [path if path.is_dir() else path.parent for path in (left, right)]
    changes = [c for one, other in pairs for c in changes_of(*reports, one, other, apart, folders)]
    found = [_judge(gate, changes) for gate in gates]
    timed = [g for g in gates if g.metric in QUANTILES and g.relative]
    undecided = {"unsure", "refused"}  # what reports can't decide, or may not, both files side by side can
    open_gates = any(gate.status in undecided for gate, want in zip(found, gates, strict=True) if want in timed)
    if side_by_side or (side_by_side is None and open_gates):
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
            instead = "Compare ratios to the teacher: 'speedup<-10%'" if want.metric in QUANTILES else ""
            raise SpecError(f"--fail-if {gate.expression!r}: {gate.why}", instead if "was measured" in gate.why else "")
    return Comparison(a=a, b=b, changes=changes, gates=found, notes=notes)


def _differing(a: Report, b: Report) -> str:
    """Why milliseconds of the two can't be compared, or nothing."""
    if a.environment.get("hardware") != b.environment.get("hardware"):
        return f"A was measured on {machine_name(a.environment)}, B on {machine_name(b.environment)}"
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


def _measure_in_turns(
    a: Path, b: Path, pairs: list[tuple[Variant, Variant]], gates: list[Condition], threads: int, time_limit_s: float
) -> list[Change]:
    """Both files in turns on this machine, in more and more rounds, until every gate on a time is sure."""
    started, changes = time.monotonic(), list[Change]()
    for one, other in pairs:
        targets = [_file_of(a, one, "A"), _file_of(b, other, "B")]
        rows = read_texts(None, [str(a), str(b)])
        rounds: dict[str, list[Array]] = {"A": [], "B": []}
        name = both(one, other)
        for look, n in enumerate(_LOOKS):
            left = time_limit_s - (time.monotonic() - started)
            if look and left <= 0:
                break
            settings = spec.Bench(
                threads=(threads,), rounds=n, round_seconds=0.5, precision=None, batch_sizes=(),
                time_limit_s=max(left, 1.0),
            )  # fmt: skip
            with tempfile.TemporaryDirectory() as work:
                done = bench(settings, targets, rows, "A", look, Path(work), sweep=False)
                for side, reason in done.conditions.failed.items():
                    raise RunError(f"{side}'s file can't be measured: it {reason}", "Run kdexport run again")
                for side in rounds:
                    rounds[side] += read_rounds(Path(work), side)
            found = [_turns_change(name, metric, rounds) for metric in QUANTILES]
            mine = [c for c in found if c]
            if all(_judge(gate, mine).status in ("passed", "failed") for gate in gates):
                break
            say(f"compare: unsure after {len(rounds['A'])} rounds")
        changes += mine
    return changes


def _turns_change(name: str, metric: str, rounds: dict[str, list[Array]]) -> Change | None:
    q = QUANTILES[metric]
    found = stats.pooled_ratio(rounds["B"], rounds["A"], q, _LOOK_LEVEL)
    if found is None:
        return None
    (x, _), (y, y_ci) = (stats.pooled(rounds[side], q, _LOOK_LEVEL) for side in "AB")
    assert x is not None
    assert y is not None
    change = ratio_change(name, metric, x, y, found, False, f"in turns, {len(rounds['A'])} rounds")
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
    """Hold a gate against every variant compared: any failure fails it, any uncertainty leaves it unsure."""
    about = [c for c in changes if c.metric == gate.metric or (gate.metric in _METRIC_GATES and _counts(c.metric))]
    if not about:
        return Gate(expression=gate.expression, status="refused", why=f"neither report has {gate.metric}")
    verdicts = [_judge_one(gate, change) for change in about]
    for status in ("refused", "failed", "unsure", "passed"):
        if reasons := [why for found, why in verdicts if found == status]:
            return Gate(expression=gate.expression, status=status, why="; ".join(reasons))
    raise AssertionError(verdicts)


def _counts(metric: str) -> bool:
    """Whether a change is of the metric that counts."""
    return metric not in _METRICS or metric in _METRIC_GATES


def _judge_one(gate: Condition, change: Change) -> tuple[str, str]:
    number = change.unit == "%" and _counts(change.metric)
    if number and (gate.metric == "accuracy" or (gate.relative and gate.unit != "%")):
        return "refused", f"{change.metric} is a number: write 'metric>+2%', or 'metric>1.5' for B itself"
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
