"""What only kdexport is asked: overload, a long time, and an end or a reload in the middle of the load."""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from servers import HERE, PORT, Running, Server, running

WARM_S, PEAK_S, UNLOADED_S = 2, 5, 10
SATURATING = (8, 32, 64)  # connections of closed loops
OPEN_CONNECTIONS = 2048  # so many that a request seldom waits for one; the server takes 4096
MANY = 16  # connections that keep every core busy without filling the queue
SAMPLE_S, SETTLED_S = 5, 60
STRICT = ("--max-queue", "5ms")


def overload(
    server: Server, artifact: Path, texts: list[str], work: Path, wrk: Callable[..., dict[str, float]], seconds: int
) -> dict[str, Any]:
    """Twice the load that saturates it, in an open loop: what is answered, how fast, and what becomes of the rest.

    Texts matter: at ten words HTTP costs more than the model, and a refusal half of an answer; at a hundred the model
    is what there is too little of.

    The server has one core and whoever asks the other one. On the same cores a client that sends twice as much would
    also take twice as much from the server, and the loss would be the client's. Twice the connections of a closed
    loop would not be twice the load: each waits for its answer, and a refusal is a quick one.
    """
    cores = sorted(os.sched_getaffinity(0))
    bodies = server.bodies(texts, work)
    try:
        os.sched_setaffinity(0, cores[:1])  # what is started inherits it
        with running(server, artifact, texts[0], work) as up:
            os.sched_setaffinity(0, cores[-1:])
            wrk(up, bodies, 8, WARM_S)
            peak = max(wrk(up, bodies, connections, PEAK_S)["per_second"] for connections in SATURATING)
            unloaded = client(server, bodies, MANY, UNLOADED_S, rate=0.1 * peak)
            loaded = client(server, bodies, OPEN_CONNECTIONS, seconds, rate=2 * peak)
    finally:
        os.sched_setaffinity(0, cores)
    asked = sum(loaded["statuses"].values())
    goodput = loaded["statuses"].get("200", 0) / loaded["seconds"]
    return {
        "peak_per_second": peak,
        "due_per_second": 2 * peak,
        "asked_per_second": asked / loaded["seconds"],
        "goodput_per_second": goodput,
        "goodput_to_peak": goodput / peak,
        "statuses": loaded["statuses"],
        "lost": loaded["lost"] + loaded["not_accepted"] + loaded["refused"],
        "p99_unloaded_ms": quantile(unloaded["ok_ms"], 0.99),
        "p50_accepted_ms": quantile(loaded["ok_ms"], 0.5),
        "p99_accepted_ms": quantile(loaded["ok_ms"], 0.99),
        "p99_accepted_since_sent_ms": quantile(loaded["ok_sent_ms"], 0.99),
        "p99_sent_late_ms": quantile(loaded["late_ms"], 0.99),
        "client_cores": loaded["cpu_seconds"] / loaded["seconds"],
        "seconds": seconds,
    }


def soak(server: Server, artifact: Path, texts: list[str], work: Path, seconds: int) -> dict[str, Any]:
    """Under load for a long time, with texts of all lengths: how far does memory grow after the first minute?"""
    bodies = server.bodies(texts, work)
    command = ["wrk", "-t1", f"-c{MANY}", f"-d{seconds}s", "-s", str(HERE / "load.lua"), server.url, "--", str(bodies)]
    samples: list[tuple[float, float]] = []  # (seconds since it began, RSS in MB)
    with running(server, artifact, texts[0], work) as up:
        began = time.monotonic()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as load:
            while load.poll() is None:
                samples.append((time.monotonic() - began, up.rss_mb()))
                time.sleep(SAMPLE_S)
            found = json.loads(load.stdout.read().splitlines()[-1])
    settled = [mb for at, mb in samples if at >= min(SETTLED_S, seconds / 2)]
    return {
        "seconds": seconds,
        "requests": found["requests"],
        "not_200": found["not_200"],
        "broken": found["broken"],
        "rss_mb_after_a_minute": settled[0],
        "rss_mb_most_later": max(settled),
        "rss_mb_in_the_end": settled[-1],
        "grown_by": max(settled) / settled[0] - 1,
        "samples": samples,
    }


def joined(texts: list[str], shortest: int, longest: int, count: int = 2000) -> list[str]:
    """Texts of so many words, all lengths alike, made of real ones."""
    words = " ".join(texts).split()
    chance = random.Random(0)
    starts = [chance.randrange(len(words) - longest) for _ in range(count)]
    return [" ".join(words[start : start + chance.randint(shortest, longest)]) for start in starts]


