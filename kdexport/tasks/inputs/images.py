"""Image input: a file's bytes → resized, cropped, normalised float32 [channels, height, width].

The arithmetic is that of Hugging Face's image processors on Pillow and numpy (transformers 4.57), configured by their
`preprocessor_config.json`.
"""

import io
import warnings
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from typing import Any, ClassVar

import msgspec
import numpy as np

from kdexport.errors import DataError, ModelError, TooLarge
from kdexport.tasks.base import Modality
from kdexport.tasks.config import ImageConfig, Row
from kdexport.tasks.inputs.headers import FORMATS, MOST_BYTES, check, read_header, trimmed
from kdexport.tasks.inputs.media import DECODING, Media, bytes_of, inline, installed
from kdexport.tasks.metrics import Array

_BICUBIC = 3
# The measured decoding time on one core, of the slowest format.
_SECONDS_PER_BYTE = 3e-9


class Images(Media):
    """The input side of tasks with rows `{"image": …}`."""

    modality: ClassVar[Modality] = "image"
    files: ClassVar = "images"
    _how: ImageConfig

    @cached_property
    def _scaling(self) -> tuple[Array, Array]:
        return scaling(self._how)

    @classmethod
    def inspect(cls, content: bytes) -> None:
        decoded(content)

    def compact(self, content: bytes) -> Array:
        """uint8 [channels, height, width]."""
        image, size = opened(content)
        with DECODING.room(size):
            return pixels_of(_loaded(image), self._how)

    def expand(self, compact: Array) -> Array:
        return scaled(compact, self._scaling)

    def seconds(self, row: Row) -> float:
        return read_header(bytes_of(row[self.modality])).bytes * _SECONDS_PER_BYTE

    def shapes(self) -> dict[str, list[int]]:
        height, width = output_size(self._how)
        return {self.config.inputs[0]: [-1, self._how.channels, height, width]}

    def axes(self) -> dict[str, dict[int, str]]:
        axes = {0: "batch_size", 1: "num_channels", 2: "height", 3: "width"}
        return {self.config.inputs[0]: axes, self.output: {0: "batch_size"}}

    def remarks(self, rows: Sequence[Row]) -> list[str]:
        grey = sum(opened(bytes_of(row[self.modality]))[0].mode in ("1", "L", "I;16", "LA") for row in rows)
        if self._how.channels == 3 and grey:
            return [f"{grey / len(rows):.0%} of the images are grey; the model reads colours, so they are converted"]
        return ["the model reads grey, so colours are lost"] if self._how.channels == 1 and grey < len(rows) else []

    def probes(self) -> list[dict[str, Any]]:
        """One pixel, wide, tall with transparency, black."""
        edges = ((1, 1, "L", 0), (300, 7, "RGB", 1), (9, 200, "RGBA", 2), (64, 64, "L", None))
        return [_picture(*edge) for edge in edges]

    def examples(self) -> list[dict[str, Any]]:
        height, width = output_size(self._how)
        return [_picture(width, height, "RGB" if self._how.channels == 3 else "L", seed) for seed in range(3, 7)]


def decoded(content: bytes) -> Any:
    """Decode to a Pillow image; a JPEG of over 100 MB is decoded at a half, quarter or eighth of its size."""
    image, size = opened(content)
    with DECODING.room(size):
        return _loaded(image)


