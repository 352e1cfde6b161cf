"""Sound as a model reads it: a WAV file's bytes → mono at the model's rate → a waveform, or logarithms of mel bands.

The arithmetic is that of Hugging Face's feature extractors: Wav2Vec2's for waveforms, and for mel bands that of the
Audio Spectrogram Transformer (Gong et al. 2021) as transformers 4.57 does it without torchaudio: Kaldi's filter banks
over frames of 400 samples, 160 apart, whatever the rate.
"""

from __future__ import annotations

import io
import math
import wave
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from kdexport.errors import ModelError
from kdexport.tasks.base import Modality
from kdexport.tasks.config import AudioConfig, Row
from kdexport.tasks.inputs.media import DECODING, Media, bytes_of, inline
from kdexport.tasks.inputs.wav import Recording, decoded, pieces, read_header
from kdexport.tasks.metrics import Array

FRAME, HOP = 400, 160
_FFT, _PREEMPHASIS, _FLOOR, _LOWEST_HZ = 512, 0.97, 1.192092955078125e-07, 20
# What models read of a recording at most, where nothing else says how much.
_USUAL_S = 10.0
# Fourier transforms are slow, and large, where their length has large factors. Ratios of the usual rates have none
# (160 : 441, 147 : 1,280); of all others the nearest one of small parts is taken, within a thousandth.
_MOST_RATIO, _MOST_ODD_RATIO, _MOST_ODD_LENGTH = 3_000, 100, 1 << 19
_SMOOTH = math.prod(p for p in range(2, 100) if all(p % q for q in range(2, p))) ** 24
# What reading a number and resampling a sample take on one core, and the copies of a sample that there are meanwhile.
_SECONDS_PER_NUMBER, _SECONDS_PER_SAMPLE, _BYTES_PER_SAMPLE = 5e-9, 6e-8, 32


class Sounds(Media):
    """The side of a task that reads rows `{"audio": …}`."""

    modality: ClassVar[Modality] = "audio"

    @cached_property
    def _how(self) -> AudioConfig:
        assert self.config.audio
        return self.config.audio

    @cached_property
    def _filters(self) -> Array:
        return mel_filters(self._how.mels, self._how.rate)

    @classmethod
    def inspect(cls, content: bytes) -> object:
        """Check the header, and numbers that may be no sound: floats."""
        header = read_header(content)
        if header.is_float:
            for _ in pieces(content, header):
                pass
        return header

    @property
    def _needed(self) -> int:
        """Samples that the model reads."""
        return FRAME + (self._how.length - 1) * HOP if self._how.mels else self._how.length

    def array(self, content: bytes) -> Array:
        """Float32 [length] of one recording, or [length, mels]."""
        how, needed = self._how, self._needed
        read = (needed + HOP) / how.rate + 1  # a second more than is heard, as resampling takes whole units
        with DECODING.room(read_header(content, read).frames * _BYTES_PER_SAMPLE):
            samples = resampled(decoded(content, read), how.rate, needed)
            if not how.mels:
                heard = (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7) if how.normalise else samples
                return _padded(heard, how.length)
            bands = _padded(log_mels(samples, self._filters), how.length)
            return ((bands - how.mean) / (how.std * 2) if how.normalise else bands).astype(np.float32)

    def seconds(self, row: Row) -> float:
        """Estimate the seconds that decoding a row takes, from its header.

        Raises:
            DataError: it is no sound that can be read.
        """
        header = read_header(bytes_of(row[self.modality]), (self._needed + HOP) / self._how.rate + 1)
        return header.frames * (header.channels * _SECONDS_PER_NUMBER + _SECONDS_PER_SAMPLE)

    def shapes(self) -> dict[str, list[int]]:
        """The graph's input, float32."""
        bands = [self._how.mels] if self._how.mels else []
        return {self.config.inputs[0]: [-1, self._how.length, *bands]}

    def axes(self) -> dict[str, dict[int, str]]:
        """Names of the dynamic axes of the input and of the output; of mel bands there are always so many."""
        length = {} if self._how.mels else {1: "sequence_length"}
        return {self.config.inputs[0]: {0: "batch_size"} | length, self.output: {0: "batch_size"}}

    def remarks(self, rows: Sequence[Row]) -> list[str]:
        recordings = [read_header(bytes_of(row[self.modality])) for row in rows]
        reads, said = seconds_of(self._how), []
        if others := sorted({r.rate for r in recordings} - {self._how.rate}):
            said.append(f"sound of {', '.join(f'{rate:,}' for rate in others)} Hz is resampled to {self._how.rate:,}")
        if cut := sum(r.seconds > reads + 0.02 for r in recordings):
            share = cut / len(recordings)
            said.append(f"{share:.1%} of the recordings are longer than {reads:.2g} s, and cut there")
        return said

    def probes(self) -> list[dict[str, Any]]:
        """Recordings at the edges of what may come in: a sample, silence, too long, stereo of another rate."""
        length = int(seconds_of(self._how) * 44_100)
        return [
            _recording(np.zeros((1, 1)), 8_000),
            _recording(np.zeros((4_000, 1)), 16_000),
            _recording(_noise(length + 44_100, 2, 1), 44_100),
            _recording(np.ones((8_000, 1)), 8_000),
        ]

    def examples(self) -> list[dict[str, Any]]:
        rate = self._how.rate
        return [_recording(_noise(int(seconds_of(self._how) * rate), 1, seed), rate) for seed in range(2, 6)]


