"""The README is kept true: its commands exist, its table is the demo's, its Python runs."""

import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdexport.pipeline.compare import parse_gate
from kdexport.report.table import headers, table
from kdexport.results import read_report

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TEXTS = ["The striker scored twice in the second half", "Shares fell on Monday"]


def test_the_table_is_the_one_of_the_demo_run_that_is_kept():
    report = read_report(ROOT / "benchmarks" / "results" / "demo.json")
    for row in (headers(report), *table(report)):
        pattern = r"\s+".join(re.escape(cell) for cell in row)
        assert re.search(pattern, README), row


def test_the_table_of_tasks_is_made_of_the_reports_that_are_kept():
    rows = runpy.run_path(str(ROOT / "benchmarks" / "tasks.py"))["rows"]()
    assert len(rows) == 5
    for row in rows:
        assert f"| {' | '.join(row)} |" in README


COMMANDS = ["run", "demo", "init", "export", "predict", "serve", "bench", "report", "compare", "doctor"]
WORKFLOW = ROOT / "examples" / "ci" / "model-budget.yml"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_that_the_docs_name_exists(kdexport, command):
    known = kdexport(command, "--help", COLUMNS="300").stdout
    steps = [step.get("run", "") for step in yaml.safe_load(WORKFLOW.read_text())["jobs"]["student"]["steps"]]
    places = [README, (ROOT / "benchmarks" / "README.md").read_text(), *steps]
    lines = [line for text in places for line in re.findall(rf"kdexport {command}\b[^\n`]*", text)]
    for line in lines:
        for flag in re.findall(r"--[a-z][a-z0-9-]+", line):
            assert flag in known, f"{command} has no {flag}"
    assert lines or command == "demo", f"no document shows {command}"


def test_the_workflows_gates_can_be_read():
    (gates,) = [
        s["run"]
        for s in yaml.safe_load(WORKFLOW.read_text())["jobs"]["student"]["steps"]
        if "--fail-if" in s.get("run", "")
    ]
    found = [parse_gate(text) for text in re.findall(r'--fail-if "([^"]+)"', gates)]
    assert [gate.metric for gate in found] == ["p99", "accuracy", "size"]


def test_the_screenshot_in_the_readme_is_there_and_is_a_picture():
    (path,) = re.findall(r"!\[[^\]]+\]\(([^)]+\.png)\)", README)
    assert (ROOT / path).read_bytes().startswith(b"\x89PNG")


def test_the_python_of_the_readme_runs(finished, tmp_path, monkeypatch, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    shutil.copytree(finished, tmp_path / "runs" / "tickets")
    shutil.copy(finished / "spec.yaml", tmp_path)
    (tmp_path / "runs" / "main").symlink_to(finished)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(block, found)
    assert found["report"].variants == read_report(finished / "report.json").variants
    first, *answers, last = capsys.readouterr().out.splitlines()
    assert first == f"{found['report'].recommended} None"
    assert [line.split()[0] for line in answers] == [answer.label for answer in found["model"].predict(TEXTS)]
    assert len(found["pairs"]) == 1
    assert last.startswith("['passed', ")


def test_no_figure_stands_without_the_command_that_makes_it():
    text = (ROOT / "benchmarks" / "README.md").read_text()
    commands = r"make bench|make demo|python benchmarks/|kdexport run examples/"
    for section in re.split(r"\n## ", text)[1:]:
        assert re.search(commands, section), section.splitlines()[0]
