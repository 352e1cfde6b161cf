"""Speech recognition over HTTP and gRPC: Hugging Face's, OpenAI's and Triton's own clients, the page, and bad input."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import grpc
import httpx
import numpy as np
import openai
import pytest
import soundfile
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton
from fuzz import small
from huggingface_hub import InferenceClient, constants
from limits import begin_peak, cpu_seconds, memory_mb
from load_client import ask
from serve_process import served
from server import forget_sessions
from test_openapi import CONFIG, schemathesis
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub
from wire import ask as ask_raw
from wire import assert_refused

import kdexport as package
from kdexport.errors import DataError

RATE = 16_000
FORM = b"Content-Type: multipart/form-data; boundary=b"


def sound(seconds: float = 3.0, form: str = "WAV", channels: int = 1, seed: int = 0) -> bytes:
    """Three bursts of noise of other colours, with silence between them."""
    random, pieces = np.random.default_rng(seed), []
    for i in range(3):
        noise = np.cumsum(random.normal(0, 0.05, int(seconds * RATE / 5))) if i == 1 else random.normal(0, 0.1, 9_600)
        pieces += [noise.clip(-0.5, 0.5), np.zeros(int(seconds * RATE / 5))]
    samples = np.resize(np.concatenate(pieces), int(seconds * RATE))
    file = io.BytesIO()
    soundfile.write(file, np.repeat(samples[:, None], channels, axis=1), RATE, format=form)
    return file.getvalue()


SOUND = sound()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return small.pack(small.configs()["speech"], tmp_path_factory.mktemp("speech") / "speech")


@pytest.fixture(scope="module")
def server(artifact, tmp_path_factory):
    text = small.pack(small.configs()["text"], tmp_path_factory.mktemp("text") / "text")
    with served(f"speech={artifact}", f"text={text}", "--grpc-port", "0") as found:
        yield found
        assert not any('"code":500' in line or "Traceback" in line for line in found.log)


@pytest.fixture(scope="module")
def expected(artifact):
    (found,) = package.load(artifact).predict(SOUND)
    assert len(found.words) > 2, "the recording is to have several words"
    return found


@pytest.fixture
def hugging_face(server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    forget_sessions()
    yield InferenceClient(server.url)
    forget_sessions()


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def form(fields: list[tuple[str, bytes]], end: bytes = b"--b--\r\n") -> bytes:
    parts = [
        b'--b\r\nContent-Disposition: form-data; name="%b"; filename="x; name=y"\r\n\r\n%b\r\n' % (name.encode(), value)
        for name, value in fields
    ]
    return b"".join(parts) + end


GOOD = form([("file", SOUND), ("model", b"speech")])


# --- Hugging Face


def test_hugging_faces_client_gets_the_text(hugging_face, expected):
    found = hugging_face.automatic_speech_recognition(SOUND)
    assert (found.text, found.chunks) == (expected.text, None)
    found = hugging_face.automatic_speech_recognition(SOUND, extra_body={"return_timestamps": True})
    assert [chunk.text for chunk in found.chunks] == [word.word for word in expected.words]
    assert [tuple(chunk.timestamp) for chunk in found.chunks] == [(word.start, word.end) for word in expected.words]


@pytest.mark.parametrize("path", ["/", "/models/speech", "/predict", "/invocations"])
def test_every_path_of_files_answers_with_the_text_alone(server, expected, path):
    assert httpx.post(server.url + path, content=SOUND).json() == {"text": expected.text}
    inputs = {"inputs": base64.b64encode(SOUND).decode(), "parameters": {"return_timestamps": False}}
    assert httpx.post(server.url + path, json=inputs).json() == {"text": expected.text}


def test_parameters_of_labels_are_refused(server):
    for parameters in ({"top_k": 1}, {"return_timestamps": "char"}, {"generation_parameters": {"num_beams": 2}}):
        inputs = {"inputs": base64.b64encode(SOUND).decode(), "parameters": parameters}
        found = httpx.post(server.url, json=inputs)
        assert (found.status_code, next(iter(parameters)) in found.json()["error"]) == (422, True)


# --- OpenAI


def test_openais_client_gets_every_format(client, expected):
    create, asked = client.audio.transcriptions.create, {"file": ("a.wav", SOUND), "model": "speech"}
    found = create(**asked)
    assert (found.text, found.usage.type, found.usage.seconds) == (expected.text, "duration", 3.0)
    assert create(**asked, response_format="text") == f"{expected.text}\n"
    verbose = create(**asked, response_format="verbose_json", language="en", temperature=0)
    assert (verbose.text, verbose.language, verbose.duration) == (expected.text, "en", 3.0)
    assert " ".join(segment.text for segment in verbose.segments) == expected.text
    assert verbose.words is None
    assert verbose.segments[0].start == expected.words[0].start
    assert verbose.segments[-1].end == expected.words[-1].end
    assert np.exp(verbose.segments[0].avg_logprob) == pytest.approx(expected.score)
    words = create(**asked, response_format="verbose_json", timestamp_granularities=["word"])
    assert words.segments is None
    assert [(word.word, word.start, word.end) for word in words.words] == [
        (word.word, word.start, word.end) for word in expected.words
    ]
    both = create(**asked, response_format="verbose_json", timestamp_granularities=["word", "segment"])
    assert both.words
    assert both.segments == verbose.segments
    assert len(both.segments) > 1, "a pause ends a segment"
    srt, vtt = create(**asked, response_format="srt"), create(**asked, response_format="vtt")
    time = r"\d\d:\d\d:\d\d"
    assert [int(cue.split("\n")[0]) for cue in srt.split("\n\n")[:-1]] == [*range(1, len(verbose.segments) + 1)]
    assert re.match(rf"1\n{time},\d\d\d --> {time},\d\d\d\n{verbose.segments[0].text}\n\n2\n", srt)
    assert re.match(rf"WEBVTT\n\n{time}\.\d\d\d --> {time}\.\d\d\d\n{verbose.segments[0].text}\n\n", vtt)


def test_a_stream_has_a_delta_and_the_whole(client, expected):
    events = list(client.audio.transcriptions.create(file=("a.wav", SOUND), model="speech", stream=True))
    assert [event.type for event in events] == ["transcript.text.delta", "transcript.text.done"]
    assert (events[0].delta, events[1].text) == (expected.text, expected.text)


def test_the_types_of_responses(server):
    for given, kind in [
        ({}, "application/json"), ({"response_format": "text"}, "text/plain; charset=utf-8"),
        ({"response_format": "srt"}, "text/plain; charset=utf-8"), ({"stream": "true"}, "text/event-stream"),
        ({"response_format": "vtt"}, "text/vtt; charset=utf-8"),
    ]:  # fmt: skip
        found = httpx.post(
            f"{server.url}/v1/audio/transcriptions", data={"model": "speech"} | given, files={"file": SOUND}
        )
        assert (found.status_code, found.headers["content-type"]) == (200, kind)


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"model": "whisper-1"}, 404, "no such model"),
        ({"model": "text"}, 404, "text is for text-classification, and transcribes nothing"),
        ({"prompt": "Names: Ada."}, 422, 'prompt is not supported; it may be absent or ""'),
        ({"temperature": 0.5}, 422, "temperature is not supported; it may be absent or 0"),
        ({"temperature": "warm"}, 422, "temperature"),
        ({"response_format": "diarized_json"}, 422, "response_format"),
        ({"chunking_strategy": "auto"}, 422, "unknown field `chunking_strategy`"),
        ({"include": ["logprobs"]}, 422, "unknown field `include"),
        ({"timestamp_granularities": ["word"]}, 422, "is for the response_format verbose_json"),
        ({"stream": True, "response_format": "srt"}, 422, "response_format may be absent, json or text"),
        ({"file": ("a.wav", b"no sound")}, 422, "it is no sound file"),
        ({"file": ("a.wav", b"")}, 422, "it is empty"),
    ],
)
def test_what_would_have_no_effect_is_refused(client, change, status, said):
    with pytest.raises(openai.APIStatusError) as error:
        client.audio.transcriptions.create(**{"file": ("a.wav", SOUND), "model": "speech"} | change)
    assert error.value.status_code == status
    assert said in error.value.response.json()["error"]


def test_parameters_that_clients_always_send_are_taken(client, expected):
    given = {"language": "de", "prompt": "", "temperature": 0.0, "response_format": "json", "stream": False}
    assert client.audio.transcriptions.create(file=SOUND, model="speech", **given).text == expected.text


def test_recognisers_are_listed(client):
    assert [model.id for model in client.models.list()] == ["speech"]


def test_info_has_how_long_a_recording_may_be_and_no_labels(server):
    found = httpx.get(f"{server.url}/info").json()
    assert found.pop("version") == package.__version__
    assert re.fullmatch(r"[0-9a-f]{12}", found.pop("model_sha"))
    assert found == {
        "model_id": "speech", "model_dtype": "fp32", "model_pipeline_tag": "automatic-speech-recognition",
        "max_input_seconds": 4.995, "sampling_rate": RATE, "max_client_batch_size": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("body", "header", "status"),
    [
        (GOOD, b"Content-Type: application/json", 415),
        (GOOD, b"Content-Type: multipart/form-data", 415),
        (GOOD, b"Content-Type: multipart/form-data; boundary=" + b"b" * 71, 415),
        (GOOD, b"Content-Type: multipart/form-data; boundary=other", 400),
        (GOOD.removesuffix(b"--b--\r\n"), FORM, 400),
        (GOOD[:20_000], FORM, 400),
        (form([("model", b"speech")]), FORM, 422),
        (form([("file", SOUND)]), FORM, 422),
        (form([]), FORM, 422),
        (b"", FORM, 400),
        (form([("model", b"speech\xff"), ("file", SOUND)]), FORM, 400),
        (form([(f"a{i}", b"x") for i in range(100)]), FORM, 400),
        (form([("x" * 5_000, b"x"), ("model", b"speech"), ("file", SOUND)]), FORM, 400),
        (b"--b\r\n\r\nvalue\r\n--b--", FORM, 400),
        (b"--b\r\nContent-Disposition: form-data; name=file\r\n--b--", FORM, 400),
        (
            b"--b\r\nContent-Disposition: form-data; name=file\r\nContent-Transfer-Encoding: 7bit\r\n\r\n\r\n--b--",
            FORM,
            400,
        ),
        (b"--b" * 500_000, FORM, 422),
        (b"\r\n--b" * 500_000, FORM, 400),
    ],
)
def test_forms_that_are_none_are_refused_in_a_line(server, body, header, status):
    assert_refused(ask_raw(server.url, "/v1/audio/transcriptions", body, header), status)


@pytest.mark.parametrize(
    "header", [FORM, b'Content-Type: Multipart/Form-Data; charset=utf-8; boundary="b"', FORM + b"; charset=utf-8"]
)
def test_forms_may_be_written_in_other_ways(server, expected, header):
    inside = SOUND + b"\r\n--not the boundary"  # what follows a WAV file's samples is not read
    body = b"a preamble\r\n" + form([("model", b"speech"), ("file", inside)], b"--b--\r\nan epilogue")
    found = ask_raw(server.url, "/v1/audio/transcriptions", body, header)
    assert (found.status, found.json["text"]) == (200, expected.text)
    plain = body.replace(b'"model"; filename="x; name=y"', b"model").replace(b'"file"', b"file")
    assert ask_raw(server.url, "/v1/audio/transcriptions", plain, header).json["text"] == expected.text


# --- recordings


@cache
def broken() -> dict[str, tuple[bytes, int, str]]:
    """Recordings that can't be recognised, with the status and a part of the reason."""
    flac = sound(form="FLAC")
    return {
        "nothing": (b"", 422, "it is empty"),
        "no samples": (sound(0), 422, "it holds no sound"),
        "a header alone": (flac[:50], 422, "it is no sound that can be read"),
        "half a file": (flac[: len(flac) // 2], 422, "it is no sound that can be read"),
        "ten minutes": (sound(600)[:3_000_000], 413, "it lasts"),
        "longer than the model reads": (sound(5.5), 413, "it lasts 5.5 s; the model reads 5.0"),
        "a video": (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(5_000), 422, "it is no sound file"),
        "WebM": (b"\x1a\x45\xdf\xa3" + bytes(5_000), 422, "it is no sound file"),
        "25 MB": (bytes(25_000_000), 413, "the body has more than 4,000,000 bytes"),
        "1,000,003 Hz": (rate(1_000_003), 413, "it has 1,000,003 samples a second; at most 384,000 are read"),
        "0 Hz": (rate(0), 422, "it is no sound that can be read"),
        "1 Hz": (rate(1), 413, "it lasts 48,000 s; at most 120 are read"),
    }


def rate(hertz: int) -> bytes:
    """A WAV file whose header has another rate."""
    return SOUND[:24] + hertz.to_bytes(4, "little") + SOUND[28:]


@pytest.mark.parametrize("kind", broken())
def test_bad_recordings_are_refused_in_a_line_on_every_path(server, kind):
    content, status, said = broken()[kind]
    before, began = begin_peak(server.process.pid), cpu_seconds(server.process.pid)
    for path, body, header in (
        ("/models/speech", content, b"Content-Type: audio/wav"),
        ("/v1/audio/transcriptions", form([("model", b"speech"), ("file", content)]), FORM),
    ):
        found = ask_raw(server.url, path, body, header)
        assert_refused(found, status)
        assert said in found.json["error"]
        assert "\n" not in found.json["error"]
    assert memory_mb(server.process.pid) - before < 40
    assert cpu_seconds(server.process.pid) - began < 1


@pytest.mark.parametrize("kind", broken())
def test_bad_recordings_are_named_in_a_line_by_predict(artifact, kind, tmp_path):
    content, _, said = broken()[kind]
    (tmp_path / "bad.wav").write_bytes(content)
    with pytest.raises(DataError) as error:
        package.load(artifact).predict([tmp_path / "bad.wav"])
    wanted = "it is no sound file" if kind == "25 MB" else said
    assert str(error.value).startswith(f"{tmp_path / 'bad.wav'} {wanted.removeprefix('it ')}")
    assert "\n" not in str(error.value)


def test_odd_recordings_are_answered(server):
    noise = io.BytesIO()
    soundfile.write(noise, np.random.default_rng(0).uniform(-1, 1, 4 * RATE), RATE, format="WAV")
    for content in (
        sound(4.9),
        sound(0.001),
        sound(channels=8),
        sound(form="FLAC"),
        sound(form="OGG"),
        noise.getvalue(),
    ):
        found = httpx.post(f"{server.url}/models/speech", content=content)
        assert (found.status_code, list(found.json())) == (200, ["text"])
    silence = io.BytesIO()
    soundfile.write(silence, np.zeros(RATE), RATE, format="WAV")
    assert httpx.post(f"{server.url}/models/speech", content=silence.getvalue()).json() == {"text": ""}
    given = {"data": {"model": "speech", "response_format": "verbose_json"}, "files": {"file": silence.getvalue()}}
    found = httpx.post(f"{server.url}/v1/audio/transcriptions", **given).json()
    assert (found["text"], found["segments"], found["duration"]) == ("", [], 1.0)


def test_recordings_at_once_are_answered_as_alone(server):
    recordings = [sound(0.5 + i / 4, seed=i) for i in range(16)]
    alone = [httpx.post(server.url, content=content).json()["text"] for content in recordings]
    with ThreadPoolExecutor(16) as threads:
        found = threads.map(lambda content: httpx.post(server.url, content=content).json()["text"], recordings * 4)
        assert list(found) == alone * 4


# --- the Open Inference Protocol


def test_tritons_client_gives_features_or_files_and_gets_text_and_logits(server, artifact, expected):
    model = package.load(artifact)
    arrays = model.task.encode([{"audio": SOUND}])["input_values"]
    with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
        found = client.get_model_metadata("speech")
        assert found["inputs"] == [
            {"name": "input_values", "datatype": "FP32", "shape": [-1, -1, 40]},
            {"name": "audio", "datatype": "BYTES", "shape": [1]},
        ]
        assert found["outputs"] == [
            {"name": "text", "datatype": "BYTES", "shape": [-1]},
            {"name": "logits", "datatype": "FP32", "shape": [-1, -1, len(model.task.labels)]},
        ]
        features = triton.InferInput("input_values", list(arrays.shape), "FP32").set_data_from_numpy(arrays)
        # As numpy objects the client writes bytes as they are.
        file = triton.InferInput("audio", [1], "BYTES").set_data_from_numpy(np.array([SOUND], dtype=np.object_))
        for given in (features, file):
            got = client.infer("speech", [given])
            assert [text.decode() for text in got.as_numpy("text")] == [expected.text]
            np.testing.assert_allclose(got.as_numpy("logits"), model.logits([{"audio": SOUND}]), atol=1e-4)
        best = client.infer("speech", [file], outputs=[triton.InferRequestedOutput("logits", class_count=1)])
        assert best.as_numpy("logits").shape == (1, 498, 1)
        for shape in ([1, 499, 40], [1, 10, 39], [1, 40], [300, 1, 40]):
            wrong = triton.InferInput("input_values", shape, "FP32").set_data_from_numpy(np.zeros(shape, np.float32))
            with pytest.raises(triton.InferenceServerException, match=r"must have the shape \[1…256, 1…498, 40\]"):
                client.infer("speech", [wrong])
        bad = triton.InferInput("audio", [1], "BYTES").set_data_from_numpy(np.array([b"\xff"], dtype=np.object_))
        with pytest.raises(triton.InferenceServerException, match="it is no sound file"):
            client.infer("speech", [bad])
        two = triton.InferInput("audio", [2], "BYTES").set_data_from_numpy(np.array([SOUND] * 2, dtype=np.object_))
        for several in ([features, file], [two]):
            with pytest.raises(triton.InferenceServerException, match="is one file, and the only input"):
                client.infer("speech", several)
        with pytest.raises(triton.InferenceServerException, match="the outputs are text, logits"):
            client.infer("speech", [file], outputs=[triton.InferRequestedOutput("label")])


def test_base64_that_is_none_is_refused(server):
    tensor = {"name": "audio", "shape": [1], "datatype": "BYTES", "data": ["no base64!"]}
    status, found, *_ = ask(f"{server.url}/v2/models/speech/infer", {"inputs": [tensor]})
    assert (status, found["error"]) == (400, "the file of input audio is not base64")


def test_grpc_takes_files_raw_or_in_base64(server, expected):
    address = re.search(r"gRPC on (\S+)", "".join(server.log))[1]
    with triton_grpc.InferenceServerClient(address) as client:
        file = triton_grpc.InferInput("audio", [1], "BYTES")
        got = client.infer("speech", [file.set_data_from_numpy(np.array([SOUND], dtype=np.object_))])
        assert got.as_numpy("text").tolist() == [expected.text.encode()]
        bad = file.set_data_from_numpy(np.array([b"\xff"], dtype=np.object_))
        with pytest.raises(triton.InferenceServerException, match=r"INVALID_ARGUMENT.*it is no sound file"):
            client.infer("speech", [bad])
    with grpc.insecure_channel(address) as channel:
        call = pb.ModelInferRequest(model_name="speech")
        tensor = call.inputs.add(name="audio", datatype="BYTES", shape=[1])
        tensor.contents.bytes_contents.append(base64.b64encode(SOUND))
        found = GRPCInferenceServiceStub(channel).ModelInfer(call)
    assert found.outputs[0].contents.bytes_contents == [expected.text.encode()]


# --- the document and the page


def test_the_document_is_that_of_recognisers(server, artifact):
    with served(f"speech={artifact}") as alone:
        found = httpx.get(f"{alone.url}/openapi.json").json()
    body = found["paths"]["/"]["post"]["requestBody"]["content"]
    assert {"audio/*", "application/octet-stream", "application/json"} == set(body)
    assert found["components"]["schemas"]["RequestedOutput"]["properties"]["name"] == {"enum": ["text", "logits"]}
    assert found["components"]["schemas"]["TranscriptionRequest"]["properties"]["model"] == {"enum": ["speech"]}
    assert not re.findall(r'"\$(?!ref")[^"]*"', json.dumps(found))


@pytest.mark.slow
def test_schemathesis_finds_nothing(artifact, tmp_path):
    # JSON Schema can't say which bytes are sound.
    config = tmp_path / "schemathesis.toml"
    config.write_text(CONFIG.read_text().replace('["200", "404"]', '["200", "404", "422"]'))
    phases = ("--phases", "examples,coverage,fuzzing", "--max-examples", "25")
    with served(f"speech={artifact}") as server:
        found = schemathesis(server.url, tmp_path, *phases, config=config)
        assert not any('"code":500' in line for line in server.log)
    assert found.returncode == 0, found.stdout


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="this machine has no Chromium: apt-get install chromium")
def test_the_page_transcribes_a_file_and_what_a_microphone_hears(artifact, expected, tmp_path):
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import sync_playwright

    quiet = ["--no-sandbox", "--disable-gpu", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    (tmp_path / "a.wav").write_bytes(SOUND)
    (tmp_path / "a.txt").write_bytes(b"no sound")
    said: list[str] = []
    with served(f"speech={artifact}") as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=quiet)
        page = browser.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(server.url)
        status, text = page.get_by_role("status"), page.locator("#speech-written")
        assert "automatic-speech-recognition: an audio in, its text out" in page.locator(".verdict").inner_text()
        page.get_by_label("A recording").set_input_files(tmp_path / "a.wav")
        page.get_by_role("button", name="Transcribe").click()
        status.get_by_text("Heard by speech in").wait_for()
        assert text.inner_text() == expected.text
        page.get_by_label("A recording").set_input_files(tmp_path / "a.txt")
        page.get_by_role("button", name="Transcribe").click()
        status.get_by_text("Error 422").wait_for()
        assert "it is no sound file" in status.inner_text()
        assert text.inner_text() == ""
        page.get_by_role("button", name="Record", exact=True).click()
        status.get_by_text("Recording, for 5.0 s at most").wait_for()
        with page.expect_response(lambda response: response.request.method == "POST") as answer:
            page.wait_for_timeout(1500)  # it beeps now and then
            page.get_by_role("button", name="Stop").click()
        sent = answer.value.request.post_data_buffer
        assert (answer.value.status, sent[:4]) == (200, b"RIFF")
        samples, rate = soundfile.read(io.BytesIO(sent))
        assert (rate, samples.ndim) == (RATE, 1)
        assert np.abs(samples).max() > 0.01, "the fake microphone beeps"
        status.get_by_text("eard by speech in").wait_for()
        page.get_by_role("button", name="Record", exact=True).wait_for()
        browser.close()
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=quiet[:2])
        page = browser.new_page(bypass_csp=True)  # axe puts a script into the page
        page.goto(server.url)
        found = Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21aa", "wcag22aa", "best-practice"]})
        assert [rule["id"] for rule in found.response["violations"]] == []
        browser.close()
    assert [line for line in said if not line.startswith("Failed to load resource")] == []


