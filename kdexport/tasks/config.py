"""`task.json`: what encode and decode need, whatever the task; the types that tasks share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from kdexport.errors import ArtifactError
from kdexport.tasks.metrics import Array

Row = Mapping[str, Any]
Arrays = dict[str, Array]
Function = Literal["softmax", "sigmoid", "none"]


class Items(NamedTuple):
    """What is labelled, one by one: rows, or the words of rows; for what looks at single answers."""

    of: Array
    """int64 [M]: the row that each belongs to."""
    labels: Array
    """int64 [M]."""
    logits: Array
    """float [M, C]."""
    words: Sequence[str] = ()


class ImageConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How a picture becomes float32 [channels, height, width]: resized, cut, scaled, normalised.

    `resize` is [height, width], or one number for the shorter edge; `crop` is [height, width] of the middle, `resample`
    Pillow's number of a filter. A value v of 0 … 255 becomes (v · scale − mean) / std.
    """

    channels: int = 3
    resize: list[int] | int | None
    crop: list[int] | None = None
    resample: int = 2
    scale: float = 1 / 255
    mean: list[float]
    std: list[float]


class AudioConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How sound becomes the model's input: mono at `rate` Hz, then a waveform or the logarithms of mel bands.

    A waveform is `length` samples, cut or padded with zeros; with `normalise` what is sound of it has mean 0 and
    deviation 1. With `mels` bands it is `length` frames of them, and `normalise` takes `mean` away and divides by
    2 · `std`.
    """

    rate: int
    length: int
    mels: int = 0
    normalise: bool = True
    mean: float = 0.0
    std: float = 0.5


class TaskConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`task.json`, and the manifest's `task`: all that encode and decode need besides tokenizer.json.

    `max_length`, `pad_id`, `pad_type_id` and `padding_side` are of texts, `image` of pictures, `audio` of sound.
    Of language models, an answer holds the `kept` most probable tokens, and `end_id` ends a text.
    """

    task: str
    labels: list[str]
    inputs: list[str]
    max_length: int = 0
    pad_id: int = 0
    pad_type_id: int = 0
    padding_side: str = "right"
    function: Function = "softmax"
    image: ImageConfig | None = None
    audio: AudioConfig | None = None
    kept: int = 0
    end_id: int | None = None


class Comparable:
    """A task whose answers are compared number by number."""

    def difference(self, logits: Array, reference: Array) -> float:
        """max |Δlogit|."""
        return float(np.abs(logits - reference).max())


def read_config(folder: Path) -> TaskConfig:
    """The task of a model folder (`task.json`) or an artifact (`kdexport.json`).

    Raises:
        ArtifactError: it has none, or one that can't be read.
    """
    try:
        if (folder / "kdexport.json").exists():
            manifest = msgspec.json.decode((folder / "kdexport.json").read_bytes())
            return msgspec.convert(manifest["task"], TaskConfig)
        return msgspec.json.decode((folder / "task.json").read_bytes(), type=TaskConfig)
    except (OSError, msgspec.MsgspecError, KeyError) as error:
        raise ArtifactError(f"{folder} holds no task of ours: {error}") from None
