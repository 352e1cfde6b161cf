"""Students of one teacher on clinc150: what each change of the recipe gave, each a `kdexport run`.

    python benchmarks/students.py --data ../shared/data/clinc150 --work runs/students

The teacher is fine-tuned once; soft targets are shared by all. What is finished is kept, so `--only` can go on.
Writes `benchmarks/results/students.json` and prints it as a table. `--quiet` measures latency at length: nothing
else should run then.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from kdexport.bench.machine import environment
from kdexport.data import demo
from kdexport.runtime.predictor import Predictor
from kdexport.tasks import load_task
from kdexport.tasks.metrics import roc_auc, softmax

TEACHER = ["--teacher-epochs", "6", "--set", "teacher.train.learning_rate=2e-4", "--set", "teacher.train.batch_size=32"]
VIEWS = ["--augment", "8", "--set", "distill.batch_size=64"]
# Longer, over three times as many copies, on what the teacher says alone and softer.
PATIENT = ["--augment", "24", "--epochs", "4", "--alpha", "1", "--temperature", "4", "--set", "distill.batch_size=64"]
WIDE = ["--set", "student.embedding=384"]
TINY = ["--student", "tiny", "--set", "distill.learning_rate=1e-3"]
RANDOM = ["--set", "student.start=embeddings"]

# name → flags; one change at a time from the line that it names
RECIPES: dict[str, list[str]] = {
    "tiny, random layers, labels alone": [*TINY, *RANDOM, "--alpha", "0"],
    "tiny, random layers": [*TINY, *RANDOM],
    "tiny": TINY,
    "tiny, logit MSE": [*TINY, "--loss", "mse", "--alpha", "1"],
    "tiny, DIST": [*TINY, "--loss", "dist"],
    "tiny, KL and relations": [*TINY, "--set", "distill.loss={kl: 1, relation: 1}"],
    "tiny, whole vocabulary": [*TINY, "--set", "student.vocabulary=whole"],
    "tiny, wide, labels alone": [*TINY, *WIDE, "--alpha", "0", "--epochs", "15"],
    "tiny, wide": [*TINY, *WIDE],
    "tiny, wide, 8 views": [*TINY, *WIDE, *VIEWS],
    "tiny, wide, 24 views": [*TINY, *WIDE, *PATIENT],
    "bag, labels alone": ["--student", "bag", "--alpha", "0", "--epochs", "15"],
    "bag": ["--student", "bag"],
    "bag, 8 views": ["--student", "bag", *VIEWS],
    "bag, 24 views": ["--student", "bag", *PATIENT],
    "cnn, labels alone": ["--student", "cnn", "--alpha", "0"],
    "cnn": ["--student", "cnn"],
    "cnn of 128, 8 views": ["--student", "cnn", "--set", "student.embedding=128", *VIEWS],
    "cnn of 128, 24 views": ["--student", "cnn", "--set", "student.embedding=128", *PATIENT],
    "cnn:512, 8 views": ["--student", "cnn:512", *VIEWS],
}
QUICK = ["bench.rounds=1", "bench.round_seconds=0.2", "bench.precision=null", "bench.batch_sizes=[]"]


def main() -> None:
    """Run what is not there yet, and tell."""
    args = _arguments()
    if not (args.data / "train.csv").is_file():
        sys.exit(f"{args.data} holds no train.csv: name the folder of clinc150 with --data")
    os.environ.setdefault("KDEXPORT_CACHE", str(args.work / "cache"))
    teacher = args.teacher or fine_tuned(args)
    table = json.loads(args.out.read_bytes())["students"] if args.out.exists() else {}
    for name in args.only or RECIPES:
        run(name, teacher, args)
        table[name] = told(name, args)
        print(line(name, table[name]), flush=True)
        ordered = {name: table[name] for name in RECIPES if name in table}
        args.out.write_text(json.dumps({"environment": environment(), "students": ordered}, indent=2) + "\n")


def fine_tuned(args: argparse.Namespace) -> Path:
    """The teacher: all-MiniLM-L6-v2, fine-tuned on the training split."""
    folder: Path = args.work / "teacher"
    if not (folder / "report.json").exists():
        _kdexport(args, folder, str(demo.teacher()), [*TEACHER, "--student", "bag", "--epochs", "1"], quick=True)
    return folder / "teacher"


def run(name: str, teacher: Path, args: argparse.Namespace) -> None:
    """One recipe, from the shared teacher; a finished one is there at once."""
    _kdexport(args, place(name, args), str(teacher), RECIPES[name], quick=not args.quiet)


def place(name: str, args: argparse.Namespace) -> Path:
    """The run's folder."""
    return Path(args.work / "-".join("".join(c if c.isalnum() else " " for c in name).split()))


