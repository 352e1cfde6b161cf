"""Spoken orders without transcripts: a folder to distil from, and the share of the orders' words that a model hears.

    python benchmarks/coffee_orders.py split shared/data/coffee-orders orders
    python benchmarks/coffee_orders.py judge orders/test MODEL…

`split` links every fifth recording below `test/`, the others below `train/`, each with a `metadata.csv` of
`file_name,slots`. The slots are the only truth there is, and no recogniser sees them. It writes `words.txt` too: the
words that an order may have, by the sentences beside the recordings, with numbers in words and in digits.
`judge` prints the share of the words of the slots' values that are in the transcripts, with a 95 % interval over
recordings, and for each model its speed against the first's, in turns by recording on one thread, with quartiles.
Numbers count as heard in words or digits: both sides pass Whisper's normaliser of English. A model is an artifact, a
Whisper folder (transformers' pipeline), or for faster-whisper a folder of CTranslate2's:

    ct2-transformers-converter --model WHISPER --output_dir ct2 --copy_files tokenizer.json preprocessor_config.json
"""

import csv
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

spelled_alike = EnglishTextNormalizer({})


def split(source: Path, out: Path) -> None:
    """Link the recordings, and write the words of orders."""
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
    said = (source / "sentences.txt").read_text().lower()
    (out / "words.txt").write_text("\n".join(sorted({*said.split(), *spelled_alike(said).split()})) + "\n")


def judge(folder: Path, *models: str) -> None:
    """Print the share of words heard by each model, and how many times as fast as the first it is."""
    with (folder / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    listeners = [listener(model) for model in models]
    texts: list[list[str]] = [[] for _ in models]
    seconds = np.zeros((len(rows), len(models)))
    for i, row in enumerate(rows):
        for j, hear in enumerate(listeners):
            began = time.perf_counter()
            texts[j].append(hear(str(folder / row["file_name"])))
            seconds[i, j] = time.perf_counter() - began
    for j, model in enumerate(models):
        counts = np.array([_heard(row["slots"], text) for row, text in zip(rows, texts[j], strict=True)], float)
        draws = np.random.default_rng(0).poisson(1.0, (2000, len(counts))) @ counts
        low, high = np.quantile(draws[:, 0] / draws[:, 1], (0.025, 0.975))
        found, words = counts.sum(axis=0)
        slow, ratio, quick = np.quantile(seconds[:, 0] / seconds[:, j], (0.25, 0.5, 0.75))
        faster = f"{ratio:.2f}x [{slow:.2f}, {quick:.2f}] the first's speed, {1000 * np.median(seconds[:, j]):.0f} ms"
        print(f"{model}: {found / words:.1%} [{low:.1%}, {high:.1%}] of {words:.0f} words; {faster}")


def listener(model: str) -> Callable[[str], str]:
    """Return what transcribes a file: an artifact, a Whisper folder, or its CTranslate2 form (`model.bin`), in int8."""
    if (Path(model) / "model.bin").is_file():
        from faster_whisper import WhisperModel

        quick = WhisperModel(model, device="cpu", compute_type="int8", cpu_threads=1)
        how = {"language": "en", "beam_size": 1, "without_timestamps": True, "temperature": 0.0}
        return lambda file: " ".join(segment.text for segment in quick.transcribe(file, **how)[0])
    if (Path(model) / "model.safetensors").is_file():
        import soundfile
        import torch
        from transformers import pipeline

        torch.set_num_threads(1)
        pipe = pipeline("automatic-speech-recognition", model, device="cpu")

        def hear(file: str) -> str:
            samples, rate = soundfile.read(file, dtype="float32")
            found = pipe({"raw": samples, "sampling_rate": rate}, generate_kwargs={"do_sample": False, "num_beams": 1})
            return re.sub(r"<\|.*?\|>", "", found["text"])

        return hear
    import kdexport

    loaded = kdexport.load(model, threads=1)
    return lambda file: loaded.predict([file])[0].text


def _heard(slots: str, text: str) -> tuple[int, int]:
    """Return how many words of the slots' values are in a text, and how many there are."""
    words = [word for value in json.loads(slots).values() for word in spelled_alike(value).split()]
    there = spelled_alike(text).split()
    return sum(word in there for word in words), len(words)


if __name__ == "__main__":
    command, first, *others = sys.argv[1:]
    split(Path(first), Path(others[0])) if command == "split" else judge(Path(first), *others)
