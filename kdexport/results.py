"""The records of what was measured: `report.json`, with units in the names. Everything else renders these.

The contract is versioned (`SCHEMA`) and published as `kdexport/schemas/report.schema.json`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from kdexport.errors import RunError
from kdexport.rundir import write_json

SCHEMA = 1


class Metric(msgspec.Struct, frozen=True):
    """The task's metric on the whole test split, with a 95 % Wilson interval."""

    value: float
    ci95: tuple[float, float]
    n: int


class Quality(msgspec.Struct, frozen=True):
    """What one file or model answers on the test split, against the teacher."""

    metric: Metric
    agreement: float
    mcnemar_p: float
    max_abs_diff: float | None = None


class Latency(msgspec.Struct, frozen=True):
    """Milliseconds from text to answer at batch 1; null where there are too few samples to say.

    p50 is the median over rounds of each round's median, its interval is Student's t over rounds on a log
    scale; p90 and p99 are of all samples, p99 from 1,000 on.
    """

    p50: float
    p90: float | None
    p99: float | None
    p50_ci95: tuple[float, float]
    tokenize_p50: float
    model_p50: float
    samples: int
    rounds: int


class Ratio(msgspec.Struct, frozen=True):
    """A ratio of latencies, paired by round, with its 95 % interval."""

    value: float
    ci95: tuple[float, float]


class Variant(msgspec.Struct, frozen=True, kw_only=True):
    """One file or model that was measured."""

    name: str
    model: str
    runtime: str
    device: str
    precision: str
    graph: str
    file: str | None
    sha256: str | None
    size_bytes: int
    parameters: int | None
    metric: Metric
    agreement: float
    mcnemar_p: float
    max_abs_diff: float | None
    latency_ms: Latency | None
    speedup_p50: Ratio | None
    shipped: bool
    note: str = ""


class Check(msgspec.Struct, frozen=True):
    """One limit of the budget: what was asked for, what was found."""

    name: str
    limit: float
    found: float | None
    met: bool


class Verdict(msgspec.Struct, frozen=True):
    """The budget as a whole; `met` is null where nothing was asked for."""

    met: bool | None
    checks: list[Check]


class Distillation(msgspec.Struct, frozen=True, kw_only=True):
    """What distillation gave: the same student on hard labels alone is the baseline."""

    teacher: Metric
    student: Metric
    baseline: Metric | None
    retention: float
    gain_points: float | None
    gain_mcnemar_p: float | None
    ratio: float | None
    temperature: float
    alpha: float
    origin: str
    student_curve: list[dict[str, float]]
    baseline_curve: list[dict[str, float]]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """`report.json`."""

    schema: int = SCHEMA
    kdexport: str
    task: str
    metric: str
    labels: list[str]
    recommended: str
    reason: str
    variants: list[Variant]
    budget: Verdict
    distillation: Distillation
    data: dict[str, Any]
    leakage: dict[str, Any]
    bench: dict[str, Any]
    environment: dict[str, Any]
    spec: dict[str, Any]
    seconds: dict[str, float]

    def variant(self, name: str) -> Variant:
        """A variant by its name."""
        return next(variant for variant in self.variants if variant.name == name)


def write_report(report: Report, path: Path) -> None:
    """Write `report.json`, atomically."""
    write_json(path, report)


def read_report(path: Path) -> Report:
    """Read `report.json`.

    Raises:
        RunError: there is none, it is cut short, or it is of another schema version.
    """
    try:
        raw = msgspec.json.decode(path.read_bytes())
    except OSError:
        raise RunError(f"{path} does not exist", "A finished kdexport run writes it") from None
    except msgspec.DecodeError as error:
        raise RunError(f"{path} can't be read: {error}", "Write it again with: kdexport report RUN") from None
    version = raw.get("schema") if isinstance(raw, dict) else None
    if version != SCHEMA:
        raise RunError(f"{path} is of schema {version}, this kdexport reads {SCHEMA}", "Run kdexport run again")
    try:
        return msgspec.convert(raw, Report)
    except msgspec.ValidationError as error:
        raise RunError(f"{path} is no report of ours: {error}", "Write it again with: kdexport report RUN") from None
