"""What was found out: evidence, leakage, the budget, the search, what distillation gave."""

from __future__ import annotations

from typing import Any

import msgspec

from kdexport.results.measured import Interval, Metric


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


class SearchCandidate(msgspec.Struct, frozen=True, kw_only=True):
    """One student of a search: measured untrained, then tried, then trained, as far as it came.

    Size and latency are those of its file of `precision`; they don't depend on the weights. `trial` and `metric` are
    of the validation split: after a short training in PyTorch, and of the exported file after the whole one.
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

    rungs: list[SearchCandidate]
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
    during training is written as text. `gain_points` is positive where the student is better than the baseline, in
    percentage points, or in the metric's own unit where it is a number; `gain_mcnemar_p` is of fractions only. `ratio`
    is (student − baseline) ÷ (teacher − baseline).
    `further` are the metrics beside the one that counts, of teacher, student and baseline in PyTorch.
    """

    teacher: Metric
    student: Metric
    baseline: Metric | None
    retention: float
    gain_points: float | None
    gain_ci95: Interval | None = None
    gain_mcnemar_p: float | None = None
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
    further: dict[str, dict[str, float]] = {}
