"""All that is to be measured on one NVIDIA GPU, in ten minutes, on a machine that nothing can be reached from.

    python benchmarks/gpu.py --wheels wheels --clinc150 CLINC150 --shakespeare SHAKESPEARE --out gpu-results
    python benchmarks/gpu.py --cpu --clinc150 CLINC150 --shakespeare SHAKESPEARE --out cpu-results

`gpu-wheels.txt` says what the wheels are; without them this Python and what it has is taken. Each part is a process
with a time limit, so that a fault in one leaves the others; `parts.json` has their times and how they ended, and each
has its log. `--cpu` tries every part in its smallest form where there is no GPU: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MOST_SECONDS = 600.0  # all parts together
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_SMALL = ("translate", "transfer", "timer", "definition", "insurance")  # labels of clinc150 for --cpu
_WATCHED = "timestamp,memory.used,utilization.gpu,power.draw"


class Parts:
    """The parts that were run, one after the other."""

    def __init__(self, out: Path, most_seconds: float) -> None:
        self.out, self.ends, self.done = out, time.monotonic() + most_seconds, list[dict[str, Any]]()
        self.env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.env["KDEXPORT_CACHE"] = str(out / "work" / "cache")

    def run(self, name: str, limit: float, *command: object) -> None:
        """Run a command until its limit, or that of all parts."""
        limit = min(limit, self.ends - time.monotonic())
        began = time.monotonic()
        how: int | str = "no time left"
        if limit > 1:
            with (self.out / f"{name}.log").open("w") as log:
                process = subprocess.Popen(
                    [str(word) for word in command],
                    stdout=log,
                    stderr=log,
                    env=self.env,
                    cwd=ROOT,
                    start_new_session=True,
                )
                try:
                    how = process.wait(limit)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    how = "its time was up"
        seconds = round(time.monotonic() - began, 1)
        self.done.append({"part": name, "ended": how, "seconds": seconds, "command": [str(word) for word in command]})
        (self.out / "parts.json").write_text(json.dumps(self.done, indent=1) + "\n")
        print(f"{name}: {how} after {seconds} s", flush=True)


def main() -> int:
    """Run all parts, and return how many did not end well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="folder of wheels; without it this Python's packages are taken")
    parser.add_argument("--clinc150", type=Path, required=True, help="folder of train, validation and test.csv")
    parser.add_argument("--shakespeare", type=Path, required=True, help="folder of train.txt and test.txt")
    parser.add_argument("--out", type=Path, required=True, help="new folder for results")
    parser.add_argument("--cpu", action="store_true", help="every part in its smallest form, without a GPU")
    parser.add_argument("--only", nargs="*", help="parts to run")
    asked = parser.parse_args()
    out, work = asked.out.absolute(), asked.out.absolute() / "work"
    work.mkdir(parents=True)
    parts = Parts(out, 3600.0 if asked.cpu else MOST_SECONDS)
    watch = _watch(out)
    try:
        _run(parts, asked, work)
    finally:
        if watch:
            watch.terminate()
        _collect(work, out)
    return sum(part["ended"] not in (0, 3) for part in parts.done)  # 3: done, but the budget is not met


def _run(parts: Parts, asked: argparse.Namespace, work: Path) -> None:
    cpu, python = asked.cpu, Path(sys.executable)
    data = {"clinc150": asked.clinc150.absolute(), "shakespeare": asked.shakespeare.absolute()}
    if cpu:
        data["clinc150"] = _few_rows(data["clinc150"], work / "clinc150-data")
        data["shakespeare"] = _few_lines(data["shakespeare"], work / "shakespeare-data")
    if asked.wheels:
        python = work / "venv" / "bin" / "python"
        parts.run("venv", 30, sys.executable, "-m", "venv", work / "venv")
        pins = ["-c", ROOT / "constraints.txt", "-r", ROOT / "benchmarks" / "gpu-wheels.txt"]
        parts.run(
            "install", 150, python, "-m", "pip", "install", "-q", "--no-index", "-f", asked.wheels.absolute(), *pins
        )
        found = sorted((work / "venv").glob("lib/python*/site-packages/nvidia/**/lib"))
        parts.env["LD_LIBRARY_PATH"] = os.pathsep.join([*map(str, found), os.environ.get("LD_LIBRARY_PATH", "")])
    kdexport = [python, "-m", "kdexport"]
    devices, runtimes = ("cpu", "torch") if cpu else ("cpu,cuda", "torch,torch-cudagraphs")
    speed = {"distill.dtype": "bfloat16", "distill.batch_size": 8 if cpu else 256}
    speed |= {"bench.rounds": 1, "bench.round_seconds": 0.1, "bench.precision": "null", "bench.batch_sizes": "[]"}
    fine_tuned = speed | {"teacher.train.dtype": "bfloat16", "teacher.train.batch_size": 8 if cpu else 256}

    def sets(values: dict[str, object]) -> list[str]:
        return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]

    def wanted(name: str) -> bool:
        return not asked.only or name in asked.only

    if wanted("doctor"):
        parts.run("doctor", 60, *kdexport, "doctor")
    clinc150, teacher = work / "clinc150", work / "clinc150" / "teacher"
    if wanted("clinc150"):
        recipe = {"teacher.train.epochs": 2 if cpu else 6, "distill.epochs": 1 if cpu else 10}
        recipe |= {"teacher.train.learning_rate": 2e-4, "student.embedding": "null", "budget.retention": "null"}
        recipe |= {"export.variants": "[fp32,fp16,int8]"}
        command = [*kdexport, "run", "examples/text-classification.yaml", "--data", data["clinc150"], "--no-baseline"]
        command += ["--student", "tiny", "--augment", 0, "--out", clinc150, *sets(fine_tuned | recipe)]
        parts.run("clinc150", 900 if cpu else 120, *command)
    if wanted("bench"):
        shape = ["--device", devices, "--runtime", f"{runtimes},onnxruntime", "--rounds", 1 if cpu else 3]
        shape += ["--round-seconds", 0.1 if cpu else 0.3, "--precision", 0, "--time-limit", "20s" if cpu else "100s"]
        shape += ["--batch-sizes", "2" if cpu else "8,64,512", "--out", work / "bench"]
        parts.run("bench", 600 if cpu else 150, *kdexport, "bench", clinc150, teacher, *shape)
    if wanted("bound"):
        written = work / "teacher-onnx"
        precisions = ["--variants", "fp32,fp16"]
        parts.run("export", 300 if cpu else 60, *kdexport, "export", teacher, written, *precisions)
        batches = ",".join(map(str, (1, 2) if cpu else BATCHES))
        measure = [python, __file__, "measure", parts.out / "bound.json", "cpu" if cpu else "cuda", batches]
        parts.run("bound", 300 if cpu else 60, *measure, clinc150 / "artifact", written)
    if wanted("lm"):
        recipe = {"teacher.train.epochs": 1 if cpu else 3, "distill.epochs": 1 if cpu else 3}
        recipe |= {"export.variants": "[fp32,int8]"}
        command = [*kdexport, "run", "examples/causal-lm.yaml", "--data", data["shakespeare"], "--no-baseline"]
        parts.run("lm", 900 if cpu else 120, *command, "--out", work / "lm", *sets(fine_tuned | recipe))
    if wanted("demo"):
        recipe = speed | {"teacher.train.dtype": "bfloat16"}
        recipe |= {"teacher.train.epochs": 1, "distill.epochs": 1} if cpu else {}
        command = [*kdexport, "demo", "--student", "tiny", "--out", work / "demo", *sets(recipe)]
        parts.run("demo", 900 if cpu else 110, *command)


