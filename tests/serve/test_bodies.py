"""How large a body may be: an ordinary photo and a minute of sound are taken, texts have less room."""

from __future__ import annotations

import base64
import io
import json
import os
import struct

import pytest
from fuzz.small import Server
from PIL import Image

from kdexport.serve.settings import Settings


@pytest.fixture(scope="module")
def server() -> Server:
    return Server()


def photo() -> bytes:
    """A JPEG of 12 megapixels and about 6 MB."""
    image, file = Image.new("RGB", (4000, 3000)), io.BytesIO()
    image.paste(Image.frombytes("RGB", (4000, 2400), os.urandom(4000 * 2400 * 3)))
    image.save(file, "JPEG")
    return file.getvalue()


def minute() -> bytes:
    """A WAV file of a minute at 16 kHz."""
    head = struct.pack("<HHIIHH", 1, 1, 16_000, 32_000, 2, 16)
    size = 60 * 32_000
    return b"RIFF\0\0\0\0WAVEfmt " + struct.pack("<I", 16) + head + b"data" + struct.pack("<I", size) + bytes(size)


@pytest.mark.parametrize(("model", "file"), [("image", photo), ("audio", minute)])
def test_an_ordinary_file_is_answered_as_it_is_and_in_base64(server, model, file):
    content = file()
    assert server.post(f"/models/{model}", content) == 200
    in_json = json.dumps({"inputs": base64.b64encode(content).decode(), "parameters": {"top_k": 1}}).encode()
    assert server.post(f"/models/{model}", in_json) == 200


@pytest.mark.parametrize(
    ("path", "most"),
    [
        ("/", 2_000_000), ("/predict", 2_000_000), ("/models/tags", 2_000_000), ("/v2/models/text/infer", 2_000_000),
        ("/v1/completions", 2_000_000), ("/models/unknown", 2_000_000), ("/models/audio", 4_000_000),
        ("/models/image", 10_000_000), ("/v2/models/image/infer", 10_000_000),
    ],
)  # fmt: skip
def test_the_limit_is_that_of_what_the_model_reads(server, path, most):
    assert server.post(path, bytes(most)) != 413
    assert server.post(path, bytes(most + 1)) == 413
    assert server.post(path, b"", (b"content-length", b"%d" % (most + 1))) == 413


def test_a_limit_that_is_given_is_that_of_every_model():
    settings = Settings(max_body=100)
    assert {settings.body_limit(reads) for reads in ("text", "audio", "image")} == {100}
    assert Settings(max_body=0).body_limit("text") == 0
