"""Recordings whose words can be learned in seconds: a tone for each letter."""

from __future__ import annotations

import csv
import io
import wave

import numpy as np

RATE = 8_000
_HERTZ = {"a": 500, "b": 900, "c": 1_600, "d": 2_700}


def wav(samples, rate=RATE, channels=1) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((channels, 2, rate, 0, "NONE", ""))
        out.writeframes((np.repeat(samples, channels) * 32767).astype("<i2").tobytes())
    return file.getvalue()


def say(text: str, seed: int = 0, rate: int = RATE) -> bytes:
    """Return a recording of a text: 0.1 s a letter, a short gap between two, a longer one between words."""
    draw = np.random.default_rng(seed)
    parts = [np.zeros(int(0.1 * rate))]
    for letter in text:
        t = np.arange(int(0.1 * rate)) / rate
        tone = np.zeros(int(0.15 * rate)) if letter == " " else 0.3 * np.sin(2 * np.pi * _HERTZ[letter] * t)
        parts += [tone, np.zeros(int(draw.uniform(0.04, 0.08) * rate))]
    samples = np.concatenate(parts)
    return wav(samples + draw.normal(0, 0.003, len(samples)), rate)


def sentences(count: int, seed: int = 0) -> list[str]:
    draw = np.random.default_rng(seed)
    words = ["".join(draw.choice(list(_HERTZ), draw.integers(1, 4))) for _ in range(30)]
    return [" ".join(draw.choice(words, draw.integers(1, 4))) for _ in range(count)]


def write_folder(folder, texts, column="text", seed=0):
    """Write recordings and their metadata.csv."""
    folder.mkdir(parents=True)
    with (folder / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", column])
        for i, text in enumerate(texts):
            (folder / f"{i}.wav").write_bytes(say(text, seed + i))
            table.writerow([f"{i}.wav", text])
    return folder
