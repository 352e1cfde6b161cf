"""Who may import whom; and that the light side stays light."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "kdexport"

# From the top down; a room may import rooms of lower levels, and its own.
LEVELS = [
    {"__main__"},
    {"cli"},
    {"pipeline", "schemas"},
    {"integrations"},
    {"serve", "asking"},
    {"distill", "export", "bench", "report"},
    {"models"},
    {"runtime"},
    {"data"},
    {"analysis"},
    {"spec"},
    {"tasks"},
    {"results"},
    {"stages"},
    {"output", "ranks"},
    {"locks"},
    {"files"},
    {"progress"},
    {"errors"},
]
LEVEL = {room: i for i, rooms in enumerate(LEVELS) for room in rooms}
TORCH = {"torch", "transformers", "optimum", "accelerate", "safetensors"}
TORCH_ROOMS = {
    "distill",
    "models",
    "asking/choose.py",
    "export/onnx.py",
    "export/speech.py",
    "bench/subjects.py",
    "ranks.py",
}


def imports(path: Path, top_level_only=False):
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.split(".") for name in names)


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downward_only(path):
    mine = room(path)
    for parts in imports(path):
        if parts[0] == "kdexport" and len(parts) > 1 and parts[1] in LEVEL and mine in LEVEL:
            other = parts[1]
            assert other == mine or LEVEL[other] > LEVEL[mine], f"{mine} imports {other}"
        relative = path.relative_to(PACKAGE).as_posix()
        if parts[0] in TORCH:
            assert mine in TORCH_ROOMS or relative in TORCH_ROOMS, f"{relative} imports {parts[0]}"


def test_every_room_has_a_level():
    rooms = {room(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert rooms == set(LEVEL)


@pytest.mark.parametrize(
    "code",
    [
        "import kdexport",
        "import kdexport.cli; kdexport.cli.app(['--help'], standalone_mode=False)",
        "import kdexport; kdexport.load",
        "import kdexport.pipeline.run, kdexport.pipeline.export_model",
        "from kdexport.integrations import kubernetes, triton",
        "import kdexport.export.verify, kdexport.export.quantize, kdexport.export.fuse",
    ],
)
def test_the_light_side_loads_no_torch(code):
    probe = f"{code}\nimport sys; print(sorted(set(sys.modules) & {{'torch', 'transformers', 'datasets'}}))"
    found = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"


# Where a package may be imported that neither prediction nor the server needs, and so may be absent.
TRAINING = {
    "scipy",
    "sklearn",
    "pandas",
    "pyarrow",
    "datasets",
    "datasketch",
    "onnx",
    "peft",
    "skeletoken",
    "safetensors",
}
DISTRIBUTIONS = packages_distributions() | {"google": ["protobuf"]}
TRAINING_ROOMS = {"distill", "asking", "models", "export", "data/sources.py", "data/read.py", "analysis/duplicates.py"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_package_that_is_imported_is_declared(path):
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = {name(line) for lines in (project["dependencies"], *extras.values()) for line in lines}
    relative = path.relative_to(PACKAGE).as_posix()
    for module, *_ in imports(path):
        if module in sys.stdlib_module_names or module in ("kdexport", "triton_python_backend_utils"):
            continue
        assert any(name(each) in declared for each in DISTRIBUTIONS.get(module, [module])), (
            f"{relative} imports {module}"
        )
        light = room(path) not in TRAINING_ROOMS and relative not in TRAINING_ROOMS
        assert not (light and module in TRAINING), f"{relative} imports {module}"


def name(requirement):
    return re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")


def test_the_package_stays_small():
    lines = {p: len(p.read_text().splitlines()) for p in PACKAGE.rglob("*.py")}
    assert max(lines.values()) <= 400, max(lines, key=lines.get)
    assert sum(lines.values()) <= 33818


def test_nothing_outside_its_file_names_a_task():
    """Tasks say what differs; the server's protocols render them; Optimum is told its own names of exports."""
    from kdexport.tasks import BUILT_IN

    classes = [value.rpartition(":")[2] for value in BUILT_IN.values()]
    modules = [value.partition(":")[0].rpartition(".")[2] for value in BUILT_IN.values()]
    quoted = [f'"{name}"' for name in BUILT_IN]
    # In quotes, a module's name is that of a model's output.
    unquoted = rf"(?<![\"`])\b({'|'.join([*classes, *modules])})\b"
    named = re.compile(rf"{'|'.join(quoted)}|{unquoted}|isinstance\(\w*\.?task\b")
    found = [
        f"{path.relative_to(PACKAGE)}:{number}: {line.strip()}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if not path.relative_to(PACKAGE).as_posix().startswith(("tasks/", "serve/protocols/"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if named.search(line) and "library_name=" not in line
    ]
    assert found == []
