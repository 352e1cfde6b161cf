"""Fuzz what reads strangers' bytes: `python tests/fuzz --seconds 60`, or some targets by name.

Each target runs in a process of its own under libFuzzer, guided by the code that it reaches. An input is a fault if
another error than ours comes out, or if it takes more than a second of CPU or 200 MB. Faults are written to
`.benchmarks/fuzz/TARGET-…`, and inputs that reached something new are kept in `.benchmarks/fuzz/TARGET/`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

NAMES = ("images", "sound", "bodies", "tensors", "manifests", "specs")
MOST_SECONDS, MOST_MB = 1.0, 200.0
_FOUND = Path(__file__).parent.parent.parent / ".benchmarks" / "fuzz"


def fuzz(name: str, seconds: float, *flags: str) -> None:
    """Run one target in this process, until time is up or a fault is found."""
    os.environ["HF_HUB_OFFLINE"], os.environ["TOKENIZERS_PARALLELISM"] = "1", "false"
    import atheris
    from targets import TARGETS

    target = TARGETS[name]()
    corpus = _FOUND / name
    corpus.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(target.seeds):
        (corpus / f"seed-{i}").write_bytes(seed)
    peak = Path("/proc/self/clear_refs")
    worst = {"seconds": 0.0, "mb": 0.0}

    def once(data: bytes) -> tuple[float, float]:
        peak.write_text("5")
        before, began = _memory("VmRSS"), time.process_time()
        target.run(data)
        return time.process_time() - began, _memory("VmHWM") - before

    def one_input(data: bytes) -> None:
        seconds, mb = once(data)
        if seconds > MOST_SECONDS or mb > MOST_MB:  # what was loaded for the first time costs no second time
            seconds, mb = once(data)
        worst["seconds"], worst["mb"] = max(worst["seconds"], seconds), max(worst["mb"], mb)
        assert seconds <= MOST_SECONDS, f"{seconds:.2f} s for {len(data)} bytes"
        assert mb <= MOST_MB, f"{mb:.0f} MB for {len(data)} bytes"

    # libFuzzer ends the process itself, without Python's handlers of the end; so tell from time to time
    ends, told = time.monotonic() + seconds - 1, False

    def fuzzed(data: bytes) -> None:
        nonlocal told
        one_input(data)
        if not told and time.monotonic() > ends:
            told = True
            print(f"{name}: worst input {worst['seconds']:.2f} s, {worst['mb']:.0f} MB", file=sys.stderr, flush=True)

    options = [f"-max_total_time={seconds:.0f}", "-timeout=20", "-rss_limit_mb=2500", "-max_len=65536"]
    arguments = [sys.argv[0], str(corpus), *options, f"-artifact_prefix={corpus}-", "-print_final_stats=1", *flags]
    atheris.Setup(arguments, fuzzed)
    atheris.Fuzz()


def _memory(what: str) -> float:
    with open("/proc/self/status") as file:  # noqa: PTH123 # for every input
        return next(int(line.split()[1]) for line in file if line.startswith(what)) / 1e3


def main() -> int:
    """Run targets one after the other, and return how many found a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", default=NAMES, metavar="target", help=f"of {', '.join(NAMES)}; all")
    parser.add_argument("--seconds", type=float, default=60.0, help="for all of them together")
    parser.add_argument("--here", action="store_true", help="in this process, which ends with it")
    asked, flags = parser.parse_known_args()
    if asked.here:
        fuzz(asked.targets[0], asked.seconds, *flags)
    each, faults = asked.seconds / len(asked.targets), 0
    for name in asked.targets:
        command = [sys.executable, str(Path(__file__).parent), name, "--here", "--seconds", str(each), *flags]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
        lines = done.stderr.splitlines()
        facts = [line for line in lines if line.startswith(("stat::number_of_executed_units", f"{name}: "))]
        print(f"{name}: {'ok' if done.returncode == 0 else 'FAULT'}; {'; '.join(facts)}", flush=True)
        if done.returncode:
            faults += 1
            print("\n".join([line for line in lines if not line.startswith(("INFO", "#"))][-60:]), flush=True)
    return faults


if __name__ == "__main__":
    raise SystemExit(main())
