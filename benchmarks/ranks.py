"""Two processes against one, one thread each: the teacher's pass and the training of a student, in turns.

`python benchmarks/ranks.py DATA.csv [--rows 8000] [--rounds 3]`; `BATCH=128` before it takes 128 rows a step for 32.
The times of two processes have the opening of the second one's teacher, and the copy of model and rows, in them; ratios
are of one round.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    """Prepare rows and models once, then time both numbers of processes in each round."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        work(Path(given.inside))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(given.data, given.rows, Path(folder))
        for number in range(given.rounds):
            order = (1, 2) if number % 2 else (2, 1)
            found = {processes: timed(processes, Path(folder)) for processes in order}
            one, two = found[1], found[2]
            each = [f"{n}: {one[n]:.1f} s, {two[n]:.1f} s, {one[n] / two[n]:.2f}×" for n in one]
            shown = "; ".join(each)
            print(f"round {number + 1}, one process and two: {shown}", flush=True)


def prepare(data: str, rows: int, folder: Path) -> None:
    """Write the data stage and the teacher, with a fresh head, as stages of a run."""
    from kdexport import spec
    from kdexport.data import demo, read_rows, read_summary
    from kdexport.data import prepare as prepare_data
    from kdexport.data.rows import write_rows
    from kdexport.models.loading import open_config, open_model
    from kdexport.models.saving import save_model, save_task

    (folder / "data").mkdir()
    (folder / "teacher").mkdir()
    (folder / "student").mkdir()
    prepare_data(spec.Data(train=data), "text-classification", 0, folder / "data")
    labels = read_summary(folder / "data").labels
    write_rows(folder, "some", read_rows(folder / "data", "train")[:rows])
    opened = open_model(demo.teacher(), open_config(demo.teacher()), "text-classification", labels)
    save_task(opened, 64, labels, folder / "teacher", task="text-classification")
    save_model(opened, folder / "teacher")


def timed(processes: int, folder: Path) -> dict[str, float]:
    """Run the work in so many processes of one thread, and return its seconds by name."""
    command = [sys.executable, __file__, "-", "--inside", str(folder)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), *command[1:]]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "KDEXPORT_CACHE": cache, "TOKENIZERS_PARALLELISM": "false"}
        subprocess.run(launch if processes > 1 else command, env=environment, check=True)
    found: dict[str, float] = json.loads((folder / "seconds.json").read_text())
    return found


def work(folder: Path) -> None:
    """Compute soft targets of all rows, and train a student on them for an epoch; time each after a warm-up."""
    import numpy as np

    from kdexport import ranks, spec
    from kdexport.data import read_rows
    from kdexport.distill.student import build_student
    from kdexport.distill.teacher_outputs import Teacher
    from kdexport.distill.teachers import TeacherFolder
    from kdexport.distill.train import TrainConfig, fit
    from kdexport.files import hash_files
    from kdexport.models.saving import save_task
    from kdexport.tasks import load_task

    with ranks.joined(), ranks.led(dict) as leads:
        if not leads:
            return
        rows, task, seconds = read_rows(folder, "some"), load_task(folder / "teacher"), {}
        named = TeacherFolder(folder / "teacher", "", "torch", "teacher")
        teacher = Teacher(named, hash_files(folder / "teacher"), spec.Teacher(model="teacher"), 0)
        teacher.read(rows[:32], "warm-up")
        began = time.perf_counter()
        teacher.read(rows, "teacher")
        seconds["teacher's pass"] = time.perf_counter() - began
        soft = teacher.answers(rows)
        for name in ("warm-up", "training"):
            some = rows[:64] if name == "warm-up" else rows
            opened = build_student(spec.Student(), "mini", folder / "teacher", (row["text"] for row in rows)).opened
            if ranks.leads():
                save_task(opened, 64, task.labels, folder / "student", task=task.name)
            model, task = opened.model, load_task(folder / "student")
            how = TrainConfig(epochs=1, learning_rate=1e-4, batch_size=int(os.environ.get("BATCH", "32")), seed=0)
            began = time.perf_counter()
            fit(model, task, some, np.asarray(soft[: len(some)]), how, validation=[], work=folder / "work", title=name)
            seconds[name] = time.perf_counter() - began
        del seconds["warm-up"]
        (folder / "seconds.json").write_text(json.dumps(seconds))


if __name__ == "__main__":
    main()
