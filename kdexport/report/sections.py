"""The parts of a report, in order. Each reads the report and gives a section, or None where it has nothing to say.

A new part is a function and a name in `SECTIONS`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from kdexport.report.membership import leakage, near_duplicates
from kdexport.report.page import Section, Table
from kdexport.report.quality import calibration, classes, differences, quality, training
from kdexport.report.search import search
from kdexport.report.speed import budget, latency, steps, trade_off, variants
from kdexport.report.table import trimmed
from kdexport.results import Report


def data(r: Report) -> Section | None:
    """Rows, splits, and duplicates."""
    if "rows" not in r.data or not r.leakage:
        return None
    counts, audit = r.data["rows"], r.leakage
    across, dropped = sum(audit["across"].values()), sum(audit["dropped"].values())
    classes = f"{len(r.labels)} classes. " if r.labels else ""
    lead = (
        f"{classes}{audit['duplicates']:,} of {audit['rows']:,} rows are exact duplicates; {across:,} "
        f"texts stood in two splits, {dropped:,} rows were dropped for it, so that no test text was seen in training."
    )
    rows = [
        (split, f"{n:,}", f"{audit['within'].get(split, 0):,}", f"{audit['dropped'].get(split, 0):,}",
         "yes" if split in r.data["split_by_us"] else "no")
        for split, n in counts.items()
    ]  # fmt: skip
    headers = ("split", "rows", "duplicates in it", "dropped", "split off here")
    return Section("Data", lead, tables=[Table(headers, rows)], brief=True)


def cost(r: Report) -> Section | None:
    """A million answers, at the price that the user gives."""
    price, rows = r.bench.price_per_hour, []
    for v in r.variants:
        if v.latency_ms is None:
            continue
        rates = [c.per_second for c in v.cells if c.scenario == "batch" and c.per_second]
        single, best = 1e6 * v.latency_ms.p50 / 3.6e6, 1e6 / max(rates) / 3600 if rates else None
        hours = [single * r.bench.threads, None if best is None else best * r.bench.threads]
        rows.append(
            (v.name, *(trimmed(h) for h in hours), *(trimmed(h * price if h and price else None) for h in hours))
        )
    if not rows:
        return None
    at = f"at {price:g} an hour of one core or GPU" if price else "give a price: kdexport report RUN --price 0.04"
    headers = ("variant", "core-hours, one by one", "in its best batch", "cost, one by one", "cost in its best batch")
    lead = f"A million answers, by the time that they take here, with no idle time; {at}."
    return Section("Cost", lead, tables=[Table(headers, rows)])


def machine(r: Report) -> Section:
    """Where it was measured."""
    rows = [(key.replace("_", " "), text) for key, value in r.environment.items() if (text := written(value))]
    lead = "All of it is part of the result: milliseconds hold for this machine."
    return Section("Environment", lead, tables=[Table(("what", "found"), rows)])


def reproduce(r: Report) -> Section:
    """The command and the spec, to the letter."""
    sums = "".join(f"\n# sha256 {digest}  {name}" for name, digest in (r.data.get("sha256") or {}).items())
    files = "".join(f"\n# sha256 {v.sha256}  {v.name}" for v in r.variants if v.sha256)
    settings = f"\n\n{msgspec.yaml.encode(r.spec).decode().rstrip()}" if r.spec else ""
    lead = "The command, the hashes of data and files, and the whole spec."
    return Section("How to reproduce", lead, code=f"{r.command}{sums}{files}{settings}")


def written(value: Any) -> str:
    """A fact of the machine as words."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {written(v)}" for k, v in value.items())
    if isinstance(value, list):
        return "; ".join(map(written, value)) if value and isinstance(value[0], dict) else ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


SECTIONS = (
    variants, budget, search, trade_off, latency, steps, quality, classes, calibration, differences, training, data,
    leakage, near_duplicates, cost, machine, reproduce,
)  # fmt: skip
