"""Sections on leakage: duplicates and near duplicates across splits, and membership inference."""

from typing import Any

import msgspec

from kdexport.report.charts import Axis, Bar, bars
from kdexport.report.page import Figure, Section, Table
from kdexport.report.table import percent
from kdexport.results import Attack, Membership, Report

_ATTACK = (
    "An AUC of 0.5 gives nothing away, 1 every training row (membership inference by a threshold, Yeom et al. 2018, "
    "Salem et al. 2019; intervals by DeLong). A difference in kind between train and test shows in it, too. The rows "
    "that a teacher used as given was trained on are unknown."
)


def leakage(r: Report) -> Section | None:
    """Report duplicates across splits, and membership inference on teacher and student."""
    near = r.leakage.get("near")
    attacked = msgspec.convert(r.leakage.get("membership") or {}, dict[str, Membership | None])
    rows = [
        (name, by, attack)
        for name, found in attacked.items()
        if found
        for by, attack in (("confidence", found.by_confidence), ("probability of the label", found.by_label))
        if attack
    ]
    lead = [_exact(r.leakage)] if "across" in r.leakage else []
    lead += [_near(near)] if near else []
    lead += [_in_words(name, found.by_confidence) for name, found in attacked.items() if found]
    if not lead:
        return None
    tables = [_across(r.leakage["across"], near)] if "across" in r.leakage else []
    figures = [_figure(rows)] if rows else []
    return Section("Leakage", " ".join(lead), figures, tables, _ATTACK if rows else "", brief=True)


def near_duplicates(r: Report) -> Section | None:
    """Show some pairs across splits."""
    near = r.leakage.get("near")
    if not near or not near["examples"]:
        return None
    headers, rows = ("row", "near-duplicate of", "similarity", "labels", "its text", "the other's"), []
    for pair in near["examples"]:
        (other_id, own_id), (other_text, own_text) = pair["ids"], pair["texts"]
        other, own = (label or "none" for label in pair["labels"])
        labels = own if own == other else f"{own} ≠ {other}"
        rows.append((own_id, other_id, f"{pair['similarity']:.2f}", labels, own_text, other_text))
    lead = (
        f"{near['how']}. They are not removed, because many data sets have them by nature; but many make a test too "
        "easy. Some are shown, differing labels first; all across splits are in data/near_duplicates.jsonl."
    )
    return Section("Near duplicates", lead, tables=[Table(headers, rows)])


def _exact(audit: dict[str, Any]) -> str:
    if not (n := sum(audit["across"].values())):
        return "No text stands in two splits word for word."
    then = "were dropped from the earlier one" if sum(audit["dropped"].values()) else "were left in both, as asked"
    return f"In {n:,} {'case' if n == 1 else 'cases'} a text stood word for word in two splits; they {then}."


def _near(near: dict[str, Any]) -> str:
    n, of = near["across"].get("train–test", 0), near["compared"].get("test", 0)
    share, conflicts = percent(n / of if of else 0.0), near["conflicting_labels"]
    labels = (
        f"texts of all splits with a near duplicate of another label: {conflicts:,}"
        if conflicts
        else "no labels conflict"
    )
    return f"Test texts with a near duplicate in train: {n:,} of {of:,} ({share}); {labels}."


def _across(exact: dict[str, int], near: dict[str, Any] | None) -> Table:
    headers = ("splits", "exact duplicates", "near duplicates")
    found = near["across"] if near else {}
    return Table(headers, [(key, f"{n:,}", f"{found[key]:,}" if key in found else "–") for key, n in exact.items()])


def _in_words(name: str, attack: Attack) -> str:
    """Describe an AUC: how often an attacker picks the training row out of a training row and another."""
    low, high = attack.ci95
    meaning = "; chance gives 50" if low > 0.5 else ", not significantly more than the 50 of chance"
    if high < 0.5:
        meaning = "; it is more confident on rows outside training, so train and test differ in kind"
    return (
        f"Of a row that the {name} was trained on and one that it was not, its confidence picks out the first in "
        f"{100 * attack.auc:.0f} of 100 cases (95 % interval {100 * low:.0f} to {100 * high:.0f}){meaning}."
    )


def _figure(rows: list[tuple[str, str, Attack]]) -> Figure:
    drawn = [Bar(f"{name}, by {score}", a.auc, a.ci95, f"{a.auc:.2f}", 0.5, i % 8)
             for i, (name, score, a) in enumerate(rows)]  # fmt: skip
    reach = (0.5, *(bound for *_, attack in rows for bound in attack.ci95))
    axis = Axis("AUC; 0.5 gives nothing away", "{:g}".format, reach=reach)
    chart = bars("AUC of confidence between training rows and others, with 95 % intervals", drawn, axis)
    headers = ("model", "attacked by", "AUC [95 %]", "best TPR − FPR", "by chance up to", "training rows", "others")
    cells = [
        (name, score, f"{a.auc:.3f} [{a.ci95[0]:.3f}–{a.ci95[1]:.3f}]", f"{a.advantage:.3f}", f"{a.by_chance:.3f}",
         f"{a.members:,}", f"{a.others:,}")
        for name, score, a in rows
    ]  # fmt: skip
    return Figure("Membership inference by a threshold", chart, Table(headers, cells))
