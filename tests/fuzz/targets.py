"""What is fuzzed: bytes that come from strangers → the code that reads them. Only our own errors may come out."""

from __future__ import annotations

import atexit
import io
import json
import struct
import tempfile
import wave
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import atheris

with atheris.instrument_imports(include=["kdexport"]):
    import numpy as np
    import small
    import soundfile
    from PIL import Image

    import kdexport
    from kdexport import spec
    from kdexport.cli.options import parse_sets
    from kdexport.errors import ArtifactError, DataError, SpecError
    from kdexport.runtime import artifact
    from kdexport.runtime.onnx_wire import has_external_data
    from kdexport.serve.registry import Models
    from kdexport.tasks import task_class
    from kdexport.tasks.config import AudioConfig, ImageConfig, TaskConfig
    from kdexport.tasks.inputs import recordings


class Target(NamedTuple):
    """A function of bytes, and inputs to begin with."""

    run: Callable[[bytes], None]
    seeds: Iterator[bytes]


# --- pictures and sound


def images() -> Target:
    """Any bytes as a picture, for a model that crops, one that doesn't, and one that reads grey."""
    hows = [
        ImageConfig(channels=3, resize=256, crop=[224, 224], mean=[0.5] * 3, std=[0.5] * 3),
        ImageConfig(channels=3, resize=[32, 48], resample=3, mean=[0.5] * 3, std=[0.5] * 3),
        ImageConfig(channels=1, resize=32, crop=[32, 32], mean=[0.5], std=[0.5]),
    ]
    tasks = [_task("image-classification", "pixel_values", image=how) for how in hows]
    return Target(lambda data: _encode(tasks, "image", data), _pictures())


def sound() -> Target:
    """Any bytes as a recording, for a model of waveforms and one of mel bands; checksums of OGG are made right."""
    hows = [AudioConfig(rate=16_000, length=160_000), AudioConfig(rate=8_000, length=98, mels=40, mean=-4.0, std=4.0)]
    tasks = [_task("audio-classification", "input_values", audio=how) for how in hows]
    return Target(lambda data: _encode(tasks, "audio", _with_checksums(data)), _recordings())


def _with_checksums(data: bytes) -> bytes:
    pages = data.split(b"OggS\0")
    for i, page in enumerate(pages[1:], 1):
        head = b"OggS\0" + page[:17] + bytes(4)
        end = 22 + (page[21] + sum(page[22 : 22 + page[21]]) if len(page) > 21 else 0)
        pages[i] = page[:17] + recordings._ogg_checksum(head + page[21:end]) + page[21:]
    return b"OggS\0".join(pages)


def _task(name: str, reads: str, **how: Any) -> Any:
    return task_class(name)(TaskConfig(task=name, labels=["a", "b"], inputs=[reads], **how))


def _encode(tasks: list[Any], reads: str, data: bytes) -> None:
    for task in tasks:
        with suppress(DataError):
            task.seconds({reads: data})
        try:
            arrays = task.encode([{reads: data}])
        except DataError:
            continue
        assert all(np.isfinite(array).all() for array in arrays.values())


def _pictures() -> Iterator[bytes]:
    values = np.random.default_rng(0).integers(0, 256, (9, 7, 4), dtype=np.uint8)
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"):
        for mode in ("RGB", "L", "RGBA", "1", "P", "CMYK", "I;16"):
            file = io.BytesIO()
            try:
                Image.fromarray(values).convert("RGB").convert(mode).save(file, kind)
            except (OSError, ValueError):
                continue
            yield file.getvalue()
    # little that stands for much: one colour, and long and thin
    for size in ((7000, 7000), (1, 100_000), (100_000, 1)):
        for kind in ("PNG", "GIF", "WEBP", "TIFF"):
            file = io.BytesIO()
            try:
                Image.new("L", size).save(file, kind)
            except (OSError, ValueError, OverflowError):
                continue
            yield file.getvalue()


