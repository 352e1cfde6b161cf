"""The records of a report, of the comparison of two, and of an export; reading a report."""

from pathlib import Path
from typing import Any

import msgspec

from kdexport.errors import RunError
from kdexport.results.asked import Asked
from kdexport.results.findings import Distillation, Evidence, Search, Verdict
from kdexport.results.measured import Conditions, Interval, MetricKind, Variant

SCHEMA = 2


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """`report.json` of a run, or of `kdexport bench`, with fewer fields.

    `metric_kind`: fraction (of rows that are correct), ratio (between 0 and 1) or number (in a unit of its own).
    `machines`: name, hash of the hardware, and threads of the machine that made each stage. `varies`: what a second run
    of the same spec may give otherwise.
    """

    schema: int = SCHEMA
    kdexport: str
    task: str
    metric: str
    metric_higher_is_better: bool = True
    metric_kind: MetricKind = "ratio"
    labels: list[str]
    recommended: str | None
    reason: str
    variants: list[Variant]
    budget: Verdict = Verdict(None, [])
    search: Search | None = None
    distillation: Distillation | None = None
    asked: Asked | None = None
    evidence: Evidence | None = None
    data: dict[str, Any] = {}
    leakage: dict[str, Any] = {}
    bench: Conditions
    environment: dict[str, Any]
    spec: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    machines: dict[str, dict[str, Any]] = {}
    varies: list[str] = []
    command: str = ""

    def variant(self, name: str | None) -> Variant:
        """Return a variant by its name."""
        return next(variant for variant in self.variants if variant.name == name)


def made_elsewhere(report: Report) -> dict[str, list[str]]:
    """Return the stages by each machine that made them, other than that of the measurement."""
    found: dict[str, list[str]] = {}
    for stage, machine in report.machines.items():
        if machine["hardware"] != report.environment.get("hardware"):
            found.setdefault(machine["name"], []).append(stage)
    return found


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One metric of one variant in A and in B. `change` and its interval are in `unit`: % or points (of fractions).

    `verdict` is better, worse, same, unsure or not comparable; `how` is the method.
    """

    variant: str
    metric: str
    a: float | None
    b: float | None
    b_ci95: Interval | None = None
    change: float | None
    ci95: Interval | None
    unit: str
    verdict: str
    how: str


class Gate(msgspec.Struct, frozen=True, kw_only=True):
    """A condition that must not hold: passed, failed or unsure, and the reason."""

    expression: str
    status: str
    why: str


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """The changes from A to B."""

    a: str
    b: str
    changes: list[Change]
    gates: list[Gate]
    notes: list[str]


class ExportedFile(msgspec.Struct, frozen=True, kw_only=True):
    """One exported file: its difference from PyTorch, and the fraction of rows with fp32's answer."""

    precision: str
    file: str
    graph: str
    size_bytes: int
    max_abs_diff: float
    agreement: float | None


class Exported(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `kdexport export`; `rows` of the user's data verified it."""

    model: str
    task: str
    labels: list[str]
    function: str
    max_length: int
    rows: int
    recommended: str
    reason: str
    files: list[ExportedFile]


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
        raise RunError(f"{path} can't be read: {error}", "Run the same command again; it resumes") from None
    version = raw.get("schema") if isinstance(raw, dict) else None
    if version == 1:  # 2 only added fields
        raw["schema"] = version = SCHEMA
    if isinstance(raw, dict) and raw.get("metric") == "accuracy":  # older reports lack the kind
        raw.setdefault("metric_kind", "fraction")
    if version != SCHEMA:
        raise RunError(f"{path} is of schema {version}, this kdexport reads 1 and {SCHEMA}", "Run kdexport run again")
    try:
        return msgspec.convert(raw, Report)
    except msgspec.ValidationError as error:
        raise RunError(f"{path} is no report of ours: {error}", "Run the same command again") from None
