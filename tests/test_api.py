"""The Python functions beside the commands: the same parameters, the same errors, the same records."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import click
import msgspec
import pytest
import typer

import kdexport as package
from kdexport import spec
from kdexport.cli import app
from kdexport.pipeline import api
from kdexport.spec.flags import KEYS

# Flags that say what to print, or which exit code; and what the command line alone knows.
OF_THE_TERMINAL, OF_THE_COMMAND = {"plan", "json", "debug", "unsure_fails"}, {"command"}


def flags(command: str) -> dict[str, object]:
    """Name → default of a command's arguments and flags, as typer reads them."""
    found = {}
    for param in typer.main.get_command(app).commands[command].params:
        name = param.name if isinstance(param, click.Argument) or not param.opts else max(param.opts, key=len)
        default = inspect.Parameter.empty if param.required else param.default
        found[name.lstrip("-").replace("-", "_")] = default
    return {name: default for name, default in found.items() if name not in {*OF_THE_TERMINAL, "help"}}


@pytest.mark.parametrize("command", ["run", "export", "bench", "compare"])
def test_a_function_has_the_names_and_defaults_of_its_commands_flags(command):
    parameters = inspect.signature(package.__getattr__(command)).parameters.values()
    assert {p.name: p.default for p in parameters if p.name not in OF_THE_COMMAND} == flags(command)


def test_every_flag_of_run_is_of_the_function_or_sets_a_key_that_exists():
    assert {*flags("run")} - {"spec", "set", "out", "move_aside"} == {*KEYS}
    assert {*KEYS.values()} <= {*spec.settings()}


def test_keywords_lie_over_a_file_its_content_or_a_spec(tmp_path):
    content = {"data": {"train": "a.csv"}, "teacher": {"model": "./t"}, "distill": {"temperature": 3.0}}
    (tmp_path / "tickets.yaml").write_bytes(msgspec.yaml.encode(content))
    given = {"temperature": 4, "max_p99": "0.002s", "no_baseline": True, "student": [Path("a"), "b"], "seed": 0}
    given |= {"teacher": None, "skip_bad_rows": False, "set": {"distill.batch_size": 64}}
    found = [api.settings_of(tmp_path / "tickets.yaml", given), api.settings_of(content, given)]
    found.append(api.settings_of(spec.parse(content, "here"), given))
    for settings in found:
        assert settings == found[0]
        assert (settings.distill.temperature, settings.distill.batch_size, settings.distill.baseline) == (
            4.0,
            64,
            False,
        )
        assert (settings.budget.p99_ms, settings.student.model, settings.teacher.model) == (2.0, ("a", "b"), "./t")
    assert content["distill"] == {"temperature": 3.0}
    folders = [
        api.run_folder(given, found[0]) for given in (tmp_path / "tickets.yaml", tmp_path / "spec.yaml", content)
    ]
    assert list(map(str, folders)) == ["runs/tickets", "runs/a", "runs/a"]


WRONG = [
    (lambda: package.run(), package.SpecError, "'data.train' is missing"),
    (lambda: package.run(max_p99="fast"), package.SpecError, "--max-p99 'fast' can't be read"),
    (lambda: package.run("no.yaml"), package.SpecError, "spec no.yaml does not exist"),
    (lambda: package.run(data="no.csv", teacher="./t"), package.DataError, "no.csv does not exist"),
    (lambda: package.bench("x", threads=[0]), package.SpecError, "--threads '0' can't be read"),
    (lambda: package.bench("x", rate=[]), package.SpecError, "--rate"),
    (lambda: package.bench("x", rounds=0), package.SpecError, "--rounds: Expected `int` >= 1"),
    (lambda: package.export("nowhere", "out"), package.ModelError, "nowhere does not exist"),
    (lambda: package.export("m", "out", variants=["fp33"]), package.SpecError, "--variants ['fp33'] can't be read"),
    (lambda: package.export("m", "out", max_length=2), package.SpecError, "--max-length 2 is below 8"),
    (lambda: package.export("m", "out", layout="x"), package.SpecError, "--layout 'x' is none of hub, triton, kserve"),
    (lambda: package.compare("a", "b"), package.RunError, "a does not exist"),
    (lambda: package.compare("a", "b", fail_if="x"), package.SpecError, "--fail-if 'x' can't be read"),
    (lambda: package.load("nowhere:int8"), package.ArtifactError, "nowhere is no artifact"),
]


