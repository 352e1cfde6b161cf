"""What the pages say of a language model as teacher is done as written, against the tests' own endpoint.

Its encoder is a smaller one than the pages', and the texts are fewer; all else is theirs but for the port.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from endpoint import running
from test_docs import ROOT, blocks, shell_lines
from test_examples import QUICK

from kdexport.results import read_report

LABELS = ["business", "entertainment", "politics", "sports", "tech"]
# Those of the page's commands that the tests of other rooms try, or that have no end.
ELSEWHERE = ("kdexport demo", "kdexport serve", "curl", "git", "cd", "pip", "python tests/llama.py")


@pytest.fixture
def place(tmp_path, cache, finished, articles, monkeypatch):
    """A folder with what the demo leaves, a clone's tests, and `kdexport` and `python` as programs."""
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "teacher").symlink_to(finished / "teacher")
    (tmp_path / "runs" / "bbc-news").mkdir()
    unlabelled = [{"text": row["text"]} for row in articles[60:]]
    for name, rows in (("test", articles[:60]), ("unlabelled", unlabelled)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "runs" / "bbc-news" / f"{name}.jsonl").write_text(lines)
    (tmp_path / "bin").mkdir()
    for name, more in (("python", ""), ("kdexport", "-m kdexport")):
        (program := tmp_path / "bin" / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {more} "$@"\n')
        program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDEXPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def quickly(line: str) -> str:
    """A command that reads, trains and measures as little as it can."""
    few = ["--max-length 32", "--epochs 2", *(f"--set {each}" for each in QUICK)]
    return " ".join([line, *few]) if line.startswith("kdexport run") else line


def shell(line: str) -> str:
    done = subprocess.run(["sh", "-ec", line], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 3), f"{line}\n{done.stderr}"  # so small a teacher may miss a budget
    return done.stdout


@pytest.mark.slow
def test_the_tutorial_is_true_from_its_beginning_to_a_served_file(place):
    page = ROOT / "docs" / "tutorials" / "asking.md"
    text, _, _ = page.read_text(encoding="utf-8").partition("\n## A real language model")
    (place / "page.md").write_text(text)
    url, found, server, names = "http://localhost:8000/v1", "", None, dict[str, object]()
    try:
        for block in blocks(place / "page.md"):
            if block.language == "python":
                exec(block.text, names)
            if block.language == "yaml":
                (place / "news.yaml").write_text(block.text.replace(url, found))
            for line in shell_lines(block) if block.language == "console" else ():
                if line.startswith("python tests/endpoint.py"):
                    command = shlex.split(re.sub(r"--port \d+", "--port 0", line))
                    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
                    found = server.stdout.readline().strip()
                elif not line.startswith(ELSEWHERE):
                    shell(quickly(line.replace(url, found)))
    finally:
        if server:
            server.terminate()
            server.wait(30)
    report = read_report(place / "runs" / "asked" / "report.json")
    assert report.asked.texts["train"] > 150
    assert report.asked.trust.accuracy.n == 60
    assert (place / "runs" / "news" / "artifact" / "kdexport.json").is_file()


@pytest.mark.slow
def test_the_command_of_the_readme_makes_an_artifact(place, finished, articles):
    (line,) = [
        line for block in blocks(ROOT / "README.md") if block.language == "console" for line in shell_lines(block)
        if "--teacher openai:" in line
    ]  # fmt: skip
    model, url = re.search(r"openai:([^@ ]+)@(\S+)", line).groups()
    data = re.search(r"--data (\S+)", line)[1]
    (place / data).write_text("".join(" ".join(row["text"].split()) + "\n" for row in articles))
    with running(finished / "teacher", model=model) as server:
        shell(quickly(line.replace(url, server.url)))
    (report,) = (place / "runs").glob("*/report.json")
    asked = read_report(report).asked
    assert (asked.model, sum(asked.texts.values())) == (model, 300)


@pytest.mark.slow
def test_the_example_runs_on_texts_without_labels(place, finished, monkeypatch):
    with running(finished / "teacher", model="encoder") as server:
        line = f"kdexport run examples/language-model.yaml --data {place}/runs/bbc-news/unlabelled.jsonl"
        line += f" --teacher openai:encoder@{server.url} --labels {','.join(LABELS)} --out {place}/runs/example"
        monkeypatch.chdir(ROOT)
        shell(quickly(line))
    report = read_report(place / "runs" / "example" / "report.json")
    assert report.metric == "agreement with the teacher"
    assert report.asked.price == (0.1, 0.3)
    assert Path(place / "runs" / "example" / "artifact" / report.variant(report.recommended).file).is_file()
