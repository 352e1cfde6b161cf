"""The machine's facts, for every result and `kdexport doctor`."""

import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from kdexport.results import machine_name
from kdexport.runtime.predictor import allowed_cores, providers

_PACKAGES = (
    "torch", "transformers", "optimum", "optimum-onnx", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino",
    "tokenizers", "numpy",
)  # fmt: skip
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm", "sve")
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ORT_INTRA_OP_NUM_THREADS")
_GPU = ("name", "driver_version", "memory.total", "clocks.sm", "power.draw", "power.limit", "temperature.gpu")
BUSY_PERCENT = 25.0
_CPU_DIR = Path("/sys/devices/system/cpu/cpu0/cpufreq")


def identity() -> dict[str, Any]:
    """Facts that identify a machine: CPU, allowed cores, GPUs; `hardware` is their hash."""
    model, flags = _cpu()
    known = [flag for flag in _FLAGS if flag in flags]
    facts: dict[str, Any] = {"cpu": model, "cpu_flags": known, "cores_allowed": allowed_cores(), "gpus": _gpus()}
    return facts | {"hardware": hardware(facts)}


def maker() -> dict[str, Any]:
    """Name this machine, for the records of what it makes; with the threads that sums are split over."""
    here = identity()
    threads = os.environ.get("OMP_NUM_THREADS") or str(here["cores_allowed"])
    gpu = bool(here["gpus"])
    return {"name": machine_name(here), "hardware": here["hardware"], "threads": threads, "gpu": gpu}


def environment() -> dict[str, Any]:
    """CPU, cores, memory, load, GPU, versions and commit, now."""
    physical, cores = psutil.cpu_count(logical=False), os.cpu_count()
    return {
        "kdexport": _version("kdexport"), "python": platform.python_version(), "os": platform.platform(),
        **identity(),
        "cores": cores, "threads_a_core": (cores or 1) // physical if physical else None,
        "governor": _read(_CPU_DIR / "scaling_governor"), "mhz": _mhz(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "memory_limit": _read(Path("/sys/fs/cgroup/memory.max")), "load_1min": round(os.getloadavg()[0], 2),
        # A load average would count our own past work.
        "busy_percent": round(100 - psutil.cpu_times_percent(interval=0.5).idle, 1),
        "virtual": "hypervisor" in _cpu()[1], "container": _container(),
        "providers": providers() if find_spec("onnxruntime") else [],
        "thread_settings": {name: os.environ[name] for name in _THREADS if name in os.environ},
        "packages": {name: found for name in _PACKAGES if (found := _version(name))}, "git_commit": _git_commit(),
    }  # fmt: skip


def hardware(facts: dict[str, Any]) -> str:
    """Hash of CPU, flags, allowed cores and GPUs; times are comparable where it is the same."""
    gpus = (gpu["name"] for gpu in facts.get("gpus", []))
    parts = [facts["cpu"], *facts["cpu_flags"], str(facts["cores_allowed"]), *gpus]
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:12]


def advice(facts: dict[str, Any]) -> list[str]:
    """Hints for measuring and exporting on this machine."""
    lines = []
    if facts["cores_allowed"] < facts["cores"]:
        lines.append(f"{facts['cores_allowed']} of {facts['cores']} cores are allowed: threads follow that")
    if facts["governor"] not in (None, "performance"):
        lines.append(f"the frequency governor is {facts['governor']}: times will wander; performance is steadier")
    x86 = "x86" in facts["os"] or "amd64" in facts["os"].lower()
    if x86 and not {"avx512_vnni", "avx_vnni", "amx_int8"} & set(facts["cpu_flags"]):
        lines.append("this CPU has no VNNI: int8 may be no faster than fp32 here")
    if facts["busy_percent"] > BUSY_PERCENT:
        lines.append(f"{facts['busy_percent']:.0f} % of the CPU time is taken: something else is running")
    for package, extra in (("onnxruntime", "cpu"), ("torch", "distill")):
        if find_spec(package) is None:
            lines.append(f"{package} is not installed: pip install 'kdexport[{extra}]'")
    if facts["gpus"] and "CUDAExecutionProvider" not in facts["providers"]:
        lines.append("there is a GPU, but onnxruntime has no CUDAExecutionProvider: pip install 'kdexport[gpu]'")
    return lines


def _cpu() -> tuple[str, set[str]]:
    if (found := _read(Path("/proc/cpuinfo"))) is None:
        return platform.processor() or platform.machine(), set()
    lines = [line.partition(":") for line in reversed(found.splitlines())]  # of several CPUs, the first
    facts = {key.strip(): value.strip() for key, _, value in lines}
    return facts.get("model name", platform.machine()), set(facts.get("flags", facts.get("Features", "")).split())


def _mhz() -> int | None:
    try:
        found = psutil.cpu_freq()
    except (OSError, NotImplementedError):
        return None
    return round(found.current) if found and found.current else None


def _container() -> str | None:
    if Path("/.dockerenv").exists():
        return "docker"
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return "kubernetes"
    return "podman" if Path("/run/.containerenv").exists() else None


def _gpus() -> list[dict[str, str]]:
    query = ["nvidia-smi", f"--query-gpu={','.join(_GPU)}", "--format=csv,noheader"]
    rows = [line.split(", ") for line in (_run(query) or "").splitlines()]
    return [dict(zip(_GPU, row, strict=True)) for row in rows if len(row) == len(_GPU)]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Return the commit of kdexport itself, if it runs from a checkout."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    return _run(["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"])


def _run(command: list[str]) -> str | None:
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
