import numpy as np
import pytest

from kdexport import spec
from kdexport.bench.engine import bench, ratio, read_measured
from kdexport.bench.machine import environment
from kdexport.bench.targets import Target
from kdexport.data import read_rows
from kdexport.errors import RunError


def test_ratios_are_paired_by_round_so_drift_cancels():
    found = ratio([10, 20, 40], [1, 2, 4])
    assert found.value == pytest.approx(10)
    assert found.ci95 == pytest.approx((10, 10))


def test_the_interval_of_a_ratio_is_students_t_over_rounds():
    from scipy.stats import t

    logs = np.log([10, 11, 12, 9, 10])
    half = t.ppf(0.975, 4) * np.std(logs, ddof=1) / np.sqrt(5)
    found = ratio([10, 11, 12, 9, 10], [1, 1, 1, 1, 1])
    assert found.ci95 == pytest.approx((np.exp(logs.mean() - half), np.exp(logs.mean() + half)), rel=1e-3)


def test_the_same_file_twice_comes_out_the_same(finished, tmp_path):
    """A/A: no claim is made about milliseconds, only that the engine doesn't tell a file from itself."""
    file = str(finished / "export" / "model_quantized.onnx")
    twins = [Target(name, "onnxruntime", str(finished / "student"), file) for name in ("a", "b")]
    bench(spec.Bench(rounds=5, round_seconds=0.3), twins, read_rows(finished / "data", "test"), "a", 0, tmp_path)
    measured = read_measured(tmp_path)
    assert 0.5 < measured.speedup["b"].value < 2
    latency = measured.latency["a"]
    assert latency.rounds == 5
    assert latency.p99 is not None
    assert latency.p50 <= latency.p90 <= latency.p99
    assert latency.samples == sum(len(x) for name, x in np.load(tmp_path / "samples.npz").items() if name[0] == "a")


def test_p99_is_left_blank_where_samples_are_too_few(finished):
    measured = read_measured(finished / "bench")
    for latency in measured.latency.values():
        assert (latency.p99 is None) == (latency.samples < 1000)


def test_a_target_that_stops_is_named(finished, tmp_path):
    target = Target("broken", "onnxruntime", str(finished / "student"), str(tmp_path / "none.onnx"))
    with pytest.raises(RunError, match=r"broken stopped while it was measured: .*none\.onnx can't be loaded"):
        bench(spec.Bench(rounds=3), [target], read_rows(finished / "data", "test"), "broken", 0, tmp_path)


def test_the_environment_names_the_machine():
    found = environment()
    assert found["cpu"]
    assert 1 <= found["cores_allowed"] <= found["cores"]
    assert found["packages"]["onnxruntime"]