@pytest.mark.skipif(CHROMIUM is None, reason="this machine has no Chromium: apt-get install chromium")
def test_beside_a_model_of_texts_each_has_its_own_form(server, expected, tmp_path):
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import sync_playwright

    (tmp_path / "a.wav").write_bytes(SOUND)
    said: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(server.url)
        texts, speech = page.get_by_role("region", name="Try it: texts"), page.get_by_role("region", name=": speech")
        assert texts.get_by_role("radio").evaluate_all("all => all.map((one) => one.value)") == ["models/text"]
        assert speech.locator("option").all_inner_texts() == ["speech"]
        texts.get_by_role("button", name="Classify").click()
        texts.get_by_text("answered by text in").wait_for()
        speech.get_by_label("A recording").set_input_files(tmp_path / "a.wav")
        speech.get_by_role("button", name="Transcribe").click()
        speech.get_by_text("Heard by speech in").wait_for()
        assert speech.locator("#speech-written").inner_text() == expected.text
        assert page.get_by_role("heading", name="Model card of").all_inner_texts() == [
            "Model card of speech",
            "Model card of text",
        ]
        page = browser.new_page(bypass_csp=True, viewport={"width": 400, "height": 900})
        page.goto(server.url)
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        found = Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21aa", "wcag22aa", "best-practice"]})
        assert [rule["id"] for rule in found.response["violations"]] == []
        browser.close()
    assert said == []