def opened(content: bytes) -> tuple[Any, int]:
    """Return a Pillow image before decoding, and the memory for decoding in bytes."""
    header = read_header(content)
    try:
        image = _pillow().open(io.BytesIO(trimmed(content)), formats=FORMATS)
    except Exception as error:
        raise _broken(error) from None
    if header.scale > 1:
        image.draft(image.mode, (image.width // header.scale, image.height // header.scale))
        return image, header.bytes
    # the frame of a GIF may be larger than the header says
    return image, check(header._replace(width=image.width, height=image.height)).bytes


def _loaded(image: Any) -> Any:
    try:
        image.load()
    except Exception as error:
        raise _broken(error) from None
    return image


def _broken(error: Exception) -> DataError:
    """Convert the dozen exception classes of Pillow's plugins."""
    if isinstance(error, DataError):
        return error
    reason = "it is no image" if "cannot identify" in str(error) else f"it is a broken image ({error})"
    return DataError(f"{reason}; known are {', '.join(FORMATS)}")


@cache
def _pillow() -> Any:
    image = installed("PIL.Image", "pillow")
    # Process-wide, because `warnings.catch_warnings` is not thread-safe.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    return image


def pixels_of(image: Any, how: ImageConfig) -> Array:
    """Return a Pillow image resized and cropped, uint8 [channels, height, width]."""
    mode = "L" if how.channels == 1 else "RGB"
    if image.mode != mode:
        if image.mode.startswith("I;16"):  # Pillow clips 16 bits to 8
            image = _pillow().fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode == "LAB":  # converts to RGB only
            image = image.convert("RGB")
        image = image.convert(mode)
    if how.resize is not None:
        height, width = _resized(image.height, image.width, how.resize)
        # Pillow resizes rows first: the intermediate image has the new width and the old height
        if 4 * (image.width * image.height + width * (image.height + height)) > MOST_BYTES:
            raise TooLarge(f"it has {image.width} × {image.height} pixels, too long and thin to be resized")
        if (width, height) != image.size:
            image = image.resize((width, height), how.resample)
    if how.crop:  # the centre; a smaller image gets a black border
        left, top = (image.width - how.crop[1]) // 2, (image.height - how.crop[0]) // 2
        image = image.crop((left, top, left + how.crop[1], top + how.crop[0]))
    return np.ascontiguousarray(np.asarray(image).reshape(image.height, image.width, how.channels).transpose(2, 0, 1))


def scaled(pixels: Array, scale: tuple[Array, Array]) -> Array:
    """Return float32 values of uint8 pixels; `scale` comes from `scaling`."""
    gain, shift = (each[:, None, None] for each in scale)
    values = pixels * gain
    values += shift
    return np.asarray(values)


def scaling(how: ImageConfig) -> tuple[Array, Array]:
    """Return (v · scale − mean) / std as a factor and an offset, [channels] each."""
    mean, std = np.array(how.mean, np.float64), np.array(how.std, np.float64)
    return (how.scale / std).astype(np.float32), (-mean / std).astype(np.float32)


def _resized(height: int, width: int, to: list[int] | int) -> tuple[int, int]:
    if isinstance(to, list):
        return to[0], to[1]
    long = int(to * max(height, width) / min(height, width))
    return (to, long) if height <= width else (long, to)


def output_size(how: ImageConfig) -> tuple[int, int]:
    """Return height and width after resizing and cropping."""
    size = how.crop or how.resize
    if not isinstance(size, list):
        raise ModelError("the image processor has no fixed output size", "Set do_center_crop or a fixed size")
    return size[0], size[1]


def config_of(processor: Mapping[str, Any], channels: int) -> ImageConfig:
    """Convert a Hugging Face image processor's settings (`preprocessor_config.json`)."""
    if processor.get("do_pad") or processor.get("rescale_offset"):
        kind = processor.get("image_processor_type")
        raise ModelError(f"the image processor {kind} has unsupported steps: do_pad or rescale_offset")
    resize, crop = processor.get("size"), processor.get("crop_size") if processor.get("do_center_crop") else None
    if (edge := (resize or {}).get("shortest_edge")) and "crop_pct" in processor:  # ConvNext's
        small = edge < 384
        resize = {"shortest_edge": int(edge / processor["crop_pct"])} if small else {"height": edge, "width": edge}
        crop = {"height": edge, "width": edge} if small else None
    normalise = processor.get("do_normalize", True)
    how = ImageConfig(
        channels=channels,
        resize=_size(resize) if processor.get("do_resize", True) else None,
        crop=_pair(crop) if crop else None,
        resample=processor.get("resample", 2),
        scale=processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0,
        mean=_each(processor.get("image_mean") if normalise else 0.0, channels),
        std=_each(processor.get("image_std") if normalise else 1.0, channels),
    )
    output_size(how)
    return how


def processor_of(how: ImageConfig) -> dict[str, Any]:
    """Return the settings of the equivalent ViTImageProcessor."""
    height, width = output_size(how)
    values = {"rescale_factor": how.scale, "image_mean": how.mean, "image_std": how.std}
    size = {"size": {"height": height, "width": width}, "resample": how.resample}
    return size | values | {"do_convert_rgb": how.channels == 3 or None}


def fitted(rows: Sequence[Row], largest: tuple[int, int]) -> ImageConfig:
    """Fit a small student's input to training rows: their median size up to `largest`, grey if all are."""
    images = [decoded(bytes_of(row["image"])) for row in rows]
    height, width = (int(np.median([getattr(image, side) for image in images])) for side in ("height", "width"))
    channels = 1 if all(image.mode in ("1", "L", "I;16", "LA") for image in images) else 3
    size = [min(height, largest[0]), min(width, largest[1])]
    plain = ImageConfig(channels=channels, resize=size, resample=_BICUBIC, mean=[0.0] * channels, std=[1.0] * channels)
    values = np.stack([scaled(pixels_of(image, plain), scaling(plain)) for image in images]).astype(np.float64)
    mean, std = values.mean(axis=(0, 2, 3)), np.maximum(values.std(axis=(0, 2, 3)), 1e-3)
    return msgspec.structs.replace(plain, mean=mean.round(4).tolist(), std=std.round(4).tolist())


def _size(size: Any) -> list[int] | int:
    if isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
        return int(size["shortest_edge"])
    return _pair(size)


def _pair(size: Any) -> list[int]:
    match size:
        case int():
            return [size, size]
        case {"height": int() as height, "width": int() as width}:
            return [height, width]
    raise ModelError(f"the image processor's size {size} is not supported", "Set height and width")


def _each(value: Any, channels: int) -> list[float]:
    """Return a number for each channel; a grey model gets the mean of three."""
    values = [float(value)] if isinstance(value, int | float) else [float(one) for one in value]
    return values if len(values) == channels else [sum(values) / len(values)] * channels


def _picture(width: int, height: int, mode: str, seed: int | None) -> dict[str, Any]:
    from PIL import Image

    shape = (height, width) if mode == "L" else (height, width, len(mode))
    values = np.zeros(shape) if seed is None else np.random.default_rng(seed).integers(0, 256, shape)
    image = Image.fromarray(values.astype(np.uint8))
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"image": inline(file.getvalue())}
