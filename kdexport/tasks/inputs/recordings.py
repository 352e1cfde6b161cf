"""Read sound files with libsndfile: the header, and the first seconds of sound, mono.

libsndfile detects 25 formats; only files with the magic bytes of `FORMATS` get that far. Length, rate and channels are
bounded by the header, before any decoding.
"""

import io
import math
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from kdexport.errors import DataError, TooLarge
from kdexport.tasks.inputs.media import installed
from kdexport.tasks.metrics import Array

FORMATS = ("WAV", "FLAC", "OGG", "MP3")
# Longer files are most likely unsegmented.
_LONGEST_S = 120
_MOST_HZ = 384_000
# For OGG, where a byte may expand to thousands of samples; FLAC and MP3 have no more channels, WAV is uncompressed.
_MOST_CHANNELS = 8
# More frames than any file has: FLAC written to a pipe does not state their number.
_ENDLESS = 1 << 40
# Floats are within −1 … 1, or on an integer scale; squares of larger ones overflow.
_LOUDEST = 2.0**32
# Samples per piece: a whole large file as float32 would be several times its size.
_AT_ONCE = 1 << 20
# Supported encodings → measured seconds per sample on one core, for the slowest file.
_SECONDS = {
    **dict.fromkeys(("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"), 5e-9),
    **dict.fromkeys(("FLAC PCM_S8", "FLAC PCM_16", "FLAC PCM_24"), 1e-8),
    **dict.fromkeys(("OGG VORBIS", "OGG OPUS", "MP3 MPEG_LAYER_III"), 6e-8),
}
# libvorbis allocates memory for each value of a codebook; encoders write up to 90,000.
_MOST_CODES, _MOST_SETUP = 500_000, 100_000
_MOST_BLOCKS = 1_000  # of a FLAC file's metadata, which libFLAC reads one by one
_CODEBOOK = re.compile(rb"(?=(BCV)(..)(...))", re.DOTALL)
_MP3_IN_WAV = re.compile(rb"fmt ....\x55\0", re.DOTALL)
_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_CONVERT = "Convert it: ffmpeg -i IN OUT.wav"


class Recording(NamedTuple):
    """Samples float32 [T], mono, within −1 … 1, and their rate in Hz."""

    samples: Array
    rate: int


class Header(NamedTuple):
    """A sound file's header: `kind` is libsndfile's name of the encoding, `rate` is in Hz."""

    kind: str
    channels: int
    rate: int
    frames: int

    @property
    def seconds(self) -> float:
        return self.frames / self.rate

    @property
    def decoding_seconds(self) -> float:
        """An estimate of the CPU time for decoding."""
        return self.frames * self.channels * _SECONDS[self.kind]


def read_header(content: bytes, seconds: float = math.inf) -> Header:
    """Return the header of a sound file; `frames` are at most those of the first `seconds`."""
    with opened(content, seconds) as (header, _):
        return header


def decoded(content: bytes, seconds: float = math.inf) -> Recording:
    """Decode a file, or its first `seconds`."""
    with opened(content, seconds) as (header, pieces):
        return Recording(np.concatenate(list(pieces)), header.rate)


@contextmanager
def opened(content: bytes, seconds: float = math.inf) -> Iterator[tuple[Header, Iterator[Array]]]:
    """Open a sound file: its header as in `read_header`, and its mono samples, decoded piece by piece."""
    _check(content)
    library = installed("soundfile", "soundfile")
    try:
        with library.SoundFile(io.BytesIO(content)) as file:
            header = _header(file, seconds)
            yield header, _pieces(file, header)
    except library.LibsndfileError as error:
        raise DataError(f"it is no sound that can be read ({error.error_string.rstrip('.')})", _CONVERT) from None


def _header(file: Any, seconds: float) -> Header:
    kind, rate, channels, frames = file.subtype, file.samplerate, file.channels, file.frames
    if file.format not in ("WAV", "WAVEX"):
        kind = f"{file.format} {kind}"
    if kind not in _SECONDS:
        raise DataError(f"it is sound of the kind {kind}, which is not supported", _CONVERT)
    if frames < 1:
        raise DataError("it holds no sound")
    if frames > _ENDLESS:
        raise DataError("its header does not say how long it is", _CONVERT)
    if frames > _LONGEST_S * rate:
        raise TooLarge(f"it lasts {frames / rate:,.0f} s; at most {_LONGEST_S} are read", "Cut it")
    if rate > _MOST_HZ:
        raise TooLarge(f"it has {rate:,} samples a second; at most {_MOST_HZ:,} are read", "Resample it")
    if file.format == "OGG" and channels > _MOST_CHANNELS:
        raise TooLarge(f"it has {channels} channels; at most {_MOST_CHANNELS} of an OGG file are read")
    return Header(kind, channels, rate, int(min(frames, math.ceil(min(seconds, _LONGEST_S) * rate))))