def _few_rows(folder: Path, small: Path) -> Path:
    small.mkdir()
    for split, most in (("train", 30), ("validation", 8), ("test", 8)):
        with (folder / f"{split}.csv").open(newline="") as file, (small / f"{split}.csv").open("w", newline="") as few:
            rows = list(csv.DictReader(file))
            writer = csv.DictWriter(few, ["text", "label"], extrasaction="ignore")
            writer.writeheader()
            for label in _SMALL:
                writer.writerows([row for row in rows if row["label"] == label][:most])
    return small


def _few_lines(folder: Path, small: Path) -> Path:
    small.mkdir()
    for split, most in (("train", 40_000), ("test", 4_000)):
        (small / f"{split}.txt").write_text((folder / f"{split}.txt").read_text()[:most])
    return small


def _watch(out: Path) -> subprocess.Popen[bytes] | None:
    """Write the GPU's memory, load and power once a second."""
    if not shutil.which("nvidia-smi"):
        return None
    facts = subprocess.run(["nvidia-smi", "-q"], capture_output=True, text=True)
    (out / "nvidia-smi.txt").write_text(facts.stdout)
    log = (out / "nvidia-smi.csv").open("w")
    return subprocess.Popen(["nvidia-smi", f"--query-gpu={_WATCHED}", "--format=csv", "-l", "1"], stdout=log)


def _collect(work: Path, out: Path) -> None:
    """Copy what is small: reports, specs, manifests, the trainings' records."""
    for kind in ("report.*", "spec.yaml", "stage.json", "training*.json", "kdexport.json", "bench*.json"):
        for file in work.glob(f"**/{kind}"):
            if "venv" not in file.parts and "cache" not in file.parts and file.stat().st_size < 2**22:
                place = out / "results" / file.relative_to(work)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place)


def measure(file: Path, device: str, batches: list[int], folders: list[Path]) -> None:
    """Measure each folder's fp32 and fp16 graph by IOBinding: inputs and outputs on the device, 32 tokens a row."""
    import numpy as np
    import onnxruntime

    from kdexport.tasks import load_task

    provider = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
    found: list[dict[str, Any]] = []
    for folder in folders:
        task = load_task(folder)
        for model in sorted(folder.glob("onnx/model*.onnx")):
            if model.stem not in ("model", "model_fp16"):
                continue
            session = onnxruntime.InferenceSession(str(model), providers=[provider], enable_fallback=0)
            assert session.get_providers()[0] == provider, session.get_providers()
            for batch in batches:
                binding = session.io_binding()
                for name in task.config.inputs:
                    low, high = {"input_ids": (0, task.vocabulary), "attention_mask": (1, 2)}.get(name, (0, 1))
                    array = np.random.default_rng(0).integers(low, high, (batch, 32))
                    value = onnxruntime.OrtValue.ortvalue_from_numpy(array, device, 0)
                    binding.bind_ortvalue_input(name, value)
                binding.bind_output(task.output, device)
                times = []
                for i in range(3 if device == "cpu" else 60):
                    began = time.perf_counter()
                    session.run_with_iobinding(binding)
                    binding.synchronize_outputs()
                    if i >= (1 if device == "cpu" else 10):
                        times.append(time.perf_counter() - began)
                ms = 1e3 * statistics.median(times)
                one = {
                    "folder": folder.name,
                    "file": model.name,
                    "device": device,
                    "batch": batch,
                    "p50_ms": round(ms, 4),
                }
                found.append(one | {"rows_per_s": round(1e3 * batch / ms, 1)})
                file.write_text(json.dumps({"python": platform.python_version(), "runs": found}, indent=1) + "\n")
                print(found[-1], flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        place, on, sizes, *named = sys.argv[2:]
        measure(Path(place), on, [int(size) for size in sizes.split(",")], [Path(name) for name in named])
        sys.exit(0)
    sys.exit(main())
