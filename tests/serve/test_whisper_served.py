"""A recogniser that writes behind the server: OpenAI's client, long recordings, and many at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
from serve_process import served
from tones import wav
from whispers import write_whisper

import kdexport as package
from kdexport.pipeline.export_model import export


def sound(seconds: float, seed: int) -> bytes:
    random, times = np.random.default_rng(seed), np.arange(int(seconds * 16_000)) / 16_000
    tones = sum(np.sin(2 * np.pi * random.uniform(80, 2000) * times) for _ in range(4))
    return wav((0.1 * tones).tolist(), 16_000)


SOUNDS = [sound(seconds, seed) for seed, seconds in enumerate((0.5, 1.5, 4.0, 1.0))]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whisper")
    export(write_whisper(folder / "model"), folder / "artifact", variants="fp32,int8")
    return folder / "artifact"


@pytest.fixture(scope="module")
def client(artifact):
    with served(f"whisper={artifact}:fp32") as found:
        with openai.OpenAI(base_url=f"{found.url}/v1", api_key="none", max_retries=6) as client:  # it sheds load
            yield client
        assert not any('"code":500' in line or "Traceback" in line for line in found.log)


def test_openais_client_gets_what_predict_gives_however_many_ask(client, artifact):
    expected = [found.text for found in package.load(artifact, "fp32").predict(SOUNDS)]
    ask = client.audio.transcriptions.create

    def text(content: bytes) -> str:
        return ask(model="whisper", file=("a.wav", content)).text

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(text, SOUNDS * 4)) == expected * 4


def test_a_text_without_times_is_one_segment(client):
    ask = client.audio.transcriptions.create
    found = ask(model="whisper", file=("a.wav", SOUNDS[2]), response_format="verbose_json")
    assert [(one.start, one.end, one.text) for one in found.segments] == [(0.0, 4.0, found.text)]
    assert ask(model="whisper", file=("a.wav", SOUNDS[2]), response_format="srt").startswith(
        "1\n00:00:00,000 --> 00:00:04,000\n"
    )


def test_much_longer_recordings_are_refused(client):
    with pytest.raises(openai.APIStatusError, match="413"):
        client.audio.transcriptions.create(model="whisper", file=("a.wav", sound(125, 0)))
