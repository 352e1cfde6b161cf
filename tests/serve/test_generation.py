"""A language model behind the server: Hugging Face's and Triton's clients, OpenAI's protocol, streams cut short."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from huggingface_hub import AsyncInferenceClient, InferenceClient, constants
from huggingface_hub.errors import HfHubHTTPError
from serve_process import served
from server import forget_sessions
from test_openapi import ALL_SELECTED, schemathesis
from wire import Wire, request

from kdexport import load, spec
from kdexport.export import export_student
from kdexport.files import write_json
from kdexport.runtime import artifact
from kdexport.runtime.generation import Sampling, write
from kdexport.runtime.predictor import golden_answers
from kdexport.tasks import load_task
from kdexport.tasks.config import TaskConfig

LINES = ["To be, or not to be, that is the question:", "Whether 'tis nobler in the mind to suffer", "Ünïcode: naïve"]
PROMPT = "To be, or"
READS = 1024


def packed(model, task: TaskConfig, folder):
    """A model with random weights and a tokenizer of a few lines, exported and packed."""
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(LINES, vocab_size=300, min_frequency=1, special_tokens=["<end>"])
    if task.task != "causal-lm":  # classifiers read the first token
        tokenizer._tokenizer.post_processor = TemplateProcessing("<end> $A", special_tokens=[("<end>", 0)])
    student, graphs, out = (folder / name for name in ("student", "graphs", "artifact"))
    for made in (student, graphs, out):
        made.mkdir()
    model.save_pretrained(student)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<end>").save_pretrained(student)
    write_json(student / "task.json", task)
    export_student(spec.Export(variants=["fp32"]), student, graphs)
    file = graphs / "model.onnx"
    golden = golden_answers(load_task(student), {"fp32": file})
    artifact.pack(student, {"fp32": (file, "plain")}, "fp32", {"by": "a test"}, out, golden)
    return out


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    # Weights larger than usual: which token is most probable then depends on what stands before.
    config = GPT2Config(
        vocab_size=300, n_positions=READS, n_embd=32, n_layer=2, n_head=2, initializer_range=0.5, eos_token_id=0
    )
    inputs = ["input_ids", "attention_mask"]
    task = TaskConfig(task="causal-lm", labels=[], inputs=inputs, max_length=READS, function="none", kept=1, end_id=0)
    return packed(GPT2LMHeadModel(config), task, tmp_path_factory.mktemp("language"))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=2
    )
    inputs = ["input_ids", "attention_mask", "token_type_ids"]
    task = TaskConfig(task="text-classification", labels=["no", "yes"], inputs=inputs, max_length=32)
    return packed(BertForSequenceClassification(config), task, tmp_path_factory.mktemp("classes"))


@pytest.fixture(scope="module")
def server(language_model):
    with served(f"lm={language_model}") as found:
        yield found


@pytest.fixture(scope="module")
def model(language_model):
    return load(language_model, threads=1)


@pytest.fixture
def client(server, monkeypatch):
    """Hugging Face's own; it refuses to talk to anyone while HF_HUB_OFFLINE is set."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    forget_sessions()
    yield InferenceClient(server.url)
    forget_sessions()


def metric(server, name):
    text = httpx.get(f"{server.admin}/metrics").text
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE))


def until(condition):
    ends = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.02)


