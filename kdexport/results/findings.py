"""Records of evidence, leakage, the budget, the search and the distillation."""

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
    """Expected calibration error (Guo et al. 2017, eq. 5) and its bins."""

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
    """Teacher and recommended student compared row by row; classes by lost recall, worst first."""

    classes: list[ClassScore]
    calibration: dict[str, Calibration]
    examples: list[Example]


class Attack(msgspec.Struct, frozen=True):
    """Separation of training rows (members) from others by a threshold on a score.

    `auc` is 0.5 by chance; `advantage` is the largest TPR − FPR, which is below `by_chance` in 95 % by chance.
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
    """One limit of the budget and the figure found; `sure` if its whole interval is on one side of the limit."""

    name: str
    limit: float
    found: float | None
    met: bool
    sure: bool = True
    ci95: Interval | None = None


class Verdict(msgspec.Struct, frozen=True):
    """The whole budget; `met` is null without limits."""

    met: bool | None
    checks: list[Check]


class SearchCandidate(msgspec.Struct, frozen=True, kw_only=True):
    """One student of a search, with the figures of the steps that it reached: untrained, trial, full training.

    Size and latency are those of the file in `precision`; they don't depend on the weights. `trial` and `metric` are on
    the validation split: in PyTorch after a short training, and of the exported file after the full one.
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
    """The search for a student within a budget; all metrics, the teacher's too, are on the validation split."""

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
    """The gain by distillation over the baseline: the same student trained on hard labels alone.

    `model` is the student's name in the spec. `loss`, `temperature` and `alpha` are as in the spec; schedules are text.
    `gain_points` is positive where the student is better than the baseline, in percentage points, or in the unit of a
    metric that is a number; `gain_mcnemar_p` is of fractions only. `ratio` is (student − baseline) ÷ (teacher −
    baseline). `further` are the other metrics of teacher, student and baseline in PyTorch.
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
