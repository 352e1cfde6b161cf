"""Reports of runs that never were, for metrics of every kind and direction."""

from __future__ import annotations

from kdexport.results import Conditions, Distillation, Latency, Metric, Ratio, Report, Variant

BITS = {"metric": "bits per byte", "metric_higher_is_better": False, "metric_kind": "number"}
F1 = {"metric": "entity F1", "metric_kind": "ratio"}


def variant(name, value, ci95, p50=1.0, **changes):
    """A variant of which the metric, and a latency in ms, are known."""
    latency = Latency(
        p50=p50, p90=p50, p99=1.5 * p50, p50_ci95=(0.98 * p50, 1.02 * p50), p99_ci95=(1.4 * p50, 1.6 * p50),
        samples=2000, rounds=5, round_p50=[p50] * 5,
    )  # fmt: skip
    values = {
        "model": name.partition("-")[0], "runtime": "onnxruntime", "device": "cpu", "precision": "fp32",
        "graph": "plain", "file": "onnx/model.onnx", "sha256": None, "size_bytes": 10**6, "latency_ms": latency,
        "metric": Metric(value, ci95, 1000), "speedup_p50": Ratio(5.0 / p50, (4.8 / p50, 5.2 / p50), "faster"),
    }  # fmt: skip
    return Variant(name=name, **values | changes)


def made(variants, metric, gain=None, gain_ci95=None, **changes):
    """A report whose first variant is the teacher, whose last one is recommended, and which had a baseline."""
    teacher, best = variants[0], variants[-1]
    distilled = Distillation(
        teacher=teacher.metric, student=best.metric, baseline=best.metric, retention=0.95, gain_points=gain,
        gain_ci95=gain_ci95, ratio=0.5, temperature=2.0, alpha=0.5, origin="first weights", model="tiny",
        student_curve=[], baseline_curve=[],
    )  # fmt: skip
    values = {
        "kdexport": "0", "task": "token-classification", "labels": [], "recommended": best.name, "reason": "it is good",
        "variants": variants, "distillation": distilled, "environment": {"cpu": "A CPU", "cores_allowed": 2},
        "bench": Conditions(rounds=5, round_seconds=1.0, rows=256, clock="text to answer"),
    }  # fmt: skip
    return Report(**values | metric | changes)
