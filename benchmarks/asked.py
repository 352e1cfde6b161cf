"""What students of an endpoint's answers keep of it, and what choosing the texts saves.

    python benchmarks/asked.py runs --bbc runs/demo/teacher
    python benchmarks/asked.py runs --clinc runs/clinc/teacher --clinc-data ../shared/data/clinc150

The endpoint is `tests/endpoint.py` around a fine-tuned encoder, in place of a language model. No text that the runs
read has a label; the figures are on labelled texts that were held out, by the file that ships and the encoder itself.
Writes `results/asked.json`, and keeps the reports of both runs beside it. Finished runs under the first argument are
taken as they are.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from endpoint import Encoder, running  # noqa: E402

import kdexport  # noqa: E402
from kdexport.data import demo  # noqa: E402
from kdexport.results import read_report  # noqa: E402
from kdexport.tasks.metrics import paired_difference, wilson_interval  # noqa: E402

BBC_CALLS, CLINC_CALLS = 1_600, 15_000
QUICK = {"bench.time_limit_s": 60, "bench.batch_sizes": [8], "export.variants": ["fp32", "int8"]}
CNN: dict[str, Any] = {"student": "cnn", "max_length": 32, "set": {"student.embedding": 128}}
Rows = Sequence[dict[str, str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of the runs")
    parser.add_argument("--bbc", type=Path, help="an encoder for BBC News: the demo's teacher")
    parser.add_argument("--clinc", type=Path, help="an encoder for clinc150")
    parser.add_argument("--clinc-data", type=Path, help="train.csv and test.csv of clinc150")
    parser.add_argument(
        "--texts", type=int, nargs=2, default=(2_250, 4_000), help="of clinc150, chosen and random ones"
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "asked.json")
    given = parser.parse_args()
    given.runs.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = json.loads(given.out.read_text()) if given.out.is_file() else {}
    if given.bbc:
        texts, test = of_bbc(given.runs)
        with endpoint(given.bbc, [*texts, *test]) as (url, encoder):
            run(given.runs / "bbc", url, encoder, texts, BBC_CALLS, student="tiny", max_length=96, max_size="5MB")
            found["bbc"] = judged(given.runs / "bbc", encoder, test)
            keep(given.runs / "bbc", "bbc-endpoint.json")
    if given.clinc:
        texts, test = (read(given.clinc_data / f"{split}.csv") for split in ("train", "test"))
        with endpoint(given.clinc, [*texts, *test]) as (url, encoder):
            run(given.runs / "clinc150", url, encoder, texts, CLINC_CALLS, **CNN)
            found["clinc150"] = judged(given.runs / "clinc150", encoder, test)
            found["chosen or random"] = chosen_or_random(
                given.runs, url, encoder, texts, test, given.texts, given.seeds
            )
            keep(given.runs / f"chosen-others-guessed-{given.texts[0]}-0", "clinc150-endpoint.json")
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


@contextmanager
def endpoint(folder: Path, rows: Rows) -> Iterator[tuple[str, Encoder]]:
    """Serve an encoder that has computed these texts before it is asked."""
    encoder = Encoder.of(folder)
    encoder.know([{"text": row["text"]} for row in rows])
    with running(encoder) as server:
        yield f"openai:encoder@{server.url}", encoder


def run(out: Path, url: str, encoder: Encoder, texts: Rows, calls: int, **given: Any) -> None:
    """Distil the endpoint's answers to texts without labels, unless that was done."""
    if (out / "report.json").is_file():
        return
    file = out.with_suffix(".jsonl")
    file.write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in texts))
    more = given.pop("set", {})
    kdexport.run(teacher=url, data=file, labels=encoder.labels, max_calls=calls, out=out, set=QUICK | more, **given)


def judged(out: Path, encoder: Encoder, test: Rows) -> dict[str, Any]:
    """Return calls, and the accuracy of the encoder and of the file that ships on labelled texts."""
    report = read_report(out / "report.json")
    asked, best = report.asked, report.variant(report.recommended)
    assert asked
    assert best.latency_ms
    student = [found.label for found in kdexport.load(out).predict([row["text"] for row in test])]
    teacher = [encoder.labels[int(encoder.of_row({"text": row["text"]}).argmax())] for row in test]
    right = {name: [a == row["label"] for a, row in zip(answers, test, strict=True)] for name, answers in
             (("student", student), ("teacher", teacher))}  # fmt: skip
    counts = {name: sum(each) for name, each in right.items()}
    import numpy as np

    difference, interval = paired_difference(np.array(right["teacher"]), np.array(right["student"]))
    return {
        "calls": asked.sent + asked.cached, "texts": asked.texts, "stopped": asked.stopped, "test rows": len(test),
        **{name: {"accuracy": n / len(test), "ci95": wilson_interval(n, len(test))} for name, n in counts.items()},
        "student − teacher": {"value": difference, "ci95": interval},
        "kept": counts["student"] / counts["teacher"],
        "file": best.file, "size_mb": (best.size_bytes or 0) / 1e6, "p50_ms": best.latency_ms.p50,
        "endpoint p50_ms": asked.p50_ms,
    }  # fmt: skip


def chosen_or_random(
    runs: Path, url: str, encoder: Encoder, texts: Rows, test: Rows, train: Sequence[int], seeds: int
) -> dict[str, Any]:
    """Train the same student on fewer texts that were chosen and on more that were random, with several seeds."""
    found: dict[str, Any] = {}
    few, many = train
    ways = {
        "random": ("random", many, False), "random, others guessed": ("random", many, True),
        "chosen": ("unsure", few, False), "chosen, others guessed": ("unsure", few, True),
    }  # fmt: skip
    for name, (choose, n, guess) in ways.items():
        each = []
        for seed in range(seeds):
            out = runs / f"{name.replace(', ', '-').replace(' ', '-')}-{n}-{seed}"
            # Of the texts that can be asked three quarters teach; 50 are asked twice, and the probes are a few calls.
            calls = round(n / 0.75) + 60
            keys = {
                "teacher.ask.choose": choose,
                "teacher.ask.guess": guess,
                "bench.time_limit_s": 10,
                "bench.rounds": 1,
            }
            run(out, url, encoder, texts, calls, seed=seed, **CNN | {"set": CNN["set"] | keys})
            each.append(judged(out, encoder, test))
        found[name] = {
            "accuracy": [one["student"]["accuracy"] for one in each],
            "training texts": [one["texts"]["train"] for one in each], "calls": [one["calls"] for one in each],
        }  # fmt: skip
    return found


def keep(run_folder: Path, name: str) -> None:
    """Keep a run's report, with paths that any machine has."""
    text = (run_folder / "report.json").read_text().replace(f"{run_folder.parent.resolve()}/", "runs/")
    (HERE / "results" / name).write_text(text.replace(f"{run_folder.parent}/", "runs/"))


def of_bbc(folder: Path) -> tuple[Rows, Rows]:
    """Return the demo's texts that its teacher was not tested on, and its test articles."""
    folder = folder / "bbc-news"
    folder.mkdir(exist_ok=True)
    demo.write_few_labels(folder)
    parts = {name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()] for name in
             ("train", "unlabelled", "test")}  # fmt: skip
    return [*parts["train"], *parts["unlabelled"]], parts["test"]


def read(file: Path) -> Rows:
    """Return the rows of a CSV file."""
    with file.open(newline="", encoding="utf-8") as opened:
        return [*csv.DictReader(opened)]


if __name__ == "__main__":
    main()
