"""What one picture or recording may cost: 200 MB and a second of CPU, whatever its bytes claim."""

from __future__ import annotations

import io
import os
import struct
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest
import soundfile
from limits import MOST_MB, MOST_SECONDS, assert_cheap, begin_peak, cost_of, cpu_seconds, memory_mb
from PIL import Image
from serve_process import served
from wire import ask, assert_refused

from kdexport import spec
from kdexport.data import prepare, read_summary
from kdexport.errors import DataError
from kdexport.runtime import artifact
from kdexport.serve.http import Refused
from kdexport.serve.registry import Version
from kdexport.serve.settings import MAX_BODY
from kdexport.tasks import task_class
from kdexport.tasks.config import AudioConfig, ImageConfig, TaskConfig
from kdexport.tasks.inputs import headers, images, recordings
from kdexport.tasks.inputs.media import Decoding, bytes_of, inline, inline_bytes

BODY = 2_000_000 - 2_000
COLOURS = {"mean": [0.5] * 3, "std": [0.5] * 3}
CROPPED = ImageConfig(resize=256, crop=[224, 224], resample=3, **COLOURS)
BANDS = AudioConfig(rate=16_000, length=1024, mels=8)


# --- files that claim much


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, *parts: bytes, bits=8, kind=0, data: bytes | None = None) -> bytes:
    bands = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
    if data is None:
        deflate, row = zlib.compressobj(9), bytes(1 + width * bands * bits // 8)
        data = b"".join([*(deflate.compress(row) for _ in range(height)), deflate.flush()])
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(parts) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def saved(mode, width, height, form, **how) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, form, **how)
    return file.getvalue()


def segment(kind: int, data: bytes) -> bytes:
    return b"\xff" + bytes([kind]) + struct.pack(">H", len(data) + 2) + data


def jpeg_with(metadata: bytes) -> bytes:
    plain = saved("RGB", 8, 8, "JPEG")
    return plain[:2] + metadata + plain[2:]


def scans(size, count) -> bytes:
    plain = saved("L", size, size, "JPEG", progressive=True)
    return plain[:-2] + plain[plain.rfind(b"\xff\xda") : -2] * count + plain[-2:]


def gif_with(extensions: bytes) -> bytes:
    plain = saved("L", 8, 8, "GIF")
    at = plain.index(b"\x2c", 13 + 3 * (2 << (plain[10] & 7)))
    return plain[:at] + extensions + plain[at:]


def tiff(*tags: tuple[int, int, int, int], data: bytes = b"") -> bytes:
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def strips(count) -> bytes:
    data = struct.pack(f"<{count}I", *[8] * count) + struct.pack(f"<{count}I", *[1] * count)
    return tiff(
        (256, 4, 1, 1), (257, 4, 1, count), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1),
        (273, 4, count, 8), (277, 3, 1, 1), (278, 4, 1, 1), (279, 4, count, 8 + 4 * count), data=data,
    )  # fmt: skip


def chain(count) -> bytes:
    """A TIFF of very many pictures."""
    first = tiff((256, 4, 1, 1), (257, 4, 1, 1), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8),
                 (277, 3, 1, 1), (278, 4, 1, 1), (279, 4, 1, 1), data=bytes(8))  # fmt: skip
    at = len(first)
    more = [struct.pack("<HHHIII", 1, 256, 4, 1, 1, at + 18 * (i + 1)) for i in range(count)]
    return first[:-4] + struct.pack("<I", at) + b"".join(more)[:-4] + bytes(4)


def bmp_rle(width, height, data: bytes) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(data), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(data), 0, 0, 1078) + head + bytes(1024) + data


