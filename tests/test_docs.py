"""The README is kept true: its commands exist, its table is the demo's, its Python runs."""

import re
from pathlib import Path

import pytest

from kdexport.report.table import HEADERS, table
from kdexport.results import read_report

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_table_is_the_one_of_the_demo_run_that_is_kept():
    report = read_report(ROOT / "benchmarks" / "results" / "demo.json")
    for row in (HEADERS, *table(report)):
        pattern = r"\s+".join(re.escape(cell) for cell in row)
        assert re.search(pattern, README), row


@pytest.mark.parametrize("command", ["run", "demo", "predict", "report", "init"])
def test_every_flag_that_the_readme_names_exists(kdexport, command):
    known = kdexport(command, "--help", COLUMNS="300").stdout
    for line in re.findall(rf"kdexport {command}\b[^\n`]*", README):
        for flag in re.findall(r"--[a-z][a-z0-9-]+", line):
            assert flag in known, f"{command} has no {flag}"


def test_the_python_of_the_readme_runs(finished, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(block.replace("runs/demo/artifact", str(finished / "artifact")))
    label, score = capsys.readouterr().out.split()
    assert label
    assert 0 < float(score) <= 1


def test_no_figure_stands_without_the_command_that_makes_it():
    text = (ROOT / "benchmarks" / "README.md").read_text()
    for section in re.split(r"\n## ", text)[1:]:
        assert "make bench" in section or "make demo" in section, section.splitlines()[0]
