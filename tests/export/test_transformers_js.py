"""Artifacts in transformers.js, under Node.js: the same answers without a line of Python."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile
from embedders import write_embedder
from tones import say
from whispers import write_whisper

import kdexport as package
from kdexport.pipeline.export_model import export

TESTS = Path(__file__).parents[1]
MODULES = TESTS.parent / ".node"


@pytest.fixture(scope="module")
def ask():
    if not (shutil.which("node") and (MODULES / "node_modules" / "@huggingface" / "transformers").is_dir()):
        pytest.skip("there is no transformers.js: make .node/.made installs it, with Node.js 20")

    def asked(task, folder, dtype, inputs):
        done = subprocess.run(
            ["node", TESTS / "transformers_js.mjs", task, folder, dtype, MODULES], input=json.dumps(inputs), text=True,
            capture_output=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return asked


@pytest.mark.parametrize("trimmed", [False, True])
def test_a_whisper_writes_the_same(ask, tmp_path, trimmed):
    sounds = [say("ab ca", seed, 16_000) for seed in range(3)]
    for i, sound in enumerate(sounds):
        (tmp_path / f"{i}.wav").write_bytes(sound)
    (tmp_path / "sounds.csv").write_text("audio\n0.wav\n1.wav\n2.wav\n")
    asked = {"vocabulary": "corpus", "data": tmp_path / "sounds.csv"} if trimmed else {}
    export(write_whisper(tmp_path / "model"), tmp_path / "whisper", variants="fp32,int8", **asked)
    samples = [soundfile.read(io.BytesIO(sound), dtype="float32")[0][:32_000].tolist() for sound in sounds]
    found = ask("automatic-speech-recognition", tmp_path / "whisper", "fp32", samples)
    expected = package.load(tmp_path / "whisper", "fp32").predict(sounds)
    for theirs, ours in zip(found, expected, strict=True):
        assert theirs["text"].strip().startswith(ours.text[:8])  # ours ends where a loop begins
    assert ask("automatic-speech-recognition", tmp_path / "whisper", "q8", samples[:1])[0].keys() == {"text"}


def test_an_embedder_gives_the_same_vectors(ask, tmp_path):
    texts = ["shares rose after the merger", "Über 5 € – a new phone", "a " * 100]
    export(write_embedder(tmp_path / "model"), tmp_path / "embedder", variants="fp32")
    found = ask("feature-extraction", tmp_path / "embedder", "fp32", texts)
    expected = package.load(tmp_path / "embedder").embed(texts)
    np.testing.assert_allclose(np.concatenate(found)[:2], expected[:2], atol=1e-5)
    assert np.shape(found) == (3, 1, 32)
