"""Memory and time, measured in a process of its own: what one input costs at most."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

# What any admitted input may cost under the default limits.
MOST_MB, MOST_SECONDS = 200, 1.0

_CHILD = """
import json, sys, time
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1e3
arguments = sys.argv[1:]
{setup}
open("/proc/self/clear_refs", "w").write("5")  # the peak begins again from here
before, began = peak(), time.process_time()
{work}
print(json.dumps({{"seconds": time.process_time() - began, "mb": peak() - before, "result": result}}))
"""


class Cost(NamedTuple):
    """CPU seconds (this machine may be busy with other work), the peak above what was there before, the result."""

    seconds: float
    mb: float
    result: Any


def cost_of(setup: str, work: str, *arguments: object, limit_gb: int = 6, timeout: float = 60) -> Cost:
    """Run `setup`, then `work`, which sets `result` to something that JSON can hold; only `work` is measured.

    Both find `arguments`, as texts. The child may not take more than `limit_gb` of memory, nor `timeout` seconds.
    """
    child = subprocess.run(
        [sys.executable, "-c", _CHILD.format(setup=setup, work=work), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit_gb << 30, limit_gb << 30)),
    )
    assert child.returncode == 0, child.stderr[-2000:]
    return Cost(**json.loads(child.stdout.splitlines()[-1]))


def assert_cheap(cost: Cost, mb: float = MOST_MB, seconds: float = MOST_SECONDS) -> None:
    """Hold a cost to its limits; CPU seconds, so that a busy machine changes nothing."""
    assert cost.mb <= mb, cost
    assert cost.seconds <= seconds, cost


def begin_peak(pid: int) -> float:
    """Let a process's peak begin again; what it holds now, in MB."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return memory_mb(pid, "VmRSS")


def memory_mb(pid: int, what: str = "VmHWM") -> float:
    """VmHWM, the peak, or VmRSS, what it holds now."""
    return int(re.search(rf"{what}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1e3


def cpu_seconds(pid: int) -> float:
    """The CPU seconds that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
