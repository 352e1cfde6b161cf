"""Graphs of the same weights on both lines of transformers, and by both exporters, in turns.

    .venv-4.57/bin/python benchmarks/exporters.py write MODELS OLD     # Optimum's graphs, operator by operator
    .venv/bin/python benchmarks/exporters.py write MODELS NEW
    .venv/bin/python benchmarks/exporters.py measure MODELS OLD NEW

`write` makes the twenty small models of tests/families.py where MODELS has none, and every candidate file of each.
`measure` runs the plain file of OLD and each candidate of NEW on one thread, in shuffled turns, and prints the speedup
of each over OLD's, with its 95 % interval over rounds, and its size as a fraction.
"""

import argparse
import random
import sys
import timeit
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

ROUNDS, SECONDS = 20, 0.15
PRECISIONS = ("fp32", "int8")


def write(models: Path, out: Path, names: list[str]) -> None:
    import families

    from kdexport import spec
    from kdexport.export import export_student

    for name in names or families.EVERY:
        if not (models / name).exists():
            families.write(name, models / name)
        (out / name).mkdir(parents=True, exist_ok=True)
        export_student(spec.Export(variants=PRECISIONS), models / name, out / name)


def measure(models: Path, old: Path, new: Path, names: list[str]) -> None:
    from kdexport.bench.stats import ratio
    from kdexport.export import read_candidates
    from kdexport.runtime.predictor import Predictor
    from kdexport.tasks import load_task

    for name in names or sorted(path.name for path in new.iterdir()):
        task = load_task(models / name)
        for precision in PRECISIONS:
            before = next((c for c in read_candidates(old / name) if c.name == precision), None)
            if before is None:
                continue
            files = {"before": old / name / before.file}
            files |= {c.name: new / name / c.file for c in read_candidates(new / name) if c.precision == precision}
            predictors = {label: Predictor(task, file, threads=1) for label, file in files.items()}
            for length in (32, 128) if task.modality == "text" else (1,):
                arrays = task.sized(task.examples() * 20, length)
                rounds = {label: [] for label in files}
                for i in range(ROUNDS + 1):
                    for label in random.Random(i).sample(list(files), len(files)):
                        run = partial(predictors[label].run, arrays)
                        count = max(1, int(SECONDS / max(timeit.timeit(run, number=1), 1e-6)))
                        times = timeit.repeat(run, number=1, repeat=min(count, 200))
                        rounds[label].append(1e3 * float(np.median(times)))
                line = [f"{name:<12}{precision} {length:>4}  before {np.median(rounds['before'][1:]):.3f} ms"]
                for label, file in files.items():
                    size = file.stat().st_size / files["before"].stat().st_size
                    if label != "before":
                        faster = ratio(rounds["before"][1:], rounds[label][1:])
                        low, high = faster.ci95 or (faster.value, faster.value)
                        line.append(f"{label} {faster.value:.2f}× [{low:.2f}–{high:.2f}], size {size:.2f}")
                print("  ".join(line), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("write", "measure"))
    parser.add_argument("folders", nargs="+", type=Path, help="MODELS OUT, or MODELS OLD NEW")
    parser.add_argument("--models", nargs="*", default=[], help="some of tests/families.py")
    given = parser.parse_args()
    {"write": write, "measure": measure}[given.what](*given.folders, given.models)
