"""Loads on a server, in shuffled rounds."""

import random
from pathlib import Path

import msgspec
import numpy as np

from kdexport.bench import stats
from kdexport.bench.generator import LoadJob, LoadSamples
from kdexport.bench.process import Crashed, call
from kdexport.bench.subjects import Target
from kdexport.progress import bar
from kdexport.results import Cell

_ROUNDS = 3


class Loads(msgspec.Struct, frozen=True, kw_only=True):
    """Clients of closed loops, and rates of open ones: requests/s, or with `of_peak` fractions of the highest rate."""

    connections: tuple[int, ...] = (1, 4, 16)
    rates: tuple[float, ...] = (0.8,)
    of_peak: bool = True
    poisson: bool = True
    seconds: float = 5.0


def put_loads(target: Target, loads: Loads, seed: int, rows: Path) -> tuple[list[Cell], str]:
    """Put closed loops, then open ones, on a server, in three shuffled rounds each.

    Returns:
        The measured cells, and the error if the server is gone or answers with errors alone.
    """
    cells: list[Cell] = []

    def put(kinds: list[tuple[int, float | None]]) -> None:
        for (connections, rate), rounds in _load_rounds(target, loads, kinds, seed, rows).items():
            cells.append(_load_cell(connections, rate, rounds))

    try:
        put([(n, None) for n in loads.connections])
        peak = max(cell.per_second or 0.0 for cell in cells) if loads.of_peak else 1.0
        put([(4 * max(loads.connections), rate * peak) for rate in loads.rates])
    except Crashed as crash:
        return cells, str(crash)
    return cells, ""


def _load_rounds(
    target: Target, loads: Loads, kinds: list[tuple[int, float | None]], seed: int, rows: Path
) -> dict[tuple[int, float | None], list[LoadSamples]]:
    found: dict[tuple[int, float | None], list[LoadSamples]] = {kind: [] for kind in kinds}
    with bar(f"load on {target.name}", _ROUNDS * len(kinds)) as advance:
        for number in range(_ROUNDS):
            for connections, rate in random.Random(f"{seed}:{number}").sample(kinds, len(kinds)):
                job = LoadJob(
                    url=target.model, rows=str(rows), connections=connections, rate=rate, poisson=loads.poisson,
                    seconds=loads.seconds, seed=seed + number,
                )  # fmt: skip
                done = call("kdexport.bench.generator", msgspec.json.encode(job), 1, 120 + 2 * loads.seconds)
                found[connections, rate].append(msgspec.json.decode(done, type=LoadSamples))
                advance(1)
    return found


def _load_cell(connections: int, rate: float | None, rounds: list[LoadSamples]) -> Cell:
    scenario, at = ("closed", float(connections)) if rate is None else ("open", round(rate, 1))
    errors, answered = sum(one.errors for one in rounds), [one.latency_ms for one in rounds if one.latency_ms]
    if not answered:
        raise Crashed(f"answered none of {errors} requests under a load ({scenario}, {at:g})")
    per_second = float(np.median([len(one.latency_ms) / one.seconds for one in rounds]))
    found = stats.cell(scenario, at, answered, None)
    return msgspec.structs.replace(found, per_second=per_second, errors=errors)
