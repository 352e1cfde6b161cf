"""Read an image's header without Pillow: its size and the cost of decoding it, within microseconds.

Pillow parses metadata on opening a file, at unbounded cost: with Pillow 13, a JPEG of 2 MB with 100,000 empty EXIF
segments takes 12 s, a PNG with 1,900 colour profiles 4 s. So the header is checked first, and Pillow gets only the
parts that determine the pixels.
"""

import re
import struct
from typing import NamedTuple

from kdexport.errors import DataError, TooLarge

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# The memory limit for decoding an image, in bytes, all copies included.
MOST_BYTES = 192_000_000
# Larger JPEGs are decoded at a smaller scale, by libjpeg.
_MOST_EXACT = 100_000_000
# The filter weights of a resize grow with the side, whatever the number of pixels.
_LONGEST_SIDE = 65_535
_MOST_PARTS = 1_000
_MOST_STRIPS = 10_000
# Pillow decoders in Python take about 1 µs a pixel, as long as C takes for this many bytes.
_IN_PYTHON = 333.0
_MARKER = re.compile(rb"\xff([^\x00\xff])(..)", re.DOTALL)
_NO_LENGTH = {0x01, *range(0xD0, 0xDA)}
_PPM = re.compile(rb"P(\w{1,5})" + 3 * rb"(?:(?:\s|#[^\r\n]{0,1000}[\r\n]){1,100}(\d{1,10}))?", re.ASCII)
_TIFF_SIZES = dict(zip(range(1, 19), (1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8), strict=True))


class Header(NamedTuple):
    """Size in pixels, bytes per pixel (or an equivalent in time), and the divisor by which a JPEG is scaled down."""

    width: int
    height: int
    per_pixel: float
    scale: int = 1

    @property
    def bytes(self) -> int:
        """The peak memory of decoding, all copies included."""
        return int(self.width * self.height * self.per_pixel)


def read_header(content: bytes) -> Header:
    """Return the size and decoding cost of an image; raise if its format is unknown or the cost too high."""
    if not content:
        raise DataError("it is empty")
    for start, read in _READERS.items():
        if content.startswith(start):
            try:
                return check(read(content))
            except (struct.error, LookupError, OverflowError, ValueError):  # sizes and offsets are arbitrary numbers
                break
    raise DataError(f"it is no image; known are {', '.join(FORMATS)}")


def check(header: Header) -> Header:
    """Return the header, or raise `TooLarge`."""
    width, height = header.width, header.height
    if max(width, height) > _LONGEST_SIDE or header.bytes > MOST_BYTES:
        millions = MOST_BYTES / header.per_pixel / 1e6
        limits = f"at most {millions:.1f} million of such a file are read, and {_LONGEST_SIDE:,} a side"
        raise TooLarge(f"it has {width} × {height} pixels; {limits}")
    return header


def trimmed(content: bytes) -> bytes:
    """Reduce a JPEG, PNG or TIFF to the data of its first image."""
    if content.startswith(b"\xff\xd8"):
        kept, _, scan = _jpeg_parts(content)
        return content if sum(map(len, kept)) == scan else b"".join([*kept, content[scan:]])
    if content.startswith(b"\x89PNG"):
        return _png_parts(content)
    if content[:2] in (b"II", b"MM"):  # Pillow follows the chain of all further images
        _, end, pointer = _tiff_tags(content)
        return content[:end] + bytes(pointer) + content[end + pointer :]
    return content


def _jpeg_parts(content: bytes) -> tuple[list[bytes], bytes, int]:
    """Return the segments before the first scan without metadata, the frame header, and the scan's offset."""
    kept, at, frame = list[bytes](), 0, b""
    for _ in range(_MOST_PARTS):
        if not (found := _MARKER.search(content, at)):
            raise ValueError("no scan")
        start, kind = found.start(), found[1][0]
        at = start + 2 if kind in _NO_LENGTH else start + 2 + int.from_bytes(found[2], "big")
        if kind == 0xDA:
            return kept, frame, start
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            frame = content[start:at]
        if kind in (0xE0, 0xEE) or not 0xE0 <= kind <= 0xFE:
            kept.append(content[start:at])
    raise TooLarge("it is a JPEG of too many parts")


