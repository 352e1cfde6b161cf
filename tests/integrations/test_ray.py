"""An artifact on Ray Serve: the replica by itself, and where Ray is installed two of them in a real local cluster."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import pytest
import tritonclient.http as triton

from kdexport.errors import MissingPackage, SpecError
from kdexport.integrations import ray as ours
from kdexport.serve.settings import Settings

TEXTS = ["The striker scored twice in the second half", "Shares fell — the bank warned on profits 📉", "Parliament"]
OIP = {"inputs": [{"name": "text", "shape": [3], "datatype": "BYTES", "data": TEXTS}]}

# It prints what `serve.run` says of a folder without an artifact, serves another until its input ends, and clears up.
DRIVER = """
import sys
import ray
from ray import serve
from kdexport.integrations.ray import application, deployment

folder, port = sys.argv[1], int(sys.argv[2])
two = application({"artifacts": [f"news={folder}"], "num_replicas": 2, "settings": {"max_rows": 4},
                   "ray_actor_options": {"num_cpus": 1}})
wrong = deployment([f"wrong={folder}/data"], max_constructor_retry_count=1, ray_actor_options={"num_cpus": 0})
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
try:
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(wrong, name="wrong", route_prefix="/wrong")
    except RuntimeError:
        print(repr(serve.status().applications["wrong"].deployments["kdexport"].message), flush=True)
    serve.delete("wrong")
    serve.run(two, name="news", route_prefix="/served")
    print(serve.status().applications["news"].deployments["kdexport"].replica_states, flush=True)
    sys.stdin.read()
    serve.shutdown()
finally:
    ray.shutdown()
"""


@pytest.fixture(scope="module")
def cluster(finished) -> Iterator[tuple[str, list[str]]]:
    """Where two replicas answer, and what the driver printed; of Ray nothing is left behind, nor told to anyone."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'ray[serve]'")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder = tempfile.mkdtemp(prefix="ray-")  # not pytest's: the paths of Ray's sockets must be short
    environment = {"RAY_TMPDIR": folder, "RAY_AUTH_TOKEN": secrets.token_hex(32), "HF_HUB_OFFLINE": "1"}
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(finished), str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    try:
        said = [driver.stdout.readline() for _ in range(2)]
        if not said[-1]:
            raise AssertionError(driver.communicate()[1])
        yield f"http://127.0.0.1:{port}/served", said
    finally:
        _, errors = driver.communicate()
        shutil.rmtree(folder, ignore_errors=True)
    assert driver.returncode == 0, errors


def ask(url: str, content: object = None) -> tuple[int, bytes]:
    body = None if content is None else msgspec.json.encode(content)
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body)) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_replicas_answer_behind_a_prefix(cluster):
    url, _ = cluster
    assert ask(f"{url}/v2/health/ready")[0] == 200
    client = triton.InferenceServerClient(url.removeprefix("http://"))
    assert client.is_model_ready("news")
    tensor = triton.InferInput("text", [3], "BYTES")
    tensor.set_data_from_numpy(np.array(TEXTS, dtype=object))
    raw = client.infer("news", [tensor]).as_numpy("label").tolist()
    client.close()
    code, body = ask(f"{url}/v2/models/news/infer", OIP)
    assert (code, msgspec.json.decode(body)["outputs"][0]["data"]) == (200, [label.decode() for label in raw])
    code, body = ask(url, {"inputs": TEXTS})
    assert [scores[0]["label"] for scores in msgspec.json.decode(body)] == [label.decode() for label in raw]
    assert ask(f"{url}/nowhere")[0] == 404
    assert ask(url, {"inputs": ["a"] * 5}) == (422, b'{"error":"a request may have 1 to 4 texts; it has 5"}')


def test_many_at_once_are_answered_by_two(cluster):
    url, said = cluster
    assert "RUNNING" in said[1]
    assert "2" in said[1]
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda i: ask(f"{url}/predict", {"inputs": TEXTS[i % 3]}), range(150)))
    assert {code for code, _ in found} == {200}
    labels = [msgspec.json.decode(body)[0]["label"] for _, body in found]
    assert labels == labels[:3] * 50


def test_ray_says_what_is_wrong_with_an_artifact(cluster):
    assert "is no artifact" in cluster[1][0]


# --- without Ray


def test_a_replicas_life(finished):
    async def main() -> None:
        app = ours._Replicated([f"news={finished}"], Settings(access_log="off", threads=1))
        events, replies = asyncio.Queue(), asyncio.Queue()
        life = asyncio.ensure_future(app({"type": "lifespan"}, events.get, replies.put))
        with pytest.raises(RuntimeError, match="does not answer"):
            app.check()
        events.put_nowait({"type": "lifespan.startup"})
        assert await replies.get() == {"type": "lifespan.startup.complete"}
        app.check()
        scope = {"type": "http", "method": "POST", "path": "/at/predict", "root_path": "/at", "headers": []}
        events.put_nowait({"type": "http.request", "body": msgspec.json.encode({"inputs": TEXTS[0]})})
        await app(scope, events.get, replies.put)
        assert (await replies.get())["status"] == 200
        assert len(msgspec.json.decode((await replies.get())["body"])) == 5
        app._die(ValueError("out of memory"))
        with pytest.raises(RuntimeError, match="does not answer"):
            app.check()
        events.put_nowait({"type": "lifespan.shutdown"})
        assert await replies.get() == {"type": "lifespan.shutdown.complete"}
        await life

    asyncio.run(main())


def test_names_and_the_missing_package_are_told_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "")
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED")
    with pytest.raises(SpecError, match="can't be a model's name"):
        ours.deployment(["a b=folder"])
    with pytest.raises(MissingPackage, match=r"kdexport\[ray\]"):
        ours.deployment(["a=folder"])
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