def _kdexport(args: argparse.Namespace, out: Path, teacher: str, flags: list[str], quick: bool) -> None:
    settings = [f"--set={pair}" for pair in QUICK] if quick else []
    command = ["run", "--teacher", teacher, "--data", str(args.data), "--no-baseline", *flags, *settings]
    log = out.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        done = subprocess.run([sys.executable, "-m", "kdexport", *command, "--out", str(out)], stderr=file, stdout=file)
    if done.returncode:
        sys.exit(f"kdexport {' '.join(command)}\nended with {done.returncode}; see {log}")


def told(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a finished run says of the file that it recommends, and how confidence tells queries out of scope."""
    out = place(name, args)
    report = json.loads((out / "report.json").read_bytes())
    teacher = next(v for v in report["variants"] if v["model"] == "teacher")
    best = next(v for v in report["variants"] if v["name"] == report["recommended"])
    file = out / "artifact" / best["file"]
    return {
        "flags": RECIPES[name],
        "file": best["name"],
        "accuracy": best["metric"]["value"],
        "ci95": best["metric"]["ci95"],
        "retention": best["metric"]["value"] / teacher["metric"]["value"],
        "validation": report["distillation"]["student_curve"][-1]["validation"],
        "agreement": best["agreement"],
        "ece": {who: found["ece"] for who, found in report["evidence"]["calibration"].items()},
        "size_mb": best["size_bytes"] / 1e6,
        "p50_ms": best["latency_ms"]["p50"],
        "speedup": best["speedup_p50"]["value"],
        "speedup_ci95": best["speedup_p50"]["ci95"],
        "train_s": report["seconds"]["student"],
        "membership_auc": report["leakage"]["membership"]["student"]["by_confidence"]["auc"],
        "out_of_scope_auroc": out_of_scope(best["name"], Predictor(load_task(out / "student"), file), args.data, out),
    }


def out_of_scope(best: str, student: Predictor, data: Path, out: Path) -> dict[str, float]:
    """AUROC of the maximum probability, test queries in scope against those out of scope, of teacher and student."""
    with (data / "oos_test.csv").open(newline="") as file:
        strange = [{"text": row["text"]} for row in csv.DictReader(file)]
    with np.load(out / "verify" / "logits.npz") as logits:
        known = {"teacher": logits["teacher"], "student": logits[best]}
    found = {"teacher": teacher_logits(out / "teacher", strange), "student": student.logits(strange)}
    return {who: roc_auc(softmax(known[who]).max(axis=1), softmax(found[who]).max(axis=1))[0] for who in known}


def teacher_logits(folder: Path, rows: list[dict[str, Any]]) -> np.ndarray:
    """The teacher's logits, which are kept beside the run."""
    kept = folder.parent / "out-of-scope.npy"
    if not kept.exists():
        from transformers import AutoModelForSequenceClassification

        from kdexport.models.inference import logits_of

        model = AutoModelForSequenceClassification.from_pretrained(folder)
        np.save(kept, logits_of(model, load_task(folder), rows))
    return np.asarray(np.load(kept))


def line(name: str, row: dict[str, Any]) -> str:
    """One row of the table in Markdown."""
    oos = row["out_of_scope_auroc"]
    cells = (
        name,
        *(f"{100 * row[key]:.2f} %" for key in ("accuracy", "retention", "agreement")),
        f"{row['size_mb']:.2f}",
        f"{row['speedup']:.0f}×",
        f"{row['train_s']:.0f}",
        f"{100 * oos['student']:.1f} / {100 * oos['teacher']:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/clinc150"))
    parser.add_argument("--work", type=Path, default=Path("runs/students"))
    parser.add_argument("--teacher", type=Path, help="a fine-tuned one; made when absent")
    parser.add_argument("--only", nargs="*", choices=list(RECIPES), metavar="NAME", help="some of the recipes")
    parser.add_argument("--quiet", action="store_true", help="measure latency as a run does; else shortly")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/students.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
