"""Whisper's log-mel bands, against those of transformers: generated sound, and real recordings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import WhisperFeatureExtractor

from kdexport.tasks.inputs.audio import resampled
from kdexport.tasks.inputs.recordings import decoded
from kdexport.tasks.inputs.whisper import HOP, RATE, log_mels

DATA = Path(__file__).parents[3] / "shared" / "data"
SECONDS = 4
TIME = np.arange(SECONDS * RATE) / RATE
GENERATED = {
    "a tone": 0.3 * np.sin(2 * np.pi * 440 * TIME),
    "a tone between two bands, and one near the top": 0.2 * (np.sin(2 * np.pi * 1_234 * TIME) + np.sin(49_900 * TIME)),
    "a sweep over all bands": 0.3 * np.sin(2 * np.pi * (1_000 * TIME**2)),
    "noise": np.random.default_rng(0).normal(0, 0.1, len(TIME)),
    "faint noise": np.random.default_rng(1).normal(0, 1e-5, len(TIME)),
    "a click": np.eye(1, len(TIME), 20_000)[0],
    "silence": np.zeros(len(TIME)),
    "a constant": np.full(len(TIME), 0.5),
    "clipped": np.sign(np.sin(2 * np.pi * 300 * TIME)),
}


def assert_same(samples: np.ndarray, mels: int, seconds: int) -> None:
    """Compare bands: of the whole window, in number and shape."""
    samples = samples.astype(np.float32)
    theirs = WhisperFeatureExtractor(feature_size=mels, chunk_length=seconds)(
        samples, sampling_rate=RATE, return_tensors="np"
    )["input_features"][0]
    ours = log_mels(samples, mels, seconds * RATE // HOP)
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape) == (np.float32, (mels, 100 * seconds))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mels", [80, 128])
@pytest.mark.parametrize("name", GENERATED)
def test_generated_sound_has_the_bands_of_transformers(name, mels):
    assert_same(GENERATED[name], mels, SECONDS)


@pytest.mark.parametrize("length", [1, 160, 399, 30_001, SECONDS * RATE - 1, SECONDS * RATE + 1, 2 * SECONDS * RATE])
def test_shorter_is_padded_and_longer_is_cut_as_by_transformers(length):
    noise = np.random.default_rng(length).normal(0, 0.1, 2 * SECONDS * RATE)[:length]
    noise[SECONDS * RATE :] *= 10  # louder sound behind the window would lift the floor within it
    assert_same(noise, 80, SECONDS)


@pytest.mark.parametrize("mels", [80, 128])
@pytest.mark.parametrize("pattern", ["speech-samples/*/*.*", "coffee-orders/audio/*.flac"])
def test_real_recordings_have_the_bands_of_transformers(pattern, mels):
    found = [path for path in sorted(DATA.glob(pattern)) if path.suffix in (".wav", ".flac", ".ogg")]
    if not found:
        pytest.skip(f"shared/data/{pattern} is not beside the repository")
    for path in found[:: max(1, len(found) // 8)]:
        samples = resampled(decoded(path.read_bytes()), RATE, 40 * RATE)
        assert_same(samples, mels, 30)
        assert_same(samples, mels, 1)
