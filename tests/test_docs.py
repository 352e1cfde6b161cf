"""The documentation is kept true: the site builds, commands parse, specs are valid, Python names what there is.

Blocks that are marked `<!-- runs -->` run, on a finished run; the README's tables are those of the kept reports.
"""

import ast
import importlib
import inspect
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
import yaml

import kdexport as package
from kdexport import spec
from kdexport.cli import app
from kdexport.cli.options import arguments, parse_sets
from kdexport.pipeline.api import settings_of
from kdexport.pipeline.compare import parse_gate
from kdexport.report.table import headers, table
from kdexport.results import read_report

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
WORKFLOW = ROOT / "examples" / "ci" / "model-budget.yml"
PAGES = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]  # fmt: skip
COMMANDS = typer.main.get_command(app).commands


class Block(NamedTuple):
    """A fenced block of a page: its language, whether it is marked to run, and its text."""

    language: str
    runs: bool
    text: str


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"(<!-- runs -->\n)?^```(\w*)[^\n]*\n(.*?)^```$", page.read_text(encoding="utf-8"), re.S | re.M)
    return [Block(language, bool(runs), text) for runs, language, text in found]


def shell_lines(block: Block) -> list[str]:
    """The commands of a block; those of a console follow a `$`."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [line[2:] for line in lines if line.startswith("$ ")] if block.language == "console" else lines


def commands_in(line: str) -> Iterator[list[str]]:
    """The arguments of each kdexport command in a line of a shell, without pipes and redirections."""
    words = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    words.whitespace_split, words.commenters = True, "#"
    command: list[str] = []
    for word in [*words, ";"]:
        if set(word) <= set("|&;<>"):
            names = [i for i, one in enumerate(command) if Path(one).name == "kdexport"]
            if names and all("=" in one for one in command[: names[0]]):
                yield command[names[0] + 1 :]
            command = ["redirected"] if word[0] in "<>" else []
        else:
            command.append(word)


def check_command(words: list[str]) -> None:
    """Parse a command as the command line does; check specs and gates in its flags too."""
    name, *given = words
    found = COMMANDS[name].make_context(name, given).params
    if name == "run" and not found["spec"]:
        flags = {key: list(value) if isinstance(value, tuple) else value for key, value in arguments(found).items()}
        settings_of(None, flags | {"set": parse_sets(flags["set"])})
    for gate in found.get("fail_if") or []:
        parse_gate(gate)


def test_commands_are_found_in_lines_of_a_shell():
    line = (
        "A=1 .venv/bin/kdexport run --set a=[1,2] && cat x | kdexport predict y 'a | b' > kdexport; docker kdexport z"
    )
    assert [*commands_in(line)] == [["run", "--set", "a=[1,2]"], ["predict", "y", "a | b"]]


def test_every_command_can_be_parsed():
    shown = set()
    for page in PAGES:
        shells = [block for block in blocks(page) if block.language in ("console", "sh", "bash")]
        for words in [words for block in shells for line in shell_lines(block) for words in commands_in(line)]:
            if not words[0].startswith("--"):
                check_command(words)
                shown.add(words[0])
        # In running text arguments may be left out.
        for text in re.findall(r"`kdexport ([a-z]+ [^`]*)`", page.read_text(encoding="utf-8")):
            command, *words = text.split()
            flags = {flag for parameter in COMMANDS[command].params for flag in parameter.opts}
            assert {word for word in words if re.fullmatch(r"--[a-z0-9-]+", word)} <= flags, f"{page.name}: {text}"
    assert shown == set(COMMANDS)


def test_every_spec_is_valid():
    found = [(page, block) for page in PAGES for block in blocks(page) if block.language == "yaml"]
    for page, block in found:
        spec.parse(spec.read_yaml(block.text, page.name), page.name)
    assert len(found) > 10


def test_every_block_of_python_names_what_there_is():
    for page in PAGES:
        for block in blocks(page):
            for node in ast.walk(ast.parse(block.text)) if block.language == "python" else ():
                match node:
                    case ast.Attribute(value=ast.Name(id="kdexport"), attr=name):
                        assert name in package.__all__, f"{page.name}: kdexport.{name}"
                    case ast.ImportFrom(module=str(module), names=names) if module.startswith("kdexport"):
                        assert all(hasattr(importlib.import_module(module), one.name) for one in names)


def test_every_call_of_run_has_keywords_and_values_that_are_valid():
    """Those with a spec run, or name a file that is not there."""
    calls = 0
    for block in (block for page in PAGES for block in blocks(page) if block.language == "python"):
        tree = ast.parse(block.text)
        known = {
            node.targets[0].id: ast.literal_eval(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "kdexport.run" and not node.args:
                given = {one.arg: known.get(ast.unparse(one.value), one.value) for one in node.keywords}
                given = {k: ast.literal_eval(v) if isinstance(v, ast.AST) else v for k, v in given.items()}
                inspect.signature(package.run).bind(**given)
                settings_of(None, given)
                calls += 1
    assert calls >= 2


def test_every_block_of_json_is_json():
    for page in PAGES:
        for block in blocks(page):
            for line in block.text.splitlines() if block.language == "json" else ():
                json.loads(line)


RUN = [page for page in PAGES if any(block.runs for block in blocks(page))]


@pytest.mark.parametrize("page", RUN, ids=[str(page.relative_to(ROOT)) for page in RUN])
def test_marked_blocks_run(page, finished, cache, tmp_path, monkeypatch):
    """In their order, where `runs/NAME` is a finished run, `my-bert` a trained model, and `spec.yaml` the run's."""
    for name in ("tickets", "news", "demo"):
        shutil.copytree(finished, tmp_path / "runs" / name)
    (tmp_path / "runs" / "main").symlink_to(finished)
    (tmp_path / "my-bert").symlink_to(finished / "student")
    shutil.copy(finished / "spec.yaml", tmp_path)
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "kdexport"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m kdexport "$@"\n')
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDEXPORT_CACHE", str(cache))
    environment = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    names: dict[str, object] = {}
    for block in blocks(page):
        if block.runs and block.language == "python":
            exec(block.text, names)
        elif block.runs:
            script = "\n".join(shell_lines(block))
            done = subprocess.run(["sh", "-ec", script], env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{script}\n{done.stderr}"


# --- the site


def test_the_site_builds_without_warnings_and_needs_no_network(tmp_path):
    """Links and anchors are checked by mkdocs, whose warnings are errors here."""
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    pages = {path.relative_to(tmp_path / "site").as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    assert {"index.html", "reference/spec.html", "reference/python.html", "troubleshooting.html"} <= set(pages)
    assert {f"reference/commands/{name}.html" for name in COMMANDS} <= set(pages)
    for name, page in pages.items():
        assert (
            re.findall(
                r"""<(?:script|img|iframe)[^>]*src=["']?(?:https?:)?//[^>]*|<link[^>]*href=["']?(?:https?:)?//[^>]*""",
                page,
            )
            == []
        ), name
        assert "<!-- table:" not in page, name


def test_every_setting_and_error_class_is_in_the_reference():
    made = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
    pages = dict(made["_pages"]())
    assert all(f"`{key.rpartition('.')[2]}`" in pages["reference/spec.md"] for key in spec.settings())
    assert all(name in pages["reference/python.md"] for name in package.__all__ if name != "__version__")
    flags = {flag for command in COMMANDS.values() for parameter in command.params for flag in parameter.opts}
    shown = "".join(page for name, page in pages.items() if name.startswith("reference/commands/"))
    assert all(flag in shown for flag in flags if flag.startswith("--") and flag != "--help")


def test_every_environment_variable_is_in_the_reference():
    page = (ROOT / "docs" / "reference" / "environment.md").read_text(encoding="utf-8")
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "kdexport").rglob("*.py"))
    named = re.findall(r'environ(?:\.get|\.pop|\.setdefault)?[\[(]"(\w+)"|"(\w+)" in os\.environ', source)
    assert named
    for one in {first or second for first, second in named}:
        assert f"`{one}`" in page, one