def _recordings() -> Iterator[bytes]:
    for channels, width, rate in ((1, 2, 8_000), (2, 2, 44_100), (1, 1, 16_000), (2, 3, 11_025), (1, 4, 48_000)):
        file = io.BytesIO()
        with wave.open(file, "wb") as out:
            out.setnchannels(channels)
            out.setsampwidth(width)
            out.setframerate(rate)
            out.writeframes(bytes(range(240)) * channels)
        yield file.getvalue()
    noise = np.random.default_rng(0).normal(0, 0.1, (4_000, 2))
    for form, subtype in (
        ("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"),
        ("WAV", "ULAW"), ("WAV", "IMA_ADPCM"), ("WAV", "MS_ADPCM"), ("WAV", "GSM610"), ("WAVEX", "FLOAT"),
    ):  # fmt: skip
        for samples in (noise[:, :1], 0 * noise[:, :1], *([] if subtype == "GSM610" else [noise])):
            file = io.BytesIO()
            soundfile.write(file, samples, 16_000, subtype, format=form)
            yield file.getvalue()
    for kind, channels, rate, bits, data in (
        (3, 1, 16_000, 64, struct.pack("<2d", 1e308, -1e308)),
        (3, 1, 16_000, 32, struct.pack("<2f", float("nan"), 1.0)),
        (1, 1, 1, 16, b"\0\1" * 100),
        (1, 65_535, 2**32 - 1, 16, b"\0\1" * 70_000),
        (0xFFFE, 1, 15_999, 24, b"\0\1\2" * 100),
        (0x55, 1, 8_000, 0, (b"\xff\xe3\x18\xc4" + bytes(68)) * 20),  # MP3 in WAV
    ):
        head = struct.pack("<HHIIHH", kind, channels, rate, 0, 0, bits)
        body = b"WAVEfmt " + struct.pack("<I", len(head)) + head + b"data" + struct.pack("<I", len(data)) + data
        yield b"RIFF" + struct.pack("<I", len(body)) + body


# --- requests


_FORM = (b"content-type", b"multipart/form-data; boundary=b")
_PATHS = ["/", "/predict", "/models/tags", "/models/image", "/models/audio", "/v1/completions", "/invocations"]
_INFER = [f"/v2/models/{name}/infer" for name in ("text", "tags", "image", "audio")]
_SPEECH = ["/v2/models/speech/infer", "/models/speech", "/v1/audio/transcriptions"]


def bodies() -> Target:
    """The first byte chooses the path, the rest is the body; its highest bit says that it is gzipped."""
    server = small.Server()

    def run(data: bytes) -> None:
        first, body = (data[:1] or b"\0")[0], data[1:]
        encoding = [(b"content-encoding", b"gzip")] if first & 0x80 else []
        paths = _PATHS + _INFER + _SPEECH
        server.post(paths[first % len(paths)], body, _FORM, *encoding)

    return Target(run, _bodies())


def tensors() -> Target:
    """Two bytes say how long the JSON is, the third which model is asked; raw tensors follow the JSON."""
    server = small.Server()

    def run(data: bytes) -> None:
        length, which, body = int.from_bytes(data[:2], "big"), (data[2:3] or b"\0")[0], data[3:]
        server.post(_INFER[which % 4], body, (b"inference-header-content-length", b"%d" % length))

    return Target(run, _tensors())


def _bodies() -> Iterator[bytes]:
    long = "(" * 4_000
    for i, body in (
        (0, {"inputs": "a text"}),
        (0, {"inputs": {"text": long, "text_pair": long}, "parameters": {"top_k": 2, "function_to_apply": "none"}}),
        (0, {"inputs": ["one", {"text": "two", "text_pair": "three"}]}),
        (1, {"inputs": [["one", "two"], ["three"]], "truncate": False, "raw_scores": True}),
        (2, {"inputs": ["Ada lives in York", ""], "parameters": {"aggregation_strategy": "none", "ignore_labels": []}}),
        (2, {"inputs": "a " * 2_000}),
        (3, {"inputs": "iVBORw0KGgo=", "parameters": {"top_k": 1}}),
        (5, {"model": "text", "prompt": "a", "max_tokens": 1}),
        (7, {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]}], "id": "x"}),
        (8, {"inputs": [{"name": "input_ids", "shape": [1, 2], "datatype": "INT64", "data": [[1, 2]]},
                        {"name": "attention_mask", "shape": [1, 2], "datatype": "INT64", "data": [1, 1]}],
             "outputs": [{"name": "logits", "parameters": {"classification": 2}}]}),
    ):  # fmt: skip
        yield bytes([i]) + json.dumps(body).encode()
    sound = next(_recordings())
    fields = {
        "model": b"speech",
        "response_format": b"verbose_json",
        "timestamp_granularities[]": b"word",
        "file": sound,
    }
    form = [
        b'--b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n' % (n.encode(), v) for n, v in fields.items()
    ]
    for i, content in ((3, next(_pictures())), (4, sound), (12, sound), (13, b"".join(form) + b"--b--")):
        yield bytes([i]) + content


