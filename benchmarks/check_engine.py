"""Can the engine be believed? Checks of it against itself, and against tools that nobody here wrote.

    python benchmarks/check_engine.py runs/demo [same] [slowdown] [loops] [load]

Takes the recommended file of a finished run; writes benchmarks/results/engine.json and prints what it found.
`load` wants h2load, a load generator with a fixed rate: apt-get install nghttp2-client.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from server import serving

from kdexport import spec
from kdexport.bench import stats
from kdexport.bench.engine import bench
from kdexport.bench.generator import LoadJob
from kdexport.bench.machine import environment
from kdexport.bench.process import call
from kdexport.bench.subjects import Target
from kdexport.data import read_rows
from kdexport.export import export_student
from kdexport.runtime import artifact

REPEATS, TURNS, LOAD_TURNS, LOAD_S = 20, 10, 6, 14
RESULTS = Path(__file__).parent / "results" / "engine.json"

PYTEST = """
import json, os
from itertools import cycle
from pathlib import Path
from kdexport.runtime.predictor import Predictor
from kdexport.tasks import load_task
rows = json.loads(Path(os.environ["ROWS"]).read_text())
model = Predictor(load_task(Path(os.environ["TASK"])), Path(os.environ["MODEL"]), 1)
def test_answer(benchmark):
    turn = cycle(rows)
    def answer():
        model.task.decode(model.run(model.task.encode([next(turn)])))
    benchmark.pedantic(answer, rounds=2000, warmup_rounds=300)
"""

LOOP = """
import json, os, sys, time
from pathlib import Path
import numpy, onnxruntime
from kdexport.tasks import load_task
rows = json.loads(Path(os.environ["ROWS"]).read_text())
task = load_task(Path(os.environ["TASK"]))
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = onnxruntime.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])
feeds = [task.encode([row]) for row in rows]
times = []
for i in range(2300):
    started = time.perf_counter_ns()
    session.run(None, feeds[i % len(feeds)])
    times.append((time.perf_counter_ns() - started) / 1e6)
