"""What a release carries: one version everywhere, metadata, hooks, and every file in the wheel."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_citation_and_the_changelog_are_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    released = re.findall(r"^## (\d+\.\d+\.\d+) - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert released[0] == (PROJECT["version"], citation["date-released"])
    assert released == sorted(released, reverse=True)


def test_the_project_says_where_it_lives_and_what_it_runs_on():
    assert {"Homepage", "Documentation", "Source", "Issues", "Changelog"} <= set(PROJECT["urls"])
    assert all(url.startswith("https://") for url in PROJECT["urls"].values())
    lowest = PROJECT["requires-python"].removeprefix(">=")
    assert f"Programming Language :: Python :: {lowest}" in PROJECT["classifiers"]
    assert "Typing :: Typed" in PROJECT["classifiers"]
    assert (ROOT / "kdexport" / "py.typed").is_file()
    assert PROJECT["classifiers"] == sorted(PROJECT["classifiers"])


def test_the_hooks_run_what_make_lint_runs():
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local"  # nothing to download
    assert {hook["language"] for hook in local["hooks"]} == {"system"}
    recipe = re.search(r"^lint:.*\n((?:\t.+\n)+)", (ROOT / "Makefile").read_text(), re.M)[1]
    lint = [line.strip().replace("$(BIN)", ".venv/bin").removesuffix(" .") for line in recipe.splitlines()]
    assert [hook["entry"].replace(" --force-exclude", "") for hook in local["hooks"]] == lint


def test_the_notes_for_agents_name_what_there_is(kdexport):
    text = (ROOT / "AGENTS.md").read_text()
    for command in {*re.findall(r"`kdexport ([a-z]+) ", text)}:
        known = kdexport(command, "--help", COLUMNS="300").stdout
        for line in re.findall(rf"kdexport {command} [^`]*", text):
            for flag in re.findall(r"--[a-z][a-z0-9-]+", line):
                assert flag in known, f"{command} has no {flag}"
    for path in re.findall(r"\]\(([^)]+)\)|`(kdexport/schemas/[^`]+)`", text):
        assert (ROOT / "".join(path)).exists(), path


def test_the_fields_that_the_notes_for_agents_read_are_in_a_report(finished):
    import json

    report = json.loads((finished / "report.json").read_bytes())
    best = next(variant for variant in report["variants"] if variant["name"] == report["recommended"])
    assert {"file", "size_bytes", "metric", "latency_ms", "speedup_p50"} <= set(best)
    assert {"p50", "p99"} <= set(best["latency_ms"])
    assert {"value", "ci95"} <= set(best["metric"])
    assert {"metric", "metric_higher_is_better", "reason"} <= set(report)
    assert {"met", "checks"} == set(report["budget"])
    assert {"retention", "baseline"} <= set(report["distillation"])
    assert isinstance(report["bench"]["warnings"], list)


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_package(tmp_path):
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        source.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    shutil.copytree(ROOT / "kdexport", source / "kdexport", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", tmp_path]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob(f"kdexport-{PROJECT['version']}-*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    files = {p.relative_to(source).as_posix() for p in (source / "kdexport").rglob("*") if p.is_file()}
    assert any(file.endswith(".schema.json") for file in files)
    assert any("/templates/" in file for file in files)
    assert files <= packed
    metadata = zipfile.ZipFile(wheel).read(f"kdexport-{PROJECT['version']}.dist-info/METADATA").decode()
    assert f"Project-URL: Changelog, {PROJECT['urls']['Changelog']}" in metadata
