"""Several processes of one run: what each is dealt, how they end, and that the result is that of one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from conftest import as_flags
from ranked import launch, run_case

from kdexport.files import hash_files
from kdexport.results.report import read_report
from kdexport.stages import read_record


def errors_of(processes) -> list[str]:
    return [line for each in processes for line in each.stderr.splitlines() if line.startswith("error: ")]


def test_rank_0_calls_and_all_do_their_part(tmp_path):
    ended = run_case("all", tmp_path)
    assert [each.returncode for each in ended] == [0, 0], ended
    assert [each.stderr for each in ended] == ["only rank 0 prints\n", ""]
    assert json.loads((tmp_path / "calls.json").read_text()) == {"inherited": [], "dealt": [[0, 1, 4, 5], [2, 3, 6]]}


@pytest.mark.parametrize(
    ("case", "line"),
    [
        ("error 1", "process 1 found a fault. Mend it"),
        ("alone", "rank 0 found a fault. Mend it"),
        ("apart", "the cache /proc/self/cwd is not the same folder for process 1 of 2. Set KDEXPORT_CACHE"),
        ("differ", "the processes were not started alike: distill.epochs is 0 for process 0, 1 for process 1."),
    ],
)
def test_an_error_of_one_ends_all_and_is_printed_once(case, line, tmp_path):
    ended = run_case(case, tmp_path)
    assert [each.returncode for each in ended] == [2, 2]
    [error] = errors_of(ended)
    assert error.startswith(f"error: {line}")


def test_our_own_mistake_has_one_traceback(tmp_path):
    first, second = run_case("bug 1", tmp_path)
    assert (first.returncode, second.returncode) == (1, 1)
    assert "Traceback" not in first.stderr
    assert "process 1 has a bug" in second.stderr


@pytest.mark.parametrize("case", ["kill 0", "late kill"])
def test_where_one_is_killed_the_others_end_with_a_line(case, tmp_path):
    began = time.monotonic()
    ended = run_case(case, tmp_path)
    killed = int(case == "late kill")
    assert ended[killed].returncode == -signal.SIGKILL
    assert ended[1 - killed].returncode == 2
    [error] = errors_of(ended)
    assert "ended without a word" in error
    assert "Run the same command again" in error
    assert time.monotonic() - began < 60


def test_waiting_takes_no_processor_time(tmp_path):
    assert [each.returncode for each in run_case("wait", tmp_path)] == [0, 0]
    began = float((tmp_path / "0.seconds").read_text())  # rank 0 slept
    assert float((tmp_path / "1.seconds").read_text()) < began + 1.5


def test_soft_targets_are_those_of_one_process(finished, tmp_path):
    ended = run_case("targets", tmp_path, KDEXPORT_CACHE=str(tmp_path / "cache"), FINISHED=str(finished))
    assert [each.returncode for each in ended] == [0, 0], ended
    for split in ("train", "validation", "test"):
        ours, theirs = np.load(tmp_path / f"{split}.npy"), np.load(finished / "targets" / f"{split}.npy")
        assert np.abs(ours - theirs).max() <= 1e-6
    shards = list((tmp_path / "cache").glob("targets*/*/*.np?"))
    assert len(shards) >= 2


def test_a_script_has_the_report_in_every_process(copied, settings, cache, tmp_path):
    (copied.parent / "spec.json").write_bytes(msgspec.json.encode(nested(settings)))
    ended = run_case("resume", copied.parent, KDEXPORT_CACHE=str(cache))
    assert [each.returncode for each in ended] == [0, 0], ended
    for rank in (0, 1):
        assert (copied.parent / f"{rank}.name").read_text() == read_report(copied / "report.json").recommended


def test_memory_for_images_is_that_of_the_spec_in_every_process(tmp_path):
    run_case("memory", tmp_path)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["12000000", "12000000"]


def nested(flat) -> dict:
    tree: dict = {}
    for key, value in flat.items():
        *sections, leaf = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    return tree


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["run", "--teacher", "none", "--data", "nowhere.csv"], "nowhere.csv"),
        (["bench", "runs/none"], "kdexport run and demo alone"),
    ],
)
def test_the_command_line_prints_one_line(arguments, line, tmp_path):
    ended = launch("-m", "kdexport", *arguments)
    assert [each.returncode for each in ended] == [2, 2]
    [error] = errors_of(ended)
    assert line in error


def test_a_batch_that_cannot_be_dealt_evenly_is_refused(settings):
    flags = as_flags(settings | {"distill.batch_size": 15})
    ended = launch("-m", "kdexport", "run", *flags, "--plan")
    assert [each.returncode for each in ended] == [2, 2]
    [error] = errors_of(ended)
    assert error == ("error: distill.batch_size: 15 rows a step can't be dealt evenly to 2 processes. Take 16, say")


def test_the_plan_shows_the_rows_of_each_process(settings):
    plan, nothing = launch("-m", "kdexport", "run", *as_flags(settings), "--plan", "--json")
    found = json.loads(plan.stdout)["distill.batch_size"]
    assert found == {"value": "16", "reason": "as given; 8 in a pass of each of 2 processes"}
    assert nothing.stdout == nothing.stderr == ""


# --- whole runs


def torchrun(*arguments, cache, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]
    return subprocess.Popen(
        command, env=os.environ | {"KDEXPORT_CACHE": str(cache)}, stderr=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL, start_new_session=True, **options,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_of_several_processes_resumes_after_a_kill_on_two_machines(finished, settings, tmp_path):
    """torchrun, a rank killed in training; then two agents, as on two machines; then accelerate launch."""
    out, cache = tmp_path / "run", tmp_path / "cache"
    run = ["-m", "kdexport", "run", *as_flags(settings), "--out", str(out)]
    first = torchrun("--nproc-per-node", "2", *run, cache=cache)
    while not (out / "targets/stage.json").exists() or not (out / ".kdexport-student").exists():
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(first.pid)], capture_output=True, text=True, check=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    _, log = first.communicate(timeout=60)
    assert first.returncode != 0
    assert len([line for line in log.splitlines() if line.startswith("error: ")]) == 1
    before = {stage: read_record(out / stage) for stage in ("data", "teacher", "targets")}

    agents = [
        torchrun(
            "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "kdexport",
            "--rdzv-endpoint", "localhost:29477", *run, cache=cache,
        )
        for _ in range(2)
    ]  # fmt: skip
    logs = [agent.communicate(timeout=600)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], logs
    assert before == {stage: read_record(out / stage) for stage in before}

    found, single = read_report(out / "report.json"), read_report(finished / "report.json")
    assert {path.name for path in out.iterdir()} == {path.name for path in finished.iterdir()}
    assert {v.name for v in found.variants} == {v.name for v in single.variants}
    ours, theirs = (next(v for v in each.variants if v.name == "student-fp32") for each in (found, single))
    assert ours.metric.ci95[0] <= theirs.metric.value <= ours.metric.ci95[1]

    sums = hash_files(out, without=frozenset({".kdexport"}))
    again = subprocess.run(
        [shutil.which("accelerate", path=str(Path(sys.executable).parent)) or "accelerate", "launch", "--multi_gpu",
         "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", *run],
        env=os.environ | {"KDEXPORT_CACHE": str(cache)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert "student: done before" in again.stderr
    assert {*sums} == {*hash_files(out, without=frozenset({".kdexport"}))}