def events(response):
    """What a stream of server-sent events holds."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


# --- Hugging Face


@pytest.mark.parametrize("text", [PROMPT, "", "naïve 你好", "word " * 3000])
def test_hugging_faces_client_gets_what_the_model_writes(client, model, text):
    expected = write(model, text, Sampling(max_new_tokens=20)).completion
    assert expected
    assert client.text_generation(text, max_new_tokens=20) == expected
    assert "".join(client.text_generation(text, max_new_tokens=20, stream=True)) == expected
    assert client.text_generation(text, max_new_tokens=20, return_full_text=True) == text + expected
    assert (
        client.text_generation(text, max_new_tokens=20, do_sample=False, model=f"{client.model}/models/lm") == expected
    )


def test_details_say_what_every_token_was(client, model):
    expected = write(model, PROMPT, Sampling(max_new_tokens=12, temperature=1.0, seed=7))
    how = {"max_new_tokens": 12, "do_sample": True, "seed": 7, "details": True}
    found = client.text_generation(PROMPT, **how)
    details = found.details
    assert found.generated_text == expected.completion
    assert (details.finish_reason, details.generated_tokens, details.seed) == ("length", 12, 7)
    assert "".join(token.text for token in details.tokens) == expected.completion
    assert all(token.logprob <= 0 and not token.special for token in details.tokens)
    streamed = list(client.text_generation(PROMPT, stream=True, **how))
    assert [vars(one.token) for one in streamed] == [vars(token) for token in details.tokens]
    assert [one.index for one in streamed] == list(range(12))
    assert all(one.details is None and one.generated_text is None for one in streamed[:-1])
    last = streamed[-1]
    assert last.generated_text == expected.completion
    assert (last.details.finish_reason, last.details.generated_tokens) == ("length", 12)
    assert last.details.input_length == expected.prompt_tokens


def test_sampling_is_what_was_asked_for(client, model):
    greedy = write(model, PROMPT, Sampling(max_new_tokens=16)).completion
    assert client.text_generation(PROMPT, max_new_tokens=16, top_p=0.9) == greedy
    assert client.text_generation(PROMPT, max_new_tokens=16, temperature=0.9, top_k=1) == greedy
    assert client.text_generation(PROMPT, max_new_tokens=16, temperature=1e-300) == greedy
    how = Sampling(max_new_tokens=16, temperature=0.9, top_k=20, top_p=0.8, seed=3)
    given = {"max_new_tokens": 16, "temperature": 0.9, "top_k": 20, "top_p": 0.8, "seed": 3}
    assert client.text_generation(PROMPT, **given) == write(model, PROMPT, how).completion
    drawn = {client.text_generation(PROMPT, max_new_tokens=16, do_sample=True) for _ in range(5)}
    assert len(drawn) > 1


def test_a_text_that_stops_is_left_out(client, model):
    whole = write(model, PROMPT, Sampling(max_new_tokens=30)).completion
    stop = whole[10:13]
    found = client.text_generation(PROMPT, max_new_tokens=30, stop=[stop, "never there"], details=True)
    assert found.generated_text == whole[: whole.index(stop)]
    assert found.details.finish_reason == "stop_sequence"
    assert "".join(client.text_generation(PROMPT, max_new_tokens=30, stop=[stop], stream=True)) == found.generated_text


def test_what_is_not_done_here_is_refused_in_one_line(client):
    for parameters, said in [
        ({"best_of": 2}, "best_of is not supported; it may be absent or 1"),
        ({"repetition_penalty": 1.2}, "repetition_penalty is not supported; it may be absent or 1"),
        ({"watermark": True}, "watermark is not supported; it may be absent or false"),
        ({"typical_p": 0.9}, "typical_p is not supported"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": READS}, f"the model writes at most {READS - 1} tokens; {READS} are asked for"),
        ({"temperature": -0.5}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"stop": [""]}, "stop"),
    ]:
        for stream in (False, True):
            with pytest.raises(HfHubHTTPError, match=re.escape(said)) as error:
                list(client.text_generation(PROMPT, stream=stream, **parameters))
            assert error.value.response.status_code == 422
            assert list(error.value.response.json()) == ["error"]
    neutral = {"best_of": 1, "repetition_penalty": 1.0, "watermark": False, "truncate": None}
    assert client.text_generation(PROMPT, max_new_tokens=3, **neutral)


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({}, 422, "`inputs`"),
        ({"inputs": [PROMPT]}, 422, "Expected `str`"),
        ({"inputs": PROMPT, "parameters": {"max_tokens": 3}}, 422, "unknown field `max_tokens`"),
        ({"inputs": PROMPT, "options": {}}, 422, "unknown field `options`"),
        ({"inputs": "x" * 100_001}, 413, "100,000 characters"),
    ],
)
def test_bodies_that_are_not_understood(server, body, status, said):
    found = httpx.post(server.url, json=body)
    assert found.status_code == status
    assert said in found.json()["error"]


@pytest.mark.usefixtures("client")
def test_its_asynchronous_client_gets_a_stream_too(server, model):
    async def ask():
        async with AsyncInferenceClient(server.url) as client:
            stream = await client.text_generation(PROMPT, max_new_tokens=20, stream=True)
            return "".join([text async for text in stream])

    assert asyncio.run(ask()) == write(model, PROMPT, Sampling(max_new_tokens=20)).completion


def test_a_key_is_needed_where_there_are_some(language_model):
    with served(f"lm={language_model}", KDEXPORT_API_KEYS="a-key") as server:
        for path in ("/", "/v1/completions"):
            assert httpx.post(server.url + path, json={"inputs": PROMPT}).status_code == 401
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        key = {"Authorization": "Bearer a-key"}
        assert httpx.get(f"{server.url}/v1/models", headers=key).json()["data"][0]["id"] == "lm"
        asked = {"model": "lm", "prompt": PROMPT, "max_tokens": 2}
        assert httpx.post(f"{server.url}/v1/completions", json=asked, headers=key).status_code == 200


# --- OpenAI


def test_completions_are_answered_at_once_and_as_they_come(server, model):
    expected = write(model, PROMPT, Sampling(max_new_tokens=10))
    asked = {"model": "lm", "prompt": PROMPT, "max_tokens": 10, "temperature": 0, "user": "someone", "n": 1}
    found = httpx.post(f"{server.url}/v1/completions", json=asked).json()
    assert found["object"] == "text_completion"
    assert found["model"] == "lm"
    choice = {"text": expected.completion, "index": 0, "logprobs": None, "finish_reason": "length"}
    assert found["choices"] == [choice]
    usage = {"prompt_tokens": expected.prompt_tokens, "completion_tokens": 10}
    assert found["usage"] == usage | {"total_tokens": 10 + expected.prompt_tokens}
    streaming = {"stream": True, "stream_options": {"include_usage": True}}
    response = httpx.post(f"{server.url}/v1/completions", json=asked | streaming)
    assert response.headers["content-type"] == "text/event-stream"
    *parts, last = events(response)
    assert last == "[DONE]"
    *parts, counted = map(json.loads, parts)
    assert "".join(part["choices"][0]["text"] for part in parts) == expected.completion
    assert [part["choices"][0]["finish_reason"] for part in parts] == [None] * 9 + ["length"]
    assert (counted["choices"], counted["usage"]) == ([], found["usage"])
    assert len({part["id"] for part in parts}) == 1


def test_completions_stop_and_are_drawn_as_openai_has_it(server, model):
    how = Sampling(max_new_tokens=16, temperature=1.0, seed=5)
    asked = {"model": "lm", "prompt": PROMPT, "seed": 5}
    whole = write(model, PROMPT, how).completion
    assert httpx.post(f"{server.url}/v1/completions", json=asked).json()["choices"][0]["text"] == whole
    (choice,) = httpx.post(f"{server.url}/v1/completions", json=asked | {"stop": whole[4:6]}).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == (whole[: whole.index(whole[4:6])], "stop")


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"model": "gpt-9"}, 404, "no such model"),
        ({"prompt": None}, 422, "prompt"),
        ({"prompt": ["a", "b"]}, 422, "prompt"),
        ({"n": 2}, 422, "n is not supported; it may be absent or 1"),
        ({"echo": True}, 422, "echo is not supported"),
        ({"logprobs": 5}, 422, "logprobs is not supported; it may be absent"),
        ({"stop": ""}, 422, "stop"),
        ({"max_tokens": 5000}, 422, "at most 1023"),
        ({"messages": []}, 422, "unknown field `messages`"),
    ],
)
def test_completions_that_are_refused(server, change, status, said):
    found = httpx.post(f"{server.url}/v1/completions", json={"model": "lm", "prompt": PROMPT} | change)
    assert found.status_code == status
    assert said in found.json()["error"]


@pytest.mark.usefixtures("client")
def test_models_and_info_are_told(server):
    (entry,) = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert (entry["id"], entry["object"]) == ("lm", "model")
    info = InferenceClient(server.url, provider="hf-inference").get_endpoint_info()
    assert (info["model_id"], info["model_pipeline_tag"]) == ("lm", "text-generation")
    assert info["max_total_tokens"] == READS


# --- the Open Inference Protocol


def test_tritons_client_gives_texts_and_gets_texts(server, model):
    texts = [PROMPT, "naïve", "x"]
    expected = [write(model, text, Sampling(max_new_tokens=8)).completion for text in texts]
    with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
        found = client.get_model_metadata("lm")
        assert found["inputs"] == found["outputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1]}]
        given = np.array([text.encode() for text in texts], dtype=np.object_)
        tensor = triton.InferInput("text", [3], "BYTES").set_data_from_numpy(given)
        got = client.infer("lm", [tensor], parameters={"max_new_tokens": 8})
        assert [text.decode() for text in got.as_numpy("text")] == expected
        for parameters, said in [
            ({"max_new_tokens": 0}, "max_new_tokens"),
            ({"max_new_tokens": READS}, "at most"),
            ({"best_of": 2}, "unknown field `best_of`"),
            ({"stop": ""}, "stop"),
        ]:
            with pytest.raises(triton.InferenceServerException, match=said):
                client.infer("lm", [tensor], parameters=parameters)
        ids = triton.InferInput("input_ids", [1, 3], "INT64").set_data_from_numpy(np.ones((1, 3), np.int64))
        with pytest.raises(triton.InferenceServerException, match="the input is `text`"):
            client.infer("lm", [ids])
        with pytest.raises(triton.InferenceServerException, match="the output is text"):
            client.infer("lm", [tensor], outputs=[triton.InferRequestedOutput("logits")])


def test_grpc_gives_the_same(language_model, model):
    import tritonclient.grpc as grpc

    with served(f"lm={language_model}", "--grpc-port", "0") as server:
        (address,) = [found[1] for line in server.log if (found := re.search(r"gRPC on (\S+)", line))]
        with grpc.InferenceServerClient(address) as client:
            assert client.get_model_metadata("lm").outputs[0].name == "text"
            tensor = grpc.InferInput("text", [1], "BYTES")
            tensor.set_data_from_numpy(np.array([PROMPT.encode()], dtype=np.object_))
            got = client.infer("lm", [tensor], parameters={"max_new_tokens": 8})
    assert got.as_numpy("text")[0].decode() == write(model, PROMPT, Sampling(max_new_tokens=8)).completion


# --- other kinds of models


def test_each_kind_of_model_refuses_what_the_other_does(language_model, classifier, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with served(f"lm={language_model}", f"classes={classifier}") as server:
        ask = httpx.Client(base_url=server.url)
        found = ask.post("/predict", json={"inputs": PROMPT})
        assert (found.status_code, found.json()) == (404, {"error": "lm is for causal-lm; POST / answers for it"})
        found = ask.post("/", json={"inputs": {"text": PROMPT, "text_pair": "b"}})
        assert found.status_code == 422
        found = ask.post("/v1/completions", json={"model": "classes", "prompt": PROMPT})
        assert found.status_code == 404
        assert found.json() == {"error": "classes is for text-classification, and writes nothing"}
        classes = f"{server.url}/models/classes"
        for stream in (False, True):
            with pytest.raises(HfHubHTTPError, match="no language model"):
                list(InferenceClient(classes).text_generation(PROMPT, stream=stream))
        assert {one.label for one in InferenceClient(classes).text_classification(PROMPT)} == {"no", "yes"}
        assert InferenceClient(server.url).text_generation(PROMPT, max_new_tokens=3)
        assert ask.post("/invocations", json={"inputs": PROMPT, "parameters": {"max_new_tokens": 3}}).status_code == 200
        assert [entry["id"] for entry in ask.get("/v1/models").json()["data"]] == ["lm"]
        paths = ask.get("/openapi.json").json()["paths"]
        body = paths["/models/{name}"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        requests = [one["$ref"].rsplit("/")[-1] for one in body["anyOf"]]
        assert requests[:4] == ["ClassifyRequest", "TagRequest", "WriteRequest", "TranscribeRequest"]
        assert requests[4:] == ["FeatureRequest"]
        assert ask.get("/").status_code == 200


@pytest.mark.slow
def test_schemathesis_finds_nothing_in_a_language_model(language_model, tmp_path):
    with served(f"lm={language_model}", "--threads", "2") as server:
        phases = ("--phases", "examples,coverage,fuzzing", "--max-examples", "15")
        found = schemathesis(server.url, tmp_path, *phases)
        assert not any('"code":500' in line for line in server.log)
    assert found.returncode == 0, found.stdout
    assert ALL_SELECTED in found.stdout


# --- many at once, and those that leave


def test_many_at_once_get_each_their_own(client, model):
    prompts = [f"{line[:i]}" for line in LINES for i in range(4, 16)]
    expected = [write(model, prompt, Sampling(max_new_tokens=25)).completion for prompt in prompts]

    def ask(i):
        if i % 2:
            return client.text_generation(prompts[i], max_new_tokens=25)
        return "".join(client.text_generation(prompts[i], max_new_tokens=25, stream=True))

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, range(len(prompts)))) == expected


def body_of(tokens, stream=True):
    return json.dumps({"inputs": PROMPT, "parameters": {"max_new_tokens": tokens}, "stream": stream}).encode()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_the_writing(language_model, stream):
    with served(f"lm={language_model}", "--threads", "1") as server:
        with Wire(server.url) as wire:
            wire.send(request("/", body_of(READS - 1, stream)))
            if stream:
                assert b"200 OK" in wire.socket.recv(200)
            else:
                time.sleep(0.05)
        until(lambda: 'code="499"' in httpx.get(f"{server.admin}/metrics").text)
        assert metric(server, "kdexport_generated_tokens_total") < READS - 1
        assert httpx.post(server.url, json={"inputs": PROMPT, "parameters": {"max_new_tokens": 2}}).status_code == 200


def test_what_would_wait_too_long_is_refused_and_the_rest_is_answered(language_model):
    with served(f"lm={language_model}", "--threads", "1", "--max-writing-queue", "50ms") as server:

        def ask(_):
            return httpx.post(server.url, content=body_of(600, stream=False), timeout=60)

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, range(8)))
        codes = [answer.status_code for answer in answers]
        assert set(codes) == {200, 429}
        full = answers[codes.index(429)]
        assert full.json() == {"error": "too much work is waiting"}
        assert int(full.headers["retry-after"]) >= 1


def test_the_deadline_ends_an_answer_and_a_stream(language_model):
    with served(f"lm={language_model}", "--threads", "1", "--timeout", "200ms") as server:
        found = httpx.post(server.url, content=body_of(READS - 1, stream=False))
        assert found.status_code == 504
        *parts, last = map(json.loads, events(httpx.post(server.url, content=body_of(READS - 1))))
        assert last == {"error": "the answer took longer than the request's deadline"}
        assert 0 < len(parts) < READS - 1
        assert metric(server, "kdexport_first_token_seconds_count") == 2


def test_a_stream_is_ended_before_the_server_is(language_model):
    with served(f"lm={language_model}", "--threads", "1") as server:
        with httpx.stream("POST", server.url, content=body_of(READS - 1), timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["details"]["generated_tokens"] == READS - 1
        assert server.process.wait(timeout=30) == 0


def test_health_is_answered_while_threads_write(language_model):
    with served(f"lm={language_model}", "--threads", "1") as server, ThreadPoolExecutor(3) as pool:
        written = [pool.submit(httpx.post, server.url, content=body_of(READS - 1), timeout=60) for _ in range(3)]
        asked = 0
        while not all(one.done() for one in written):
            assert httpx.get(f"{server.url}/v2/health/ready").status_code == 200
            asked += 1
        assert asked > 3
        assert {one.result().status_code for one in written} == {200}
        assert metric(server, "kdexport_generated_tokens_total") == 3 * (READS - 1)
        assert metric(server, "kdexport_first_token_seconds_count") == 3


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="this machine has no Chromium: apt-get install chromium")
def test_the_page_shows_what_is_written_and_how_to_ask(server, model, tmp_path):
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import sync_playwright

    expected = write(model, PROMPT, Sampling(max_new_tokens=40))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_context(bypass_csp=True, viewport={"width": 400, "height": 900}).new_page()
        said = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(server.url)
        assert "causal-lm: a text in, what comes after it out" in page.locator(".verdict").inner_text()
        page.get_by_label("Text", exact=True).fill(PROMPT)
        page.get_by_label("New tokens").fill("40")
        page.get_by_label("Temperature").fill("0")
        page.get_by_role("button", name="Write").click()
        page.get_by_text("40 tokens").wait_for()
        assert page.locator("#written").text_content() == expected.completion
        assert not page.get_by_text("Second text, for").is_visible()
        page.get_by_label("Python").check()
        code = page.locator("#code").inner_text()
        (tmp_path / "ask.py").write_text(code)
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        found = Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21aa", "wcag22aa", "best-practice"]})
        assert [rule["id"] for rule in found.response["violations"]] == []
        page.get_by_label("New tokens").fill(str(READS))
        page.evaluate("document.getElementById('form').noValidate = true")
        page.get_by_role("button", name="Write").click()
        page.get_by_text(f"the model writes at most {READS - 1} tokens").wait_for()
        browser.close()
    assert [line for line in said if not line.startswith("Failed to load resource")] == []
    ran = subprocess.run(
        [sys.executable, tmp_path / "ask.py"],
        capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "0"},
    )  # fmt: skip
    assert ran.stdout == expected.completion, ran.stderr