def _pieces(file: Any, header: Header) -> Iterator[Array]:
    left, step = header.frames, max(1, _AT_ONCE // header.channels)
    while left:
        samples = file.read(min(step, left), dtype="float32", always_2d=True)
        if not len(samples):  # the header of compressed sound may overstate the length
            if left == header.frames:
                raise DataError("it holds no sound")
            return
        with np.errstate(over="ignore", invalid="ignore"):
            samples = samples.mean(axis=1) if header.channels > 1 else samples[:, 0]
        if not np.abs(samples).max() <= _LOUDEST:  # nor is NaN
            raise DataError("it holds numbers that are no sound: infinite, or far beyond 1")
        left -= len(samples)
        yield samples


def format_of(content: bytes) -> str:
    """Detect which of `FORMATS` a file has, by its first bytes."""
    if not content:
        raise DataError("it is empty")
    if content.startswith(b"RIFF") and content[8:12] == b"WAVE":
        return "WAV"
    if found := {b"fLaC": "FLAC", b"OggS": "OGG"}.get(content[:4]):
        return found
    at = 0
    if content.startswith(b"ID3") and len(content) > 10:  # a tag; its length has 7 bits a byte
        at = 10 + sum((byte & 0x7F) << 7 * i for i, byte in enumerate(reversed(content[6:10])))
    if content[at : at + 1] == b"\xff" and content[at + 1 : at + 2] >= b"\xe0":
        return "MP3"
    raise DataError(f"it is no sound file; known are {', '.join(FORMATS)}", _CONVERT)


def _check(content: bytes) -> None:
    """Pass only `FORMATS`, and no file that can harm the libraries below libsndfile."""
    form = format_of(content)
    if form == "OGG":
        _check_ogg(content)
    elif form == "FLAC":
        at = 4
        for _ in range(_MOST_BLOCKS):
            if at >= len(content) or content[at] >= 0x80:  # the last one is marked
                return
            at += 4 + int.from_bytes(content[at + 1 : at + 4], "big")
        raise TooLarge(f"it is a FLAC file with more than {_MOST_BLOCKS:,} blocks of metadata")
    elif form == "WAV" and _MP3_IN_WAV.search(content):
        raise DataError("it is a WAV file with MP3 in it, which is not supported", _CONVERT)


def _check_ogg(content: bytes) -> None:
    """Bound Vorbis codebooks: libvorbis allocates as many values as 13 bytes claim."""
    first, _, setup = _ogg_packets(content)
    if first.startswith(b"OpusHead"):
        return
    if len(setup) > _MOST_SETUP:
        raise TooLarge(f"it is an OGG file with a setup of {len(setup):,} bytes")
    bits, codes = int.from_bytes(setup, "little"), 0
    for shift in range(8):  # codebooks begin at any bit: a mark, 16 bits for dimensions, 24 for entries
        for _, dimensions, entries in _CODEBOOK.findall((bits >> shift).to_bytes(len(setup), "little")):
            codes += max(1, int.from_bytes(dimensions, "little")) * int.from_bytes(entries, "little")
    if codes > _MOST_CODES:
        raise TooLarge(f"it is an OGG file with codebooks of {codes:,} values")


def _ogg_packets(content: bytes) -> list[bytearray]:
    """Return the first three packets; gaps and faults are refused, as libogg would skip them silently."""
    packets, at = [bytearray()], 0
    stream, number = content[14:18], int.from_bytes(content[18:22], "little")  # which may begin anywhere, and wraps
    while len(head := content[at : at + 27]) == 27:
        lengths = content[at + 27 : at + 27 + head[26]]
        begin = at + 27 + len(lengths)
        at = begin + sum(lengths)
        if (
            head[:5] != b"OggS\0"
            or head[14:18] != stream
            or int.from_bytes(head[18:22], "little") != number % 2**32
            or bool(head[5] & 1) != bool(packets[-1])
            or head[22:26] != _ogg_checksum(head[:22] + bytes(4) + head[26:] + content[begin - len(lengths) : at])
        ):
            break
        for length in lengths:
            packets[-1] += content[begin : begin + length]
            begin += length
            if length < 255:
                if len(packets) == 3:
                    return packets
                packets.append(bytearray())
        number += 1
    raise DataError("it is a broken OGG file", _CONVERT)


def _ogg_checksum(page: bytes) -> bytes:
    """CRC-32 with zlib's polynomial, but most significant bit first, and starting from 0."""
    return (zlib.crc32(page.translate(_MIRRORED), 0xFFFFFFFF) ^ 0xFFFFFFFF).to_bytes(4, "big").translate(_MIRRORED)
