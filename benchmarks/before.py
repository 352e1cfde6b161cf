"""The server beside that of another commit: `python benchmarks/before.py COMMIT runs/demo/artifact --rounds 10`.

`--path` and `--body` ask otherwise than Hugging Face's client does.

Both serve the same artifact on two ports, and are asked by wrk in turns, in a new order each round; ratios are paired
by round.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
BODY = '{"inputs": "Shares in the airline rose after it beat profit forecasts", "parameters": {"top_k": 1}}'


def serve(tree: Path, artifact: Path) -> tuple[subprocess.Popen[str], str]:
    """Serve with the code of a tree; the process, and where it listens."""
    command = [sys.executable, "-m", "kdexport", "serve", str(artifact.resolve()), "--port", "0", "--admin-port", "-1"]
    process = subprocess.Popen(  # in the tree: `-m` looks where it is started before anywhere else
        [*command, "--access-log", "off"], stderr=subprocess.PIPE, text=True, cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree)},
    )  # fmt: skip
    assert process.stderr
    line = next(line for line in process.stderr if "ready after" in line)
    return process, re.findall(r"http://[^\s,]+", line)[0]


def ask(url: str, script: Path, connections: int, seconds: int) -> tuple[float, float]:
    """Median latency in ms, and requests a second."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", str(script), url]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Non-2xx" not in said, said
    value, unit = re.findall(r"50%\s+([\d.]+)(us|ms)", said)[0]
    return float(value) * (1e-3 if unit == "us" else 1), float(re.findall(r"Requests/sec:\s+([\d.]+)", said)[0])


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commit")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--path", default="/")
    parser.add_argument("--body", default=BODY, help="JSON without single quotes")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        tree, script = Path(home) / "tree", Path(home) / "post.lua"
        script.write_text(f"wrk.method = \"POST\"\nwrk.body = '{asked.body}'\n")
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "-q", "--detach", tree, asked.commit], check=True)
        servers = {"before": serve(tree, asked.artifact), "now": serve(ROOT, asked.artifact)}
        found: dict[tuple[int, str], list[tuple[float, float]]] = {}
        for number in range(asked.rounds + 1):
            for connections in (1, 16):
                for name in random.Random(number).sample(list(servers), 2):
                    one = ask(servers[name][1] + asked.path, script, connections, 2)
                    if number:  # the first round warms up
                        found.setdefault((connections, name), []).append(one)
        for process, _ in servers.values():
            process.terminate()
            process.wait()
        subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=True)
    print("| connections | | before | now | ratio, median [quartiles] |")
    print("|--:|---|--:|--:|--:|")
    for connections in (1, 16):
        before, now = found[connections, "before"], found[connections, "now"]
        for i, what in enumerate(("p50, ms", "requests/s")):
            ratios = [b[i] / a[i] for a, b in zip(before, now, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            medians = (statistics.median(one[i] for one in side) for side in (before, now))
            cells = " | ".join(f"{value:,.3g}" if i == 0 else f"{value:,.0f}" for value in medians)
            print(f"| {connections} | {what} | {cells} | {middle:.3f} [{low:.3f}–{high:.3f}] |")


if __name__ == "__main__":
    main()