print(numpy.median(times[300:]))
"""


def main() -> None:
    run, chosen = Path(sys.argv[1]), sys.argv[2:] or ["same", "slowdown", "loops", "load"]
    folder = artifact.resolve(run)
    file = Target("a", "onnxruntime", str(folder), str(artifact.model_file(folder)))
    rows = read_rows(run / "data", "test")
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in chosen:
        found[name] = {"same": same, "slowdown": slowdown, "loops": loops, "load": load}[name](file, rows, folder)
        found["environment"] = environment()
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        print(name, {key: value for key, value in found[name].items() if key != "every"}, flush=True)


def _pair(file: Target, rows: list, slower: float, seed: int) -> dict:
    how = spec.Bench(rounds=6, round_seconds=0.4, precision=0.03, time_limit_s=19.0, batch_sizes=())
    other = msgspec.structs.replace(file, name="b", slower=slower)
    with tempfile.TemporaryDirectory() as work:
        started = time.monotonic()
        ratio = bench(how, [file, other], rows, "a", seed, Path(work), sweep=False).speedup["b"]
        return msgspec.to_builtins(ratio) | {"seconds": round(time.monotonic() - started, 1)}


def same(file: Target, rows: list, folder: Path) -> dict:
    """One file twice, as if it were two: how often does the engine tell it from itself?"""
    return _counted([_pair(file, rows, 0.0, seed) for seed in range(REPEATS)])


def slowdown(file: Target, rows: list, folder: Path) -> dict:
    """Every answer 10 % longer: how often is it found, in at most 20 s?"""
    return _counted([_pair(file, rows, 0.10, seed) for seed in range(REPEATS)])


def _counted(every: list[dict]) -> dict:
    verdicts = [one["verdict"] for one in every]
    counts = {verdict: verdicts.count(verdict) for verdict in ("faster", "slower", "same", "unsure")}
    values = [one["value"] for one in every]
    return counts | {
        "ratios": [min(values), float(np.median(values)), max(values)],
        "longest_s": max(o["seconds"] for o in every),
        "every": every,
    }


def loops(file: Target, rows: list, folder: Path) -> dict:
    """The engine's p50 against pytest-benchmark's, and its model time against a bare loop over the session."""
    turns: dict[str, list[float]] = {"engine": [], "engine_model": [], "pytest_benchmark": [], "bare_loop": []}
    how = spec.Bench(rounds=1, round_seconds=1.0, precision=None, batch_sizes=())
    with tempfile.TemporaryDirectory() as work:
        place = Path(work)
        (place / "rows.json").write_text(json.dumps(rows[:256]))
        (place / "test_it.py").write_text(PYTEST)
        (place / "ours").mkdir()
        given = {"ROWS": str(place / "rows.json"), "TASK": str(folder), "MODEL": file.model}
        pinned = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        for turn in range(TURNS):
            latency = bench(how, [file], rows[:256], "a", 0, place / "ours", sweep=False).latency["a"]
            turns["engine"].append(latency.p50)
            turns["engine_model"].append(latency.model_p50)
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-p",
                "no:cacheprovider",
                "test_it.py",
                "--benchmark-disable-gc",
            ]
            subprocess.run(
                [*command, f"--benchmark-json={turn}.json"],
                cwd=place,
                env=os.environ | given | pinned,
                check=True,
                capture_output=True,
            )
            stored = json.loads((place / f"{turn}.json").read_text())
            turns["pytest_benchmark"].append(1e3 * stored["benchmarks"][0]["stats"]["median"])
            printed = subprocess.run(
                [sys.executable, "-c", LOOP], env=os.environ | given | pinned, check=True, capture_output=True
            )
            turns["bare_loop"].append(float(printed.stdout))
    return {
        "engine_to_pytest_benchmark": msgspec.to_builtins(stats.ratio(turns["engine"], turns["pytest_benchmark"])),
        "engine_model_to_bare_loop": msgspec.to_builtins(stats.ratio(turns["engine_model"], turns["bare_loop"])),
        "every": turns,
    }


def load(file: Target, rows: list, folder: Path) -> dict:
    """The p99 of an evenly spaced open loop at 80 % of the peak, by us and by nghttp2's h2load, in turns.

    h2load's timer ticks every 10 ms, so more than 100 requests a second would come in bursts: the teacher is served,
    which is slow enough. It counts from when it sent a request, we from when one was due.
    """
    turns: dict[str, list] = {"ours": [], "h2load": []}
    text = " ".join(rows[0]["text"].split()[:64])
    with tempfile.TemporaryDirectory() as work:
        place = Path(work)
        teacher = _served_teacher(folder.parent / "teacher", place)
        (place / "rows.json").write_text(json.dumps([{"text": text}]))
        (place / "body.json").write_text(json.dumps({"inputs": text}))
        with serving(teacher) as url:

            def ours(rate: float | None) -> list[float]:
                job = LoadJob(
                    url=f"{url}/predict",
                    rows=str(place / "rows.json"),
                    connections=1 if rate is None else 16,
                    rate=rate,
                    poisson=False,
                    seconds=LOAD_S,
                    seed=0,
                )
                found = json.loads(call("kdexport.bench.generator", msgspec.json.encode(job), 1))
                return [len(found["latency_ms"]) / found["seconds"], *_quantiles(found["latency_ms"])]

            peak = ours(None)[0]
            rate = min(100, round(0.8 * peak))
            for turn in range(LOAD_TURNS):
                turns["ours"].append(ours(rate)[1:])
                log = place / f"{turn}.log"
                command = [
                    "h2load",
                    "--h1",
                    "-c",
                    "1",
                    "-m",
                    "16",
                    "--rps",
                    str(rate),
                    "-D",
                    str(LOAD_S),
                    "--warm-up-time",
                    "1",
                ]
                command += [
                    "-d",
                    str(place / "body.json"),
                    "-H",
                    "content-type: application/json",
                    "--log-file",
                    str(log),
                ]
                subprocess.run([*command, f"{url}/predict"], check=True, capture_output=True)
                turns["h2load"].append(
                    _quantiles([float(line.split()[2]) / 1e3 for line in log.read_text().splitlines()])
                )
    ratios = {
        name: msgspec.to_builtins(stats.ratio([t[i] for t in turns["ours"]], [t[i] for t in turns["h2load"]]))
        for i, name in enumerate(("p50", "p90", "p99"))
    }
    return {"peak_a_second": peak, "rate": rate, "ours_to_h2load": ratios, "every": turns}


def _served_teacher(teacher: Path, work: Path) -> Path:
    (work / "export").mkdir()
    (work / "artifact").mkdir()
    export_student(spec.Export(variants=("fp32",)), teacher, work / "export")
    artifact.pack(teacher, {"fp32": (work / "export" / "model.onnx", "plain")}, "fp32", {}, work / "artifact")
    return work / "artifact"


def _quantiles(milliseconds: list[float]) -> list[float]:
    return [float(np.quantile(milliseconds, q, method="higher")) for q in (0.5, 0.9, 0.99)]


if __name__ == "__main__":
    main()
