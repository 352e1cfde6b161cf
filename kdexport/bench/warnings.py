"""Warnings about a measurement: noise, drift, threads, too little time."""

from typing import Any

import numpy as np

from kdexport import spec
from kdexport.bench.machine import BUSY_PERCENT
from kdexport.bench.stats import half_width
from kdexport.errors import counted
from kdexport.results import ENOUGH_ROUNDS

_AGAIN = "Measure again when the machine is idle: kdexport bench RUN"


def of(settings: spec.Bench, found: dict[str, Any], measured: Any, facts: dict[str, Any]) -> list[str]:
    """Return warnings, one sentence each, the gravest first."""
    lines = []
    rounds = max(map(len, found.values()))
    if rounds < ENOUGH_ROUNDS:
        few, limit = counted(rounds, "round"), f"the time limit of {settings.time_limit_s:g} s"
        why, mend = f"{few} asked for", "take --rounds 3"
        if rounds < settings.rounds:
            why, mend = f"{limit} allowed {few}", "raise --time-limit"
        lines.append(f"{why}: too few for any interval; {mend}")
    control = measured.conditions.control
    if control and control.ratio.verdict in ("faster", "slower"):
        low, high = control.ratio.ci95
        lines.append(
            f"this machine was too noisy: {control.name}, measured twice as if it were two files, came out "
            f"{low:.2f}–{high:.2f}× apart; don't trust smaller differences"
        )
    elif control and control.ratio.ci95 and (noise := half_width(control.ratio.ci95)) > 0.1:
        lines.append(f"this machine was noisy: differences below ±{100 * noise:.0f} % can't be told from none")
    if max(settings.threads) > facts["cores_allowed"]:
        lines.append(f"{max(settings.threads)} threads were asked for on {counted(facts['cores_allowed'], 'core')}")
    threads, costs = settings.threads[0], measured.footprint.items()
    if greedy := [f"{name} {one.cores_used:.1f}" for name, one in costs if one.cores_used > threads + 0.2]:
        lines.append(f"{counted(threads, 'thread')} asked for, but some used more cores: {', '.join(greedy)}")
    if starved := [f"{name} {100 * one.cores_used:.0f} %" for name, one in costs if one.starved(threads)]:
        lines.append(
            f"the machine was busy and gave less than a core: {', '.join(starved)}; these times are too long. {_AGAIN}"
        )
    drifting = [name for name, runs in found.items() if _drifts(runs)]
    if drifting:
        names = ", ".join(drifting)
        lines.append(f"{names} slowed down or sped up by over 10 % within rounds: warming up, or a busy machine")
    if facts["busy_percent"] > BUSY_PERCENT:
        lines.append(
            f"other programs took {facts['busy_percent']:.0f} % of the CPU time just before measuring: times may be "
            f"too long, ratios less so, as variants took turns. {_AGAIN}"
        )
    return lines


def _drifts(rounds: dict[int, Any]) -> bool:
    """Return whether latency drifts within rounds: first to last quarter, by 10 % in the median round."""
    ratios = []
    for one in rounds.values():
        quarter = len(one.total_us) // 4
        if quarter < 5:
            return False
        ratios.append(np.median(one.total_us[:quarter]) / np.median(one.total_us[-quarter:]))
    return bool(np.median(ratios) > 1.1 or np.median(ratios) < 1 / 1.1)
