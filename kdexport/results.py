"""The records of what was measured: `report.json`, with units in the names. Everything else renders these.

The contract is versioned (`SCHEMA`) and published as `kdexport/schemas/report.schema.json`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from kdexport.errors import RunError
from kdexport.rundir import write_json

SCHEMA = 2

Interval = tuple[float, float]
VerdictOfRatio = Literal["faster", "slower", "same", "unsure"]


class Metric(msgspec.Struct, frozen=True):
    """The task's metric on the whole test split, with a 95 % Wilson interval."""

    value: float
    ci95: Interval
    n: int


class Quality(msgspec.Struct, frozen=True):
    """What one file or model answers on the test split, against the teacher."""

    metric: Metric
    agreement: float
    mcnemar_p: float
    max_abs_diff: float | None = None


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds from text to answer at batch 1; null where there are too few samples to say.

    p50 is the centre over rounds of each round's median; p90 and p99 are of all samples, p99 from 1,000 on.
    Intervals are taken over rounds. `p99_at_most` is a bound where samples are too few for p99.
    `quantiles` are at `QUANTILES`, for the distribution's curve.
    """

    p50: float
    p90: float | None
    p99: float | None
    p50_ci95: Interval | None
    p90_ci95: Interval | None = None
    p99_ci95: Interval | None = None
    p99_at_most: float | None = None
    tokenize_p50: float | None = None
    model_p50: float | None = None
    samples: int
    rounds: int
    round_p50: list[float] = []
    quantiles: list[float] = []


QUANTILES = (0.0, 0.01, *(round(0.05 * i, 2) for i in range(1, 20)), 0.97, 0.98, 0.99, 0.995, 0.999, 1.0)


class Ratio(msgspec.Struct, frozen=True):
    """A ratio of latencies, paired by round, with its 95 % interval and what that allows one to say."""

    value: float
    ci95: Interval | None
    verdict: VerdictOfRatio = "unsure"


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """A variant under one other condition: a batch size, a length in tokens, a number of threads, a load.

    `scenario` is batch, length, threads, closed (at: connections) or open (at: requests a second, latency
    counted from when each was due). `p50_ms` is of a batch, a run, or a request.
    """

    scenario: str
    at: float
    p50_ms: float
    p50_ci95: Interval | None
    p99_ms: float | None = None
    per_second: float | None = None
    samples: int
    errors: int = 0


class Footprint(msgspec.Struct, frozen=True, kw_only=True):
    """What a process that only predicts costs; medians over rounds, each a fresh process.

    `cold_ms` runs from the start of the process to its first answer, files in the system's cache.
    `cores_used` is CPU time by wall time while it was measured: below the threads, the machine was busy.
    """

    cold_ms: float
    cold_ms_ci95: Interval | None = None
    rss_mb: float
    rss_mb_ci95: Interval | None = None
    peak_rss_mb: float
    gpu_peak_mb: float | None = None
    device_p50_ms: float | None = None
    cores_used: float
    os_threads: int


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
    size_bytes: int | None
    parameters: int | None = None
    metric: Metric | None = None
    agreement: float | None = None
    mcnemar_p: float | None = None
    max_abs_diff: float | None = None
    latency_ms: Latency | None = None
    speedup_p50: Ratio | None = None
    speedup_p99: Ratio | None = None
    footprint: Footprint | None = None
    cells: list[Cell] = []
    wrong_rows: list[int] | None = None
    shipped: bool = False
    note: str = ""


class Control(msgspec.Struct, frozen=True):
    """The engine's check of itself: one file measured twice as if it were two. `ratio` should hold 1."""

    name: str
    ratio: Ratio


class Conditions(msgspec.Struct, frozen=True, kw_only=True):
    """How it was measured, and what a reader must know about it.

    `texts` is the hash of the texts; `tokens` their lengths, and how many per cent of them fill
    all `limit` that are read, so most likely were cut.
    """

    reference: str = "teacher-torch"
    batch_size: int = 1
    threads: int = 1
    rounds: int
    round_seconds: float
    rows: int
    texts: str = ""
    tokens: dict[str, int] = {}
    spinning: bool = False
    clock: str
    seconds: float | None = None
    control: Control | None = None
    failed: dict[str, str] = {}
    left_out: dict[str, str] = {}
    warnings: list[str] = []
    price_per_hour: float | None = None


class ClassScore(msgspec.Struct, frozen=True):
    """One class on the test split: recall of teacher and student, and how often they agree."""

    label: str
    rows: int
    teacher_recall: float
    student_recall: float
    agreement: float


class Bin(msgspec.Struct, frozen=True):
    """Rows whose confidence falls into one of ten equal bins."""

    confidence: float
    accuracy: float
    rows: int


class Calibration(msgspec.Struct, frozen=True):
    """Does 90 % sure mean right in 90 %? Expected calibration error (Guo et al. 2017, eq. 5) and its bins."""

    ece: float
    bins: list[Bin]


class Answer(msgspec.Struct, frozen=True):
    """A label and its probability."""

    label: str
    score: float


class Example(msgspec.Struct, frozen=True):
    """A test row on which teacher and student differ."""

    id: str
    text: str
    label: str
    teacher: Answer
    student: Answer


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """Teacher and recommended student, looked at closely; classes by lost recall, worst first."""

    classes: list[ClassScore]
    calibration: dict[str, Calibration]
    examples: list[Example]


