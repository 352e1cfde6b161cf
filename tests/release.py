"""Try an installed wheel as a user without training does: no torch, every file there, an artifact predicts and serves.

`make release` runs it in a fresh environment of `kdexport[cpu,serve]`: python tests/release.py ARTIFACT
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from urllib.request import Request, urlopen

from serve_process import served

import kdexport

ROOT = Path(__file__).resolve().parent.parent
TEXT = "Shares in the airline rose after it beat profit forecasts"


def main() -> None:
    artifact = Path(sys.argv[1]).resolve()
    os.chdir("/")  # so that nothing of the checkout is found
    check_package()
    done = subprocess.run(
        [sys.executable, "-m", "kdexport", "predict", artifact, TEXT], capture_output=True, text=True, check=True
    )
    label = json.loads(done.stdout)["label"]
    with served(artifact) as server:
        body = json.dumps({"inputs": TEXT}).encode()
        request = Request(f"{server.url}/predict", body, {"Content-Type": "application/json"})
        answer = json.load(urlopen(request))
        assert answer[0]["label"] == label, (answer, label)
    print(f"kdexport {version('kdexport')}: {artifact} predicts and serves {label!r}, without torch")


def check_package() -> None:
    """The package is the installed one, with each file of the checkout, and what trains is not there."""
    installed = Path(kdexport.__file__).parent
    assert "site-packages" in installed.parts, installed
    for package in ("torch", "transformers", "datasets"):
        assert find_spec(package) is None, f"{package} is installed"
    assert version("kdexport") == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    files = {path.relative_to(ROOT / "kdexport") for path in (ROOT / "kdexport").rglob("*") if path.is_file()}
    missing = [str(file) for file in sorted(files) if file.suffix != ".pyc" and not (installed / file).is_file()]
    assert not missing, f"not in the wheel: {', '.join(missing)}"


if __name__ == "__main__":
    main()
