"""A server's life: ready, loaded anew, drained, dead; what operators see of it."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import signal
import subprocess
import sys
import time
import urllib.request

import msgspec
import pytest
from load_client import Load, ask
from serve_process import served

import kdexport as package
from kdexport.files import hash_file
from kdexport.runtime.artifact import sealed
from kdexport.serve import metrics

TEXTS = [
    "shares rose after the merger", "the striker scored twice", "a new phone with a better camera",
    "the minister resigned over the budget", "the film won three awards at the festival", "interest rates went up",
]  # fmt: skip


@pytest.fixture(scope="module")
def server(finished):
    with served(finished) as found:
        yield found


def labels(run, texts=TEXTS):
    return {text: answer.label for text, answer in zip(texts, package.load(run).predict(texts), strict=True)}


def test_every_protocol_gives_what_the_predictor_gives(server, finished):
    expected = package.load(finished).predict(TEXTS)
    _, nested, _ = ask(server.url, {"inputs": TEXTS})
    _, flat, _ = ask(f"{server.url}/predict", {"inputs": [[text] for text in TEXTS]})
    infer = {"inputs": [{"name": "text", "shape": [len(TEXTS)], "datatype": "BYTES", "data": TEXTS}]}
    _, oip, _ = ask(f"{server.url}/v2/models/finished/infer", infer)
    outputs = {output["name"]: output["data"] for output in oip["outputs"]}
    # int8 scales activations by the whole batch, so a text's scores depend a little on its company.
    for i, answer in enumerate(expected):
        for found in (nested[i], flat[i]):
            assert {one["label"]: pytest.approx(one["score"], abs=0.02) for one in found} == answer.scores
            assert [one["score"] for one in found] == sorted((one["score"] for one in found), reverse=True)
        assert outputs["label"][i] == answer.label
        assert outputs["score"][i] == pytest.approx(answer.score, abs=0.02)


def test_many_clients_each_get_their_own_answer(server, finished):
    async def storm():
        load = Load(server.url, TEXTS, connections=24)
        await asyncio.sleep(1.5)
        await load.stop()
        return load

    load = asyncio.run(storm())
    expected = labels(finished)
    assert load.codes[200] > 100
    assert set(load.codes) == {200}
    assert not load.lost
    assert all(expected[text] == label for text, label in load.answers)


def test_metrics_count_what_happened(server):
    ask(server.url, {"inputs": TEXTS})
    ask(f"{server.url}/v2/models/nobody")
    with urllib.request.urlopen(f"{server.admin}/metrics") as response:
        text = response.read().decode()
    documented = re.findall(r'"(kdexport_\w+)"', inspect.getsource(metrics))
    served_names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE kdexport_")}
    assert sorted(documented) == sorted(name.removesuffix("_total") for name in served_names)
    assert 'kdexport_requests_total{code="200",model="finished",protocol="huggingface"}' in text
    assert 'kdexport_requests_total{code="404"' in text
    assert "kdexport_ready 1.0" in text
    # Metrics are not on the public port.
    assert ask(f"{server.url}/metrics")[0] == 404


def test_the_access_log_is_json_lines_without_texts(finished):
    process = subprocess.Popen(
        [sys.executable, "-m", "kdexport", "serve", str(finished), "--port", "0", "--admin-port", "-1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    line = ""
    while "ready after" not in line:
        line = process.stderr.readline()
        assert line, "it ended"
    url = line.split()[-1]
    ask(url, {"inputs": "the striker scored twice"}, Authorization="Bearer hf_secret")
    ask(f"{url}/nowhere")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    first, second = (json.loads(line) for line in out.splitlines())
    assert first["code"] == 200
    assert first["model"] == "finished"
    assert first["rows"] == 1
    assert first["run_ms"] > 0
    assert second["code"] == 404
    assert "striker" not in out
    assert "secret" not in out


def test_nothing_accepted_is_lost_when_it_is_told_to_stop(finished):
    async def stop_under_load(server):
        load = Load(server.url, TEXTS)
        await asyncio.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        await load.ended()
        return load

    for _ in range(3):
        with served(finished) as server:
            load = asyncio.run(stop_under_load(server))
        assert not load.lost
        assert set(load.codes) == {200}
        assert load.codes[200] > 50


def test_while_it_drains_ready_says_no_and_requests_are_taken_in(finished):
    with served(finished, "--drain-delay", "1s") as server:
        assert ask(f"{server.url}/v2/health/ready")[0] == 200
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        code, content, headers = ask(f"{server.url}/v2/health/ready")
        assert (code, content["ready"], headers["retry-after"]) == (503, False, "1")
        assert ask(f"{server.url}/v2/health/live")[0] == 200
        assert ask(server.url, {"inputs": "x"})[0] == 200
    assert server.log[-1] == "stopped: 4 requests answered\n"


def test_a_new_version_takes_over_under_load_and_a_bad_one_does_not(copied):
    artifact = copied / "artifact"

    async def reload_under_load(server):
        load = Load(server.url, TEXTS)
        await asyncio.sleep(0.2)
        url = f"{server.admin}/v2/repository/models/run/load"
        found = []
        for change in (change_manifest, spoil_golden, break_file, restore):
            change()
            found.append(await asyncio.to_thread(ask, url, b""))
        await load.stop()
        return load, found

    manifest = artifact / "kdexport.json"
    good = {path: path.read_bytes() for path in artifact.rglob("*") if path.is_file()}

    def change_manifest():
        content = msgspec.json.decode(manifest.read_bytes())
        manifest.write_bytes(msgspec.json.encode(sealed(content | {"made": {"note": "second"}})))

    def spoil_golden():
        # A model that answers otherwise than when it was packed, with all its checksums right.
        golden = msgspec.json.decode((artifact / "golden.json").read_bytes())
        golden["logits"] = {name: [[x + 1 for x in row] for row in rows] for name, rows in golden["logits"].items()}
        (artifact / "golden.json").write_bytes(msgspec.json.encode(golden))
        content = msgspec.json.decode(manifest.read_bytes())
        content["files"]["golden.json"] = hash_file(artifact / "golden.json")
        manifest.write_bytes(msgspec.json.encode(sealed(content)))

    def break_file():
        for path, data in good.items():
            path.write_bytes(data)
        next(artifact.glob("onnx/*quantized*")).write_bytes(b"half a model")

    def restore():
        for path, data in good.items():
            path.write_bytes(data)

    with served(f"{copied}:int8") as server:
        before = ask(f"{server.url}/v2/models/run")[1]["versions"]
        load, found = asyncio.run(reload_under_load(server))
        after = ask(f"{server.url}/v2/models/run")[1]["versions"]
        index = ask(f"{server.admin}/v2/repository/index", b"")[1]
    assert [code for code, _, _ in found] == [200, 400, 400, 200]
    assert found[0][1]["version"] not in before
    assert after == before
    assert "differs" in found[1][1]["error"]
    assert "sha256" in found[2][1]["error"]
    assert index == [{"name": "run", "version": before[0], "state": "READY", "reason": ""}]
    assert not load.lost
    assert set(load.codes) == {200}


def test_a_hangup_loads_every_model_again(copied):
    with served(copied) as server:
        server.process.send_signal(signal.SIGHUP)
        for _ in range(100):
            if any("serves" in line for line in server.log):
                break
            time.sleep(0.05)
        assert ask(server.url, {"inputs": "x"})[0] == 200
        # Broken: it says so, and goes on with what it has.
        (copied / "artifact" / "tokenizer.json").write_text("{}")
        server.process.send_signal(signal.SIGHUP)
        for _ in range(100):
            if any("was not reloaded" in line for line in server.log):
                break
            time.sleep(0.05)
        else:
            raise AssertionError(server.log)
        assert ask(server.url, {"inputs": "x"})[0] == 200


def test_several_models_at_once(finished, copied):
    with served(f"first={finished}", f"second={copied}:fp32") as server:
        assert ask(f"{server.url}/v2/models/second")[1]["name"] == "second"
        one = ask(f"{server.url}/models/first", {"inputs": TEXTS})[1]
        two = ask(f"{server.url}/models/second", {"inputs": TEXTS})[1]
        assert [row[0]["label"] for row in one] == list(labels(finished).values())
        assert [row[0]["label"] for row in two] == [a.label for a in package.load(copied, "fp32").predict(TEXTS)]
        assert ask(f"{server.url}/models/third", {"inputs": "x"})[0] == 404
        # One may be taken out of service, and put back.
        assert ask(f"{server.admin}/v2/repository/models/first/unload", b"")[0] == 200
        assert ask(f"{server.url}/models/first", {"inputs": "x"})[0] == 503
        assert ask(f"{server.url}/models/second", {"inputs": "x"})[0] == 200
        assert ask(f"{server.admin}/v2/repository/models/first/load", b"")[0] == 200
        assert ask(f"{server.url}/models/first", {"inputs": "x"})[0] == 200


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "nowhere is no artifact"),
        (["{run}:fp99"], "has no variant"),
        (["{run}", "{run}"], "two models are called"),
        (["a b={run}"], "can't be a model's name"),
        (["{run}", "--host", "203.0.113.1"], "can't be listened on"),
        (["{run}", "--max-queue", "soon"], "--max-queue"),
        (["{run}", "--api-keys", "nofile"], "can't be read"),
        (["{run}", "--access-log", "some"], "--access-log"),
    ],
)
def test_wrong_use_is_one_line(kdexport, finished, arguments, says):
    arguments = [one.replace("{run}", str(finished)) for one in arguments]
    if "--port" not in arguments:
        arguments += ["--port", "0", "--admin-port", "0"]
    found = kdexport("serve", *arguments)
    assert found.returncode == 2, found.stderr
    last = found.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert says in last
    assert "Traceback" not in found.stderr


def test_a_taken_port_is_named(kdexport, server, finished):
    port = server.url.rsplit(":", 1)[1]
    found = kdexport("serve", finished, "--port", port, "--admin-port", "0")
    assert found.returncode == 2
    assert "Name another with --port" in found.stderr


def test_it_imports_no_torch_and_starts_quickly(server, finished):
    probe = "import kdexport.serve.server, sys\n"
    probe += "print({'torch', 'transformers', 'grpc', 'ray', 'jinja2'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