# --- the README


def test_the_readme_is_short_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 150
    for target in re.findall(r"\]\(([^)]+)\)", README):
        path, _, anchor = target.partition("#")
        assert (ROOT / path).exists(), target
        headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(encoding="utf-8"), re.M) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings}, (
            target
        )


def test_the_table_is_the_one_of_the_demo_run_that_is_kept():
    report = read_report(ROOT / "benchmarks" / "results" / "demo.json")
    for row in (headers(report), *table(report)):
        pattern = r"\s+".join(re.escape(cell) for cell in row)
        assert re.search(pattern, README), row


def test_the_table_of_tasks_is_made_of_the_reports_that_are_kept():
    rows = runpy.run_path(str(ROOT / "benchmarks" / "tasks.py"))["rows"]()
    assert len(rows) == 7
    for row in rows:
        assert f"| {' | '.join(row)} |" in README


def test_the_screenshot_in_the_readme_is_there_and_is_a_picture():
    (path,) = re.findall(r"!\[[^\]]+\]\(([^)]+\.png)\)", README)
    assert (ROOT / path).read_bytes().startswith(b"\x89PNG")


# --- the examples and figures


def test_the_workflow_for_ci_can_be_run():
    steps = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]["student"]["steps"]
    found = [words for step in steps for words in commands_in(step.get("run", "")) if words]
    for words in found:
        check_command(words)
    assert {words[0] for words in found} == {"doctor", "run", "compare"}


def test_no_figure_stands_without_the_command_that_makes_it():
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    commands = r"make (bench|demo|kills|mutants)|python benchmarks/|kdexport run examples/|kdexport run --teacher"
    for section in re.split(r"\n## ", text)[1:]:
        assert re.search(commands, section), section.splitlines()[0]
