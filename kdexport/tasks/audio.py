"""Sound as a model reads it: a WAV file's bytes → mono at the model's rate → a waveform, or logarithms of mel bands.

The arithmetic is that of Hugging Face's feature extractors: Wav2Vec2's for waveforms, and for mel bands that of the
Audio Spectrogram Transformer (Gong et al. 2021) as transformers 4.57 does it without torchaudio: Kaldi's filter banks
over frames of 400 samples, 160 apart, whatever the rate.
"""

from __future__ import annotations

import io
import math
import struct
import wave
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from kdexport.errors import DataError, ModelError
from kdexport.tasks.config import AudioConfig, Row
from kdexport.tasks.media import DECODING, Media, bytes_of, inline
from kdexport.tasks.metrics import Array

FRAME, HOP = 400, 160
_FFT, _PREEMPHASIS, _FLOOR, _LOWEST_HZ = 512, 0.97, 1.192092955078125e-07, 20
# Longer ones are most often whole recordings that were never cut.
_LONGEST_S = 120
# What models read of a recording at most, where nothing else says how much.
_USUAL_S = 10.0
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_MOST_HZ, _MOST_CHUNKS = 384_000, 1_000
# Floats of a WAV file are within −1 … 1, or of any scale that integers have; squares of larger ones overflow.
_LOUDEST = 2.0**32
# Numbers that are converted at once: all of a large file as float32 would be several times its size.
_AT_ONCE = 1 << 20
# Fourier transforms are slow, and large, where their length has large factors. Ratios of the usual rates have none
# (160 : 441, 147 : 1,280); of all others the nearest one of small parts is taken, within a thousandth.
_MOST_RATIO, _MOST_ODD_RATIO, _MOST_ODD_LENGTH = 3_000, 100, 1 << 19
_SMOOTH = math.prod((2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47)) ** 24
# What reading a number and resampling a sample take on one core, and the copies of a sample that there are meanwhile.
_SECONDS_PER_NUMBER, _SECONDS_PER_SAMPLE, _BYTES_PER_SAMPLE = 5e-9, 6e-8, 32


class Recording(NamedTuple):
    """Sound as it was recorded."""

    samples: Array
    """float32 [T], mono, within −1 … 1."""
    rate: int
    """Hz."""

    @property
    def seconds(self) -> float:
        """How long it is."""
        return len(self.samples) / self.rate


class Header(NamedTuple):
    """The numbers of a WAV file, and where they stand."""

    kind: int
    channels: int
    rate: int
    """Hz."""
    bits: int
    at: int
    frames: int

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.frames / self.rate


class Sounds(Media):
    """The side of a task that reads rows `{"audio": …}`."""

    reads: ClassVar = "audio"

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
        if header.kind == _FLOAT:
            for _ in _pieces(content, header, header.frames):
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
        header = read_header(bytes_of(row[self.reads]), (self._needed + HOP) / self._how.rate + 1)
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
        """What is worth saying of how these rows are read."""
        recordings = [read_header(bytes_of(row[self.reads])) for row in rows]
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
        """Recordings of the usual length."""
        rate = self._how.rate
        return [_recording(_noise(int(seconds_of(self._how) * rate), 1, seed), rate) for seed in range(2, 6)]


# --- files


def decoded(content: bytes, seconds: float = math.inf) -> Recording:
    """Return the sound of a WAV file: PCM of 8 to 32 bits, or floats.

    Args:
        content: the file.
        seconds: how much of it to read at most.

    Raises:
        DataError: it is none, holds no sound, or more than 120 s.
    """
    header = read_header(content, seconds)
    samples = np.empty(header.frames, np.float32)
    at = 0
    for piece in _pieces(content, header, header.frames):
        samples[at : at + len(piece)] = piece
        at += len(piece)
    return Recording(samples, header.rate)


def read_header(content: bytes, seconds: float = math.inf) -> Header:
    """Return the kind of a WAV file's numbers, and how many frames of them there are within the first `seconds`.

    Raises:
        DataError: it is none, holds no sound, or more than 120 s.
    """
    if not content:
        raise DataError("it is empty")
    if len(content) < 12 or content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        raise DataError("it is no WAV file", "Convert it: ffmpeg -i in.mp3 out.wav")
    kind, channels, rate, bits, at, size = _chunks(content)
    frames = min(size, len(content) - at) // (channels * bits // 8)
    if not frames:
        raise DataError("it holds no sound")
    if frames > _LONGEST_S * rate:
        raise DataError(f"it lasts {frames / rate:,.0f} s; at most {_LONGEST_S} are read", "Cut it")
    if rate > _MOST_HZ:
        raise DataError(f"it has {rate:,} samples a second; at most {_MOST_HZ:,} are read", "Resample it")
    return Header(kind, channels, rate, bits, at, int(min(frames, math.ceil(min(seconds, _LONGEST_S) * rate))))


def _pieces(content: bytes, header: Header, frames: int) -> Iterator[Array]:
    """Mono float32 of a file, piece by piece."""
    frame = header.channels * header.bits // 8
    step = max(1, _AT_ONCE // header.channels)
    for first in range(0, frames, step):
        start = header.at + first * frame
        raw = content[start : start + min(step, frames - first) * frame]
        with np.errstate(over="ignore", invalid="ignore"):
            samples = _numbers(raw, header.kind, header.bits)
            if header.channels > 1:
                samples = samples.reshape(-1, header.channels).mean(axis=1)
            samples = samples.astype(np.float32, copy=False)
        if header.kind == _FLOAT and not np.abs(samples).max() <= _LOUDEST:  # nor is NaN
            raise DataError("it holds numbers that are no sound: infinite, or far beyond 1")
        yield samples


def _chunks(content: bytes) -> tuple[int, int, int, int, int, int]:
    """Kind of numbers, channels, rate, bits, and where the sound begins, with its size in bytes."""
    at, kind, channels, rate, bits = 12, 0, 0, 0, 0
    for _ in range(_MOST_CHUNKS):
        if at + 8 > len(content):
            break
        name, size = content[at : at + 4], int.from_bytes(content[at + 4 : at + 8], "little")
        at += 8
        if name == b"fmt " and size >= 16 and at + 16 <= len(content):
            kind, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", content, at)
            if kind == _EXTENSIBLE and size >= 26:
                kind = int.from_bytes(content[at + 24 : at + 26], "little")
        elif name == b"data":
            known = (kind == _PCM and bits in (8, 16, 24, 32)) or (kind == _FLOAT and bits in (32, 64))
            if not known or not channels or not rate:
                raise DataError(f"it is a WAV file of kind {kind}, {bits} bits: neither PCM nor float", "Convert it")
            return kind, channels, rate, bits, at, size
        at += size + size % 2
    raise DataError("it is a broken WAV file: it has no data")


def _numbers(raw: bytes, kind: int, bits: int) -> Array:
    if kind == _FLOAT:
        return np.frombuffer(raw, f"<f{bits // 8}")
    if bits == 8:
        return (np.frombuffer(raw, np.uint8).astype(np.float32) - 128) / 128
    if bits == 24:  # the upper three bytes of 32 bits
        wide = np.zeros((len(raw) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        raw, bits = wide.tobytes(), 32
    return np.frombuffer(raw, f"<i{bits // 8}").astype(np.float32) / np.float32(2 ** (bits - 1))


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
