"""One distillation in several tools, side by side on this machine; to be run in the repository's root.

    .venv/bin/python benchmarks/peers/distilling/compare.py --repeats 3                      # the table
    .venv/bin/python benchmarks/peers/distilling/compare.py --rows 640 --epochs 1            # does it work?

All get the same teacher, rows, first weights, epochs, batch size, length, schedule, seed and threads; each has the loss
that its own examples have. Each distillation is a process of its own, and in every repeat their order is another. What
is finished is kept in a work folder: the same command goes on where it was. Wants PyPI on the first run, since each
peer gets an environment of its own under `.benchmarks/peers/`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import inputs
import msgspec
import numpy as np
import psutil
import torch
from tools import ENVIRONMENTS, HERE, OURS, Failed, Tool, install, tools

from kdexport.bench import stats
from kdexport.bench.machine import environment

BATCH_SIZE = 32


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))  # and so ends the process that trains
    options = parse()
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(options.threads)
    found = compare(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(markdown(found))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, default=Path("runs/clinc/teacher"), help="a Hugging Face folder")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/clinc150"), help="a folder of CSV files")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/distilling.json"))
    parser.add_argument("--work", type=Path, default=ENVIRONMENTS.parent / "distilling", help="finished results")
    parser.add_argument("--best", type=Path, default=HERE / "best.yaml", help="the spec of `kdexport, best`")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="the highest")
    parser.add_argument("--max-length", type=int, default=64, help="tokens kept of each text")
    parser.add_argument("--seed", type=int, default=0, help="of the first repeat; each further one has the next")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--rows", type=int, help="of each split at most")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="tools to take, by name or its start")
    options = parser.parse_args()
    inputs.check(options.data, options.teacher)
    options.teacher, options.work = options.teacher.resolve(), options.work.resolve()
    return options


# --- the comparison


def compare(options: argparse.Namespace) -> dict[str, Any]:
    chosen = tools(options.best)
    if options.only:
        wanted = set(map(str.lower, options.only))
        begins = tuple(wanted - {one.name.lower() for one in chosen})  # a whole name means that one alone
        chosen = [one for one in chosen if one.name.lower() in wanted or one.name.lower().startswith(begins)]
    bench = Bench(options)
    left_out: dict[str, str] = {}
    runs: dict[str, list[dict[str, Any]]] = {tool.name: [] for tool in chosen}
    for repeat in range(options.repeats):
        first = repeat % len(chosen)
        for tool in chosen[first:] + chosen[:first]:
            if tool.name in left_out:
                continue
            try:
                install(tool.peer)
                runs[tool.name].append(bench.distil(tool, repeat))
            except Failed as error:
                left_out[tool.name] = str(error)
                print(error, file=sys.stderr)
    runs = {name: turns for name, turns in runs.items() if name not in left_out}
    return {
        "settings": bench.settings | {"repeats": options.repeats},
        "tools": {tool.name: {"settings": tool.settings, "lines": tool.user_lines()} for tool in chosen},
        "left_out": left_out,
        "teacher_accuracy": bench.teacher_accuracy,
        "summary": summary(runs),
        "runs": runs,
        "environment": environment(),
    }


class Bench:
    """What all tools get alike, in the work folder, and how one of them takes its turn."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.work = options, options.work
        self.data, self.place = self.work / "data", self.work / "turn"
        inputs.write_data(options.data, options.rows, self.data)
        test = inputs.read_rows(self.data, "test")
        self.texts, self.labels = [row["text"] for row in test], np.array([row["label"] for row in test], dtype=object)
        self.teachers = inputs.answers(options.teacher, options.teacher, self.texts, options.max_length)
        self.teacher_accuracy = float(np.mean(self.teachers == self.labels))
        self.settings = {
            "epochs": options.epochs,
            "batch_size": BATCH_SIZE,
            "learning_rate": options.learning_rate,
            "max_length": options.max_length,
            "seed": options.seed,
            "threads": options.threads,
            "rows": {split: len(inputs.read_rows(self.data, split)) for split in inputs.SPLITS},
        }
        self.inputs = inputs.digest(options.teacher, self.data, self.settings)

    def distil(self, tool: Tool, repeat: int) -> dict[str, Any]:
        """One distillation, unless its result is there already."""
        key = inputs.digest(self.inputs, tool.told, tool.options)
        kept = self.work / "results" / f"{tool.name.replace(', ', '-').replace(' ', '-')}-{repeat}-{key}.json"
        if not kept.exists():
            shutil.rmtree(self.place, ignore_errors=True)
            found = self.judge(self.train(tool, repeat), repeat)
            kept.parent.mkdir(exist_ok=True)
            kept.write_text(json.dumps(found, indent=1) + "\n")
            shutil.rmtree(self.place)
        found = json.loads(kept.read_text())
        print(f"{tool.name}, repeat {repeat + 1}: {in_short(found)}", file=sys.stderr, flush=True)
        return found

    def train(self, tool: Tool, repeat: int) -> dict[str, Any]:
        """Run the tool, and say what its process has to say of itself.

        Raises:
            Failed: it did not end well.
        """
        out, result, job_file = self.place / "out", self.place / "result.json", self.place / "job.json"
        out.mkdir(parents=True)
        job = self.settings | {
            "adapter": tool.adapter.stem,
            "teacher": str(self.options.teacher),
            "student": str(self.student(repeat)),
            "data": str(self.data),
            "spec": str(tool.spec.resolve()) if tool.spec else None,
            "out": str(out),
            "result": str(result),
            "seed": self.options.seed + repeat,
        }
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), str(self.options.threads))
        always = {"CUDA_VISIBLE_DEVICES": "", "KDEXPORT_CACHE": str(self.place / "cache")}
        busy, began = _busy_seconds(), time.monotonic()
        job_file.write_text(json.dumps(job | tool.options | {"started": began}))
        with (self.place / "log").open("w") as log:
            done = subprocess.run(
                [tool.python, str(HERE / "runner.py"), str(job_file)],
                cwd=self.place,
                env=os.environ | threads | always,
                stdout=log,
                stderr=log,
            )
        took = time.monotonic() - began
        if done.returncode:
            raise Failed(f"{tool.name} failed; its last words: {(self.place / 'log').read_text()[-400:]}")
        found = json.loads(result.read_text())
        stages = {path.parent.name: json.loads(path.read_text())["seconds"] for path in out.glob("run/*/stage.json")}
        others = max(0.0, (_busy_seconds() - busy - found["cpu_s"]) / took)
        return found | {"other_cores": others} | ({"stages_s": stages} if stages else {})

    def student(self, repeat: int) -> Path:
        """The first weights, the same for all tools; others in each repeat."""
        folder = self.place / "student"
        inputs.write_student(self.options.teacher, self.options.seed + repeat, folder)
        return folder

    def judge(self, found: dict[str, Any], repeat: int) -> dict[str, Any]:
        """How good the student is that was written, by one piece of code for all."""
        folder = Path(found.pop("student"))
        tokenizer = (
            folder if (folder / "tokenizer.json").exists() else self.place / "student"
        )  # kdexport writes its own
        students = inputs.answers(folder, tokenizer, self.texts, self.options.max_length)
        return found | {
            "repeat": repeat,
            "accuracy": float(np.mean(students == self.labels)),
            "agreement": float(np.mean(students == self.teachers)),
        }


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return times.user + times.nice + times.system + times.irq + times.softirq + times.steal