# --- the command line


def test_predict_prints_a_line_for_each_recording(kdexport, artifact, expected, tmp_path):
    (tmp_path / "a.wav").write_bytes(SOUND)
    done = kdexport("predict", artifact, tmp_path / "a.wav", "--scores")
    (line,) = map(json.loads, done.stdout.splitlines())
    assert (line["audio"], line["text"]) == (str(tmp_path / "a.wav"), expected.text)
    assert [word["word"] for word in line["words"]] == [word.word for word in expected.words]
    (tmp_path / "b.mp4").write_bytes(b"\0\0\0\x20ftypisom")
    done = kdexport("predict", artifact, tmp_path / "b.mp4")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)


def test_listed_words_are_the_only_ones_that_are_written(kdexport, artifact, expected, tmp_path):
    (tmp_path / "a.wav").write_bytes(SOUND)
    (tmp_path / "words.txt").write_text("Sonar station\nrest\n")
    listed = {"sonar", "station", "rest"}
    assert not {*expected.text.split()} <= listed
    (found,) = package.load(artifact, words=["Sonar station", "rest"]).predict(SOUND)
    assert found.text
    assert {*found.text.split()} <= listed
    assert " ".join(word.word for word in found.words) == found.text
    assert 0 < found.score < expected.score
    done = kdexport("predict", artifact, tmp_path / "a.wav", "--words", tmp_path / "words.txt")
    assert json.loads(done.stdout)["text"] == found.text


def test_words_that_can_not_be_used_are_refused_in_a_line(kdexport, artifact, tmp_path):
    text = small.pack(small.configs()["text"], tmp_path / "text")
    with pytest.raises(DataError, match="a list of words is of speech recognition; this model is for text-class"):
        package.load(text, words=["one"])
    for name, content, said in [
        ("digits.txt", "7up", "the word '7up' has '7', which the model does not write"),
        ("empty.txt", "\n", "holds no word"),
        ("table.csv", "word\nrest\n", "Write one a line, or in a column named text"),
        ("nowhere.txt", None, "nowhere.txt does not exist"),
    ]:
        if content is not None:
            (tmp_path / name).write_text(content)
        done = kdexport("predict", artifact, "a.wav", "--words", tmp_path / name)
        assert (done.returncode, said in done.stderr, done.stderr.count("\n")) == (2, True, 1), done.stderr
