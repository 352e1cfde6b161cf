"""`/v1/embeddings` of kdexport serve beside Sentence-Transformers behind FastAPI; to be run in the repository's root.

    .venv/bin/python benchmarks/peers/serving/embeddings.py ARTIFACT --teacher FOLDER     # 5 rounds, about 15 minutes

The artifact's recommended file is served by kdexport, and by Sentence-Transformers in ONNX Runtime; the teacher by
Sentence-Transformers in PyTorch. In every round each server is started by itself, in a new order, asked for two seconds
that do not count, measured and stopped, with one text a request and with 32. Wants wrk, and on the first run PyPI.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from compare import WARM_S, _ratio, read_texts, wrk
from servers import PORT, Failed, Server, ask, install, running

import kdexport
from kdexport.bench.machine import environment
from kdexport.runtime import artifact

SIZES = (1, 32)  # texts of a request
CONNECTIONS = {1: (1, 8, 32), 32: (1, 4)}
CHECKED = 50
OURS = "kdexport serve"
WAITING = ["--max-queue", "10s"]  # peers queue without a bound, and so a closed loop sheds nothing


def main() -> None:
    options = parse()
    texts = read_texts(options.texts)
    servers = servers_of(options)
    with tempfile.TemporaryDirectory() as work:
        for server in servers:
            if server.peer != "kdexport":
                install(server.peer)
        agreement = {server.name: agree(server, options, texts, Path(work)) for server in servers}
        rounds = [one_round(number, servers, options, texts, Path(work)) for number in range(options.rounds)]
    found = {
        "artifact": str(options.artifact.name),
        "settings": {server.name: server.settings for server in servers},
        "lowest_cosine_to_the_file": agreement,
        "summary": summary(rounds),
        "rounds": rounds,
        "environment": environment(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(markdown(found["summary"]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--teacher", type=Path, help="a folder of Sentence-Transformers, for PyTorch")
    parser.add_argument("--texts", type=Path, default=Path("../shared/data/clinc150/test.csv"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serving-embeddings.json"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=5, help="of each load in each round")
    options = parser.parse_args()
    if not shutil.which("wrk"):
        sys.exit("wrk is missing: apt-get install wrk")
    options.artifact = artifact.resolve(options.artifact).resolve()
    return options


def servers_of(options: argparse.Namespace) -> list[Server]:
    file = artifact.model_file(options.artifact, None)
    command = f"uvicorn with_sentence_transformers:app --port {PORT} --workers 2 --log-level warning".split()
    common: dict[str, Any] = {"path": "/v1/embeddings", "body": lambda texts: texts, "answer": vectors_of}
    ours = Server(
        OURS, "kdexport",
        ["kdexport", "serve", str(options.artifact), "--port", str(PORT), "--admin-port", str(PORT + 1), *WAITING],
        settings=f"as it comes, access log included, but {' '.join(WAITING)}", **common,
    )  # fmt: skip
    onnx = Server(
        "FastAPI + Sentence-Transformers, ONNX", "sentence-transformers", command,
        settings="the same file in a sync endpoint, 2 workers of one thread",
        environment={"MODEL": str(options.artifact), "FILE": str(file.relative_to(options.artifact))}, **common,
    )  # fmt: skip
    torch = Server(
        "FastAPI + Sentence-Transformers, PyTorch", "sentence-transformers", command,
        settings="the teacher in a sync endpoint, 2 workers of one thread",
        environment={"MODEL": str(options.teacher.resolve())}, **common,
    ) if options.teacher else None  # fmt: skip
    return [server for server in (ours, onnx, torch) if server]


def vectors_of(answer: dict[str, Any]) -> Any:
    return [one["embedding"] for one in answer["data"]]


def body(texts: list[str]) -> Any:
    return {"input": texts, "encoding_format": "float"}


def agree(server: Server, options: argparse.Namespace, texts: list[str], work: Path) -> float:
    """The lowest cosine of a server's vectors with those of the file: the teacher's are others."""
    right = kdexport.load(options.artifact, threads=1).embed(texts[:CHECKED])
    with running(server, options.artifact, body(texts[:1]), work):
        theirs = np.array(ask(server, body(texts[:CHECKED])))
    if theirs.shape != right.shape:
        return 0.0
    lowest = float((theirs * right).sum(axis=1).min())
    if lowest < 0.99 and "PyTorch" not in server.name:
        raise Failed(f"{server.name} answers otherwise than the file itself: cosine {lowest:.4f}")
    return lowest


def one_round(
    number: int, servers: list[Server], options: argparse.Namespace, texts: list[str], work: Path
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for server in random.Random(number).sample(servers, len(servers)):
        with running(server, options.artifact, body(texts[:1]), work) as up:
            loads = {}
            for size in SIZES:
                parts = [texts[i : i + size] for i in range(0, len(texts) - size, size)]
                bodies = work / f"{size}.bodies"
                bodies.write_text("".join(json.dumps(body(part)) + "\n" for part in parts))
                wrk(up, bodies, 4, WARM_S)
                loads[size] = {n: wrk(up, bodies, n, options.seconds) for n in CONNECTIONS[size]}
            found[server.name] = {"loads": loads, "ready_s": up.ready_s, "rss_mb": up.rss_mb()}
    print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    return found


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Texts a second where a server's median over rounds is best; ratios are paired by round."""
    found: dict[str, Any] = {}
    for name in rounds[0]:
        turns = [one[name] for one in rounds]
        row: dict[str, Any] = {"p50_ms": [turn["loads"][1][1]["p50_ms"] for turn in turns]}
        for size in SIZES:
            rates = {n: [size * turn["loads"][size][n]["per_second"] for turn in turns] for n in CONNECTIONS[size]}
            best = max(rates, key=lambda n: statistics.median(rates[n]))
            row[f"texts_per_second_by_{size}"], row[f"connections_by_{size}"] = rates[best], best
        loads = [load for turn in turns for sizes in turn["loads"].values() for load in sizes.values()]
        row["failed"] = sum(load["not_200"] + load["broken"] for load in loads)
        found[name] = row | {key: [turn[key] for turn in turns] for key in ("ready_s", "rss_mb")}
    for row in found.values():
        for size in SIZES:
            key = f"texts_per_second_by_{size}"
            row[f"kdexport_to_it_by_{size}"] = _ratio(found[OURS][key], row[key])
    return found


def markdown(found: dict[str, Any]) -> str:
    def middle(row: dict[str, Any], key: str, digits: int = 0) -> str:
        return f"{statistics.median(row[key]):,.{digits}f}"

    def times(name: str, row: dict[str, Any], size: int) -> str:
        ratio = row[f"kdexport_to_it_by_{size}"]
        interval = " [{:.2f}–{:.2f}]".format(*ratio["ci95"]) if ratio["ci95"] else ""
        return "–" if name == OURS else f"{ratio['value']:.2f}{interval}"

    lines = [
        "| server | p50 ms, 1 connection | texts/s, one a request | kdexport's is × higher | texts/s, 32 a request "
        "| kdexport's is × higher | ready after s | RSS MB | failed |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in found.items():
        cells = [name, middle(row, "p50_ms", 2)]
        for size in SIZES:
            cells += [middle(row, f"texts_per_second_by_{size}"), times(name, row, size)]
        cells += [middle(row, "ready_s", 1), middle(row, "rss_mb"), str(row["failed"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