# --- samples → what a model reads


def resampled(recording: Recording, rate: int, needed: int) -> Array:
    """At most `needed` samples at another rate, by the Fourier transform: what lies above half the rate is gone."""
    samples, own = recording
    if own == rate:
        return samples[:needed]
    to, of = _ratio(rate, own)
    blocks = -(-min(len(samples), math.ceil((needed + HOP) * own / rate)) // of)
    samples = samples[: blocks * of]
    wanted = min(needed, max(1, math.ceil(len(samples) * rate / own)))
    blocks = -(-blocks // 32) * 32  # lengths that are products of small numbers are transformed sooner
    while blocks * of > _MOST_ODD_LENGTH and _SMOOTH % blocks:
        blocks += 32
    spectrum = np.fft.rfft(samples, blocks * of)
    length = blocks * to
    return (np.fft.irfft(spectrum[: length // 2 + 1], length)[:wanted] * (rate / own)).astype(np.float32)


@lru_cache(64)
def _ratio(rate: int, own: int) -> tuple[int, int]:
    """Samples after and before resampling, in small whole numbers."""
    ratio = Fraction(rate, own)
    if any(part > _MOST_RATIO or _SMOOTH % part for part in ratio.as_integer_ratio()):
        ratio = ratio.limit_denominator(_MOST_ODD_RATIO)
    return max(1, ratio.numerator), ratio.denominator


def log_mels(samples: Array, filters: Array) -> Array:
    """Float32 [frames, mels]: the logarithm of each band's energy in frames of 400 samples, 160 apart."""
    if len(samples) < FRAME:
        samples = _padded(samples, FRAME)
    frames = sliding_window_view(samples, FRAME)[::HOP]
    sharper = np.empty_like(frames)
    sharper[:, 0] = (1 - _PREEMPHASIS) * frames[:, 0]
    sharper[:, 1:] = frames[:, 1:] - _PREEMPHASIS * frames[:, :-1]
    # each frame's mean is taken away first; that does not change what was done after it but for this
    sharper -= (1 - _PREEMPHASIS) * frames.mean(axis=1, keepdims=True)
    spectrum = np.fft.rfft(sharper * _WINDOW, _FFT)
    energy = spectrum.real**2 + spectrum.imag**2
    return np.asarray(np.log(np.maximum(energy @ filters, np.float32(_FLOOR))))


_WINDOW = np.hanning(FRAME).astype(np.float32)


def mel_filters(mels: int, rate: int) -> Array:
    """Kaldi's triangles in mel space, float32 [257, mels], from 20 Hz to half the rate."""

    def mel(hertz: Any) -> Any:
        return 1127.0 * np.log(1.0 + hertz / 700.0)

    corners = np.linspace(mel(_LOWEST_HZ), mel(rate // 2), mels + 2)
    places = mel(rate / _FFT * np.arange(_FFT // 2 + 1))[:, None]
    width = np.diff(corners)
    rising, falling = (places - corners[:-2]) / width[:-1], (corners[2:] - places) / width[1:]
    return np.asarray(np.maximum(0.0, np.minimum(rising, falling)), np.float32)


def _padded(values: Array, length: int) -> Array:
    values = values[:length]
    if len(values) == length:
        return np.ascontiguousarray(values, dtype=np.float32)
    found = np.zeros((length, *values.shape[1:]), np.float32)
    found[: len(values)] = values
    return found


# --- settings


def seconds_of(how: AudioConfig) -> float:
    """How much of a recording is read, in s."""
    return (FRAME + (how.length - 1) * HOP if how.mels else how.length) / how.rate


def config_of(extractor: Mapping[str, Any], rows: Sequence[Row]) -> AudioConfig:
    """What a Hugging Face feature extractor does, from its settings (`preprocessor_config.json`).

    Args:
        extractor: Wav2Vec2's or the Audio Spectrogram Transformer's.
        rows: some of the training rows: waveforms are cut where 99 of 100 have ended, and at 10 s.

    Raises:
        ModelError: it is another kind.
    """
    kind, rate = extractor.get("feature_extractor_type"), extractor.get("sampling_rate", 16_000)
    normalise = extractor.get("do_normalize", True)
    if kind == "ASTFeatureExtractor":
        return AudioConfig(
            rate=rate,
            length=extractor["max_length"],
            mels=extractor["num_mel_bins"],
            normalise=normalise,
            mean=extractor["mean"],
            std=extractor["std"],
        )
    if kind == "Wav2Vec2FeatureExtractor":
        return AudioConfig(rate=rate, length=math.ceil(_usual_seconds(rows) * rate), normalise=normalise)
    raise ModelError(f"the feature extractor {kind} is none of Wav2Vec2FeatureExtractor and ASTFeatureExtractor")


def extractor_of(how: AudioConfig) -> dict[str, Any]:
    """The settings of the Hugging Face extractor (the Audio Spectrogram Transformer's) that makes these bands."""
    return {
        "sampling_rate": how.rate,
        "num_mel_bins": how.mels,
        "max_length": how.length,
        "mean": how.mean,
        "std": how.std,
    }


def fitted(rows: Sequence[Row], most_rate: int, mels: int) -> AudioConfig:
    """How a small student should read recordings like these: at their own rate, as long as 99 of 100 of them.

    Args:
        rows: some of the training rows.
        most_rate: the teacher's, in Hz, which is not exceeded.
        mels: bands.
    """
    recordings = [decoded(bytes_of(row["audio"]), _USUAL_S + 1) for row in rows]
    rate = min(most_rate, int(np.median([recording.rate for recording in recordings])))
    samples = int(_usual_seconds(rows) * rate)
    length = max(8, 1 + (samples - FRAME) // HOP)
    filters = mel_filters(mels, rate)
    bands = np.concatenate([log_mels(resampled(one, rate, samples), filters).ravel() for one in recordings])
    return AudioConfig(
        rate=rate,
        length=length,
        mels=mels,
        mean=round(float(bands.mean()), 4),
        std=round(max(1e-3, float(bands.std())), 4),
    )


def _usual_seconds(rows: Sequence[Row]) -> float:
    lengths = [read_header(bytes_of(row["audio"])).seconds for row in rows]
    return min(_USUAL_S, max(0.1, float(np.quantile(lengths, 0.99)))) if lengths else _USUAL_S


# --- probes


def _noise(frames: int, channels: int, seed: int) -> Array:
    return np.random.default_rng(seed).normal(0, 0.1, (frames, channels)).clip(-1, 1)


def _recording(samples: Array, rate: int) -> dict[str, Any]:
    """A row of 16-bit PCM of samples [T, channels]."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(samples.shape[1])
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes((samples * 32767).astype("<i2").tobytes())
    return {"audio": inline(file.getvalue())}
