"""Audio input: a file's bytes → mono at the model's rate → a waveform, or log-mel bands.

The arithmetic is that of Hugging Face's feature extractors: Wav2Vec2's for waveforms, and for mel bands that of the
Audio Spectrogram Transformer (Gong et al. 2021) as transformers 4.57 does it without torchaudio: Kaldi's filter banks
over frames of 400 samples with a hop of 160, at any rate.
"""

import io
import math
import wave
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from kdexport.errors import DataError, ModelError
from kdexport.tasks.base import Modality
from kdexport.tasks.config import AudioConfig, Row
from kdexport.tasks.inputs import whisper
from kdexport.tasks.inputs.media import DECODING, Media, bytes_of, inline, installed
from kdexport.tasks.inputs.recordings import Recording, decoded, format_of, opened, read_header
from kdexport.tasks.metrics import Array

FRAME, HOP = 400, 160
_FFT, _PREEMPHASIS, _FLOOR, _LOWEST_HZ = 512, 0.97, 1.192092955078125e-07, 20
# The maximum input length where the model has none.
_USUAL_S = 10.0
_LONGEST_SPEECH_S, _ROOM = 30.0, 1.25
# The cost of resampling a sample on one core, copies included.
_SECONDS_PER_SAMPLE, _BYTES_PER_SAMPLE = 3e-8, 32


class Sounds(Media):
    """The input side of tasks with rows `{"audio": …}`."""

    modality: ClassVar[Modality] = "audio"
    files: ClassVar = "recordings"
    _how: AudioConfig

    @cached_property
    def _filters(self) -> Array:
        return mel_filters(self._how.mels, self._how.rate)

    @classmethod
    def inspect(cls, content: bytes) -> None:
        with opened(content) as (_, pieces):
            for _ in pieces:
                pass

    @property
    def _read(self) -> float:
        """Seconds to decode: one more than the model reads, for the resampling filter."""
        return seconds_of(self._how) + 1

    def compact(self, content: bytes) -> Array:
        """float32 [length], or [length, mels]."""
        return self._features(content, self._how.length)

    def _features(self, content: bytes, least: int = 0) -> Array:
        """Return a waveform or mel bands, padded to `least` samples or frames before bands are normalised."""
        how = self._how
        with self._samples(content, self._read, _needed(how)) as samples:
            if how.filters == "slaney":
                return whisper.log_mels(samples, how.mels, how.length)
            if not how.mels:
                heard = (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7) if how.normalise else samples
                return _padded(heard, max(least, len(heard)))
            bands = log_mels(samples, self._filters)[: how.length]
            bands = _padded(bands, max(least, len(bands)))
            return ((bands - how.mean) / (how.std * 2) if how.normalise else bands).astype(np.float32)

    @contextmanager
    def _samples(self, content: bytes, seconds: float, needed: int) -> Iterator[Array]:
        """Decode the first `seconds` and resample them to at most `needed` samples, within the budget of memory."""
        with opened(content, seconds) as (header, pieces), DECODING.room(header.frames * _BYTES_PER_SAMPLE):
            yield resampled(Recording(np.concatenate(list(pieces)), header.rate), self._how.rate, needed)

    def seconds(self, row: Row) -> float:
        content = bytes_of(row[self.modality])
        if format_of(content) == "MP3":  # libmpg123 logs each fault to stderr and may block on it
            raise DataError("it is MP3, which is read from files only", "Send WAV, FLAC or OGG")
        header = read_header(content, self._read)
        return header.decoding_seconds + header.frames * _SECONDS_PER_SAMPLE

    @property
    def longest(self) -> float:
        """The seconds of the longest recording that is read whole."""
        return seconds_of(self._how)

    def duration(self, row: Row) -> float:
        return min(read_header(bytes_of(row[self.modality])).seconds, self.longest)

    def shapes(self) -> dict[str, list[int]]:
        bands = [self._how.mels] if self._how.mels else []
        return {self.config.inputs[0]: [-1, self._how.length, *bands]}

    def axes(self) -> dict[str, dict[int, str]]:
        """The number of mel frames is fixed."""
        length = {} if self._how.mels else {1: "sequence_length"}
        return {self.config.inputs[0]: {0: "batch_size"} | length, self.output: {0: "batch_size"}}

    def remarks(self, rows: Sequence[Row]) -> list[str]:
        recordings = [read_header(bytes_of(row[self.modality])) for row in rows]
        reads, remarks = seconds_of(self._how), []
        if others := sorted({r.rate for r in recordings} - {self._how.rate}):
            remarks.append(
                f"sound of {', '.join(f'{rate:,}' for rate in others)} Hz is resampled to {self._how.rate:,}"
            )
        if cut := sum(r.seconds > reads + 0.02 for r in recordings):
            fraction = cut / len(recordings)
            remarks.append(f"{fraction:.1%} of the recordings are longer than {reads:.2g} s, and cut there")
        return remarks

    def probes(self) -> list[dict[str, Any]]:
        """One sample, silence, too long and stereo at another rate, a constant."""
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


def resampled(recording: Recording, rate: int, needed: int) -> Array:
    """Resample to at most `needed` samples with soxr, as librosa does."""
    samples, own = recording
    if own != rate:
        made = installed("soxr", "soxr").resample(samples, own, rate)
        samples = made if len(made) else samples[:1]
    return samples[:needed]


