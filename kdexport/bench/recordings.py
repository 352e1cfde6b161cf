"""Figures of recordings: real-time factor, latency by duration, and the times of a recogniser's encoder and decoder."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from kdexport.bench import stats
from kdexport.bench.subjects import Parts, Rows, Target
from kdexport.bench.worker import Samples
from kdexport.results import Cell, Interval
from kdexport.tasks import load_task
from kdexport.tasks.metrics import Array

_STEP = 37
_QUARTERS = (0.25, 0.5, 0.75, 1.0)


def start_of(number: int) -> int:
    """Return the first row of a round; rounds begin at different rows, so that slow variants see all of them."""
    return number * _STEP


def durations_of(target: Target | None, rows: Rows) -> Array:
    """Return the seconds of each row; none where rows are no recordings."""
    task = load_task(Path(target.task)) if target else None
    lasted = [task.duration(row) for row in rows] if task else []
    return np.array([seconds for seconds in lasted if seconds is not None])


def real_time_factor(rounds: dict[int, Samples], durations: Array) -> tuple[float | None, Interval | None]:
    """Return the seconds of computing for a second of recording, by the sums of each round, with its interval."""
    if not len(durations):
        return None, None
    return stats.estimate([sum(one.total_us) / 1e6 / _in_order(i, one, durations).sum() for i, one in rounds.items()])


def by_duration(rounds: dict[int, Samples], durations: Array) -> list[Cell]:
    """Return the latency of each quarter of the recordings, by duration, at the seconds of its longest."""
    edges: Array = np.unique(np.quantile(durations, _QUARTERS, method="inverted_cdf")) if len(durations) else durations
    if len(edges) < 2:
        return []
    cells = []
    for shorter, edge in zip((0.0, *edges), edges, strict=False):
        within = (durations > shorter) & (durations <= edge)
        times = [np.array(one.total_us)[_in_order(i, one, within)] / 1e3 for i, one in rounds.items()]
        if some := [one.tolist() for one in times if len(one)]:
            cells.append(stats.cell("duration", round(float(edge), 3), some, None))
    return cells


def parts(rounds: Iterable[Samples]) -> dict[str, float]:
    """Return the p50 of a recogniser's encoder and decoder, and of the tokens that the decoder writes a second."""
    every = [one.parts for one in rounds if one.parts]

    def p50(figure: Callable[[Parts], float]) -> float:
        return float(np.median([np.median([figure(run) for run in one]) for one in every]))

    if not every:
        return {}
    return {
        "encoder_p50": p50(lambda run: run.encoder_ms),
        "decoder_p50": p50(lambda run: run.decoder_ms),
        "tokens_per_second": p50(lambda run: 1e3 * run.steps / run.decoder_ms),
    }


def _in_order(number: int, samples: Samples, of_rows: Array) -> Array:
    """Return the values of the rows that a round measured, in its order."""
    return of_rows[(start_of(number) + np.arange(len(samples.total_us))) % len(of_rows)]
