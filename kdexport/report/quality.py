"""Sections on quality: the metric, classes, calibration, differences, training."""

import math

from kdexport.errors import counted
from kdexport.report.charts import Axis, Bar, Point, Series, bars, plot
from kdexport.report.page import Figure, Section, Table
from kdexport.report.table import deviation, further, helped, keeps, metric_of, percent, score, scored, tick
from kdexport.results import ClassScore, Distillation, Report
from kdexport.tasks.metrics import Metric

_WORST_CLASSES = 20


def quality(r: Report) -> Section | None:
    """Show the metric with intervals, and the gain by distillation."""
    d = r.distillation
    if d is None:
        return None
    metric = metric_of(r)
    named = [("teacher", d.teacher), ("student, PyTorch", d.student)]
    named += [("the same student on labels alone", d.baseline)] if d.baseline else []
    named += [(v.name, v.metric) for v in r.variants if v.model == "student" and v.file and v.metric]
    drawn = [Bar(name, m.value, m.ci95, score(metric, m.value), m.value, i % 8) for i, (name, m) in enumerate(named)]
    better = "" if metric.higher_is_better else " (lower is better)"
    bounds = tuple(bound for _, m in named for bound in m.ci95)  # of test rows: no busy machine widens them
    axis = Axis(f"{r.metric}{better}", lambda v: tick(v, metric), reach=bounds)
    chart = bars(f"{r.metric} with 95 % intervals", drawn, axis)
    rows = [(name, scored(metric, m), str(m.n)) for name, m in named]
    lead = f"It {keeps(r, d)} ({counted(d.teacher.n, 'row')}). "
    if d.baseline and d.gain_points is not None:
        lead += f"Against the same student trained on labels alone, distillation {helped(metric, d.gain_points)}"
        lead += f"{_certainty(metric, d)}."
    headers = ("model or file", f"{r.metric} [95 %]", "rows")
    figure = Figure("With 95 % intervals", chart, Table(headers, rows))
    return Section(f"How good: {r.metric}", lead, [figure], _further(r, d), brief=True)


def _certainty(metric: Metric, d: Distillation) -> str:
    """Say whether a gain is significant: by McNemar's test for a fraction of rows, else by the metric's interval."""
    if d.gain_ci95 is None:
        return ""
    digits = 3 if metric.kind == "number" else 1
    low, high = d.gain_ci95
    interval = f", 95 % interval {low:+.{digits}f} to {high:+.{digits}f}".replace("-", "−")
    significant = low > 0 or high < 0
    if metric.kind == "fraction" and d.gain_mcnemar_p is not None:
        significant = d.gain_mcnemar_p < 0.05
        interval += f" (McNemar p = {d.gain_mcnemar_p:.2g})"
    return f"{interval}, {'beyond doubt' if significant else 'which is not statistically significant'}"


def _further(r: Report, d: Distillation) -> list[Table]:
    """Return the other metrics, of models in PyTorch and of files."""
    titles = {"student": "student, PyTorch", "baseline": "the same student on labels alone"}
    found = [(titles.get(name, name), metrics) for name, metrics in d.further.items()]
    found += [(v.name, v.further) for v in r.variants if v.model == "student" and v.file and v.further]
    names = list(dict.fromkeys(name for _, metrics in found for name in metrics))
    rows = [(name, *(further(key, metrics.get(key)) for key in names)) for name, metrics in found]
    return [Table(("model or file", *names), rows)] if names else []


def classes(r: Report) -> Section | None:
    """Show the recall of each class, worst first."""
    if not r.evidence or not r.evidence.classes:
        return None
    worst = r.evidence.classes[:_WORST_CLASSES]
    drawn = []
    for c in worst:
        recalls = f"teacher {percent(c.teacher_recall, 0)} → student {percent(c.student_recall, 0)}"
        style = 1 if c.student_recall < c.teacher_recall else 2
        drawn.append(
            Bar(c.label, c.student_recall, None, f"{recalls}, {counted(c.rows, 'row')}", c.teacher_recall, style)
        )
    axis = Axis("recall, from teacher to student", tick)
    chart = bars("Recall of teacher and student by class", drawn, axis)
    rows = [
        (c.label, str(c.rows), percent(c.teacher_recall), percent(c.student_recall), percent(c.agreement))
        for c in r.evidence.classes
    ]
    headers = ("class", "rows", "teacher", "student", "agree")
    few = f"; the worst {_WORST_CLASSES}, the table has all" if len(rows) > _WORST_CLASSES else ""
    figure = Figure(f"Recall, worst first{few}", chart, Table(headers, rows))
    return Section("Class by class", _worst(r.evidence.classes), [figure], brief=True)


