"""A real `kill -9` in every stage; the same result in the end."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import as_flags

from kdexport.stages import read_record

STAGES = ("data", "teacher", "targets", "student", "export", "baseline", "verify", "bench", "artifact")

# Checkpoints after every epoch, so that short trainings have some.
CALL = "import kdexport.distill.train as t; t.CHECKPOINT_EVERY_S = 0; from kdexport.cli import main; main()"


def start(settings, out, cache) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", CALL, "run", *as_flags(settings), "--out", str(out)],
        env=os.environ | {"KDEXPORT_CACHE": str(cache)},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def kill_in(stage, settings, out, cache) -> bool:
    """Start a run and kill it, with its children, in the middle of a stage; False if the stage was too quick."""
    work = out / f".kdexport-{stage}"
    process = start(settings, out, cache)
    try:
        while process.poll() is None and not (out / stage).exists():
            training = stage in ("teacher", "student", "baseline")
            if list(work.glob("checkpoints/*/trainer_state.json")) if training else work.exists():
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return not (out / stage).exists()
            time.sleep(0.002)
        process.wait()
        return False
    finally:
        process.stderr.close()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_killed_in_every_stage_ends_with_the_same_result(finished, settings, tmp_path):
    out, cache = tmp_path / "killed", tmp_path / "cache"
    killed = [stage for stage in STAGES if kill_in(stage, settings, out, cache)]
    last = start(settings, out, cache)
    _, log = last.communicate()
    assert last.returncode == 0, log
    assert {"teacher", "student", "baseline", "bench", "export"} <= set(killed)
    for stage in ("data", "teacher", "targets", "student", "baseline", "verify"):
        ours, theirs = read_record(out / stage).outputs, read_record(finished / stage).outputs
        if stage == "verify":
            assert (out / "verify/quality.json").read_text() == (finished / "verify/quality.json").read_text()
        else:
            assert ours == theirs, stage
    assert np.array_equal(np.load(out / "student/reference.npy"), np.load(finished / "student/reference.npy"))
    assert not list(out.glob(".kdexport-*"))
