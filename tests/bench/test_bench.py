import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import msgspec
import numpy as np
import psutil
import pytest
from near import apart
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from kdexport import spec
from kdexport.bench import engine, machine, warnings
from kdexport.bench.engine import bench, read_measured, read_rounds
from kdexport.bench.machine import environment
from kdexport.bench.process import Crashed, call
from kdexport.bench.subjects import Target, of_file, of_model, open_target
from kdexport.data import read_rows
from kdexport.errors import RunError
from kdexport.export import export_student
from kdexport.pipeline.bench import labelled_rows, measure
from kdexport.pipeline.run import run as kdexport_run
from kdexport.report import page_of
from kdexport.report.page import html, markdown
from kdexport.report.terminal import summary
from kdexport.results import Control, Ratio, machine_name
from kdexport.runtime.predictor import Predictor
from kdexport.tasks import load_task, task_class
from kdexport.tasks.config import TaskConfig

QUICK = spec.Bench(rounds=3, round_seconds=0.2, precision=None, batch_sizes=(8,))


@pytest.fixture(scope="module")
def rows(finished):
    return read_rows(finished / "data", "test")


@pytest.fixture(scope="module")
def file(finished):
    return Target("int8", "onnxruntime", str(finished / "student"), str(finished / "export" / "model_quantized.onnx"))


def named(target, name, **changes):
    return msgspec.structs.replace(target, name=name, **changes)


def test_the_same_file_twice_comes_out_the_same_and_a_slower_one_slower(file, rows, tmp_path):
    """The engine's check of itself, and a slowdown that it must find; each in turns with the other."""
    how = msgspec.structs.replace(QUICK, rounds=8, round_seconds=0.3, precision=0.06, time_limit_s=30)
    found = bench(how, [file, named(file, "late", slower=0.3)], rows, "int8", 0, tmp_path, control="int8", sweep=False)
    assert found.speedup["late"].verdict == "slower"
    assert 0.6 < found.speedup["late"].value < 0.95
    low, high = found.conditions.control.ratio.ci95
    assert low < 1.05, found.conditions.control
    assert high > 0.95, found.conditions.control
    assert set(found.latency) == {"int8", "late"}  # the twin is a check, not a result


def test_what_is_measured_is_kept_to_the_last_sample(file, rows, tmp_path):
    bench(QUICK, [file], rows, "int8", 0, tmp_path)
    found = read_measured(tmp_path)
    latency, footprint = found.latency["int8"], found.footprint["int8"]
    kept = read_rounds(tmp_path, "int8")
    assert len(kept) == latency.rounds == 3
    assert sum(map(len, kept)) == latency.samples
    assert latency.p50 == pytest.approx(np.median([np.median(one) for one in kept]), rel=0.2)
    assert latency.p50 <= latency.p90 <= (latency.p99 or latency.quantiles[-1])  # a busy machine gives few samples
    assert latency.quantiles[-1] == pytest.approx(max(one.max() for one in kept), rel=1e-5)
    assert 50 < footprint.cold_ms < 60_000
    assert 20 < footprint.rss_mb <= footprint.peak_rss_mb
    assert footprint.cores_used < 1.2
    assert found.conditions.tokens["p50"] <= 32
    assert found.conditions.durations == {}  # texts don't last, and nothing writes what it hears
    assert latency.real_time_factor is latency.encoder_p50 is latency.first_token_p50 is None
    assert not [cell for cell in found.cells["int8"] if cell.scenario == "duration"]


def test_batches_lengths_and_threads_are_measured_beside_the_single_stream(file, rows, tmp_path):
    found = bench(msgspec.structs.replace(QUICK, threads=(1, 2)), [file], rows, "int8", 0, tmp_path)
    cells = {(cell.scenario, cell.at): cell for cell in found.cells["int8"]}
    assert set(cells) == {("batch", 8), ("threads", 2), *(("length", n) for n in (8, 16, 32))}
    assert cells["batch", 8].per_second == pytest.approx(8e3 / cells["batch", 8].p50_ms)
    assert cells["length", 8].p50_ms < cells["length", 32].p50_ms
    assert all(cell.p50_ci95[0] <= cell.p50_ms <= cell.p50_ci95[1] for cell in cells.values())


def test_p99_is_left_blank_where_samples_are_too_few(finished):
    measured = read_measured(finished / "bench")
    for latency in measured.latency.values():
        assert (latency.p99 is None) == (latency.samples < 1000)


