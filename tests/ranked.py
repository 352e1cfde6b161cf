"""Start Python in several processes as torchrun does, and what they run: `python ranked.py CASE FOLDER`.

A case ends as the command line does: one line for an error, and exit code 2.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np

from kdexport import cli, ranks
from kdexport.errors import SpecError

CASE, FOLDER, RANK = "", Path(), os.environ.get("RANK")


def launch(*command, processes=2, **environment) -> list[subprocess.CompletedProcess]:
    """Run Python with these arguments in several processes; return how each ended."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    started = [
        subprocess.Popen(
            [sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | where | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | environment,
        )
        for rank in range(processes)
    ]  # fmt: skip
    ended = [process.communicate(timeout=120) for process in started]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *texts)
        for process, texts in zip(started, ended, strict=True)
    ]


def run_case(case, folder, **environment) -> list[subprocess.CompletedProcess]:
    """Run a case in two processes."""
    return launch(__file__, case, folder, **environment)


@ranks.together
def dealt(items):
    """Fail as the case says; else return what each process was dealt."""
    rank, _ = ranks.part()
    if f"error {rank}" == CASE:
        raise SpecError(f"process {rank} found a fault", "Mend it")
    if f"bug {rank}" == CASE:
        raise TypeError(f"process {rank} has a bug")
    if f"kill {rank}" == CASE:
        os.kill(os.getpid(), signal.SIGKILL)
    return ranks.gathered(ranks.share(items, 2))


def calls():
    """What rank 0 does alone, and what all do."""
    if CASE == "apart":
        (FOLDER / RANK).mkdir()
        os.chdir(FOLDER / RANK)
    with ranks.joined():
        print("only rank 0 prints", file=sys.stderr)
        with ranks.led(lambda: {"distill.epochs": RANK if CASE == "differ" else "3"}) as leads:
            if leads:
                started = [name for name in os.environ if name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")]
                (FOLDER / "calls.json").write_text(json.dumps({"inherited": started, "dealt": dealt(range(7))}))
                if CASE == "apart":  # a folder of each process's own, as on two machines
                    ranks.check_shared(Path("/proc/self/cwd"), "the cache", "Set KDEXPORT_CACHE")
                if CASE == "alone":
                    raise SpecError("rank 0 found a fault", "Mend it")
                if CASE == "wait":
                    time.sleep(4)
        if CASE == "wait":
            (FOLDER / f"{RANK}.seconds").write_text(str(time.process_time()))
        if CASE == "late kill":
            os.kill(os.getpid(), signal.SIGKILL) if RANK == "1" else time.sleep(60)


def train():
    """Train the model of the folder, and write its weights and what was learned."""
    import torch
    from transformers import BertForSequenceClassification

    from kdexport.distill import train
    from kdexport.tasks import load_task

    given = json.loads((FOLDER / "given.json").read_text())
    model, soft = BertForSequenceClassification.from_pretrained(FOLDER), np.load(FOLDER / "soft.npy")
    train.CHECKPOINT_EVERY_S = 0
    how = msgspec.convert(given["how"], train.TrainConfig)
    with ranks.joined(), ranks.led(dict) as leads:
        if leads:
            curve = train.fit(
                model, load_task(FOLDER), given["rows"], soft, how, validation=given["rows"][:25],
                work=FOLDER / "work", title="train", teacher=FOLDER / "teacher",
            )  # fmt: skip
            torch.save(model.state_dict(), FOLDER / "weights.pt")
            (FOLDER / "curve.json").write_text(json.dumps(curve))


def targets():
    """Compute the soft targets of a finished run anew."""
    from kdexport.distill.soft_targets import write_targets

    run = Path(os.environ["FINISHED"])
    with ranks.joined(), ranks.led(dict) as leads:
        if leads:
            write_targets(run / "data", run / "teacher", FOLDER)


def memory():
    """Call `kdexport.run` for images that are not there; write the limit that each process has for decoded ones."""
    import kdexport
    from kdexport.tasks.inputs.cache import memory_for_cache

    data = {"train": "none.csv", "cache_mb": 12}
    settings = {"task": "image-classification", "data": data, "teacher": {"model": "none/none"}}
    try:
        kdexport.run(settings, out=FOLDER / "run")
    finally:
        (FOLDER / RANK).write_text(str(memory_for_cache()))


def resume():
    """Call `kdexport.run` for a finished run."""
    import kdexport

    report = kdexport.run(json.loads((FOLDER / "spec.json").read_text()), out=FOLDER / "run")
    (FOLDER / f"{RANK}.name").write_text(report.recommended)


if __name__ == "__main__":
    CASE, FOLDER = sys.argv[1], Path(sys.argv[2])
    ranks._GRACE_S = 2.0
    cases = {"train": train, "targets": targets, "memory": memory, "resume": resume}
    cli.app = cases.get(CASE.partition(" ")[0], calls)
    sys.argv = ["kdexport", "run"]
    cli.main()
