"""`task.json`: the configuration of encode and decode for all tasks; types that tasks share."""

import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from kdexport.errors import ArtifactError
from kdexport.tasks.metrics import Array

Row = Mapping[str, Any]
Arrays = dict[str, Array]
Function = Literal["softmax", "sigmoid", "none"]
TextSide = Literal["right", "left"]
# Bounds of values from untrusted files, wide enough for every known model.
Name = Annotated[str, Meta(max_length=255)]
Length = Annotated[int, Meta(ge=0, le=2**20)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
Side = Annotated[int, Meta(ge=1, le=4096)]
Shift = Annotated[float, Meta(ge=-1e6, le=1e6)]
Scale = Annotated[float, Meta(ge=1e-9, le=1e6)]
Each = Meta(min_length=1, max_length=3)
Sides = Annotated[list[Side], Meta(min_length=2, max_length=2)]
# The label of an unlabelled row or token: the index that PyTorch's cross-entropy ignores.
NO_LABEL = -100
# The most words of a closed vocabulary: reading a recording takes time in proportion.
MOST_WORDS, MOST_LETTERS = 4096, 64
# The size limit of manifests and configurations, in bytes.
MOST_JSON = 2**24


class Items(NamedTuple):
    """Labelled items, rows or words of rows, for analyses of single predictions."""

    of: Array  # int64 [M]: the row of each item
    labels: Array  # int64 [M]
    logits: Array  # float [M, C]
    words: Sequence[str] = ()


class ImageConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Preprocessing of images to float32 [channels, height, width]: resize, crop, rescale, normalise.

    `resize` is [height, width], or one number for the shorter edge; `crop` is [height, width] of the centre, `resample`
    Pillow's filter number. A value v of 0 … 255 becomes (v · scale − mean) / std.
    """

    channels: Annotated[int, Meta(ge=1, le=3)] = 3
    resize: Sides | Side | None
    crop: Sides | None = None
    resample: Annotated[int, Meta(ge=0, le=5)] = 2
    scale: Scale = 1 / 255
    mean: Annotated[list[Shift], Each]
    std: Annotated[list[Scale], Each]


class AudioConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Preprocessing of sound: mono at `rate` Hz, then a waveform or log-mel bands.

    A waveform is `length` samples, cut or padded with zeros; `normalise` scales it to mean 0 and standard deviation 1
    before padding. With `mels` bands it is `length` frames, and `normalise` subtracts `mean` and divides by 2 · `std`.
    Bands are those of Kaldi's filters, or, as Whisper has them, of Slaney's, which it normalises in its own way.
    Speech is not padded, and its model has outputs at `steps` points of time for a whole input.
    """

    rate: Annotated[int, Meta(ge=1, le=384_000)]
    length: Annotated[int, Meta(ge=1, le=2**25)]
    mels: Annotated[int, Meta(ge=0, le=1024)] = 0
    normalise: bool = True
    mean: Shift = 0.0
    std: Scale = 0.5
    steps: Annotated[int, Meta(ge=0, le=2**20)] = 0
    filters: Literal["kaldi", "slaney"] = "kaldi"


class DecoderConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Rules for writing text with a decoder.

    Each text starts with the tokens `start`. Tokens in `never` are suppressed everywhere, those in `never_first` only
    right after `start`. The probability of `silence` after the first token of `start` is that of no speech. A window
    gets at most `most` tokens; recordings of up to `seconds` are read in overlapping windows.
    """

    start: Annotated[list[TokenId], Meta(min_length=1, max_length=8)]
    never: Annotated[list[TokenId], Meta(max_length=4096)] = []
    never_first: Annotated[list[TokenId], Meta(max_length=64)] = []
    silence: TokenId | None = None
    most: Annotated[int, Meta(ge=1, le=2**12)] = 224
    seconds: Annotated[float, Meta(gt=0, le=600)] = 30.0


class EmbeddingConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Vectors of `width` dimensions. `prompts` by name are put before a text, `problem` says how vectors are judged."""

    width: Annotated[int, Meta(ge=1, le=2**16)]
    prompts: Annotated[dict[Name, Annotated[str, Meta(max_length=4096)]], Meta(max_length=64)] = {}
    default_prompt: Name | None = None
    problem: Name = ""


class TaskConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`task.json`, and `task` in the manifest: the configuration of encode and decode besides tokenizer.json.

    `max_length`, `pad_id`, `pad_type_id` and the sides are for texts, `image` for images, `audio` for sound; long texts
    are cut on their `truncation_side`. For language models, `kept` is the number of top tokens in an output, and
    `end_id` the token that ends a text; so too for speech that a `decoder` writes, of at most `max_length` tokens. Of
    other speech, `words` are the only ones that are recognised, if there are any. `language` is the code of the
    spoken language, where it is known. `embedding` is for vectors of texts.
    """

    task: Name
    labels: Annotated[list[str], Meta(max_length=2**20)]
    inputs: Annotated[list[Name], Meta(max_length=8)]
    max_length: Length = 0
    pad_id: TokenId = 0
    pad_type_id: TokenId = 0
    padding_side: TextSide = "right"
    truncation_side: TextSide = "right"
    function: Function = "softmax"
    image: ImageConfig | None = None
    audio: AudioConfig | None = None
    kept: Annotated[int, Meta(ge=0, le=4096)] = 0
    end_id: TokenId | None = None
    decoder: DecoderConfig | None = None
    words: Annotated[
        list[Annotated[str, Meta(min_length=1, max_length=MOST_LETTERS)]], Meta(max_length=MOST_WORDS)
    ] = []
    language: Name = ""
    embedding: EmbeddingConfig | None = None


def read_config(folder: Path) -> TaskConfig:
    """Read the task of a model folder (`task.json`) or an artifact (`kdexport.json`), or raise ArtifactError."""
    try:
        if (folder / "kdexport.json").exists():
            manifest = msgspec.json.decode(read_regular(folder / "kdexport.json", MOST_JSON))
            return msgspec.convert(manifest["task"], TaskConfig)
        return msgspec.json.decode(read_regular(folder / "task.json", MOST_JSON), type=TaskConfig)
    except (OSError, msgspec.MsgspecError, KeyError, TypeError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(f"{folder} holds no task of ours: {error}") from None


def read_regular(path: Path, most: int) -> bytes:
    """Read a regular file of at most `most` bytes: a pipe would block, and a device such as /dev/zero never ends."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ArtifactError(f"{path} is no file")
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ArtifactError(f"{path} has more than {most:,} bytes")
    return content