def log_mels(samples: Array, filters: Array) -> Array:
    """Return log energy by band, float32 [frames, mels], in frames of 400 samples with a hop of 160."""
    frames = sliding_window_view(_padded(samples, max(FRAME, len(samples))), FRAME)[::HOP]
    sharper = np.empty_like(frames)
    sharper[:, 0] = (1 - _PREEMPHASIS) * frames[:, 0]
    sharper[:, 1:] = frames[:, 1:] - _PREEMPHASIS * frames[:, :-1]
    # the frame's mean is subtracted before pre-emphasis; done after it, this is the difference
    sharper -= (1 - _PREEMPHASIS) * frames.mean(axis=1, keepdims=True)
    spectrum = np.fft.rfft(sharper * _WINDOW, _FFT)
    energy = spectrum.real**2 + spectrum.imag**2
    return np.asarray(np.log(np.maximum(energy @ filters, np.float32(_FLOOR))))


_WINDOW = np.hanning(FRAME).astype(np.float32)


def mel_filters(mels: int, rate: int) -> Array:
    """Return Kaldi's triangular filters, float32 [257, mels], from 20 Hz to half the rate."""

    def mel(hertz: Any) -> Any:
        return 1127.0 * np.log(1.0 + hertz / 700.0)

    corners = np.linspace(mel(_LOWEST_HZ), mel(rate // 2), mels + 2)
    places = mel(rate / _FFT * np.arange(_FFT // 2 + 1))[:, None]
    width = np.diff(corners)
    rising, falling = (places - corners[:-2]) / width[:-1], (corners[2:] - places) / width[1:]
    return np.asarray(np.maximum(0.0, np.minimum(rising, falling)), np.float32)


def _padded(values: Array, length: int) -> Array:
    found = np.zeros((length, *values.shape[1:]), np.float32)
    found[: len(values)] = values[:length]
    return found


def seconds_of(how: AudioConfig) -> float:
    """Return the seconds of a recording that the model reads."""
    return _needed(how) / how.rate


def _needed(how: AudioConfig) -> int:
    return FRAME + (how.length - 1) * HOP if how.mels else how.length


def config_of(extractor: Mapping[str, Any], rows: Sequence[Row], seconds: float | None = None) -> AudioConfig:
    """Convert a Hugging Face feature extractor's settings (`preprocessor_config.json`).

    Waveforms are cut at `seconds`; by default at the 99 % quantile of the lengths of `rows`, a sample of the training
    rows, and at 10 s.
    """
    kind, rate = extractor.get("feature_extractor_type"), extractor.get("sampling_rate", 16_000)
    normalise = extractor.get("do_normalize", True)
    if kind == "ASTFeatureExtractor":
        length, mels = extractor["max_length"], extractor["num_mel_bins"]
        if seconds:
            length = max(8, 1 + (int(seconds * rate) - FRAME) // HOP)
        mean, std = extractor["mean"], extractor["std"]
        return AudioConfig(rate=rate, length=length, mels=mels, normalise=normalise, mean=mean, std=std)
    if kind == "Wav2Vec2FeatureExtractor":
        return AudioConfig(rate=rate, length=math.ceil((seconds or _usual_seconds(rows)) * rate), normalise=normalise)
    raise ModelError(f"the feature extractor {kind} is none of Wav2Vec2FeatureExtractor and ASTFeatureExtractor")


def extractor_of(how: AudioConfig) -> dict[str, Any]:
    """Return the settings of the equivalent ASTFeatureExtractor."""
    shape = {"sampling_rate": how.rate, "num_mel_bins": how.mels, "max_length": how.length}
    return shape | {"mean": how.mean, "std": how.std}


def fitted(rows: Sequence[Row], most_rate: int, mels: int, seconds: float | None = None) -> AudioConfig:
    """Fit a small student's input to training rows: their median rate up to `most_rate`, their 99 % length.

    It reads `seconds` instead where they are given.
    """
    recordings = [decoded(bytes_of(row["audio"]), (seconds or _USUAL_S) + 1) for row in rows]
    rate = min(most_rate, int(np.median([recording.rate for recording in recordings])))
    samples = int((seconds or _usual_seconds(rows)) * rate)
    length = max(8, 1 + (samples - FRAME) // HOP)
    filters = mel_filters(mels, rate)
    bands = np.concatenate([log_mels(resampled(one, rate, samples), filters).ravel() for one in recordings])
    mean, std = round(float(bands.mean()), 4), round(max(1e-3, float(bands.std())), 4)
    return AudioConfig(rate=rate, length=length, mels=mels, mean=mean, std=std)


def speech_seconds(rows: Sequence[Row]) -> float:
    """Return how far speech is read: a little further than the longest of these recordings, at most 30 s."""
    return min(_LONGEST_SPEECH_S, _ROOM * longest_seconds(rows))


def longest_seconds(rows: Sequence[Row]) -> float:
    """Return the length of the longest of these recordings, at most 30 s."""
    longest = max((read_header(bytes_of(row["audio"])).seconds for row in rows), default=_LONGEST_SPEECH_S)
    return min(_LONGEST_SPEECH_S, longest)


def _usual_seconds(rows: Sequence[Row]) -> float:
    lengths = [read_header(bytes_of(row["audio"])).seconds for row in rows]
    return min(_USUAL_S, max(0.1, float(np.quantile(lengths, 0.99)))) if lengths else _USUAL_S


def _noise(frames: int, channels: int, seed: int) -> Array:
    return np.random.default_rng(seed).normal(0, 0.1, (frames, channels)).clip(-1, 1)


def _recording(samples: Array, rate: int) -> dict[str, Any]:
    """Return a row with samples [T, channels] as 16-bit PCM."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(samples.shape[1])
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes((samples * 32767).astype("<i2").tobytes())
    return {"audio": inline(file.getvalue())}