def _jpeg(content: bytes) -> Header:
    _, frame, scan = _jpeg_parts(content)
    kind, height, width, bands = frame[1], *struct.unpack_from(">HHB", frame, 5)
    if kind > 0xC2:
        raise DataError("it is a JPEG that is neither baseline nor progressive", "Convert it")
    per_pixel = 4.2 if bands == 3 else 5.0 if bands == 1 else 8.0
    if kind != 0xC2 and content[scan + 4] == bands:  # otherwise all coefficients stay in memory until the last scan
        scale = next((s for s in (1, 2, 4) if width * height * per_pixel / s**2 <= _MOST_EXACT), 8)
        return Header(width, height, 2.4 if scale > 1 else per_pixel, scale)  # 7 ns a pixel, with little memory
    return Header(width, height, per_pixel + 2 * bands + 0.13 * content.count(b"\xff\xda", scan))


def _png(content: bytes) -> Header:
    width, height, bits, kind = struct.unpack_from(">IIBB", content, 16)
    return Header(width, height, 8 if kind in (4, 6) or bits == 16 else 4.2 if kind == 2 else 5)


def _png_parts(content: bytes) -> bytes:
    kept, at = [content[:8]], 8
    for _ in range(_MOST_PARTS + len(content) // 1_000):
        if at + 12 > len(content):
            break
        length, name = struct.unpack_from(">I4s", content, at)
        if name in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept.append(content[at : at + 12 + length])
        at += 12 + length
    else:
        raise TooLarge("it is a PNG of too many parts")
    return b"".join(kept)


def _webp(content: bytes) -> Header:
    if content[8:12] != b"WEBP":
        raise ValueError("it is another RIFF file")
    if content[12:16] == b"VP8X":
        width, height = (1 + int.from_bytes(content[i : i + 3], "little") for i in (24, 27))
    elif content[12:16] == b"VP8L":
        packed = struct.unpack_from("<I", content, 21)[0]
        width, height = 1 + (packed & 0x3FFF), 1 + (packed >> 14 & 0x3FFF)
    else:
        width, height = (size & 0x3FFF for size in struct.unpack_from("<HH", content, 26))
    return Header(width, height, 15.7)


def _gif(content: bytes) -> Header:
    width, height = struct.unpack_from("<HH", content, 6)
    return Header(width, height, 5)


def _bmp(content: bytes) -> Header:
    if struct.unpack_from("<I", content, 14)[0] == 12:
        width, height, compression = *struct.unpack_from("<HH", content, 18), 0
    else:
        width, height, _, _, compression = struct.unpack_from("<iiHHI", content, 18)
    return Header(abs(width), abs(height), _IN_PYTHON if compression in (1, 2) else 8)


def _tiff_tags(content: bytes) -> tuple[dict[int, tuple[int, int]], int, int]:
    """Return tag → (count, first value if stored inline), the end of the entries, and the bytes of a pointer."""
    order = "<" if content[:2] == b"II" else ">"
    big = content[2:4] in (b"\0+", b"+\0")
    entry, pointer = ("HHQ", 8) if big else ("HHI", 4)
    at: int = struct.unpack_from(order + ("Q" if big else "I"), content, 8 if big else 4)[0]
    entries: int = struct.unpack_from(order + ("Q" if big else "H"), content, at)[0]
    at += 8 if big else 2
    if entries > _MOST_PARTS:
        raise TooLarge(f"it is a TIFF of {entries:,} tags")
    tags, total = dict[int, tuple[int, int]](), 0
    for _ in range(entries):
        tag, kind, count = struct.unpack_from(order + entry, content, at)
        at += struct.calcsize("=" + entry)
        short = kind == 3
        value = struct.unpack_from(order + ("H" if short else "I"), content, at)[0]
        at += pointer
        total += count * _TIFF_SIZES.get(kind, 0)
        tags.setdefault(tag, (count, value))
    if total > len(content) or any(tags.get(tag, (0, 0))[0] > _MOST_STRIPS for tag in (273, 324)):
        raise TooLarge("it is a TIFF of too many parts")
    return tags, at, pointer


def _tiff(content: bytes) -> Header:
    tags = _tiff_tags(content)[0]
    return Header(tags[256][1], tags[257][1], 13)


def _ppm(content: bytes) -> Header:
    if not (found := _PPM.match(content)) or not found[3]:
        raise ValueError("no size")
    plain = found[1] in (b"1", b"2", b"3")
    if plain and content.count(b"#") > _MOST_PARTS:
        raise TooLarge("it is a PPM of too many comments")
    fast = found[1] in (b"4", b"f", b"0CMYK") or found[4] in (b"255", b"65535")
    return Header(int(found[2]), int(found[3]), 8 if fast and not plain else _IN_PYTHON)


_READERS = {
    b"\xff\xd8\xff": _jpeg,
    b"\x89PNG\r\n\x1a\n": _png,
    b"RIFF": _webp,
    b"GIF8": _gif,
    b"BM": _bmp,
    b"II": _tiff,
    b"MM": _tiff,
    b"P": _ppm,
}
