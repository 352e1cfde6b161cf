"""Compare two reports, with gates that pass or fail only if the whole interval does.

Times in two reports differ by the machine's drift, too. They are compared by their ratios to the same teacher, if
both runs measured it; otherwise directly, on equal hardware only. Measuring both files here, in turns, is most
precise, and is done while a gate is unsure.
"""

import re
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from kdexport import spec
from kdexport.bench import stats
from kdexport.bench.engine import bench, read_rounds
from kdexport.bench.machine import BUSY_PERCENT
from kdexport.bench.subjects import Target
from kdexport.errors import KdexportError, RunError, SpecError, counted
from kdexport.files import hash_file
from kdexport.pipeline.bench import read_texts
from kdexport.pipeline.changes import QUANTILES, Figure, both, changes_of, ratio_change
from kdexport.progress import say
from kdexport.report.exchange import read_any
from kdexport.results import Change, Comparison, Gate, Report, Variant, machine_name
from kdexport.runtime import artifact
from kdexport.tasks.metrics import Array

# Rounds of each look; Bonferroni's correction for the looks, because a gate may stop at any of them.
_LOOKS = (6, 6, 12, 24)
_LOOK_LEVEL = 1 - 0.05 / len(_LOOKS)
_TIMES = {"": 1.0, "ms": 1.0, "s": 1e3, "us": 1e-3}
_SIZES, _FRACTIONS = {"": 1.0, "mb": 1.0, "kb": 1e-3}, {"": 1.0, "%": 0.01}
# metric → units of a gate on its value
_METRICS: dict[str, dict[str, float]] = {
    "p50": _TIMES, "p90": _TIMES, "p99": _TIMES, "cold": _TIMES, "size": _SIZES, "memory": _SIZES,
    "speedup": {"": 1.0, "x": 1.0}, "accuracy": _FRACTIONS, "agreement": _FRACTIONS, "metric": _FRACTIONS,
}  # fmt: skip
# Names of gates on the main metric, whatever its name.
_METRIC_GATES = ("accuracy", "metric")


class Condition(NamedTuple):
    """A parsed gate: fails if `metric` (or its change, in `unit`, if relative) is above (or below) the bound."""

    expression: str
    metric: str
    above: bool
    relative: bool
    bound: float
    unit: str


def parse_gate(text: str) -> Condition:
    """Parse `p99>+10%` (change), `accuracy<-0.5` (points), `size>5MB`, `accuracy<95%` (B itself).

    `metric` is the main metric, whatever its name; changes of a number such as bits per byte are in per cent.
    """
    found = re.fullmatch(r"\s*([a-z0-9_]+)\s*([<>])\s*([+-]?)(\d+(?:\.\d+)?)\s*(%|[a-z]*)\s*", text.lower())
    if not found or found[1] not in _METRICS:
        hint = f"Write it like 'p99>+10%', 'accuracy<-0.5' or 'size>5MB'; known: {', '.join(_METRICS)}"
        raise SpecError(f"--fail-if {text!r} can't be read", hint)
    metric, relation, sign, number, unit = found.groups()
    fraction, bound = _METRICS[metric] is _FRACTIONS, float(number)
    if sign:
        if unit not in (("", "points", "%") if fraction else ("%",)):
            how = f"'{metric}{relation}{sign}0.5' (points)" if fraction else f"'{metric}{relation}{sign}10%'"
            raise SpecError(f"--fail-if {text!r}: a change of {metric} has no such unit", f"Write it like {how}")
        bound *= -1 if sign == "-" else 1
    elif unit not in _METRICS[metric]:
        known = ", ".join(filter(None, _METRICS[metric])) or "no unit"
        hint = f"For a change write a sign: '{metric}{relation}+{number}%'"
        raise SpecError(f"--fail-if {text!r}: {metric} is not in {unit!r} but in {known}", hint)
    else:
        bound *= 0.01 if metric != "metric" and fraction and not unit and bound > 1 else _METRICS[metric][unit]
    return Condition(text.strip(), metric, relation == ">", bool(sign), bound, unit)