ICC = b"a\0\0" + zlib.compress(bytes(1_000_000), 9)
HOSTILE_IMAGES = {
    "webp 7000": lambda: saved("RGB", 7000, 7000, "WEBP", lossless=True),
    "gif 7000": lambda: saved("L", 7000, 7000, "GIF"),
    "png 7000": lambda: png(7000, 7000),
    "png 7000 rgba": lambda: png(7000, 7000, kind=6),
    "png 6000 16 bit": lambda: png(6000, 6000, bits=16),
    "png 1 x 10,000": lambda: png(1, 10_000),
    "png 1 x 65,535": lambda: png(1, 65_535),
    "png 1 x 1,000,000": lambda: png(1, 1_000_000),
    "png 65,535 x 1": lambda: png(65_535, 1),
    "png 25,000,000 x 1": lambda: png(25_000_000, 1),
    "png profiles": lambda: png(8, 8, chunk(b"iCCP", ICC) * 1900),
    "png texts": lambda: png(8, 8, chunk(b"zTXt", ICC) * 1900),
    "png of 130,000 parts": lambda: png(8, 8, chunk(b"tEXt", b"a\0b") * 130_000),
    "png of 170,000 data": lambda: png(8, 8, chunk(b"IDAT", b"") * 170_000),
    "jpeg of empty exifs": lambda: jpeg_with(segment(0xE1, b"Exif\0\0MM\0*\0\0\0\x08") * (BODY // 18)),
    "jpeg of large exifs": lambda: jpeg_with(segment(0xE1, b"Exif\0\0" + bytes(3_000)) * (BODY // 3_010)),
    "jpeg of comments": lambda: jpeg_with(segment(0xFE, b"") * (BODY // 4)),
    "jpeg of fill bytes": lambda: jpeg_with(b"\xff" * BODY),
    "jpeg of 60,000 scans": lambda: scans(1000, 60_000),
    "jpeg of 200 large scans": lambda: scans(4000, 200),
    "tiff of 250,000 strips": lambda: strips(249_000),
    "tiff of 110,000 pictures": lambda: chain(110_000),
    "tiff of 60,000 tags": lambda: tiff(*[(1000 + i, 7, 30, 8) for i in range(60_000)], data=bytes(1_000_000)),
    "gif of comments": lambda: gif_with(b"!\xfe\x01a\0" * (BODY // 5)),
    "gif of controls": lambda: gif_with(b"!\xf9\x04\0\0\0\0\0" * (BODY // 8)),
    "gif of junk": lambda: gif_with(b"\1" * BODY),
    "ppm of comments": lambda: b"P3 2 2 255\n" + b"#\n" * (BODY // 2 - 50) + b"0 " * 12,
    "ppm of one comment": lambda: b"P6 #" + b"a" * BODY + b"\n1 1 255\n\0\0\0",
    "ppm plain": lambda: b"P3 590 590 255\n" + b"0 " * (590 * 590 * 3),
    "ppm of 100 shades": lambda: b"P6 750 750 100\n" + bytes(750 * 750 * 3),
    "bmp of runs": lambda: bmp_rle(750, 750, b"\1\0" * 750 * 750),
    "bmp of large runs": lambda: bmp_rle(20_000, 20_000, b"\xff\0" * 1_000_000),
}


def largest(mode, per_pixel, form, **how) -> bytes:
    side = int((headers.MOST_BYTES / per_pixel) ** 0.5)
    return saved(mode, side, side, form, **how)


# Of every format the largest that is let in, in its costliest mode.
LARGEST_IMAGES = {
    "png": lambda: largest("RGB", 4.2, "PNG"),
    "png rgba": lambda: largest("RGBA", 8, "PNG"),
    "png 16 bit": lambda: largest("I;16", 8, "PNG"),
    "png palette": lambda: largest("P", 5, "PNG"),
    "jpeg 25 million": lambda: saved("RGB", 5600, 4200, "JPEG"),
    "jpeg 50 million": lambda: saved("RGB", 8200, 6100, "JPEG"),
    "jpeg 80 million": lambda: largest("RGB", 2.4, "JPEG"),
    "jpeg cmyk": lambda: saved("CMYK", 4000, 3000, "JPEG", subsampling=0),
    "jpeg long": lambda: saved("RGB", 65_000, 1220, "JPEG"),
    "jpeg progressive": lambda: largest("RGB", 11.5, "JPEG", progressive=True, subsampling=0),
    "jpeg progressive cmyk": lambda: largest("CMYK", 19, "JPEG", progressive=True, subsampling=0),
    "webp": lambda: largest("RGB", 15.7, "WEBP"),
    "webp lossless": lambda: largest("RGBA", 15.7, "WEBP", lossless=True),
    "gif": lambda: largest("L", 5, "GIF"),
    "tiff": lambda: largest("RGB", 13, "TIFF", compression="tiff_adobe_deflate", strip_size=1 << 30),
    "tiff cmyk": lambda: largest("CMYK", 13, "TIFF", compression="tiff_lzw", strip_size=1 << 30),
    "tiff lab": lambda: largest("LAB", 13, "TIFF", compression="tiff_lzw"),
    "tiff jpeg": lambda: largest("RGB", 13, "TIFF", compression="jpeg", strip_size=1 << 30),
    "tiff fax": lambda: largest("1", 13, "TIFF", compression="group4"),
    "bmp": lambda: largest("RGB", 8, "BMP"),
    "ppm": lambda: largest("RGB", 8, "PPM"),
}


def wav(frames, rate, channels=1, bits=8, kind=1, value=None, before=b"") -> bytes:
    if value is None:
        raw = np.random.default_rng(0).integers(0, 256, frames * channels * bits // 8).astype(np.uint8).tobytes()
    else:
        raw = np.full(frames * channels, value, f"<f{bits // 8}").tobytes()
    head = struct.pack("<HHIIHH", kind, channels, rate, 0, 0, bits)
    chunks = b"fmt " + struct.pack("<I", 16) + head + before + b"data" + struct.pack("<I", len(raw)) + raw
    return b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WAVE" + chunks


def compressed(form: str, subtype: str, seconds: float, rate: int, channels=1, noise=False) -> bytes:
    """A file of silence, which is small, or of noise."""
    file = io.BytesIO()
    frames = np.random.default_rng(0).normal(0, 0.1, (rate, channels)) if noise else np.zeros((rate, channels))
    with soundfile.SoundFile(file, "w", rate, channels, subtype, format=form) as out:
        for begin in np.arange(0, seconds, 1):
            out.write(frames[: round(min(1, seconds - begin) * rate)])
    return file.getvalue()


def flac_claims(frames: int, channels: int = 1) -> bytes:
    """A FLAC file whose header has another number of frames, and of channels."""
    content = bytearray(compressed("FLAC", "PCM_16", 0.5, 16_000))
    content[18:26] = (16_000 << 44 | (channels - 1) << 41 | 15 << 36 | frames).to_bytes(8, "big")
    return bytes(content)


def ogg_page(number: int, *packets: bytes, granule: int = 0) -> bytes:
    lengths = b"".join(b"\xff" * (len(packet) // 255) + bytes([len(packet) % 255]) for packet in packets)
    head = b"OggS\0" + bytes([0 if number else 2]) + struct.pack("<qII", granule, 7, number)
    rest = bytes([len(lengths)]) + lengths + b"".join(packets)
    return head + recordings._ogg_checksum(head + bytes(4) + rest) + rest


def codebooks(count: int, entries: int) -> bytes:
    """Vorbis with codebooks of which each claims, in 13 bytes, so many entries."""
    bits = size = 0
    width = entries.bit_length()
    for value, length in ((count - 1, 8), *((0x564342, 24), (1, 16), (entries, 24), (1, 1), (width - 1, 5),
                                            (entries, width), (0, 4)) * count):  # fmt: skip
        bits, size = bits | value << size, size + length
    first = b"\1vorbis" + struct.pack("<IBIiiiBB", 0, 1, 16_000, 0, 64_000, 0, 0xB8, 1)
    setup = b"\5vorbis" + bits.to_bytes(-(-size // 8), "little") + bytes(50)
    pages = ogg_page(0, first), ogg_page(1, b"\3vorbis" + bytes(8) + b"\1", setup)
    return b"".join(pages) + ogg_page(2, bytes(10), granule=16_000)


MP3_OF_8_KBIT = b"\xff\xe3\x18\xc4" + bytes(68)  # 72 bytes that are 72 ms
HOSTILE_SOUNDS = {
    "flac of 10,000 s": lambda: compressed("FLAC", "PCM_16", 10_000, 8_000),
    "flac of 119 s at 384 kHz": lambda: compressed("FLAC", "PCM_16", 119, 384_000, 8),
    "flac that claims 2^36 - 1": lambda: flac_claims(2**36 - 1),
    "flac that claims 119 s": lambda: flac_claims(119 * 16_000, 8),
    "flac without a length": lambda: flac_claims(0),
    "flac of metadata": lambda: b"fLaC\4" + (BODY - 50).to_bytes(3, "big") + bytes(BODY),
    "flac of empty metadata": lambda: flac_claims(8_000)[:42] + b"\1\0\0\0" * (BODY // 4),
    "mp3 of 2,000 s": lambda: MP3_OF_8_KBIT * (BODY // 72),
    "mp3 in wav": lambda: wav(BODY // 2, 8_000, kind=0x55, bits=16),
    "vorbis of 20,000 s": lambda: compressed("OGG", "VORBIS", 20_000, 1_000),
    "vorbis of large codebooks": lambda: codebooks(256, 2**23 - 1),
    "vorbis of the largest codebooks": lambda: codebooks(32, 2**13 - 1),
    "vorbis of comments": lambda: ogg_page(0, b"\1vorbis" + bytes(23)) + ogg_page(1, *[b""] * 255) * (BODY // 282),
    "opus of 5,000 s": lambda: compressed("OGG", "OPUS", 5_000, 8_000),
    "opus of 119 s": lambda: compressed("OGG", "OPUS", 119, 48_000, 8),
    "vorbis of 20 channels": lambda: compressed("OGG", "VORBIS", 1, 8_000, 20),
    "ogg of junk": lambda: compressed("OGG", "VORBIS", 1, 8_000) + bytes(BODY - 50_000),
    "1 Hz": lambda: wav(120, 1),
    "2^32 - 1 Hz": lambda: wav(100, 2**32 - 1),
    "101 Hz": lambda: wav(12_100, 101),
    "44,101 Hz": lambda: wav(1_990_000, 44_101),
    "192,001 Hz": lambda: wav(1_990_000, 192_001),
    "255,872 Hz": lambda: wav(1_990_000, 255_872),
    "383,981 Hz": lambda: wav(1_990_000, 383_981),
    "384,000 Hz": lambda: wav(1_990_000, 384_000),
    "65,535 channels": lambda: wav(30, 16_000, 65_535),
    "1e308": lambda: wav(1000, 16_000, bits=64, kind=3, value=1e308),
    "1e308 in two channels": lambda: wav(1000, 16_000, 2, bits=64, kind=3, value=1e308),
    "3e38": lambda: wav(1000, 16_000, bits=32, kind=3, value=3e38),
    "nan": lambda: wav(1000, 16_000, bits=32, kind=3, value=float("nan")),
    "240,000 chunks": lambda: wav(100, 16_000, before=(b"LIST" + bytes(4)) * 240_000),
}

_SETUP = """
from pathlib import Path
from PIL import Image
from kdexport.errors import DataError
from kdexport.tasks import task_class
from kdexport.tasks.config import AudioConfig, ImageConfig, TaskConfig
Image.init()
content, kind = Path(arguments[0]).read_bytes(), arguments[1]
if kind == "image":
    how = ImageConfig(resize=256, crop=[224, 224], resample=3, mean=[0.5] * 3, std=[0.5] * 3)
else:
    how = AudioConfig(rate=16_000, length=160_000)
task = task_class(kind + "-classification")(TaskConfig(task="", labels=["a"], inputs=["x"], **{kind: how}))
"""
_WORK = """
result = {"refused": ""}
try:
    estimate = task.seconds({kind: content})
    result["header"] = time.process_time() - began
    array = task.array(content)
    result["estimate"], result["finite"] = estimate, bool(abs(array).max() < 1e9)
except DataError as error:
    result["refused"] = str(error)
"""


def measured(tmp_path: Path, kind: str, content: bytes):
    (tmp_path / "file").write_bytes(content)
    return cost_of(_SETUP, _WORK, tmp_path / "file", kind)


@pytest.mark.parametrize("name", HOSTILE_IMAGES)
def test_a_picture_that_claims_much_costs_little(name, tmp_path):
    cost = measured(tmp_path, "image", HOSTILE_IMAGES[name]())
    assert_cheap(cost)
    assert cost.result.get("header", 0) < 0.05  # it is read on the event loop
    assert cost.result["refused"] or cost.result["finite"]


@pytest.mark.parametrize("name", LARGEST_IMAGES)
def test_the_largest_picture_of_each_format_is_read_within_the_limits(name, tmp_path):
    cost = measured(tmp_path, "image", LARGEST_IMAGES[name]())
    assert not cost.result["refused"]
    assert_cheap(cost)
    print(f"{name:24} {cost.mb:6.1f} MB {cost.seconds:5.2f} s")


@pytest.mark.parametrize("name", HOSTILE_SOUNDS)
def test_a_recording_that_claims_much_costs_little(name, tmp_path):
    cost = measured(tmp_path, "audio", HOSTILE_SOUNDS[name]())
    assert_cheap(cost)
    assert cost.result.get("header", 0) < 0.05
    assert cost.result["refused"] or cost.result["finite"]
    print(f"{name:24} {cost.mb:6.1f} MB {cost.seconds:5.2f} s {cost.result['refused']}")


# Of every format the largest that is let in for a model that reads 10 s, in its costliest encoding.
LARGEST_SOUNDS = {
    "flac": lambda: compressed("FLAC", "PCM_24", 11, 384_000, 8),
    "flac noise": lambda: compressed("FLAC", "PCM_16", 11, 192_000, 2, noise=True),
    "vorbis": lambda: compressed("OGG", "VORBIS", 11, 192_000, 8, noise=True),
    "opus": lambda: compressed("OGG", "OPUS", 11, 48_000, 8, noise=True),
}


@pytest.mark.parametrize("name", LARGEST_SOUNDS)
def test_the_largest_recording_of_each_format_is_read_within_the_limits(name, tmp_path):
    cost = measured(tmp_path, "audio", LARGEST_SOUNDS[name]())
    assert not cost.result["refused"]
    assert_cheap(cost)
    print(f"{name:24} {cost.mb:6.1f} MB {cost.seconds:5.2f} s, estimated {cost.result['estimate']:.2f}")


_SPEECH = """
import sys
from pathlib import Path
from kdexport.tasks import task_class
from kdexport.tasks.config import AudioConfig, TaskConfig
name = "automatic-speech-recognition"
how = AudioConfig(rate=16_000, length=2_998, mels=80, steps=750)
task = task_class(name)(TaskConfig(task=name, labels=["<pad>", "a"], inputs=["x"], function="none", audio=how))
content = Path(arguments[0]).read_bytes()
"""
_SPEECH_WORK = """
from kdexport.errors import DataError
try:
    result = task.encode([task.row(content)])["x"].shape[1]
except DataError as error:
    result = str(error)
"""
# The largest that a recogniser of 30 s reads, and what claims more.
SPEECH = {
    "flac": (lambda: compressed("FLAC", "PCM_24", 29.9, 384_000, 8), 2_988),
    "vorbis": (lambda: compressed("OGG", "VORBIS", 29.9, 192_000, 8, noise=True), 2_988),
    "opus": (lambda: compressed("OGG", "OPUS", 29.9, 48_000, 8, noise=True), 2_988),
    "flac of ten minutes": (lambda: compressed("FLAC", "PCM_16", 600, 384_000), "it lasts 600 s; at most 120"),
    "flac of 119 s": (lambda: compressed("FLAC", "PCM_16", 119, 384_000, 8), "it lasts 119.0 s; the model reads 30.0"),
    "flac that claims 2^36 - 1": (lambda: flac_claims(2**36 - 1), "at most 120 are read"),
    "wav of 1,000,003 Hz": (lambda: wav(500_000, 1_000_003), "it has 1,000,003 samples a second; at most 384,000"),
    "wav of zeros, 25 MB": (lambda: wav(12_500_000, 384_000), "it lasts 32.6 s; the model reads 30.0. Cut it"),
}


@pytest.mark.parametrize("name", SPEECH)
def test_speech_is_read_or_refused_within_the_limits(name, tmp_path):
    make, wanted = SPEECH[name]
    (tmp_path / "file").write_bytes(make())
    cost = cost_of(_SPEECH, _SPEECH_WORK, tmp_path / "file")
    assert cost.result == wanted if isinstance(wanted, int) else wanted in cost.result
    assert_cheap(cost, seconds=2 * MOST_SECONDS)  # of a file of this machine it is decoded twice
    print(f"{name:24} {cost.mb:6.1f} MB {cost.seconds:5.2f} s {cost.result}")


@pytest.mark.parametrize("content", [MP3_OF_8_KBIT * 3, b"ID3\4\0\0\0\0\0\0" + MP3_OF_8_KBIT * 3])
def test_requests_with_mp3_are_refused_before_its_decoder_sees_them(content, capfd):
    task = task_class("audio-classification")(TaskConfig(task="", labels=["a"], inputs=["x"], audio=BANDS))
    with pytest.raises(DataError, match=r"it is MP3, which is read from files only\. Send WAV, FLAC or OGG"):
        task.seconds({"audio": content})
    assert not capfd.readouterr().err


def test_of_a_long_recording_only_what_the_model_reads_is_converted(tmp_path):
    cost = measured(tmp_path, "audio", wav(120 * 192_000, 192_000, 2, 16))
    assert_cheap(cost)
    assert cost.mb < 120


# --- and the answers stay


def image_task(how):
    return task_class("image-classification")(
        TaskConfig(task="image-classification", labels=["a"], inputs=["pixel_values"], image=how)
    )


def drawn(width, height) -> Image.Image:
    low = np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(np.uint8)
    return Image.fromarray(low).resize((width, height), Image.Resampling.BICUBIC)


def test_a_large_photo_is_nearly_what_it_is_at_its_full_size():
    photo, file = drawn(7600, 5700), io.BytesIO()
    photo.save(file, "JPEG", quality=90)
    shrunk = image_task(CROPPED).array(file.getvalue())
    whole = images.scaled(images.pixels_of(photo, CROPPED), images.scaling(CROPPED))
    assert np.abs(shrunk - whole).mean() < 0.005  # of −1 … 1
    assert np.abs(shrunk - whole).max() < 0.05


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
def test_metadata_is_left_out_and_pixels_are_the_same(form):
    exif = Image.Exif()
    exif[306], exif[274] = "2020:01:01 00:00:00", 6
    file, photo = io.BytesIO(), drawn(120, 90)
    photo.save(file, form, exif=exif, icc_profile=bytes(70_000), dpi=(72, 72))
    content = file.getvalue()
    assert np.array_equal(np.asarray(images.decoded(content)), np.asarray(Image.open(io.BytesIO(content))))
    if form != "TIFF":
        assert len(headers.trimmed(content)) < len(content) - 70


# --- rows of data sets


def test_bad_rows_are_named_and_left_out(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.png").write_bytes(png(8, 8 + i))
    (tmp_path / "10.png").write_bytes(png(7000, 7000, kind=6))
    os.mkfifo(tmp_path / "11.png")
    os.truncate(os.open(tmp_path / "12.png", os.O_CREAT | os.O_RDWR), 200_000_000)
    names = [*(f"{i}.png" for i in range(13)), "/dev/zero"]
    (tmp_path / "rows.csv").write_text("\n".join(["image,label", *(f"{n},{i % 2}" for i, n in enumerate(names))]))
    (tmp_path / "data").mkdir()
    settings = {"train": str(tmp_path / "rows.csv")}
    with pytest.raises(DataError, match=r"rows\.csv, row 11: its image .*10\.png has 7000 × 7000 pixels"):
        prepare(spec.Data(**settings), "image-classification", 0, tmp_path / "data")
    prepare(spec.Data(**settings, skip_bad_rows=True), "image-classification", 0, tmp_path / "data")
    assert read_summary(tmp_path / "data").bad_rows == 4


def test_a_row_that_only_the_model_can_not_read_is_named():
    with pytest.raises(DataError, match=r"rows\.csv:7: its image has 1 × 65535 pixels, too long and thin"):
        image_task(CROPPED).encode([{"image": png(1, 65_535), "id": "rows.csv:7"}])


@pytest.mark.parametrize("value", ["data:;base64,@@@", "data:;base64,é", "data:;base64,YQ", "data:;base64,YWJ\n"])
def test_no_base64_is_no_picture(value):
    for read in (bytes_of, inline_bytes):
        with pytest.raises(DataError, match="no base64"):
            read(value)


def test_inline_bytes_open_no_file():
    assert inline_bytes(inline(b"abc")) == b"abc"
    for value in ("/dev/zero", "/etc/passwd", b"abc", 3, None, "data:image/png;base64,YWJj"):
        with pytest.raises(DataError, match="does not begin with data:;base64,"):
            inline_bytes(value)


def test_warnings_of_pillow_are_no_news():
    broken = tiff((256, 4, 1, 1), (257, 4, 1, 1), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8), (306, 2, 90, 9000),
                  (277, 3, 1, 1), (278, 4, 1, 1), (279, 4, 1, 1), data=bytes(100))  # fmt: skip
    images._pillow.cache_clear()
    with warnings.catch_warnings(record=True) as came:
        warnings.simplefilter("always")
        Image.open(io.BytesIO(broken)).load()
        assert came
        came.clear()
        images.decoded(broken)
        assert not came
    images._pillow.cache_clear()


def test_threads_decode_no_more_at_once_than_there_is_room():
    room, now, most, lock = Decoding(100_000_000), [0], [0], threading.Lock()

    def work(size):
        with room.room(size):
            with lock:
                now[0] += size
                most[0] = max(most[0], now[0])
            time.sleep(0.005)
            with lock:
                now[0] -= size

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, [40_000_000, 60_000_000, 90_000_000, 5_000_000] * 10))
        pool.submit(work, 10**9).result(5)  # more than there is: alone
    assert now[0] == 0
    assert 40_000_000 < most[0] <= 10**9
    assert room._used == 0


# --- through the server


def packed(folder: Path, kind: str) -> Path:
    """An artifact whose logits are the means of what it reads."""
    import onnx
    from onnx import TensorProto, helper

    name, shape, axes = ("pixel_values", ["b", 3, 224, 224], [2, 3]) if kind == "image" else ("x", ["b", 1024, 8], [1])
    nodes = [helper.make_node("ReduceMean", [name], ["logits"], axes=axes, keepdims=0)]
    tensors = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in ((name, shape), ("logits", None))]
    graph = helper.make_graph(nodes, "g", tensors[:1], tensors[1:])
    student, out = folder / "student", folder / kind
    student.mkdir(exist_ok=True)
    out.mkdir()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, student / "model.onnx")
    labels = [str(i) for i in range(3 if kind == "image" else 8)]
    how = {"image": CROPPED} if kind == "image" else {"audio": BANDS}
    config = TaskConfig(task=f"{kind}-classification", labels=labels, inputs=[name], **how)
    (student / "task.json").write_bytes(msgspec.json.encode(config))
    artifact.pack(student, {"fp32": (student / "model.onnx", "plain")}, "fp32", {}, out)
    return out


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifacts")
    image, sound = packed(folder, "image"), packed(folder, "audio")
    with served(f"image={image}", f"audio={sound}", "--threads", 2) as running:
        ask(running.url, "/models/image", png(300, 300))
        ask(running.url, "/models/audio", wav(16_000, 16_000))
        yield running


def test_what_takes_long_runs_alone_and_counts_for_more(tmp_path):
    version = Version("image", packed(tmp_path, "image"), None, max_batch=32, max_batch_tokens=2048)
    usual, large = ({"image": png(side, side)} for side in (64, 3000))
    assert version.bucket(version.cost(usual)) == 1
    assert version.cost(large) > 20 * version.cost(usual)
    bucket = version.bucket(version.cost(large))
    assert bucket > 1
    assert version.most(bucket) == 1
    with pytest.raises(Refused, match=r"the image can't be read: it has 7000 × 7000 pixels"):
        version.cost({"image": png(7000, 7000, kind=6)})


@pytest.mark.parametrize(
    ("kind", "name", "make"),
    [
        *(("image", name, make) for name, make in HOSTILE_IMAGES.items()),
        *(("image", name, make) for name, make in LARGEST_IMAGES.items() if name not in ("png 16 bit", "tiff cmyk")),
        *(("audio", name, make) for name, make in HOSTILE_SOUNDS.items()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_request_is_answered_or_refused_within_the_limits(server, kind, name, make):
    content = make()
    before, began = begin_peak(server.process.pid), cpu_seconds(server.process.pid)
    found = ask(server.url, f"/models/{kind}", content)
    if len(content) > MAX_BODY[kind]:
        assert_refused(found, 413)
    elif found.status != 200:
        assert_refused(found, 413, 422)
    assert cpu_seconds(server.process.pid) - began <= 1.0
    assert memory_mb(server.process.pid) - before <= MOST_MB
    assert not any("Warning" in line for line in server.log)


def test_a_flood_of_large_pictures_loses_nobody_else(server):
    large = saved("RGB", 3400, 3400, "WEBP", lossless=True)  # the largest that is let in
    floods = [saved("RGB", 7000, 7000, "WEBP", lossless=True)] * 150 + [large] * 150
    good, waited, ends = [], [], threading.Event()

    def health():
        while not ends.wait(0.02):
            began = time.monotonic()
            assert ask(server.url, "/v2/health/live").status == 200
            waited.append(time.monotonic() - began)

    def client(path, content):
        for _ in range(20):
            began = time.monotonic()
            while (found := ask(server.url, path, content)).status == 429 and time.monotonic() - began < 20:
                time.sleep(0.05)
            good.append((found.status, time.monotonic() - began))

    begin = begin_peak(server.process.pid)
    with ThreadPoolExecutor(160) as pool:
        watching = pool.submit(health)
        flood = [pool.submit(ask, server.url, "/models/image", content) for content in floods]
        clients = [pool.submit(client, "/models/audio", wav(8_000, 16_000)),
                   pool.submit(client, "/models/image", png(64, 64))]  # fmt: skip
        statuses = [one.result().status for one in flood]
        for one in clients:
            one.result()
        ends.set()
        watching.result()
    assert set(statuses[:150]) == {413}
    assert set(statuses[150:]) <= {200, 429}
    assert {status for status, _ in good} == {200}
    assert np.median(waited) < 0.1
    assert memory_mb(server.process.pid) - begin < 3 * MOST_MB  # two threads
