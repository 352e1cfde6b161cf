"""A client that is killed, and what it costs: `python benchmarks/endpoint.py TEACHER ROWS.jsonl`.

A fine-tuned encoder answers 1,000 calls in OpenAI's protocol, a fifth of which go wrong; the asking process is ended
ten times on the way, by SIGKILL and SIGTERM in turn, and started again. The server counts what was asked twice, and so
what was lost. Then the client's own time per call, beside a bare connection that sends the same bytes to the same
server without faults, in rounds that take turns. Results go to `benchmarks/results/endpoint.json`.

The committed figures: TEACHER fine-tuned all-MiniLM-L6-v2 on CLINC150 (150 labels), ROWS its test split.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from string import ascii_uppercase
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from kdexport.asking.answers import Answers
from kdexport.asking.client import Call, Endpoint, Reply
from kdexport.bench.machine import environment
from kdexport.bench.stats import t_quantile
from kdexport.spec.teachers import Address
from kdexport.tasks.config import read_config

ROOT = Path(__file__).parent.parent
CALLS, KILLS, FAULTS, AT_ONCE, DEADLINE_S = 1_000, 10, 0.2, 8, 2.0
ROUNDS, A_ROUND = 12, 100


def calls_of(teacher: Path, rows: Path) -> list[Call]:
    """A call for each of the first different texts, with all labels as options of two letters."""
    labels = read_config(teacher).labels
    options = [f"{a}{b}" for a in ascii_uppercase for b in ascii_uppercase][: len(labels)]
    listed = "\n".join(f"{code}) {label}" for code, label in zip(options, labels, strict=True))
    head = f"Choose the label that fits the text.\n\n{listed}\n\nAnswer with the two letters of one label."
    texts = dict.fromkeys(json.loads(line)["text"] for line in rows.read_text(encoding="utf-8").splitlines())
    more = {"temperature": 0, "max_tokens": 3, "logprobs": True, "top_logprobs": 20}
    messages = [[{"role": "system", "content": head}, {"role": "user", "content": f"Text: {text}"}] for text in texts]
    return [Call("/chat/completions", {"model": "encoder", "messages": each} | more) for each in messages[:CALLS]]


def endpoint_at(url: str, store: Path, at_once: int = AT_ONCE) -> Endpoint:
    return Endpoint(Address("encoder", url), None, store=Answers(store), concurrency=at_once, timeout_s=DEADLINE_S)


@contextmanager
def serving(teacher: Path, rows: Path, *flags: object) -> Iterator[str]:
    """Serve the teacher in a process of its own; the logits of all texts are computed before."""
    command = [sys.executable, ROOT / "tests" / "endpoint.py", teacher, "--texts", rows, *flags]
    server = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout
        yield server.stdout.readline().strip()
    finally:
        server.kill()
        server.wait()


def log_of(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url.removesuffix("/v1") + "/log") as answer:
        return dict(json.load(answer))


def killed(teacher: Path, rows: Path, calls: list[Call], home: Path) -> dict[str, Any]:
    """End the asking process ten times, then let it finish."""
    store, ends, rng = home / "killed.sqlite", [], random.Random(0)
    command = [sys.executable, __file__, str(teacher), str(rows), "--store", str(store), "--url"]
    with serving(teacher, rows, "--faults", FAULTS, "--latency", 0.05, "--hold", 3 * DEADLINE_S) as url:
        began = time.monotonic()
        for kill in range(KILLS + 1):
            before = len(Answers(store))
            process = subprocess.Popen([*command, url], stdout=subprocess.PIPE)
            assert process.stdout
            if kill < KILLS:
                process.stdout.read(before + rng.randint(30, 120))  # a dot for each answer
                time.sleep(rng.uniform(0, 0.05))
                number = signal.SIGKILL if kill % 2 == 0 else signal.SIGTERM
                asked = time.monotonic()
                process.send_signal(number)
                process.wait()
                sent, kept = sum(log_of(url)["calls"].values()), len(Answers(store))
                ends.append({"signal": number.name, "seconds": time.monotonic() - asked, "kept": kept, "sent": sent})
            else:
                assert process.wait() == 0
        seconds, log = time.monotonic() - began, log_of(url)
        with_faults = endpoint_at(url, store).send(calls)
    with serving(teacher, rows) as url:
        expected = endpoint_at(url, home / "whole.sqlite").send(calls)
    twice = np.diff([0, *(end["sent"] - end["kept"] for end in ends)])
    said = [[reply.body["choices"] for reply in side if isinstance(reply, Reply)] for side in (with_faults, expected)]
    return {
        "calls": len(calls),
        "answered": len(said[0]),
        "same_as_without_faults": sum(a == b for a, b in zip(*said, strict=True)),
        "answers_that_went_out": sum(log["calls"].values()),
        "asked_twice": sum(n - 1 for n in log["calls"].values()),
        "by_signal": {name: int(sum(n for n, end in zip(twice, ends, strict=True) if end["signal"] == name))
                      for name in ("SIGKILL", "SIGTERM")},
        "at_most_under_way_at_kills": AT_ONCE * sum(end["signal"] == "SIGKILL" for end in ends),
        "requests": log["requests"],
        "faults": log["faults"],
        "seconds": seconds,
        "ends": ends,
    }  # fmt: skip


def overhead(teacher: Path, rows: Path, calls: list[Call], home: Path) -> dict[str, Any]:
    """Milliseconds a call: a bare connection, ours, and ours from the store; one after another, the same calls."""
    rng, names = random.Random(0), ("bare", "ours", "ours, 8 at once", "stored")
    times, of_cpu = ({name: list[float]() for name in names} for _ in range(2))
    with serving(teacher, rows) as url:
        at = urlsplit(url)
        connection = http.client.HTTPConnection(at.hostname or "", at.port)

        def bare(some: list[Call], _: Path) -> None:
            for call in some:
                content = json.dumps(call.body).encode()
                connection.request("POST", at.path + call.path, content, {"Content-Type": "application/json"})
                assert json.loads(connection.getresponse().read())["choices"]

        def ours(some: list[Call], store: Path, at_once: int = 1) -> None:
            assert all(isinstance(reply, Reply) for reply in endpoint_at(url, store, at_once).send(some))

        for turn in range(-1, ROUNDS):  # the first is not counted
            some = calls[(turn % (len(calls) // A_ROUND)) * A_ROUND :][:A_ROUND]
            ways = [("bare", bare), ("ours", ours), ("ours, 8 at once", lambda s, p: ours(s, p, AT_ONCE))]
            rng.shuffle(ways)
            for name, way in [*ways, ("stored", ours)]:
                store = home / f"{turn} {'ours' if name == 'stored' else name}.sqlite"
                began, cpu = time.perf_counter(), time.process_time()
                way(some, store)
                if turn >= 0:
                    times[name].append(1e3 * (time.perf_counter() - began) / len(some))
                    of_cpu[name].append(1e3 * (time.process_time() - cpu) / len(some))
    return {
        "rounds": ROUNDS,
        "calls_a_round": A_ROUND,
        "median_ms": {name: float(np.median(each)) for name, each in times.items()},
        "median_cpu_ms": {name: float(np.median(each)) for name, each in of_cpu.items()},
        "own_ms": difference(times["ours"], times["bare"]),
        "own_cpu_ms": difference(of_cpu["ours"], of_cpu["bare"]),
    }


def difference(ours: list[float], bare: list[float]) -> dict[str, float]:
    """The mean over paired rounds, with its 95 % interval."""
    own = np.array(ours) - bare
    half = t_quantile(0.975, len(own) - 1) * own.std(ddof=1) / np.sqrt(len(own))
    return {"mean": float(own.mean()), "low": float(own.mean() - half), "high": float(own.mean() + half)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--url", help="be the process that is ended")
    parser.add_argument("--store", type=Path)
    asked = parser.parse_args()
    calls = calls_of(asked.teacher, asked.rows)
    if asked.url:
        endpoint_at(asked.url, asked.store).send(calls, lambda done: print("." * done, end="", flush=True))
        return
    with tempfile.TemporaryDirectory() as home:
        found = {
            "killed": killed(asked.teacher, asked.rows, calls, Path(home)),
            "overhead": overhead(asked.teacher, asked.rows, calls, Path(home)),
            "machine": environment(),
        }
    (ROOT / "benchmarks" / "results" / "endpoint.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