def test_a_target_that_stops_is_named_and_the_others_results_stay(file, rows, tmp_path):
    broken = named(file, "broken", model=str(tmp_path / "none.onnx"))
    found = bench(QUICK, [file, broken], rows, "int8", 0, tmp_path)
    assert found.conditions.failed["broken"].startswith("stopped while it was measured: ")
    assert "none.onnx can't be loaded" in found.conditions.failed["broken"]
    assert set(found.latency) == {"int8"}
    with pytest.raises(RunError, match=r"nothing could be measured: broken stopped .*none\.onnx can't be loaded"):
        bench(QUICK, [broken], rows, "broken", 0, tmp_path)


def test_a_process_that_is_killed_is_said_to_be(tmp_path, monkeypatch):
    (tmp_path / "falls.py").write_text("import os; os.kill(os.getpid(), 9)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(Crashed, match=r"was killed while it was measured \(SIGKILL; out of memory\?\)"):
        call("falls", b"", 1)


def test_a_process_that_hangs_is_killed_with_all_it_started(tmp_path, monkeypatch):
    """Its child holds the same pipes open, and would be waited for."""
    (tmp_path / "hangs.py").write_text(
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    monkeypatch.setenv("PYTHONPATH", path)
    with pytest.raises(Crashed, match="hung: it was killed after 8 s without a result"):
        call("hangs", b"", 1, deadline_s=8)
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        if not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.05)
    raise AssertionError("its child lives on")


def test_a_variant_that_hangs_is_dropped_and_said(file, rows, tmp_path, monkeypatch, capfd):
    """A pipe instead of a file: whoever opens it waits for a writer."""
    monkeypatch.setattr(engine, "GRACE_S", 5.0)
    os.mkfifo(tmp_path / "pipe.onnx")
    pipe = named(file, "pipe", model=str(tmp_path / "pipe.onnx"))
    with pytest.raises(RunError, match=r"nothing could be measured: pipe hung: it was killed after 7 s"):
        bench(QUICK, [pipe], rows, "pipe", 0, tmp_path, sweep=False)
    assert "bench: pipe hung" in capfd.readouterr().err


def test_other_runtimes_answer_the_same_and_take_their_turns(finished, rows, file, tmp_path):
    """PyTorch compiled would take minutes of compiling; OpenVINO stands for what can be measured beside."""
    fp32 = finished / "export" / "model.onnx"
    targets = of_file("fp32", finished / "student", fp32, ["onnxruntime", "openvino"], ["cpu"])
    assert [t.name for t in targets] == ["fp32", "fp32-openvino"]
    ours, theirs = (open_target(target, 1) for target in targets)
    arrays = ours.encode(rows[:7])
    assert apart(theirs.run(arrays), ours.run(arrays)) < 1e-3
    found = bench(QUICK, targets, rows, "fp32", 0, tmp_path, sweep=False)
    assert found.speedup["fp32-openvino"].value > 0.1


def test_half_precision_answers_nearly_the_same_at_half_the_size(finished, rows, tmp_path):
    export_student(spec.Export(variants=("fp32", "fp16")), finished / "student", tmp_path)
    task = load_task(finished / "student")
    whole, half = (Predictor(task, tmp_path / name).logits(rows) for name in ("model.onnx", "model_fp16.onnx"))
    assert apart(half, whole) < 0.02
    assert (tmp_path / "model_fp16.onnx").stat().st_size < 0.6 * (tmp_path / "model.onnx").stat().st_size


def test_what_this_machine_has_not_is_left_out_and_said(file, finished, rows, tmp_path, capfd):
    if "CUDAExecutionProvider" in environment()["providers"]:
        pytest.skip("this machine has a GPU")
    on_gpu = of_file(
        "int8", finished / "student", finished / "export" / "model_quantized.onnx", ["onnxruntime"], ["cuda"]
    )
    on_gpu += of_model("student", finished / "student", ["torch"], ["cuda"])
    found = bench(QUICK, [file, *on_gpu], rows, "int8", 0, tmp_path)
    assert found.conditions.left_out == {
        "int8-cuda": "onnxruntime has no CUDAExecutionProvider",
        "student-torch-cuda": "PyTorch sees no CUDA device",
    }
    assert "int8-cuda is left out: onnxruntime has no CUDAExecutionProvider" in capfd.readouterr().err


LABELS = {
    "multi-label": ("a\x1fc", "b", ""),
    "single-label": ("a", "b", "c"),
    "regression": ("1.5", "-2", "0"),
    "token-classification": ("a b", "c c", "a a"),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_every_kind_are_known_to_their_model(kind, capfd):
    """A row's labels are joined, or a number: none of them is one of the model's by itself."""
    name, problem = (kind, "single-label") if kind in ("token-classification",) else ("text-classification", kind)
    made = task_class(name, problem)
    names = ["value"] if kind == "regression" else ["a", "b", "c"]
    config = TaskConfig(task=name, labels=names, inputs=["input_ids"], max_length=8)
    task = made(config, Tokenizer(WordLevel({"x": 0}, unk_token="x")))
    rows = [{"text": "x x", "label": label} for label in LABELS[kind]]
    assert labelled_rows(task, rows, "m") == rows
    assert "not measured" not in capfd.readouterr().err
    assert labelled_rows(task, [*rows, {"text": "x"}], "m") == []
    assert capfd.readouterr().err == ""  # there are no labels, which is no fault
    if kind != "regression":
        assert labelled_rows(task, [*rows, {"text": "x", "label": "d"}], "m") == []
        assert f"the {made.metric.name} of m is not measured: it has no label 'd'" in capfd.readouterr().err
    if kind == "multi-label":  # as a file has them
        assert labelled_rows(task, [{"text": "x", "label": "a\x1fc"}], "m")[0]["label"] == "a\x1fc"


def test_a_time_limit_that_is_too_short_for_any_interval_is_said(file, rows, tmp_path):
    how = msgspec.structs.replace(QUICK, rounds=5, time_limit_s=0.1)
    found = bench(how, [file, named(file, "other")], rows, "int8", 0, tmp_path, sweep=False)
    assert found.latency["int8"].rounds == 1
    assert found.latency["int8"].p50_ci95 is None
    assert found.speedup["other"].verdict == "unsure"
    assert found.conditions.warnings[0].startswith("the time limit of 0.1 s allowed 1 round: too few for any interval")


def test_rounds_go_on_for_ratios_that_are_not_known_well_enough(file, rows, tmp_path):
    how = msgspec.structs.replace(QUICK, rounds=1, precision=1e-4, time_limit_s=15)
    found = bench(how, [file, named(file, "other")], rows, "int8", 0, tmp_path, sweep=False)
    assert 1 < found.latency["other"].rounds < 100


def test_a_machine_too_noisy_to_tell_a_file_from_itself_is_said(finished):
    measured = read_measured(finished / "bench")
    noisy = Control("student-int8", Ratio(1.3, (1.1, 1.5), "faster"))
    measured = msgspec.structs.replace(measured, conditions=msgspec.structs.replace(measured.conditions, control=noisy))
    lines = _warnings(measured)
    assert any(
        "this machine was too noisy: student-int8, measured twice" in line and "1.10–1.50×" in line for line in lines
    )


def _warnings(measured, facts=None):
    samples = {"student-int8": {i: SimpleNamespace(total_us=[1.0] * 40) for i in range(3)}}
    return warnings.of(QUICK, samples, measured, facts or environment())


def test_more_threads_than_asked_for_and_a_busy_machine_are_said(finished):
    measured = read_measured(finished / "bench")
    greedy = {n: msgspec.structs.replace(f, cores_used=1.9) for n, f in measured.footprint.items()}
    starved = {n: msgspec.structs.replace(f, cores_used=0.4) for n, f in measured.footprint.items()}
    lines = _warnings(msgspec.structs.replace(measured, footprint=greedy))
    (line,) = [line for line in lines if line.startswith("1 thread asked for, but some used more cores: ")]
    assert "student-int8 1.9" in line
    lines = _warnings(msgspec.structs.replace(measured, footprint=starved), environment() | {"busy_percent": 80.0})
    (line,) = [line for line in lines if line.startswith("other programs took 80 % of the CPU time just before")]
    assert line.endswith("Measure again when the machine is idle: kdexport bench RUN")
    (line,) = [line for line in lines if line.startswith("the machine was busy and gave less than a core: ")]
    assert line.count("40 %") == len(starved)  # one line, however many variants


def test_the_environment_names_the_machine():
    found = environment()
    assert found["cpu"]
    assert 1 <= found["cores_allowed"] <= found["cores"]
    assert found["packages"]["onnxruntime"]
    assert "CPUExecutionProvider" in found["providers"]


@pytest.mark.slow
def test_a_run_that_is_copied_to_another_machine_is_measured_there_and_names_both(copied, settings, monkeypatch):
    here = machine.identity()
    there = here | {"cpu": "Other CPU", "cores_allowed": 64, "hardware": "other"}
    monkeypatch.setattr(machine, "identity", lambda: there)
    report = kdexport_run(spec.load(None, settings), copied)
    assert read_measured(copied / "bench").environment["cpu"] == "Other CPU"
    trained_by = machine_name(here)
    assert report.machines["student"]["name"] == trained_by
    assert report.machines["bench"] == {
        "name": "Other CPU, 64 cores",
        "hardware": "other",
        "threads": "1",
        "gpu": False,
    }
    lines = summary(report)
    assert any(line.startswith("measured on Other CPU, 64 cores") for line in lines)
    assert f"data, teacher, targets, student, baseline, export, verify: made on {trained_by}" in lines
    drawn = markdown(page_of(report))
    assert "on Other CPU, 64 cores" in drawn
    assert f"made on {trained_by}" in html(page_of(report))
    assert f"with other than 1 threads, or on another machine than {trained_by}" in html(page_of(report))


def test_milliseconds_may_be_compared_only_on_the_same_hardware():
    found = environment()
    assert machine.hardware(found) == found["hardware"]
    assert machine.hardware(found | {"cpu": "another"}) != found["hardware"]
    assert machine.hardware(found | {"cores_allowed": 64}) != found["hardware"]
    assert machine.hardware(found | {"load_1min": 9.0, "mhz": 1}) == found["hardware"]


def test_doctor_prints_the_machine_and_what_to_mind(kdexport):
    shown = kdexport("doctor")
    assert shown.returncode == 0, shown.stderr
    assert environment()["cpu"] in shown.stdout
    found = json.loads(kdexport("doctor", "--json").stdout)
    assert found["hardware"] == environment()["hardware"]
    assert isinstance(found["advice"], list)


def test_advice_follows_the_facts():
    facts = environment() | {"cpu_flags": ["avx2"], "governor": "powersave", "busy_percent": 99.0, "os": "Linux-x86_64"}
    lines = machine.advice(facts)
    assert any("no VNNI" in line for line in lines)
    assert any("governor is powersave" in line for line in lines)
    assert any("99 % of the CPU time is taken" in line for line in lines)


def test_bench_measures_files_and_models_side_by_side(kdexport, finished, tmp_path):
    flags = ["--rounds", 2, "--round-seconds", 0.1, "--precision", 0, "--batch-sizes", 0, "--out", tmp_path / "out"]
    targets = [f"{finished}:int8", finished / "artifact" / "onnx" / "model.onnx", finished / "teacher"]
    targets.append(finished / "student")
    found = kdexport("bench", *targets, "--reference", "teacher-torch", "--price", 0.04, *flags, "--json")
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout)
    by_name = {v["name"]: v for v in report["variants"]}
    assert set(by_name) == {f"{finished.name}-int8", "model", "teacher-torch", "student-torch"}
    assert by_name["teacher-torch"]["speedup_p50"]["value"] == 1
    assert by_name["model"]["metric"] == by_name["student-torch"]["metric"]  # one model, in two runtimes
    assert by_name["model"]["metric"]["n"] == by_name["teacher-torch"]["metric"]["n"] > 0
    assert {"report.json", "report.md", "report.html", "samples.npz"} <= {p.name for p in (tmp_path / "out").iterdir()}
    assert report["command"].startswith("kdexport bench")


BAD = [
    (["bench", "nowhere"], "nowhere does not exist. Name a run, an artifact"),
    (["bench", "{run}", "--data", "{folder}"], "holds no train.csv, .tsv"),
    (
        ["bench", "{run}", "--data", "{words}"],
        "which column is the text? Name it with --text",
    ),
    (["bench", "{run}", "--data", "{five}"], "five.jsonl, row 2: text is no text but int"),
    (["bench", "{run}", "--connections", "0"], "--connections '0' can't be read. Write whole numbers from 1 on"),
    (["bench", "{run}", "--rate", "50%,200"], "--rate '50%,200' can't be read. Write 50%,80% (of the peak)"),
    (["bench", "{run}", "--rate", "0"], "--rate '0' can't be read"),
    (["bench", "{run}", "--precision", "5"], "--precision '5' is not below 100%. Write it like 5% or 0.05"),
    (["compare", "{texts}", "{run}"], "is no report that can be read"),
    (["bench", "nowhere.onnx"], "nowhere.onnx does not exist"),
    (["bench", "{run}:int4"], "has no variant 'int4'. It has: fp32, int8"),
    (["bench", "{artifact}", "--data", "none.csv"], "none.csv does not exist"),
    (["bench", "{copy}"], "there are no texts to measure with. Name a file of real ones: --data texts.csv"),
    (["bench", "{run}", "--reference", "x"], "--reference 'x' is not measured. It is one of:"),
    (["bench", "{run}", "--runtime", "tensorflow"], "--runtime: "),
    (["bench", "{run}", "--threads", "two"], "--threads 'two' can't be read. Write whole numbers from 1 on, like 1,4"),
    (["bench", "{run}", "--time-limit", "1y"], "--time-limit '1y' can't be read"),
    (["bench", "{run}", "--device", "cuda"], "nothing could be measured"),
    (["bench", "http://127.0.0.1:9/predict", "--data", "{texts}"], "does not answer"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_targets_and_flags_are_one_line(kdexport, finished, tmp_path, arguments, says):
    places = {
        "run": finished,
        "artifact": finished / "artifact",
        "copy": tmp_path / "artifact",
        "texts": tmp_path / "t.txt",
    }
    if "{copy}" in arguments:
        shutil.copytree(finished / "artifact", tmp_path / "artifact")
    (tmp_path / "t.txt").write_text("a text\n")
    (tmp_path / "words.csv").write_text("words,label\nx,y\n")
    (tmp_path / "five.jsonl").write_text('{"text": "x"}\n{"text": 5}\n')
    places |= {"folder": tmp_path, "words": tmp_path / "words.csv", "five": tmp_path / "five.jsonl"}
    found = kdexport(*[a.format(**places) for a in arguments], "--out", tmp_path / "out")
    assert found.returncode == 2, found.stderr
    last = found.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert says in last
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("report*"))


def test_what_can_not_be_written_is_one_line(kdexport, finished, tmp_path):
    (tmp_path / "file").write_text("x")
    for arguments in (
        ["bench", finished, "--out", tmp_path / "file"],
        ["compare", finished, finished, "--out", tmp_path / "file"],
    ):
        found = kdexport(*arguments)
        assert found.returncode == 2
        assert found.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'file'} can't be used: Not a directory")
        assert "Traceback" not in found.stderr


def test_one_target_twice_is_two_variants(finished, rows, tmp_path):
    place = str(finished / "artifact")
    report = measure([f"{place}:int8", f"{place}:int8"], QUICK, tmp_path / "out")
    first, second = report.variants
    assert second.name == f"{first.name} #2"
    assert first.latency_ms.rounds == second.latency_ms.rounds == 3


def test_ctrl_c_while_measuring_is_130_and_keeps_whole_rounds(kdexport, finished, tmp_path):
    flags = [
        "--rounds",
        "3",
        "--round-seconds",
        "0.3",
        "--precision",
        "0",
        "--batch-sizes",
        "0",
        "--out",
        str(tmp_path / "out"),
    ]
    command = [sys.executable, "-m", "kdexport", "bench", str(finished), *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
    while not list(tmp_path.glob("out/.kdexport-bench/rounds-*/0.json")):
        time.sleep(0.01)
    (first,) = tmp_path.glob("out/.kdexport-bench/rounds-*/0.json")
    before = json.loads(first.read_bytes())
    process.send_signal(signal.SIGINT)
    _, log = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in log
    assert log.splitlines()[-1].startswith("error: interrupted. Whole rounds are kept: the same command with --out")
    again = kdexport("bench", finished, *flags)
    assert again.returncode == 0, again.stderr
    assert "round 1 was measured before" in again.stderr
    name = next(name for name in before if not name.endswith(" again"))
    assert np.allclose(read_rounds(tmp_path / "out", name)[0] * 1e3, before[name]["total_us"], rtol=1e-5)
    assert not list(tmp_path.glob("out/.kdexport-bench"))
    other = kdexport("bench", finished, *flags, "--threads", "2")  # another question gets no old answer
    assert "was measured before" not in other.stderr
