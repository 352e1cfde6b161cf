"""WAV files: the header, and as much of the sound as is asked for, mono."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from kdexport.errors import DataError, TooLarge
from kdexport.tasks.metrics import Array

# Longer ones are most often whole recordings that were never cut.
_LONGEST_S = 120
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_MOST_HZ, _MOST_CHUNKS = 384_000, 1_000
# Floats of a WAV file are within −1 … 1, or of any scale that integers have; squares of larger ones overflow.
_LOUDEST = 2.0**32
# Numbers that are converted at once: all of a large file as float32 would be several times its size.
_AT_ONCE = 1 << 20


class Recording(NamedTuple):
    """Sound as it was recorded."""

    samples: Array
    """float32 [T], mono, within −1 … 1."""
    rate: int
    """Hz."""

    @property
    def seconds(self) -> float:
        """Its length in s."""
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
        """Its length in s."""
        return self.frames / self.rate

    @property
    def is_float(self) -> bool:
        """Whether the numbers may be infinite or none."""
        return self.kind == _FLOAT


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
    for piece in pieces(content, header):
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
        raise TooLarge(f"it lasts {frames / rate:,.0f} s; at most {_LONGEST_S} are read", "Cut it")
    if rate > _MOST_HZ:
        raise TooLarge(f"it has {rate:,} samples a second; at most {_MOST_HZ:,} are read", "Resample it")
    return Header(kind, channels, rate, bits, at, int(min(frames, math.ceil(min(seconds, _LONGEST_S) * rate))))


def pieces(content: bytes, header: Header) -> Iterator[Array]:
    """Mono float32 of a file, piece by piece."""
    frame = header.channels * header.bits // 8
    step = max(1, _AT_ONCE // header.channels)
    for first in range(0, header.frames, step):
        start = header.at + first * frame
        raw = content[start : start + min(step, header.frames - first) * frame]
        with np.errstate(over="ignore", invalid="ignore"):
            samples = _numbers(raw, header.kind, header.bits)
            if header.channels > 1:
                samples = samples.reshape(-1, header.channels).mean(axis=1)
            samples = samples.astype(np.float32, copy=False)
        if header.is_float and not np.abs(samples).max() <= _LOUDEST:  # nor is NaN
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