def _tensors() -> Iterator[bytes]:
    ids = np.array([[101, 7592, 102]], "<i8").tobytes()
    text = struct.pack("<I", 5) + b"hello"
    for which, inputs, raw in (
        (0, [("text", [1], "BYTES", len(text))], text),
        (1, [("input_ids", [1, 3], "INT64", 24), ("attention_mask", [1, 3], "INT64", 24)], ids + ids),
        (2, [("pixel_values", [1, 3, 224, 224], "FP32", 602_112)], bytes(602_112)),
    ):
        tensors = [
            {"name": name, "shape": shape, "datatype": kind, "parameters": {"binary_data_size": size}}
            for name, shape, kind, size in inputs
        ]
        head = json.dumps({"inputs": tensors, "parameters": {"binary_data_output": True}}).encode()
        yield len(head).to_bytes(2, "big") + bytes([which]) + head + raw


# --- files


def manifests() -> Target:
    """The first byte says which file of an artifact the rest is: manifest, golden answers, card, task or graph.

    Checksums are made right again, as whoever writes an artifact can make them.
    """
    home = tempfile.TemporaryDirectory(prefix="kdexport-fuzz-")
    atexit.register(home.cleanup)
    folder = small.pack(small.configs()["text"], Path(home.name) / "text")
    names = [artifact.MANIFEST, artifact.GOLDEN, artifact.CARD, "config.json", "onnx/model.onnx"]
    whole = {name: (folder / name).read_bytes() for name in names}

    def run(data: bytes) -> None:
        name = names[(data[:1] or b"\0")[0] % len(names)]
        (folder / name).write_bytes(data[1:])
        try:
            if name.endswith(".onnx"):
                _expect(ValueError, lambda: has_external_data(folder / name))
            _seal(folder)
            _expect(ArtifactError, lambda: kdexport.load(folder))
            _expect(ArtifactError, lambda: Models({"m": (folder, None)}, 2, 64).load("m"))
        finally:
            for one, content in whole.items():
                (folder / one).write_bytes(content)

    return Target(run, (bytes([i]) + whole[name] for i, name in enumerate(names)))


def _seal(folder: Path) -> None:
    """Make the checksums of an artifact right, as far as its manifest can be read."""
    from kdexport.files import hash_file

    try:
        manifest = json.loads((folder / artifact.MANIFEST).read_bytes())
        for name in manifest["files"]:
            manifest["files"][name] = hash_file(folder / name)
        for variant in manifest["variants"].values():
            variant["sha256"] = hash_file(folder / variant["file"])
        content = json.dumps(artifact.sealed(manifest)).encode()
    except Exception:  # whatever it is, it is to be refused as it stands
        return
    (folder / artifact.MANIFEST).write_bytes(content)


def specs() -> Target:
    """A spec file, and the same text as the value of a flag."""
    home = tempfile.TemporaryDirectory(prefix="kdexport-fuzz-")
    atexit.register(home.cleanup)
    file = Path(home.name) / "spec.yaml"
    needed = {"teacher.model": "a/b", "data.train": "a.csv"}

    def run(data: bytes) -> None:
        file.write_bytes(data)
        _expect(SpecError, lambda: spec.load(file, {}))
        text = data.decode("utf-8", "replace")
        _expect(SpecError, lambda: spec.load(None, needed | parse_sets([text])))

    return Target(run, _specs())


def _specs() -> Iterator[bytes]:
    base = "teacher: {model: a/b}\ndata: {train: a.csv}\n"
    yield spec.commented(spec.load(None, {"teacher.model": "a/b", "data.train": "a.csv"})).encode()
    for line in (
        "seed: 2024-99-99", "seed: !!int abc", "seed: !!float x", "seed: 0x_", f"seed: {'9' * 5_000}",
        "seed: 3\nseed: 4", "seed: 2024-01-01 25:61:61", "seed: 2024-01-01T00:00:00+99:99", "seed: " + "[" * 4_000,
        "distill: {temperature: .inf}", "distill: {temperature: 1e400}", "? [a]\n: b", "a: &x [*x]",
        "<<: {seed: 1}", "!!python/object:os.system {}",
    ):  # fmt: skip
        yield (base + line).encode()
    yield b"distill.temperature=2e-4"


def _expect(kind: type[Exception], call: Callable[[], object]) -> None:
    """Call; errors of a kind are one line, and all others are faults."""
    try:
        call()
    except kind as error:
        assert "\n" not in str(error)  # noqa: PT017


TARGETS = {f.__name__: f for f in (images, sound, bodies, tensors, manifests, specs)}
