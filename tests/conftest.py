"""Real texts, real weights, small: 300 BBC articles, and teachers made of the lowest layers of all-MiniLM."""

from __future__ import annotations

import atexit
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import msgspec
import pytest
from filelock import FileLock

from kdexport import spec
from kdexport.data import demo
from kdexport.files import hash_files


def own_home() -> None:
    """Let nothing be written into the user's home, nor read from it, but by pip; give each process one core."""
    home, users = Path(tempfile.mkdtemp(prefix="kdexport-tests-")), Path.home()
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    for name in (".config/pip", ".cache/pip", ".pip"):
        if (users / name).is_dir():
            (home / name).parent.mkdir(exist_ok=True)
            (home / name).symlink_to(users / name)
    for name in ("KDEXPORT_CACHE", "HF_HOME", *(name for name in os.environ if name.startswith("XDG_"))):
        os.environ.pop(name, None)
    os.environ |= {"HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


# Before anything loads torch or Hugging Face's libraries, which read it once.
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit it
    own_home()
# Background jobs ignore Ctrl-C, and so would the processes that tests start to interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples every time; `--hypothesis-profile search` looks for new ones.
for name, examples in (("same", 40), ("search", 400)):
    hypothesis.settings.register_profile(
        name,
        max_examples=examples,
        deadline=None,
        derandomize=name == "same",
        suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
    )
hypothesis.settings.load_profile("same")


def pytest_report_header() -> str:
    from kdexport.bench.machine import environment

    facts = environment()
    return f"{facts['cpu']}, {facts['cores_allowed']} cores; " + ", ".join(
        f"{name} {version}" for name, version in facts["packages"].items()
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the rooms that have whole runs of their own, so that no worker is left alone with one in the end."""
    long = ("pipeline", "bench", "integrations", "tests")
    items.sort(key=lambda item: item.path.parent.name not in long)


def pytest_collection_finish() -> None:
    """Keep what all imports made out of garbage collections, which each training ends with."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """The folder that all workers of this session share."""
    root = tmp_path_factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "shared"
    root.mkdir(exist_ok=True)
    return root


@pytest.fixture(scope="session")
def once(shared) -> Iterator[Callable[[str, Callable[[Path], object]], Path]]:
    """Make a folder in the first worker that needs it; the others wait. Nothing may change it afterwards."""
    made: dict[Path, dict[str, str]] = {}

    def get(name: str, make: Callable[[Path], object]) -> Path:
        folder, record = shared / name, shared / f"{name}.made"
        with FileLock(shared / f"{name}.lock"):
            if not record.exists():
                shutil.rmtree(folder, ignore_errors=True)
                make(folder)
                record.write_bytes(msgspec.json.encode(hash_files(folder)))
        made[folder] = msgspec.json.decode(record.read_bytes())
        return folder

    yield get
    for folder, before in made.items():
        assert hash_files(folder) == before, f"a test changed {folder}, which all tests share"


@pytest.fixture(scope="session")
def articles(tmp_path_factory) -> list[dict[str, str]]:
    """300 distinct BBC articles, 60 of each class, shuffled."""
    path = tmp_path_factory.mktemp("bbc") / "bbc.jsonl"
    demo.write_bbc_news(path)
    by_label = defaultdict(dict)
    for line in path.read_bytes().splitlines():
        row = msgspec.json.decode(line)
        by_label[row["label"]][row["text"]] = row
    rows = [row for found in by_label.values() for row in list(found.values())[:60]]
    random.Random(0).shuffle(rows)
    return rows


@pytest.fixture(scope="session")
def articles_file(articles, once) -> Path:
    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "articles.jsonl").write_bytes(b"\n".join(msgspec.json.encode(row) for row in articles))

    return once("data", make) / "articles.jsonl"


@pytest.fixture(scope="session")
def base_model(once) -> Path:
    """The two lowest layers of all-MiniLM-L6-v2 with its tokenizer: a small pretrained model without a head."""
    from transformers import AutoModel, AutoTokenizer

    def make(folder: Path) -> None:
        AutoModel.from_pretrained(demo.teacher(), num_hidden_layers=2).save_pretrained(folder)
        AutoTokenizer.from_pretrained(demo.teacher()).save_pretrained(folder)

    return once("minilm-2", make)


@pytest.fixture(scope="session")
def optimum() -> Callable[[str, Path, str, list], list]:
    """Ask Optimum's ORTModel classes: class, folder, file, inputs → answers. See optimum_reads.py."""
    tests = Path(__file__).parent
    python = tests.parent / ".venv-4.57" / "bin" / "python"
    if not python.exists():
        pytest.skip("make test-4.57 makes the environment that Optimum's ORTModel classes need")

    def ask(kind: str, folder: Path, file: str, inputs: list) -> list:
        done = subprocess.run(
            [python, tests / "optimum_reads.py", kind, folder, file], input=json.dumps(inputs), text=True,
            capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return ask


CLASSIFIERS = {
    "single-label": {"num_labels": 3},
    "multi-label": {"num_labels": 3, "problem_type": "multi_label_classification"},
    "one-label": {"num_labels": 1},
    "one-label-said-single": {"num_labels": 1, "problem_type": "single_label_classification"},
    "regression": {"num_labels": 1, "problem_type": "regression"},
}


@pytest.fixture(scope="session")
def classifier(base_model, tmp_path_factory):
    """The base model with a random head of each kind, as someone else's `save_pretrained` folder."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    def make(kind: str):
        folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(base_model, **CLASSIFIERS[kind])
        with torch.no_grad():
            model.classifier.weight.mul_(20)
            model.classifier.bias.copy_(torch.linspace(-1, 1, CLASSIFIERS[kind]["num_labels"]))
        if kind == "single-label":
            model.config.id2label = {0: "good", 1: "bad", 2: "neither"}
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(base_model).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def settings(articles_file, base_model) -> dict:
    """Overrides of a spec whose run takes about half a minute."""
    return {
        "data.train": str(articles_file),
        "data.max_length": 32,
        "teacher.model": str(base_model),
        "teacher.train.epochs": 3,
        "teacher.train.learning_rate": 5e-4,
        "distill.augment.views": 0,
        "distill.epochs": 12,
        "distill.batch_size": 16,
        "distill.learning_rate": 1e-3,
        "bench.rounds": 2,
        "bench.round_seconds": 0.4,
        "bench.precision": None,
        "bench.batch_sizes": [8],
        "bench.time_limit_s": 600,
    }


@pytest.fixture(scope="session")
def cache(shared) -> Path:
    return shared / "cache"


@pytest.fixture(scope="session")
def finished(settings, cache, once) -> Path:
    """A finished run; tests only read it."""
    from kdexport.pipeline.run import run

    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KDEXPORT_CACHE", str(cache))
            run(spec.load(None, settings), folder)

    return once("finished", make)


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A copy of the finished run, to change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="session")
def kdexport(cache):
    """Call the command line in a process of its own."""

    def call(*arguments: object, input: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "kdexport", *map(str, arguments)],
            input=input,
            capture_output=True,
            text=True,
            env=os.environ | {"KDEXPORT_CACHE": str(cache), "COLUMNS": "200"} | environment,
        )

    return call


def as_flags(settings: dict) -> list[str]:
    """A spec's overrides as command-line flags."""
    return [
        part for key, value in settings.items() for part in ("--set", f"{key}={'null' if value is None else value}")
    ]
