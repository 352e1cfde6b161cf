"""Reports to and from other tools, by those tools."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kdexport.bench.engine import read_rounds
from kdexport.errors import RunError, SpecError
from kdexport.report.exchange import log_to, read_any, scalars, write_pytest_benchmark
from kdexport.results import read_report


@pytest.fixture(scope="module")
def report(finished):
    return read_report(finished / "report.json")


def test_pytest_benchmark_reads_what_we_write_and_we_read_it_back(report, finished, tmp_path):
    write_pytest_benchmark(report, finished / "bench" / "samples.npz", tmp_path / "out.json")
    command = [Path(sys.executable).with_name("pytest-benchmark"), "compare", tmp_path / "out.json"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "student-int8" in shown.stdout
    back = read_any(tmp_path / "out.json")
    for variant in report.variants:
        every = np.concatenate(read_rounds(finished / "bench", variant.name))
        assert back.variant(variant.name).latency_ms.p50 == pytest.approx(np.median(every), rel=1e-4)
        assert back.variant(variant.name).latency_ms.samples == variant.latency_ms.samples


@pytest.mark.parametrize("rounds", [2, 3])
def test_calls_too_few_for_an_interval_have_none(rounds, tmp_path):
    stats = {"median": 1e-3, "iqr": 1e-4, "rounds": rounds}
    benchmarks = [{"fullname": "test_it.py::test_sum", "name": "test_sum", "stats": stats}]
    (tmp_path / "x.json").write_text(json.dumps({"benchmarks": benchmarks, "machine_info": {}}))
    (found,) = read_any(tmp_path / "x.json").variants
    assert (found.latency_ms.p50_ci95 is None) == (rounds < 3)


def test_a_real_pytest_benchmark_run_can_be_gated(tmp_path, kdexport):
    (tmp_path / "test_it.py").write_text("def test_sum(benchmark):\n    benchmark(sum, range(1000))\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--benchmark-json=new.json",
        "test_it.py",
    ]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command.append("--benchmark-max-time=0.2")
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, env=alone)
    stored = json.loads((tmp_path / "new.json").read_text())
    for benchmark in stored["benchmarks"]:
        for key in ("median", "iqr"):
            benchmark["stats"][key] /= 2
    (tmp_path / "old.json").write_text(json.dumps(stored))
    found = kdexport("compare", tmp_path / "old.json", tmp_path / "new.json", "--fail-if", "p50>+50%")
    assert found.returncode == 3, found.stderr
    assert "test_it.py::test_sum" in found.stdout


def test_a_broken_pytest_benchmark_file_is_named(tmp_path):
    (tmp_path / "x.json").write_text('{"benchmarks": [{"name": "x"}]}')
    with pytest.raises(RunError, match="is no pytest-benchmark file: it lacks 'stats'"):
        read_any(tmp_path / "x.json")


def test_tensorboard_gets_every_number_and_the_curves(report, finished, tmp_path):
    log_to(report, f"tensorboard:{tmp_path}", finished)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / finished.name), size_guidance={"tensors": 0})
    events.Reload()
    tags = set(events.Tags()["tensors"])
    assert {name for name, _ in scalars(report)} <= tags
    assert len(events.Tensors("training/student/loss")) == len(report.distillation.student_curve)


@pytest.mark.filterwarnings("ignore")
def test_mlflow_gets_every_number_and_the_report(report, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    log_to(report, f"mlflow:file://{tmp_path}/mlruns", finished)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"file://{tmp_path}/mlruns")
    (run,) = client.search_runs([client.get_experiment_by_name("kdexport").experiment_id])
    assert run.data.metrics[f"{report.recommended}/p50_ms"] == pytest.approx(
        report.variant(report.recommended).latency_ms.p50
    )
    assert run.data.params["student.model"] == report.distillation.model == "tiny"
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"report.html", "report.json"}


def test_a_place_that_is_none_is_refused(report, finished):
    with pytest.raises(SpecError, match=r"--to 'wandb' is no place to log to\. It is one of: mlflow, tensorboard"):
        log_to(report, "wandb", finished)