def _worst(found: list[ClassScore]) -> str:
    """Name the classes that lost the most recall, and the one with the lowest."""
    lost = [
        f"{c.label} ({percent(c.teacher_recall)} → {percent(c.student_recall)} of {counted(c.rows, 'row')})"
        for c in found[:3]
        if c.student_recall < c.teacher_recall
    ]
    least = min(found, key=lambda c: (c.student_recall, c.label))
    return (
        f"{'Most recall was lost in ' + ', '.join(lost) if lost else 'No class lost recall'}; the student's lowest is "
        f"that of {least.label}: {percent(least.student_recall)} of {counted(least.rows, 'row')}."
    )


def calibration(r: Report) -> Section | None:
    """Show accuracy by confidence."""
    if not r.evidence or not r.evidence.calibration:
        return None
    found = r.evidence.calibration
    series, rows = [], []
    for name, c in found.items():
        points, total = [], sum(b.rows for b in c.bins)
        for b in c.bins:
            confidence, accuracy = percent(b.confidence), percent(b.accuracy)
            tip = f"{name}: {confidence} confidence, {accuracy} accuracy, {counted(b.rows, 'row')}"
            points.append(Point(b.confidence, b.accuracy, tip=tip, radius=20 * math.sqrt(b.rows / total)))
            rows.append((name, confidence, accuracy, str(b.rows)))
        series.append(Series(name, points, "dots"))
    series.append(Series("ideal", [Point(0.0, 0.0), Point(1.0, 1.0)]))
    axis = Axis("confidence", tick, reach=(0.0, 1.0))
    chart = plot("Accuracy by confidence", series, axis, axis._replace(label="accuracy"))
    errors = ", ".join(f"{name} {percent(c.ece)}" for name, c in found.items())
    lead = f"Expected calibration error: {errors}. Pale areas are proportional to the rows; few rows are noisy."
    figure = Figure("Accuracy by confidence", chart, Table(("model", "confidence", "accuracy", "rows"), rows))
    return Section("Calibration", lead, [figure])


def differences(r: Report) -> Section | None:
    """Show the most confident disagreements of teacher and student."""
    if not r.evidence or not r.evidence.examples:
        return None
    rows = [
        (e.id, e.label, *(f"{a.label} ({percent(a.score, 0)})" for a in (e.teacher, e.student)), e.text)
        for e in r.evidence.examples
    ]
    lead = "The test rows on which both are most confident, and disagree."
    table = Table(("row", "label", "teacher", "student", "text"), rows)
    return Section("Where teacher and student differ", lead, tables=[table])


def training(r: Report) -> Section | None:
    """Show loss and validation metric by epoch."""
    d = r.distillation
    if d is None or not d.student_curve:
        return None
    curves = {"distilled": d.student_curve} | ({"labels alone": d.baseline_curve} if d.baseline_curve else {})
    figures = []
    for key, caption in (("validation", f"{r.metric} on validation"), ("loss", "Loss (of different kinds)")):
        known = {name: [(e["epoch"], e[key]) for e in curve if key in e] for name, curve in curves.items()}
        series = [Series(name, [Point(*one) for one in curve]) for name, curve in known.items()]
        rows = [(name, *(f"{value:.3f}" for _, value in curve)) for name, curve in known.items()]
        epochs = max(len(row) for row in rows) - 1
        headers = ("student", *(f"epoch {i + 1}" for i in range(epochs)))
        axes = Axis("epoch", least=1.0), Axis(key, "{:.4g}".format)
        chart = plot(f"{caption} by epoch", series, *axes)
        table = Table(headers, [(*row, *[""] * (epochs + 1 - len(row))) for row in rows])
        figures.append(Figure(caption, chart, table))
    lead = f"Loss {d.loss}, temperature {d.temperature}, alpha {d.alpha}; {d.origin}."
    return Section("Training", lead, figures, [t for t in (_terms(d), _seeds(metric_of(r), d)) if t])


def _terms(d: Distillation) -> Table | None:
    """Return the size of each term of the loss, and its share of the gradient, by epoch."""
    names = [key.removeprefix("terms/") for key in d.student_curve[-1] if key.startswith("terms/")]
    if len(names) < 2:
        return None
    rows = [
        (f"{e['epoch']:.0f}", *(f"{e[f'terms/{n}']:.3g} ({percent(e.get(f'shares/{n}'), 0)})" for n in names))
        for e in d.student_curve
        if all(f"terms/{n}" in e for n in names)
    ]
    return Table(("epoch", *(f"{name}: size (share of the gradient)" for name in names)), rows)


def _seeds(metric: Metric, d: Distillation) -> Table | None:
    found = [(n, s) for n, s in (("distilled", d.student_seeds), ("labels alone", d.baseline_seeds)) if s]
    if not found:
        return None
    rows = [
        (name, score(metric, s.mean, 2), deviation(metric, s), ", ".join(score(metric, v, 2) for v in s.values))
        for name, s in found
    ]
    return Table(("over seeds, in PyTorch", "mean", "deviation", "each"), rows)
