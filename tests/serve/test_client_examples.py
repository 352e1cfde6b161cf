"""The client examples run and print the server's labels; KServe's client, where it is installed, understands them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from serve_process import served

import kdexport as package

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / "examples" / "clients"
TEXT = "Shares in the airline rose after it beat profit forecasts"
SECOND = "The striker scored twice"
KSERVE = ROOT / ".benchmarks" / "kserve" / "bin" / "python"


@pytest.fixture(scope="module")
def server(finished):
    with served(f"demo={finished}:fp32") as found:
        yield found


@pytest.fixture(scope="module")
def labels(finished):
    return [answer.label for answer in package.load(finished, "fp32").predict([TEXT, SECOND])]


def run(*command: object) -> str:
    found = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "0"}, timeout=60
    )
    assert found.returncode == 0, found.stderr
    assert found.stderr == ""
    return found.stdout


def test_curl(server, labels):
    if not shutil.which("curl"):
        pytest.skip("there is no curl")
    ready, *answers = map(json.loads, run("sh", CLIENTS / "curl.sh", server.url).splitlines())
    huggingface, single, batch, infer = answers
    assert ready == {"live": True, "ready": True}
    assert huggingface[0][0]["label"] == single[0]["label"] == infer["outputs"][0]["data"][0] == labels[0]
    assert [row[0]["label"] for row in batch] == labels


def test_javascript(server, labels):
    if not shutil.which("node"):
        pytest.skip("there is no node")
    lines = run("node", CLIENTS / "javascript.mjs", server.url).splitlines()
    assert [line.split()[0] for line in lines] == labels * 2


def test_python_triton(server, labels):
    lines = run(sys.executable, CLIENTS / "python_triton.py", server.url, "demo").splitlines()
    assert [line.split()[0] for line in lines] == labels
    assert all(f":{label}'" in line for line, label in zip(lines, labels, strict=True))


def test_python_huggingface(server, labels):
    *lines, error = run(sys.executable, CLIENTS / "python_huggingface.py", server.url).splitlines()
    assert [line.split()[0] for line in lines] == labels
    assert error.startswith("422 ")


# Installing it takes half a minute, and its pins don't go with ours.
@pytest.mark.skipif(
    not KSERVE.exists(), reason="python -m venv .benchmarks/kserve && .benchmarks/kserve/bin/pip install kserve==0.21.0"
)
def test_kserve(server, finished):
    texts = ["shares rose after the merger", "the striker scored twice", "über 5 €"]
    expected = package.load(finished, "fp32").predict(texts)
    found = json.loads(run(KSERVE, ROOT / "tests" / "kserve_client.py", server.url, "demo", *texts))
    health = {name: found.pop(name) for name in ("live", "ready", "model", "nobody")}
    assert health == {"live": True, "ready": True, "model": True, "nobody": False}
    assert "there is no such model here, '404 Not Found'" in found.pop("error")
    assert len(found) == 6  # raw and JSON in; raw, JSON and nothing said of what comes out
    for id, model, labels, scores in found.values():
        assert (id, model) == ("it-is-7", "demo")
        assert labels == [answer.label for answer in expected]
        for row, answer in zip(scores, expected, strict=True):
            assert row == pytest.approx(list(answer.scores.values()), abs=1e-4)
