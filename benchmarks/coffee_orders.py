"""Spoken orders without transcripts: a folder to distil from, and the share of the orders' words that a model hears.

    python benchmarks/coffee_orders.py split shared/data/coffee-orders orders
    python benchmarks/coffee_orders.py judge orders/test ARTIFACT|WHISPER

`split` links every fifth recording below `test/`, the others below `train/`, each with a `metadata.csv` of
`file_name,slots`. The slots are the only truth there is, and no recogniser sees them.
`judge` prints the share of the words of the slots' values that are in the transcripts, with a 95 % interval over
recordings, and the seconds per recording on one thread.
"""

import csv
import json
import sys
import time
from pathlib import Path

import numpy as np

from kdexport.tasks.inputs.transcripts import normalised


def split(source: Path, out: Path) -> None:
    """Link the recordings."""
    with (source / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name, chosen in (("train", lambda i: i % 5), ("test", lambda i: not i % 5)):
        (out / name).mkdir(parents=True)
        with (out / name / "metadata.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["file_name", "slots"])
            for i, row in enumerate(rows):
                if chosen(i):
                    recording = (source / row["file_name"]).resolve()
                    (out / name / Path(row["file_name"]).name).symlink_to(recording)
                    table.writerow([Path(row["file_name"]).name, row["slots"]])


def judge(folder: Path, model: str) -> None:
    """Print the share of words heard."""
    with (folder / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    texts, seconds = hear(model, [str(folder / row["file_name"]) for row in rows])
    counts = np.array([_heard(row["slots"], text) for row, text in zip(rows, texts, strict=True)], float)
    draws = np.random.default_rng(0).poisson(1.0, (2000, len(counts))) @ counts
    low, high = np.quantile(draws[:, 0] / draws[:, 1], (0.025, 0.975))
    found, words = counts.sum(axis=0)
    print(f"{found / words:.1%} [{low:.1%}, {high:.1%}] of {words:.0f} words, {1000 * np.median(seconds):.1f} ms")


def hear(model: str, files: list[str]) -> tuple[list[str], list[float]]:
    """Return the transcripts of an artifact's or a Whisper folder's model, and the seconds that each took."""
    if (Path(model) / "model.safetensors").is_file():
        import soundfile
        import torch
        from transformers import pipeline

        torch.set_num_threads(1)
        pipe = pipeline("automatic-speech-recognition", model, device="cpu")
        sounds = [soundfile.read(file, dtype="float32") for file in files]
        return _timed(lambda one: pipe({"raw": one[0], "sampling_rate": one[1]})["text"], sounds)
    import kdexport

    loaded = kdexport.load(model, threads=1)
    return _timed(lambda file: loaded.predict([file])[0].text, files)


def _timed(hear_one, given) -> tuple[list[str], list[float]]:  # type: ignore[no-untyped-def]
    texts, seconds = [], []
    for one in given:
        began = time.perf_counter()
        texts.append(hear_one(one))
        seconds.append(time.perf_counter() - began)
    return texts, seconds


def _heard(slots: str, text: str) -> tuple[int, int]:
    """Return how many words of the slots' values are in a text, and how many there are."""
    words = [word for value in json.loads(slots).values() for word in normalised(value).split()]
    there = normalised(text).split()
    return sum(word in there for word in words), len(words)


if __name__ == "__main__":
    {"split": lambda a, b: split(Path(a), Path(b)), "judge": lambda a, b: judge(Path(a), b)}[sys.argv[1]](*sys.argv[2:])
