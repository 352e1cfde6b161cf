"""The image: what its Dockerfile says is linted, installed as it says, small, and serves."""

import os
import re
import shutil
import subprocess
import sys
import urllib.request
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

import image
import pytest

STAGES = image.read()
SERVE = STAGES["serve"]
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed")
def test_the_linter_finds_nothing():
    found = subprocess.run([HADOLINT, "--no-color", image.ROOT / "Dockerfile"], capture_output=True, text=True)
    assert found.stdout + found.stderr == ""


def test_a_plain_build_makes_the_server():
    assert list(STAGES)[-1] == "serve"


def test_the_context_is_what_is_copied():
    lines = (image.ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    copied = {source for stage in STAGES.values() for words in stage.all("COPY") for source in words.split()[:-1]}
    assert {line[1:] for line in lines if line[0] == "!"} == {
        source.rstrip("/") for source in copied if not source.startswith(("-", "/"))
    }


class Installed(NamedTuple):
    prefix: Path
    environment: dict[str, str]
    left_out: list[str]

    def run(self, *command: str, **more) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True, **more)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installed:
    """What the server's image holds beside its base."""
    build = image.Below(tmp_path_factory.mktemp("image"))
    try:
        environment = build.build(image.needed("serve", STAGES))
    except subprocess.CalledProcessError as error:
        if re.search("Failed to establish a new connection|name resolution", error.stdout + error.stderr):
            pytest.skip("no packages can be had here")
        pytest.fail(error.stdout + error.stderr)
    (to,) = (words.split()[-1] for words in SERVE.all("COPY"))
    return Installed(build.out / to[1:], environment, build.left_out)


@pytest.mark.slow
def test_all_but_the_base_was_carried_out(installed):
    (command,) = installed.left_out
    assert command.startswith("rm -rf /usr/local/")


@pytest.mark.slow
def test_it_holds_what_a_server_needs(installed):
    (site,) = installed.prefix.glob("lib/python3.*/site-packages")
    names = {found.metadata["Name"].lower() for found in distributions(path=[str(site)])}
    assert {"kdexport", "onnxruntime", "tokenizers", "uvicorn"} <= names
    assert not names & {"torch", "transformers", "optimum", "onnx", "datasets", "scipy", "pandas", "pip", "setuptools"}
    # the base is some 130 MB more
    files = sum(path.lstat().st_blocks * 512 for path in installed.prefix.rglob("*"))
    assert files / 1e6 < 240, f"{files / 1e6:.0f} MB"
    base = installed.prefix.parent.parent / "base" / "bin" / "pip"
    installed.run(str(base), "--python", str(installed.prefix / "bin" / "python"), "check")


@pytest.mark.slow
def test_the_server_loads_no_torch(installed):
    code = "import sys, kdexport.serve.server; print(set(sys.modules) & {'torch', 'transformers', 'datasets'})"
    assert installed.run("python", "-c", code).stdout == "set()\n"
    assert "kdexport serve" in installed.run(*SERVE.command("ENTRYPOINT")[:2], "--help").stdout


@pytest.mark.slow
def test_it_serves_is_healthy_and_stops(installed, finished):
    before = set(installed.prefix.rglob("*.pyc"))
    environment = {name: value for name, value in installed.environment.items() if name != "PYTHONDONTWRITEBYTECODE"}
    # flags win that come after the entry point's
    given = [finished / "artifact", "--host", "127.0.0.1", "--port", "0", "--admin-port", "0"]
    process = subprocess.Popen(
        [*SERVE.command("ENTRYPOINT"), *given],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        for line in process.stderr:
            if ready := re.search(r"ready after .* on http://\S+:(\d+),", line):
                break
        else:
            pytest.fail(f"it ended with {process.wait()}")
        url = f"http://127.0.0.1:{ready[1]}"
        for path, body in (("/", None), ("/openapi.json", None), ("/predict", b'{"inputs": "A late goal"}')):
            with urllib.request.urlopen(urllib.request.Request(url + path, body)) as answer:
                assert answer.read()
        health = SERVE.command("HEALTHCHECK")
        installed.run(*(part.replace("8080", ready[1]) for part in health))
        with pytest.raises(subprocess.CalledProcessError):
            installed.run(*(part.replace("8080", "9") for part in health))
    finally:
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 0
    # a read-only image would compile these at every start: let the Dockerfile import them too
    assert set(installed.prefix.rglob("*.pyc")) - before == set()
