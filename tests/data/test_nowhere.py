"""Names that are no folders, where the hub is out of reach: one line at once, without its client's retries."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

BUILT_IN = "sentence-transformers/all-MiniLM-L6-v2"
NOWHERE = "it is no folder, nor downloaded from the hub before. Check the path"
WARNING = "warning: http://127.0.0.1:9 can't be reached: only what was downloaded before can be opened\n"


def kdexport(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run where nothing listens at the hub's address, and the client was not told to be offline."""
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "kdexport", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | nowhere | environment, timeout=120)


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"text {i}", "label": "ab"[i % 2]}) + "\n" for i in range(20)))
    return file


@pytest.mark.parametrize(
    ("teacher", "warned", "says"),
    [
        ("someone/some-model", WARNING, f"model 'someone/some-model' can't be opened: {NOWHERE}"),
        ("models/bert2", WARNING, f"model 'models/bert2' can't be opened: {NOWHERE}"),
        ("a/b/c", "", "model folder a/b/c does not exist. Name a folder written by save_pretrained"),
    ],
)
@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_teacher_that_is_nowhere_is_one_line_before_any_work(tmp_path, rows, teacher, warned, says, offline):
    done = kdexport("run", "--teacher", teacher, "--data", rows, "--out", tmp_path / "run", HF_HUB_OFFLINE=offline)
    warned = warned if offline == "0" else ""
    assert (done.returncode, done.stderr) == (2, f"{warned}error: {says}\n")
    assert not (tmp_path / "run" / "data").exists()


@pytest.mark.parametrize("flag", ["--teacher", "--student"])
def test_a_folder_that_is_not_there_is_named_before_any_work(tmp_path, rows, flag):
    named = {"--teacher": BUILT_IN, flag: tmp_path / "bert2"}
    flags = [part for pair in named.items() for part in pair]
    done = kdexport("run", *flags, "--data", rows, "--out", tmp_path / "run")
    says = f"error: model folder {tmp_path}/bert2 does not exist. Name a folder written by save_pretrained\n"
    assert (done.returncode, done.stderr) == (2, says)


@pytest.mark.parametrize("command", ["export some/model {tmp}/out", "bench some/model --data {rows} --out {tmp}/out"])
def test_other_commands_ask_once_too(tmp_path, rows, command):
    done = kdexport(*command.format(tmp=tmp_path, rows=rows).split())
    assert done.returncode == 2
    assert done.stderr == f"{WARNING}error: model 'some/model' can't be opened: {NOWHERE}\n"


def test_a_data_set_that_is_nowhere_is_one_line(tmp_path):
    done = kdexport("run", "--teacher", BUILT_IN, "--data", "some/data", "--out", tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr.startswith(f"{WARNING}error: no file and no data set on the hub: 'some/data'")
    assert done.stderr.count("\n") == 2


@pytest.mark.parametrize("out", ["/proc/kdexport/run", "{file}/run"])
def test_a_folder_that_can_not_be_written_is_one_line_before_any_work(tmp_path, rows, out):
    out = out.format(file=rows)
    done = kdexport("run", "--teacher", BUILT_IN, "--data", rows, "--out", out)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {out} can't be used: ")
    assert done.stderr.endswith(". Name another folder\n")
    assert done.stderr.count("\n") == 1
