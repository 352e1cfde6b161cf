"""Make recordings of 3 to 8 digits from single ones, for speech recognition.

    python benchmarks/digit_strings.py shared/data/fsdd digit-strings

reads the recordings of Free Spoken Digits and writes `train/`, `validation/`, `test/` and `heard/`, each with a
`metadata.csv` of `file_name,text`. Each string is of one speaker, with random pauses and loudness. Two speakers are in
`validation` and in `test` alone; `heard` has new recordings of the speakers of `train`.
"""

import csv
import sys
import wave
from collections import defaultdict
from pathlib import Path

import numpy as np

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VALIDATION, TEST = "theo", "yweweler"
STRINGS = {"train": 2_400, "validation": 200, "test": 300, "heard": 200}
RATE = 8_000


def recordings(folder: Path) -> dict[str, dict[int, dict[int, np.ndarray]]]:
    """Return speaker → digit → number of the recording → samples."""
    found: dict[str, dict[int, dict[int, np.ndarray]]] = defaultdict(lambda: defaultdict(dict))
    for path in sorted(folder.rglob("*.wav")):
        digit, speaker, number = path.stem.split("_")
        with wave.open(str(path)) as file:
            assert file.getframerate() == RATE
            samples = np.frombuffer(file.readframes(file.getnframes()), np.int16)
        found[speaker][int(digit)][int(number)] = samples.astype(np.float32) / 32768
    return found


def string(
    digits: dict[int, dict[int, np.ndarray]], numbers: range, draw: np.random.Generator
) -> tuple[np.ndarray, str]:
    """Return the samples and the words of one string, from recordings with these numbers."""
    chosen = draw.integers(0, 10, draw.integers(3, 9))
    parts = [_pause(draw)]
    for digit in chosen:
        usable = [samples for number, samples in digits[int(digit)].items() if number in numbers]
        parts += [usable[draw.integers(len(usable))], _pause(draw)]
    samples = np.concatenate(parts) * 10 ** draw.uniform(-0.6, 0.2)
    return samples.clip(-1, 1), " ".join(WORDS[digit] for digit in chosen)


def _pause(draw: np.random.Generator) -> np.ndarray:
    return draw.normal(0, 1e-3, int(draw.uniform(0.03, 0.25) * RATE)).astype(np.float32)


def main(source: Path, out: Path) -> None:
    """Write all splits."""
    speakers, draw = recordings(source), np.random.default_rng(0)
    others = [name for name in sorted(speakers) if name not in (VALIDATION, TEST)]
    for split, count in STRINGS.items():
        folder = out / split
        folder.mkdir(parents=True)
        with (folder / "metadata.csv").open("w", newline="") as table:
            rows = csv.writer(table)
            rows.writerow(["file_name", "text"])
            for i in range(count):
                name = {"validation": VALIDATION, "test": TEST}.get(split) or others[i % len(others)]
                # the first five recordings of each digit are those of the data set's own test split
                numbers = {"train": range(5, 50), "heard": range(5)}.get(split, range(50))
                samples, text = string(speakers[name], numbers, draw)
                with wave.open(str(folder / f"{i:04}.wav"), "wb") as file:
                    file.setparams((1, 2, RATE, 0, "NONE", ""))
                    file.writeframes((samples * 32767).astype("<i2").tobytes())
                rows.writerow([f"{i:04}.wav", text])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
