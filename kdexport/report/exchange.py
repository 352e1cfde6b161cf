"""Reports from and to other tools: pytest-benchmark's JSON, MLflow, TensorBoard."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from kdexport.errors import RunError, SpecError, first_line
from kdexport.files import write_json
from kdexport.results import ENOUGH_ROUNDS, QUANTILES, Conditions, Latency, Report, Variant, read_report

_PROCESSES_DIFFER = 0.05


def read_any(path: Path) -> Report:
    """Read the report of a run's or bench's folder, a report.json, or pytest-benchmark's JSON.

    Raises:
        RunError: it is none of them, or can't be read.
    """
    if path.is_dir():
        return read_report(path / "report.json")
    try:
        raw = msgspec.json.decode(path.read_bytes())
    except OSError:
        return read_report(path)  # raises our error
    except msgspec.DecodeError as error:
        raise RunError(f"{path} is no report that can be read: {error}", "Name a run, or a report.json") from None
    return from_pytest_benchmark(raw, path) if isinstance(raw, dict) and "benchmarks" in raw else read_report(path)


def from_pytest_benchmark(raw: dict[str, Any], path: Path) -> Report:
    """Convert a pytest-benchmark file to a report of variants that have only a latency.

    Its rounds are calls in one process, so the interval of the median combines the notch of a box plot, ± 1.57 · IQR /
    √n (McGill, Tukey and Larsen 1978), and 5 %, by which the medians of identical processes differ. Fewer than three
    have none.
    """
    try:
        variants, machine = [_variant(found) for found in raw["benchmarks"]], raw["machine_info"]
        cpu = machine.get("cpu", {})
    except (KeyError, TypeError, AttributeError) as error:
        hint = "Write it with --benchmark-json"
        raise RunError(f"{path} is no pytest-benchmark file: it lacks {error}", hint) from None
    name, cores = cpu.get("brand_raw", machine.get("processor", "")), cpu.get("count")
    facts = {"cpu": name, "cores_allowed": cores, "os": machine.get("release", "")}
    facts["hardware"] = machine.get("hardware", f"{name}, {cores}")
    return Report(
        kdexport="", task="pytest-benchmark", metric="", labels=[], recommended=None, reason="", variants=variants,
        bench=Conditions(reference="", rounds=1, round_seconds=0, rows=0, clock="pytest-benchmark"), environment=facts,
    )  # fmt: skip


def _variant(found: dict[str, Any]) -> Variant:
    stats = {key: 1e3 * value for key, value in found["stats"].items() if key in ("median", "iqr")}
    data = 1e3 * np.array(found["stats"].get("data") or [])
    rounds = found["stats"]["rounds"]
    half = math.hypot(1.57 * stats["iqr"] / max(1, rounds) ** 0.5, _PROCESSES_DIFFER * stats["median"])
    latency = Latency(
        p50=stats["median"],
        p50_ci95=(max(1e-9, stats["median"] - half), stats["median"] + half) if rounds >= ENOUGH_ROUNDS else None,
        p90=float(np.quantile(data, 0.9, method="higher")) if len(data) >= 100 else None,
        p99=float(np.quantile(data, 0.99, method="higher")) if len(data) >= 1000 else None, samples=rounds, rounds=1,
        quantiles=np.quantile(data, QUANTILES, method="higher").tolist() if len(data) else [],
    )  # fmt: skip
    return Variant(
        name=found["fullname"], model=found["name"], runtime="python", device="cpu", precision="", graph="",
        file=None, sha256=None, size_bytes=None, latency_ms=latency,
    )  # fmt: skip


def write_pytest_benchmark(report: Report, samples: Path, out: Path) -> None:
    """Write a file for `pytest-benchmark compare`: one benchmark a variant, in seconds, from all samples."""
    benchmarks = []
    with np.load(samples) as stored:
        for v in report.variants:
            data = [stored[key] for key in stored.files if key.rpartition("/")[0] == v.name]
            if data:
                benchmarks.append(_benchmark(v, np.concatenate(data).astype(float) / 1e3))
    facts = report.environment
    commit = facts.get("git_commit") or "unversioned"
    machine = {
        "node": "", "processor": "", "machine": "", "hardware": facts.get("hardware"),
        "cpu": {"brand_raw": facts.get("cpu"), "count": facts.get("cores_allowed")},
        "python_version": facts.get("python"),
    }  # fmt: skip
    whole = {
        "machine_info": machine, "commit_info": {"id": commit, "dirty": "dirty" in commit}, "benchmarks": benchmarks,
        "datetime": time.strftime("%Y-%m-%dT%H:%M:%S"), "version": "5.1.0",
    }  # fmt: skip
    write_json(out, whole)


def _benchmark(v: Variant, seconds: Any) -> dict[str, Any]:
    q1, median, q3 = (float(np.quantile(seconds, q)) for q in (0.25, 0.5, 0.75))
    mean, deviation = float(seconds.mean()), float(seconds.std(ddof=1)) if len(seconds) > 1 else 0.0
    low, high = q1 - 1.5 * (q3 - q1), q3 + 1.5 * (q3 - q1)
    outside = int(((seconds < low) | (seconds > high)).sum())
    beyond = int((abs(seconds - mean) > deviation).sum())
    found = {
        "min": float(seconds.min()), "max": float(seconds.max()), "mean": mean, "stddev": deviation, "median": median,
        "q1": q1, "q3": q3, "iqr": q3 - q1, "iqr_outliers": outside, "stddev_outliers": beyond,
        "outliers": f"{beyond};{outside}", "ld15iqr": float(seconds[seconds >= low].min()),
        "hd15iqr": float(seconds[seconds <= high].max()), "ops": 1 / mean, "total": float(seconds.sum()),
        "rounds": len(seconds), "iterations": 1,
    }  # fmt: skip
    return {
        "group": None, "name": v.name, "fullname": v.name, "params": None, "param": None, "stats": found,
        "extra_info": {"p90_ms": v.latency_ms and v.latency_ms.p90, "p99_ms": v.latency_ms and v.latency_ms.p99},
        "options": {"disable_gc": True, "warmup": True, "timer": "perf_counter", "min_rounds": 1, "max_time": 0,
                    "min_time": 0},
    }  # fmt: skip


def log_to(report: Report, to: str, folder: Path) -> None:
    """Log the figures to MLflow (`mlflow`, `mlflow:URI`) or TensorBoard (`tensorboard:FOLDER`).

    Raises:
        SpecError: `to` is neither, its package is not installed, or it refuses.
    """
    kind, _, where = to.partition(":")
    trackers = {"mlflow": _log_to_mlflow, "tensorboard": _log_to_tensorboard}
    if kind not in trackers:
        raise SpecError(f"--to {to!r} is no place to log to", f"It is one of: {', '.join(trackers)}")
    try:
        trackers[kind](report, where, folder)
    except ModuleNotFoundError as error:
        raise SpecError(f"the package {error.name!r} is not installed", f"pip install {kind}") from None
    except Exception as error:  # MLflow's own class, with several lines
        raise SpecError(f"{kind} refuses {where or 'its default place'}: {first_line(error)}") from None


def _log_to_mlflow(report: Report, where: str, folder: Path) -> None:
    import mlflow

    if where:
        mlflow.set_tracking_uri(where)
    mlflow.set_experiment("kdexport")
    with mlflow.start_run(run_name=folder.resolve().name):
        params = dict(_flat(report.spec))
        if report.distillation:  # a search may have chosen the student
            params["student.model"] = report.distillation.model
        mlflow.log_params({key: str(value)[:500] for key, value in params.items()})
        mlflow.log_metrics({name.replace("+", "plus"): value for name, value in scalars(report)})
        for file in ("report.html", "report.json"):
            mlflow.log_artifact(str(folder / file))


def _log_to_tensorboard(report: Report, where: str, folder: Path) -> None:
    from tensorboard.summary import Writer

    writer = Writer(str(Path(where or "runs/tensorboard") / folder.resolve().name))
    for name, value in scalars(report):
        writer.add_scalar(name, value, 0)
    found = report.distillation
    curves = {"student": found.student_curve, "baseline": found.baseline_curve} if found else {}
    for name, curve in curves.items():
        for point in curve:
            for key in sorted(point.keys() - {"epoch"}):
                writer.add_scalar(f"training/{name}/{key}", point[key], int(point["epoch"]))
    writer.close()


def scalars(report: Report) -> Iterator[tuple[str, float]]:
    """Yield the headline figures as (`variant/name`, value)."""
    for v in report.variants:
        found: dict[str, float | None] = {
            "metric": v.metric.value if v.metric else None,
            "agreement": v.agreement,
            "size_mb": v.size_bytes / 1e6 if v.size_bytes else None,
            "speedup_p50": v.speedup_p50.value if v.speedup_p50 else None,
        }
        if v.latency_ms:
            found |= {"p50_ms": v.latency_ms.p50, "p90_ms": v.latency_ms.p90, "p99_ms": v.latency_ms.p99}
            found["real_time_factor"] = v.latency_ms.real_time_factor
        if v.footprint:
            found |= {"rss_mb": v.footprint.rss_mb, "cold_ms": v.footprint.cold_ms}
        yield from ((f"{v.name}/{key}", float(value)) for key, value in found.items() if value is not None)


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
