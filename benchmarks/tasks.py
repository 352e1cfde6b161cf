"""The README's table of tasks, a row a kept report: what one `kdexport run` of each example gave.

python benchmarks/tasks.py
"""

from __future__ import annotations

from pathlib import Path

from kdexport.report.table import between, further, percent, trimmed
from kdexport.results import Report, Variant, read_report

BITS = "bits per byte"  # beside token accuracy in reports of before
RESULTS = Path(__file__).parent / "results"
# report → the task and data as the README names them
KEPT = {
    "clinc150.json": "texts: clinc150, 150 intents",
    "stsb.json": "embeddings: STS-B, Spearman's correlation",
    "cranfield.json": "rankings: Cranfield, nDCG@10",
    "wnut17.json": "tokens: WNUT 17, entity F1",
    "shakespeare.json": "language model: Shakespeare, bits per byte",
    "fashion-mnist.json": "images: Fashion-MNIST",
    "fsdd.json": "sound: Free Spoken Digits",
}
HEADERS = ("task and data", "teacher", "student", "labels alone", "teacher's size", "student's", "p50", "faster [95 %]")


def rows() -> list[tuple[str, ...]]:
    """One tuple of cells a report that is there, in the order of `HEADERS`."""
    return [_row(name, read_report(RESULTS / file), file) for file, name in KEPT.items() if (RESULTS / file).exists()]


def _row(name: str, report: Report, file: str) -> tuple[str, ...]:
    best, teacher = report.variant(report.recommended), report.variant("teacher-torch")
    found = report.distillation
    assert found
    assert best.latency_ms
    assert best.speedup_p50
    baseline = found.further.get("baseline", {}).get(BITS)
    alone = percent(found.baseline.value) if found.baseline else "–"
    p50, faster = best.latency_ms.p50, best.speedup_p50
    return (
        f"{name} ([report](benchmarks/results/{file}))",
        _metric(teacher),
        f"{_metric(best)} ({best.precision})",
        further(BITS, baseline) if baseline else alone,
        _size(teacher.size_bytes),
        _size(best.size_bytes),
        f"{trimmed(p50, best.latency_ms.p50_ci95)} ms",
        f"{trimmed(faster.value, faster.ci95)}×{between(faster.ci95, faster.value)}",
    )


def _metric(variant: Variant) -> str:
    bits = variant.further.get(BITS)
    return further(BITS, bits) if bits else percent(variant.metric.value if variant.metric else None)


def _size(size: int | None) -> str:
    assert size
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


if __name__ == "__main__":
    lines = [HEADERS, ("---", *["--:"] * (len(HEADERS) - 1)), *rows()]
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))