def lifecycle(server: Server, artifact: Path, texts: list[str], work: Path, times: int) -> dict[str, Any]:
    """SIGTERM, and SIGHUP, in the middle of the load: is every request that was taken in answered whole?"""
    bodies = server.bodies(texts, work)
    stops = []
    for number in range(times):
        with running(server, artifact, texts[0], work) as up:
            stops.append(stopped(up, bodies, seed=number))
    with running(server, artifact, texts[0], work) as up:
        reloads = reloaded(up, bodies, times)
    return {"stops": total(stops) | {"times": times}, "reloads": total([reloads]) | {"times": times}}


def stopped(up: Running, bodies: Path, seed: int) -> dict[str, Any]:
    """One end under load; the client goes on until nobody takes its connections any more."""
    load = start_client(up.server, bodies, MANY, seconds=60, seed=seed, new_connection_every=4)
    time.sleep(random.Random(seed).uniform(0.8, 1.6))
    asked = time.monotonic()
    up.process.send_signal(signal.SIGTERM)
    code = up.process.wait(timeout=60)
    return result(load) | {"exit_code": code, "ended_after_s": time.monotonic() - asked}


def reloaded(up: Running, bodies: Path, times: int) -> dict[str, Any]:
    """Many reloads under one load; each is waited for."""
    load = start_client(up.server, bodies, MANY, seconds=3600, new_connection_every=4)
    time.sleep(1)
    durations = []
    for number in range(times):
        asked = time.monotonic()
        up.process.send_signal(signal.SIGHUP)
        while up.log.read_text().count(" serves\n") <= number:
            if time.monotonic() - asked > 60:
                raise TimeoutError(f"reload {number + 1} did not end: {up.log.read_text()[-400:]}")
            time.sleep(0.02)
        durations.append(time.monotonic() - asked)
    load.terminate()
    return result(load) | {"reload_s": statistics.median(durations)}


def total(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Many runs' accounts as one."""
    statuses: Counter[str] = Counter()
    for run in runs:
        statuses.update(run["statuses"])
    found: dict[str, Any] = {"statuses": dict(statuses)}
    found |= {key: sum(run[key] for run in runs) for key in ("lost", "not_accepted")}
    found["p99_ms"] = quantile([ms for run in runs for ms in run["ok_ms"]], 0.99)
    if "exit_code" in runs[0]:
        found["exit_codes"] = dict(Counter(str(run["exit_code"]) for run in runs))
        found["ended_after_s"] = max(run["ended_after_s"] for run in runs)
    else:
        found["reload_s"] = runs[0]["reload_s"]
    return found


def client(server: Server, bodies: Path, connections: int, seconds: float, **more: Any) -> dict[str, Any]:
    """A load by our own client, from its start to its account."""
    return result(start_client(server, bodies, connections, seconds, **more))


def start_client(
    server: Server, bodies: Path, connections: int, seconds: float, rate: float | None = None, **more: Any
) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, str(HERE / "client.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    job = {"port": PORT, "path": server.path, "bodies": str(bodies), "connections": connections, "rate": rate}
    process.stdin.write(json.dumps({"seed": 0, "seconds": seconds} | job | more))
    process.stdin.close()
    return process


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    printed = process.stdout.read()
    if process.wait():
        raise RuntimeError("the client broke")
    return json.loads(printed)


def quantile(values: list[float], q: float) -> float | None:
    return float(np.quantile(values, q)) if values else None


def lines(found: dict[str, Any]) -> list[str]:
    """The checks' results as sentences."""
    said = []
    for name, one in found.get("overload", {}).items():
        said.append(
            f"\nOverload with {name}, {' '.join(STRICT)}, {one['seconds']} s, "
            f"the server on one core, peak {one['peak_per_second']:,.0f} "
            f"requests/s: {one['due_per_second']:,.0f} due, {one['asked_per_second']:,.0f} asked, "
            f"{one['goodput_per_second']:,.0f} answered ({100 * one['goodput_to_peak']:.0f} % of the peak); p99 of "
            f"those {one['p99_accepted_ms']:.1f} ms since due, {one['p99_accepted_since_sent_ms']:.1f} since sent, "
            f"unloaded {one['p99_unloaded_ms']:.1f}; answers by status {one['statuses']}, lost {one['lost']}."
        )
    if one := found.get("soak"):
        said.append(
            f"\nSoak, {one['seconds']} s, {one['requests']:,} requests: RSS {one['rss_mb_after_a_minute']:.0f} MB "
            f"after a minute, {one['rss_mb_most_later']:.0f} MB at most later ({100 * one['grown_by']:+.1f} %); "
            f"{one['not_200']} not answered with 200, {one['broken']} broken."
        )
    for name, one in found.get("lifecycle", {}).items():
        took = f"slowest end {one['ended_after_s']:.1f} s, exit codes {one['exit_codes']}" if name == "stops" else ""
        said.append(
            f"\n{one['times']} {name} under load: lost {one['lost']}, never accepted {one['not_accepted']}, answers by "
            f"status {one['statuses']}, p99 {one['p99_ms']:.1f} ms{'; ' + took if took else ''}."
        )
    return said
