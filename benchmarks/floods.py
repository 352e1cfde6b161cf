"""Good clients beside floods of hostile requests: `python benchmarks/floods.py runs/demo/artifact --seconds 60`.

One server with a text model and small models of images, sound and tags; two good clients, of texts and of pictures,
ask every 20 ms. First alone, then beside each flood; every other measurement is a quiet one, as this machine may be
busy with other things. Results go to `benchmarks/results/floods.json` and, as a table, to stdout.
"""

from __future__ import annotations

import argparse
import gzip
import http.client
import io
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "fuzz"))
PAUSE_S = 0.02


def webp(side: int) -> bytes:
    """A picture of one colour: some 34 bytes, whatever its size."""
    file = io.BytesIO()
    Image.new("L", (side, side)).save(file, "WEBP", lossless=True)
    return file.getvalue()


def floods() -> dict[str, tuple[str, bytes, dict[str, str], int]]:
    """Name → path, body, headers and connections."""
    gz = {"Content-Encoding": "gzip"}
    pair = {"inputs": {"text": "(" * 99_000, "text_pair": "(" * 99_000}}
    texts = {"inputs": ["(" * 99_000] * 19}
    words = {"inputs": ["a " * 49_000] * 19, "parameters": {"aggregation_strategy": "none", "ignore_labels": []}}
    silence = b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0\1\0\0\0\0\0\0\0\2\0\x10\0data\xff\xff\xff\x7f" + bytes(1_900_000)

    def packed(content: object) -> bytes:
        return gzip.compress(json.dumps(content).encode(), mtime=0)

    return {
        "pairs of 99,000 characters, gzipped": ("/models/text", packed(pair), gz, 16),
        "19 texts without spaces, gzipped": ("/models/text", packed(texts), gz, 60),
        "19 texts of 49,000 words to tag, gzipped": ("/models/tags", packed(words), gz, 16),
        "WebP of 7000 × 7000 pixels": ("/models/image", webp(7000), {}, 150),
        "sound of 1 Hz, 1.9 MB": ("/models/sound", silence, {}, 16),
    }


def flood(port: int, what: tuple[str, bytes, dict[str, str], int], seconds: float, found: Any) -> None:
    """Ask from many connections, each again as soon as it was answered."""
    path, body, headers, connections = what
    ends, counts = time.monotonic() + seconds, Counter[str]()

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        while time.monotonic() < ends:
            try:
                connection.request("POST", path, body, headers)
                answer = connection.getresponse()
                answer.read()
                counts[str(answer.status)] += 1
            except OSError:
                counts["broken"] += 1
                connection.close()

    threads = [threading.Thread(target=client) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.put(dict(counts))


def good(port: int, path: str, body: bytes, seconds: float, found: Any) -> None:
    """Ask every 20 ms; seconds until the answer, with 429s asked again at once after their Retry-After is ignored."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    ends, times, counts = time.monotonic() + seconds, [], Counter[str]()
    while (began := time.monotonic()) < ends:
        status = 429
        while status == 429:
            connection.request("GET" if not body else "POST", path, body or None)
            answer = connection.getresponse()
            answer.read()
            status = answer.status
            counts[str(status)] += 1
            if status == 429:
                time.sleep(PAUSE_S)
        times.append(time.monotonic() - began)
        time.sleep(PAUSE_S)
    found.put((path, times, dict(counts)))


def measure(port: int, what: tuple[str, bytes, dict[str, str], int] | None, seconds: float) -> dict[str, Any]:
    """Good clients, and health, beside a flood."""
    clients = [
        ("/models/text", json.dumps({"inputs": "Shares rose after the merger"}).encode()),
        ("/models/image", webp(224)),
        ("/v2/health/live", b""),
    ]
    start = multiprocessing.get_context("spawn")
    answers, flooded = start.Queue(), start.Queue()
    processes = [start.Process(target=good, args=(port, *client, seconds, answers)) for client in clients]
    if what:
        processes.append(start.Process(target=flood, args=(port, what, seconds, flooded)))
    for process in processes:
        process.start()
    found = {}
    for _ in clients:
        path, times, counts = answers.get()
        found[path] = {
            "p50_ms": 1e3 * float(np.quantile(times, 0.5)),
            "p99_ms": 1e3 * float(np.quantile(times, 0.99)),
            "most_ms": 1e3 * max(times),
            "answers": counts,
        }
    found["flood"] = flooded.get() if what else {}
    for process in processes:
        process.join()
    return found


def main() -> None:
    """Serve, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    asked = parser.parse_args()
    import small

    with tempfile.TemporaryDirectory() as home:
        made = {name: small.pack(config, Path(home) / name) for name, config in small.configs().items()}
        models = [f"text={asked.artifact}", *(f"{n}={made[m]}" for n, m in
                  (("image", "image"), ("sound", "audio"), ("tags", "tags")))]  # fmt: skip
        command = [sys.executable, "-m", "kdexport", "serve", *models, "--port", "0", "--admin-port", "-1"]
        server = subprocess.Popen([*command, "--access-log", "off"], stderr=subprocess.PIPE, text=True)
        assert server.stderr
        line = next(line for line in server.stderr if "ready after" in line)
        port = int(re.findall(r"http://[^:]+:(\d+)", line)[0])
        threading.Thread(target=server.stderr.read, daemon=True).start()
        results: dict[str, Any] = {"seconds": asked.seconds, "floods": {}}
        clients = "good texts p50, p99 (quiet) | good pictures p50, p99 (quiet)"
        print(f"| flood | its requests, by status | {clients} | most for health | memory |")
        print("|---|---|--:|--:|--:|--:|")
        for name, what in floods().items():
            quiet, beside = measure(port, None, asked.seconds / 3), measure(port, what, asked.seconds)
            peak = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{server.pid}/status").read_text())
            assert peak
            results["floods"][name] = {"quiet": quiet, "beside": beside, "peak_mb": int(peak[1]) / 1e3}
            cells = [
                f"{beside[path]['p50_ms']:.1f}, {beside[path]['p99_ms']:.1f} "
                f"({quiet[path]['p50_ms']:.1f}, {quiet[path]['p99_ms']:.1f}) ms"
                for path in ("/models/text", "/models/image")
            ]
            health = f"{beside['/v2/health/live']['most_ms']:.0f} ms"
            statuses = ", ".join(f"{n:,} × {status}" for status, n in sorted(beside["flood"].items()))
            print("|", " | ".join([name, statuses, *cells, health, f"{int(peak[1]) / 1e3:.0f} MB"]), "|", flush=True)
        server.terminate()
        server.wait()
    (ROOT / "benchmarks" / "results" / "floods.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
