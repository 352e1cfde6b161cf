"""Records of measured files and models: metric, latency, memory, and the conditions."""

from typing import Any, Literal

import msgspec

from kdexport.errors import counted

Interval = tuple[float, float]
MetricKind = Literal["fraction", "ratio", "number"]
VerdictOfRatio = Literal["faster", "slower", "same", "unsure"]
ENOUGH_ROUNDS = 3  # fewest for an interval or a bound; two agree, or differ, by chance


class Metric(msgspec.Struct, frozen=True):
    """The task's metric on the whole test split, with its 95 % interval: Wilson's for a fraction, else by bootstrap."""

    value: float
    ci95: Interval
    n: int


class Quality(msgspec.Struct, frozen=True):
    """Metric and agreement with the teacher of one file or model, on the test split."""

    metric: Metric
    agreement: float
    mcnemar_p: float | None
    max_abs_diff: float | None = None
    further: dict[str, float] = {}


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds from text to answer at batch 1; null where samples are too few.

    p50 is the centre over rounds of each round's median; p90 and p99 are of all samples, p99 from 1,000 on, with
    `p99_at_most`, a bound, below that. Intervals are over rounds. `quantiles`, at `QUANTILES`, are for the curve of the
    distribution. For language models: from a prompt to the last of some new tokens; `first_token_p50` until the first
    one, `tokens_per_second` are new tokens by p50. For recordings: `real_time_factor` is seconds of computing for a
    second of recording, over all rows. For recognisers that write: `encoder_p50` and `decoder_p50` are parts of
    `model_p50`, `first_token_p50` is the encoder with the decoder's first step, `tokens_per_second` are tokens by the
    decoder's time alone (of a recording that fills several windows, those of one).
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
    encoder_p50: float | None = None
    decoder_p50: float | None = None
    first_token_p50: float | None = None
    tokens_per_second: float | None = None
    real_time_factor: float | None = None
    real_time_factor_ci95: Interval | None = None
    samples: int
    rounds: int
    round_p50: list[float] = []
    quantiles: list[float] = []


QUANTILES = (0.0, 0.01, *(round(0.05 * i, 2) for i in range(1, 20)), 0.97, 0.98, 0.99, 0.995, 0.999, 1.0)


class Ratio(msgspec.Struct, frozen=True):
    """A ratio of latencies, paired by round, with its 95 % interval and verdict."""

    value: float
    ci95: Interval | None
    verdict: VerdictOfRatio = "unsure"


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """A variant at another batch size, length in tokens, number of threads, or load; or a part of its rows.

    `scenario` is batch, length, threads, closed (at: connections), open (at: requests a second; latency from the time
    when each was due) or duration (a quarter of the recordings, at: seconds of its longest). `p50_ms` is of a batch, a
    run, a request, or a recording.
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
    """Costs of a process that only predicts; medians over rounds, each a fresh process.

    `cold_ms` is from the start of the process to its first answer, with files in the system's cache. `cores_used` is
    CPU time ÷ wall time during the measurement: below the number of threads, the machine was busy.
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

    def starved(self, threads: int) -> bool:
        """Return whether other work left the process clearly less than the one core that it asked for."""
        return threads == 1 and self.device_p50_ms is None and self.cores_used < 0.85


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
    further: dict[str, float] = {}
    latency_ms: Latency | None = None
    speedup_p50: Ratio | None = None
    speedup_p99: Ratio | None = None
    footprint: Footprint | None = None
    cells: list[Cell] = []
    wrong_rows: list[int] | None = None
    shipped: bool = False
    note: str = ""


def machine_name(environment: dict[str, Any]) -> str:
    """Name the machine of an environment."""
    cores, gpus = environment.get("cores_allowed"), environment.get("gpus") or []
    name = f"{environment.get('cpu') or 'an unknown CPU'}, {counted(cores, 'core') if cores else '? cores'}"
    return ", ".join([name, *(gpu["name"] for gpu in gpus)])


class Control(msgspec.Struct, frozen=True):
    """The engine's check of itself: one file measured twice as if it were two; `ratio` should include 1."""

    name: str
    ratio: Ratio


class Conditions(msgspec.Struct, frozen=True, kw_only=True):
    """The conditions of a measurement, with failures and warnings.

    `texts` is the hash of the texts; `tokens` their lengths, and the percentage that reaches `limit`, so was probably
    truncated; `durations` the seconds of recordings.
    """

    reference: str = "teacher-torch"
    batch_size: int = 1
    threads: int = 1
    rounds: int
    round_seconds: float
    rows: int
    texts: str = ""
    tokens: dict[str, int] = {}
    durations: dict[str, float] = {}
    spinning: bool = False
    clock: str
    seconds: float | None = None
    control: Control | None = None
    failed: dict[str, str] = {}
    left_out: dict[str, str] = {}
    warnings: list[str] = []
    price_per_hour: float | None = None