# --- what the runs say


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Each tool's figures, one a repeat, and how many times faster kdexport is, paired by repeat."""
    keys = ("accuracy", "agreement", "distil_s", "import_s", "cpu_s", "peak_rss_mb", "other_cores")
    found: dict[str, Any] = {name: {key: [turn[key] for turn in turns] for key in keys} for name, turns in runs.items()}
    for name, one in found.items():
        if OURS in found and name != OURS:
            one["kdexport_is_faster"] = msgspec.to_builtins(stats.ratio(one["distil_s"], found[OURS]["distil_s"]))
    return found


def in_short(found: dict[str, Any]) -> str:
    return (
        f"{100 * found['accuracy']:.1f} %, {100 * found['agreement']:.1f} % as the teacher, {found['distil_s']:.1f} s "
        f"and {found['import_s']:.1f} s of importing, {found['peak_rss_mb']:.0f} MB; "
        f"others took {found['other_cores']:.1f} cores"
    )


def markdown(found: dict[str, Any]) -> str:
    lines = [
        "| tool | test accuracy | agrees with the teacher | distillation s | kdexport is × faster | import s "
        "| peak RSS MB | lines to write |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
        *(table_row(name, one, found["tools"][name]["lines"]) for name, one in found["summary"].items()),
        "",
        f"The teacher: {100 * found['teacher_accuracy']:.1f} %.",
        *(f"- {name}: {tool['settings']}" for name, tool in found["tools"].items()),
        *(f"- {name} was left out: {why}" for name, why in found["left_out"].items()),
    ]
    return "\n".join(lines)


def table_row(name: str, one: dict[str, Any], lines: int) -> str:
    def middle(key: str, digits: int, factor: float = 1, unit: str = "") -> str:
        values = [factor * value for value in one[key]]
        spread = f" [{min(values):,.{digits}f}–{max(values):,.{digits}f}]" if len(values) > 1 else ""
        return f"{statistics.median(values):,.{digits}f}{unit}{spread}"

    ratio = one.get("kdexport_is_faster")
    interval = " [{:.2f}–{:.2f}]".format(*ratio["ci95"]) if ratio and ratio["ci95"] else ""
    cells = [
        *(name, middle("accuracy", 1, 100, " %"), middle("agreement", 1, 100, " %"), middle("distil_s", 0)),
        f"{ratio['value']:.2f}{interval}" if ratio else "–",
        *(middle("import_s", 1), middle("peak_rss_mb", 0), str(lines)),
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