class Attack(msgspec.Struct, frozen=True):
    """How well a threshold on a score tells rows that a model was trained on (members) from others.

    `auc` is 0.5 by chance; `advantage` is the largest TPR − FPR, which chance keeps below `by_chance` in 95 %.
    """

    auc: float
    ci95: Interval
    advantage: float
    by_chance: float
    members: int
    others: int


class Membership(msgspec.Struct, frozen=True):
    """Membership inference on one model: by its highest score, and by the score of the row's own label."""

    by_confidence: Attack
    by_label: Attack | None


class Check(msgspec.Struct, frozen=True):
    """One limit of the budget: what was asked for, what was found; `sure` if its interval is on one side too."""

    name: str
    limit: float
    found: float | None
    met: bool
    sure: bool = True


class Verdict(msgspec.Struct, frozen=True):
    """The budget as a whole; `met` is null where nothing was asked for."""

    met: bool | None
    checks: list[Check]


class Rung(msgspec.Struct, frozen=True, kw_only=True):
    """One student of a search: measured before it was trained, then tried, then trained; as far as it came.

    Size and latency are those of its quickest file, with first weights: they don't depend on the weights.
    `trial` and `metric` are of the validation split: after a short training in PyTorch, and of the exported file
    after the whole one.
    """

    name: str
    parameters: int
    precision: str
    size_bytes: int
    p50_ms: float
    p99_ms: float | None
    over: str = ""
    trial: float | None = None
    trial_seconds: float | None = None
    metric: float | None = None
    retention: float | None = None
    seconds: float | None = None
    met: bool | None = None


class Search(msgspec.Struct, frozen=True, kw_only=True):
    """How a student was chosen to a budget; everything on the validation split, the teacher's metric too."""

    rungs: list[Rung]
    winner: str
    reason: str
    teacher: float
    teacher_p50_ms: float | None = None


class Spread(msgspec.Struct, frozen=True):
    """The metric on the test split in PyTorch for each seed, with mean and standard deviation (n − 1)."""

    values: list[float]
    mean: float
    deviation: float


class Distillation(msgspec.Struct, frozen=True, kw_only=True):
    """What distillation gave: the same student on hard labels alone is the baseline.

    `model` is the student as the spec names it. `loss`, `temperature` and `alpha` are as in the spec; what moves
    during training is written as text. `ratio` is (student − baseline) ÷ (teacher − baseline).
    """

    teacher: Metric
    student: Metric
    baseline: Metric | None
    retention: float
    gain_points: float | None
    gain_ci95: Interval | None = None
    gain_mcnemar_p: float | None
    ratio: float | None
    model: str = ""
    loss: str = "kl"
    temperature: float | str
    alpha: float | str
    origin: str
    student_seeds: Spread | None = None
    baseline_seeds: Spread | None = None
    student_curve: list[dict[str, Any]]
    baseline_curve: list[dict[str, Any]]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """`report.json`: of a run, or of `kdexport bench` (which leaves out what it does not know)."""

    schema: int = SCHEMA
    kdexport: str
    task: str
    metric: str
    labels: list[str]
    recommended: str | None
    reason: str
    variants: list[Variant]
    budget: Verdict = Verdict(None, [])
    search: Search | None = None
    distillation: Distillation | None = None
    evidence: Evidence | None = None
    data: dict[str, Any] = {}
    leakage: dict[str, Any] = {}
    bench: Conditions
    environment: dict[str, Any]
    spec: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    command: str = ""

    def variant(self, name: str | None) -> Variant:
        """A variant by its name."""
        return next(variant for variant in self.variants if variant.name == name)


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One metric of one variant in A and in B. `change` and its interval are in `unit`: % or points.

    `verdict` is better, worse, same, unsure or not comparable; `how` says what it rests on.
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
    """A condition that must not hold: passed, failed or unsure, and why."""

    expression: str
    status: str
    why: str


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """What changed from A to B."""

    a: str
    b: str
    changes: list[Change]
    gates: list[Gate]
    notes: list[str]


class ExportedFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file that `kdexport export` made: how far from PyTorch, and the share of rows with fp32's answer."""

    precision: str
    file: str
    graph: str
    size_bytes: int
    max_abs_diff: float
    agreement: float | None


class Exported(msgspec.Struct, frozen=True, kw_only=True):
    """What `kdexport export` made of a model, and on how many of the user's rows it was verified."""

    model: str
    task: str
    labels: list[str]
    function: str
    max_length: int
    rows: int
    recommended: str
    reason: str
    files: list[ExportedFile]


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
        raise RunError(
            f"{path} can't be read: {error}", "Run the same command again: finished stages are kept"
        ) from None
    version = raw.get("schema") if isinstance(raw, dict) else None
    if version == 1:  # 2 only added fields
        raw["schema"] = version = SCHEMA
    if version != SCHEMA:
        raise RunError(f"{path} is of schema {version}, this kdexport reads 1 and {SCHEMA}", "Run kdexport run again")
    try:
        return msgspec.convert(raw, Report)
    except msgspec.ValidationError as error:
        raise RunError(f"{path} is no report of ours: {error}", "Run the same command again") from None
