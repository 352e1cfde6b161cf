"""The sections of a report, in order: functions from the report to a section, or None without data for it.

To add one, write a function and add it to `SECTIONS`.
"""

from collections import Counter
from typing import Any

import msgspec

from kdexport.report.asked import asked
from kdexport.report.membership import leakage, near_duplicates
from kdexport.report.page import Section, Table
from kdexport.report.quality import calibration, classes, differences, quality, training
from kdexport.report.search import search
from kdexport.report.speed import budget, latency, steps, trade_off, variants
from kdexport.report.table import trimmed
from kdexport.results import Report, made_elsewhere
from kdexport.tasks import task_class


def data(r: Report) -> Section | None:
    """Count rows and duplicates by split."""
    if "rows" not in r.data or not r.leakage:
        return None
    counts, audit = r.data["rows"], r.leakage
    across, dropped = sum(audit["across"].values()), sum(audit["dropped"].values())
    classes = f"{len(r.labels)} {task_class(r.task).label_word}. " if r.labels else ""
    lead = (
        f"{classes}Exact duplicates: {audit['duplicates']:,} of {audit['rows']:,} rows; in two splits: {across:,}; "
        f"dropped, so that no test text is in training: {dropped:,}."
    )
    if heard := r.data.get("heard"):
        lead += f" The teacher wrote the transcripts of {heard:,} test rows, so errors there are against its words."
    doubted = sum((Counter(one) for one in r.data.get("doubted", {}).values()), Counter[str]())
    if doubted:
        causes = ", ".join(f"{count:,} {cause}" for cause, count in doubted.most_common())
        lead += f" Transcripts by the teacher that were left out: {causes}."
    if corrected := r.data.get("corrected"):
        lead += f" Train rows taught by the transcript alone, as the teacher's text differs too much: {corrected:,}."
    rows = [
        (split, f"{n:,}", f"{audit['within'].get(split, 0):,}", f"{audit['dropped'].get(split, 0):,}",
         "yes" if split in r.data["split_by_us"] else "no")
        for split, n in counts.items()
    ]  # fmt: skip
    headers = ("split", "rows", "duplicates in it", "dropped", "split off here")
    return Section("Data", lead, tables=[Table(headers, rows)], brief=True)


def cost(r: Report) -> Section | None:
    """Estimate the cost of a million answers, at the price that the user gives."""
    price, rows = r.bench.price_per_hour, []
    for v in r.variants:
        if v.latency_ms is None:
            continue
        single = v.latency_ms.p50 / 1e3
        best = min((1 / c.per_second for c in v.cells if c.scenario == "batch" and c.per_second), default=None)
        hours = [seconds and 1e6 * seconds / 3600 * r.bench.threads for seconds in (single, best)]
        costs = [h * price if h and price else None for h in hours]
        rows.append((v.name, *map(trimmed, (*hours, *costs))))
    if not rows:
        return None
    at = f"at {price:g} an hour of one core or GPU" if price else "give a price: kdexport report RUN --price 0.04"
    headers = ("variant", "core-hours, one by one", "in its best batch", "cost, one by one", "cost in its best batch")
    lead = f"A million answers, by the time that they take here, with no idle time; {at}."
    return Section("Cost", lead, tables=[Table(headers, rows)])


def machine(r: Report) -> Section:
    """List the facts of the machine."""
    rows = [(key.replace("_", " "), text) for key, value in r.environment.items() if (text := written(value))]
    lead = "Milliseconds are valid for this machine only."
    if strangers := made_elsewhere(r):
        lead += "".join(f" {', '.join(stages)}: made on {name}." for name, stages in strangers.items())
    return Section("Environment", lead, tables=[Table(("what", "found"), rows)])


def reproduce(r: Report) -> Section:
    """Give the command, hashes and the spec."""
    sums = "".join(f"\n# sha256 {digest}  {name}" for name, digest in (r.data.get("sha256") or {}).items())
    files = "".join(f"\n# sha256 {v.sha256}  {v.name}" for v in r.variants if v.sha256)
    settings = f"\n\n{msgspec.yaml.encode(r.spec).decode().rstrip()}" if r.spec else ""
    lead = "The command, the hashes of data and files, and the whole spec."
    if r.varies:
        lead += f" A second run makes the same files, byte by byte. What may differ: {'; '.join(r.varies)}."
    return Section("How to reproduce", lead, code=f"{r.command}{sums}{files}{settings}")


def written(value: Any) -> str:
    """Format a fact of the machine."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {written(v)}" for k, v in value.items())
    if isinstance(value, list):
        return "; ".join(map(written, value)) if value and isinstance(value[0], dict) else ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


SECTIONS = (
    variants, budget, asked, search, trade_off, latency, steps, quality, classes, calibration, differences, training,
    data, leakage, near_duplicates, cost, machine, reproduce,
)  # fmt: skip
