"""What is possible without a server: tokenise and run in a loop, on one thread and on all cores.

python bare.py ARTIFACT TEXTS SECONDS: prints {"p50_ms", "p99_ms", "per_second", "threads"}.
"""

import json
import os
import sys
import threading
import time
from itertools import cycle, islice
from pathlib import Path

import numpy as np

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from kdexport.runtime import predictor


def main() -> None:
    artifact, texts, seconds = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), float(sys.argv[3])
    model = predictor.load(artifact, "int8", 1)
    cores = predictor.allowed_cores()

    def loop(first: int, seconds: float) -> list[float]:
        times = []
        ends = time.perf_counter() + seconds
        for text in islice(cycle(texts), first, None):
            started = time.perf_counter()
            model.run(model.task.encode([{"text": text}]))
            now = time.perf_counter()
            times.append(now - started)
            if now > ends:
                return times

    loop(0, 1.0)
    alone = loop(0, seconds)
    answered = [0] * cores

    def count(number: int) -> None:
        answered[number] = len(loop(number * len(texts) // cores, seconds))

    threads = [threading.Thread(target=count, args=(number,)) for number in range(cores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    p50, p99 = np.quantile(alone, [0.5, 0.99]) * 1e3
    print(json.dumps({"p50_ms": p50, "p99_ms": p99, "per_second": sum(answered) / seconds, "threads": cores}))


if __name__ == "__main__":
    main()