@pytest.mark.parametrize(("call", "error", "says"), WRONG, ids=[says for _, _, says in WRONG])
def test_what_the_user_did_wrong_is_raised_before_any_work(call, error, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as caught:
        call()
    assert says in str(caught.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def probe(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_the_package_loads_none_of_its_libraries():
    heavy = "{'numpy', 'msgspec', 'yaml', 'typer', 'onnxruntime', 'torch'}"
    assert probe(f"import kdexport, sys; dir(kdexport); print({heavy} & set(sys.modules))") == "set()"


def test_all_names_can_be_had_before_and_after_the_folders_of_their_names_are_imported():
    assert sorted(dir(package)) == sorted(package.__all__)
    code = "import kdexport as k; print(callable(k.bench), callable(k.export)); import kdexport.bench.stats as s\n"
    code += "import kdexport.export.fuse; print(callable(k.bench), callable(k.export), k.bench.stats is s)\n"
    code += "print(all(getattr(k, name) for name in k.__all__))"
    assert probe(code).split() == ["True"] * 6


def test_names_in_cards_and_configs_of_older_versions_still_stand():
    assert probe("from kdexport.generation import Sampling, write; print(Sampling.__name__)") == "Sampling"
    code = "import importlib; m = importlib.import_module('kdexport.serve.ray'); print(m.application.__module__)"
    assert probe(code) == "kdexport.integrations.ray"


def test_type_checkers_see_the_functions(tmp_path):
    code = "import kdexport\nimport kdexport.bench.stats\n"
    code += "reveal_type(kdexport.run(data='a').budget.met)\nreveal_type(kdexport.bench('a'))\nkdexport.load(3)\n"
    (tmp_path / "user.py").write_text(code)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "user.py"]
    source = os.environ | {"MYPYPATH": str(Path(package.__file__).parents[1])}  # mypy can't follow an editable install
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=source)
    lines = found.stdout.splitlines()
    assert ['"bool | None"' in lines[0], "Report" in lines[1], "arg-type" in lines[2], len(lines)] == [True] * 3 + [4]


def test_a_variant_follows_its_folder(finished, tmp_path, monkeypatch, kdexport):
    assert package.load(f"{finished}:fp32").predict("a") == package.load(finished, "fp32").predict("a")
    for call in (
        lambda: package.load(f"{finished}:int4"),
        lambda: package.load(finished, "int4"),
        lambda: package.bench(f"{finished}:int4"),
        lambda: package.export(f"{finished}:int4", tmp_path / "out", layout="triton"),
        lambda: package.load(f"{finished}:fp32", "int8"),
    ):
        with pytest.raises(
            package.ArtifactError, match=r"has no variant 'int4'. It has: fp32, int8|Name one"
        ) as caught:
            call()
    assert "names the variant fp32, and int8 is asked for too" in str(caught.value)
    (tmp_path / "c:int8").symlink_to(finished)
    monkeypatch.chdir(tmp_path)
    assert package.load("c:int8:fp32").predict("a") == package.load(f"{finished}:fp32").predict("a")
    assert package.load("c:int8").predict("a") == package.load(finished).predict("a")
    said = kdexport("predict", f"{finished}:int4", "a").stderr
    assert said == f"error: {finished}/artifact has no variant 'int4'. It has: fp32, int8\n"
    changes = package.compare(f"{finished}:fp32", f"{finished}:int8", measure=False).changes
    assert len({change.variant for change in changes}) == 1
    assert "fp32 → student-int8" in changes[0].variant


def test_a_pair_stands_in_a_list(finished):
    model = package.load(f"{finished}:fp32")
    (pair,) = model.predict([("Shares rose", "on Monday")])
    first, second = model.predict(["Shares rose", "on Monday"])
    assert model.predict("Shares rose")[0].scores == pytest.approx(first.scores, abs=1e-4)
    assert pair.scores != first.scores != second.scores
    assert model.predict(()) == model.predict([]) == []
    with pytest.raises(package.DataError, match=r'Write \[\("a", "b"\)\] or \["a", "b"\]'):
        model.predict(("Shares rose", "on Monday"))