def compare(
    a: str, b: str, gates: list[Condition], *,
    variant: str | None = None, side_by_side: bool | None = None, time_limit_s: float = 120.0,
) -> Comparison:  # fmt: skip
    """Compare two runs, bench folders, report.json or pytest-benchmark files: the older, then the newer one.

    Each may name a variant (`runs/demo:int8`); by default the recommended ones are compared, or all of a bench. Both
    files are measured here, in turns, if `side_by_side`; if it is None, while a gate on a time is unsure.
    """
    (left, first), (right, second) = artifact.split_name(a), artifact.split_name(b)
    reports = read_any(left), read_any(right)
    if name := variant or first or second:
        pairs = [(_variant(reports[0], left, first or name), _variant(reports[1], right, second or name))]
    else:
        pairs = _pairs(*reports)
    notes = []
    if apart := _differing(*reports):
        notes.append(f"{apart}: times are not compared, ratios in each run are")
    if any(report.task == "pytest-benchmark" for report in reports):
        notes.append("pytest-benchmark times one process; its intervals here include the 5 % by which processes differ")
    if all(report.metric for report in reports) and reports[0].metric != reports[1].metric:
        notes.append(f"A is judged by {reports[0].metric}, B by {reports[1].metric}, so these are not compared")
    folders = [path if path.is_dir() else path.parent for path in (left, right)]
    changes = [c for one, other in pairs for c in changes_of(*reports, one, other, apart, folders)]
    timed = [gate for gate in gates if gate.metric in QUANTILES and gate.relative]
    undecided = any(_judge(gate, changes).status in ("unsure", "refused") for gate in timed)
    if side_by_side or (side_by_side is None and undecided):
        try:
            measured = _measure_in_turns(left, right, pairs, timed, reports[1].bench.threads, time_limit_s)
            again = {(m.variant, m.metric) for m in measured}
            changes = measured + [c for c in changes if (c.variant, c.metric) not in again]
        except KdexportError as error:
            if side_by_side:
                raise
            notes.append(f"both files could not be measured side by side: {error}")
    busy = [name for name, report in zip("AB", reports, strict=True) if _was_busy(report)]
    if busy and not any(change.how.startswith("in turns") for change in changes):
        where = f"{' and '.join(busy)} {'was' if len(busy) == 1 else 'were'} measured on a busy machine"
        notes.append(f"{where}, so times may differ for that reason alone; --measure takes both files in turns, now")
    found = [_judge(gate, changes) for gate in gates]
    for gate, want in zip(found, gates, strict=True):
        if gate.status == "refused":
            instead = "Compare ratios to the teacher: 'speedup<-10%'" if want.metric in QUANTILES else ""
            raise SpecError(f"--fail-if {gate.expression!r}: {gate.why}", instead if "was measured" in gate.why else "")
    return Comparison(a=a, b=b, changes=changes, gates=found, notes=notes)


def _differing(a: Report, b: Report) -> str:
    """Return the reason why milliseconds of the two can't be compared, or an empty string."""
    if a.environment.get("hardware") != b.environment.get("hardware"):
        return f"A was measured on {machine_name(a.environment)}, B on {machine_name(b.environment)}"
    if a.bench.threads != b.bench.threads:
        return f"A was measured with {counted(a.bench.threads, 'thread')}, B with {b.bench.threads}"
    if a.bench.texts and b.bench.texts and a.bench.texts != b.bench.texts:
        return "A and B were measured on different texts"
    return ""


def _was_busy(report: Report) -> bool:
    costs = (variant.footprint for variant in report.variants if variant.footprint)
    busy = report.environment.get("busy_percent") or 0.0
    return busy > BUSY_PERCENT or any(one.starved(report.bench.threads) for one in costs)


def _variant(report: Report, place: Path, name: str) -> Variant:
    """Return the variant of a name, or the shipped file of a precision."""
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
    """Measure both files in turns on this machine, until every gate on a time is decided or time is over."""
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
            mine = [change for metric in QUANTILES if (change := _turns_change(name, metric, rounds))]
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
    (x, x_ci), (y, y_ci) = (stats.pooled(rounds[side], q, _LOOK_LEVEL) for side in "AB")
    assert x is not None
    assert y is not None
    how = f"in turns, {len(rounds['A'])} rounds"
    return ratio_change(name, metric, Figure(x, x_ci), Figure(y, y_ci), how, found)


def _file_of(place: Path, variant: Variant, name: str) -> Target:
    """Find the measured file: in the artifact, in the run's export, or where `kdexport bench` found it."""
    folder, named = artifact.resolve(place), Path(variant.file or "none")
    places = [(folder / named, folder)]
    for file in place.glob("export*/*.onnx"):  # of a search, export-<student> beside student-<student>
        places.append((file, place / file.parent.name.replace("export", "student", 1)))
    for file, task in [*places, (named, named.parent.parent)]:
        if file.is_file() and hash_file(file) == variant.sha256:
            return Target(name, "onnxruntime", str(task), str(file))
    raise RunError(f"{place} does not hold the file of {variant.name}", "Give run folders, with their artifacts")


def _judge(gate: Condition, changes: list[Change]) -> Gate:
    """Judge a gate on all variants compared: any failure fails it, any uncertainty leaves it unsure."""
    about = [c for c in changes if c.metric == gate.metric or (gate.metric in _METRIC_GATES and _is_main(c.metric))]
    if not about:
        return Gate(expression=gate.expression, status="refused", why=f"neither report has {gate.metric}")
    verdicts = [_judge_one(gate, change) for change in about]
    worst = min((status for status, _ in verdicts), key=("refused", "failed", "unsure", "passed").index)
    why = "; ".join(why for status, why in verdicts if status == worst)
    return Gate(expression=gate.expression, status=worst, why=why)


def _is_main(metric: str) -> bool:
    return metric not in _METRICS or metric in _METRIC_GATES


def _judge_one(gate: Condition, change: Change) -> tuple[str, str]:
    number = change.unit == "%" and _is_main(change.metric)
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
