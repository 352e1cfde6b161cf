"""Whole runs that are ended at random moments, go on, and must end with the bytes of a run that nothing disturbed.

`python tests/kills.py --moments 50 --seed 1 --out kills.json` prints a line a moment, and writes them as a table.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

STAGES = ("data", "teacher", "targets", "student", "export", "baseline", "verify", "bench", "artifact")
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM}
FAULTS = (*SIGNALS, "full disk", "read-only", "open files")
# A checkpoint after each epoch: the next is due at once, where it is 20 seconds later otherwise.
CALL = """
from kdexport.__main__ import command_line, main
build = command_line().build
run = build._run
def often(*arguments, **named):
    import kdexport.distill.train as train
    train.CHECKPOINT_EVERY_S = 0
    return run(*arguments, **named)
build._run = often
main()
"""
_DISK_MB, _LONGEST_S = 1500, 300
# What is measured, and what says how much was found done before: no two runs have the same.
_MEASURED = re.compile(r"(bench/.*|(.*/)?stage\.json|report\.(md|html)|(.*/)?\.kdexport.*|data/duplicates\.json)")
_TIMES = ("latency_ms", "footprint", "speedup_p50", "speedup_p99", "cells", "environment", "bench", "seconds", "note")


def write_teacher(folder: Path, texts: list[str]) -> None:
    """The lowest layer of all-MiniLM-L6-v2, with the tokens of the texts alone: as quick as real weights can be."""
    from transformers import AutoModel, AutoTokenizer

    from kdexport.data import demo
    from kdexport.models.vocabulary import trim_vocabulary

    model = AutoModel.from_pretrained(demo.teacher(), num_hidden_layers=1)
    tokenizer = AutoTokenizer.from_pretrained(demo.teacher())
    trim_vocabulary(tokenizer, model, texts)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def specs(files: Path) -> dict[str, dict[str, object]]:
    """The two runs, as overrides of a spec: five classes; two, with early stopping, two passes and two seeds."""
    quick = {
        "data.max_length": 32, "teacher.model": str(files / "teacher"), "teacher.train.epochs": 8,
        "teacher.train.learning_rate": 5e-4, "distill.epochs": 8, "distill.batch_size": 16,
        "distill.learning_rate": 1e-3, "bench.rounds": 1, "bench.round_seconds": 0.1, "bench.precision": None,
        "bench.batch_sizes": [],
    }  # fmt: skip
    halves = {
        "teacher.passes": 2, "teacher.noise": "dropout", "distill.patience": 3, "distill.seeds": 2,
        "student.model": "cnn",
    }  # fmt: skip
    return {
        "classes": quick
        | {"data.train": str(files / "classes.jsonl"), "distill.augment.views": 1, "export.variants": ["fp32"]},
        "halves": quick | halves | {"data.train": str(files / "halves.jsonl")},
    }


def write_rows(folder: Path, articles: list[dict[str, str]]) -> None:
    """A teacher, and 120 articles with their five classes, and with two: of sports or not."""
    folder.mkdir(exist_ok=True)
    articles = articles[:120]
    write_teacher(folder / "teacher", [row["text"][:200] for row in articles])
    for name, label in (
        ("classes", lambda row: row["label"]),
        ("halves", lambda row: str(row["label"] == "sports")),
    ):
        lines = [json.dumps({"text": row["text"][:200], "label": label(row)}) for row in articles]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))


@contextlib.contextmanager
def disk(folder: Path) -> Iterator[bool]:
    """A disk of its own at a folder; yield whether this machine allows it."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_MB}m", "tmpfs", folder]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", folder], check=True)


class Attempt:
    """One run folder on a disk, which is called again and again."""

    def __init__(self, settings: dict[str, object], disk: Path, name: str) -> None:
        self.settings, self.disk = settings, disk
        self.out, self.cache = disk / name, disk / f"{name}-cache"
        self._flags = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]

    def call(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", CALL, "run", *self._flags, "--out", str(self.out)]
        environment = os.environ | {"KDEXPORT_CACHE": str(self.cache), "OMP_NUM_THREADS": "1", "COLUMNS": "400"}
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=self.log)

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read().decode(errors="replace")

    def finish(self) -> None:
        code = self.call().wait(_LONGEST_S)
        assert code == 0, self.said()

    def seconds(self) -> dict[str, float]:
        return {path.parent.name: json.loads(path.read_bytes())["seconds"] for path in self.out.glob("*/stage.json")}

    def at_work_on(self) -> str:
        places = sorted(self.out.glob(".kdexport-*"), key=lambda path: path.stat().st_mtime)
        return places[-1].name.removeprefix(".kdexport-") if places else "between stages"

    def strike(self, stage: str, share: float, fault: str, takes: dict[str, float]) -> dict[str, object] | None:
        """Call, and do `fault` when a share of a stage's time is over; None where it was over before."""
        process = self.call()
        work = self.out / f".kdexport-{stage}"
        ends = time.monotonic() + _LONGEST_S
        while process.poll() is None and not work.exists() and not (self.out / stage).exists():
            assert time.monotonic() < ends, self.said()
            time.sleep(0.001)
        time.sleep(share * takes[stage])
        if process.poll() is not None:
            assert process.returncode == 0, self.said()
            return None
        hit = self.at_work_on()
        with self._fault(fault, process):
            code = process.wait(_LONGEST_S)
        said = self.said()
        last = said.strip().splitlines()[-1] if said.strip() else ""
        wanted = (-SIGNALS[fault],) if fault in SIGNALS else (2,)
        finished = code == 0 and (self.out / "report.json").exists()  # nothing was left to be written
        proper = code in wanted and "Traceback" not in said and (code < 0 or last.startswith("error: "))
        return {
            "fault": fault, "stage": hit, "exit": code, "line": "" if code <= 0 else last.replace(str(self.disk), ""),
            "proper": proper or finished, "said": "" if proper or finished else said,
        }  # fmt: skip

    @contextlib.contextmanager
    def _fault(self, name: str, process: subprocess.Popen[bytes]) -> Iterator[None]:
        if name in SIGNALS:
            process.send_signal(SIGNALS[name])
            yield
        elif name == "open files":
            with contextlib.suppress(OSError):  # it ended
                opened = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
                resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (opened, opened))
            yield
        elif name == "full disk":
            filler = self.disk / "filler"
            with filler.open("wb", buffering=0) as file:
                for size in (1 << 20, 1 << 12):
                    with contextlib.suppress(OSError):
                        while file.write(bytes(size)) == size:
                            pass
            yield
            filler.unlink()
        elif name == "read-only":
            remount = ["mount", "-o", "remount,ro", self.disk]
            while process.poll() is None and subprocess.run(remount, capture_output=True, check=False).returncode:
                time.sleep(0.001)  # a file is open for writing
            yield
            subprocess.run(["mount", "-o", "remount,rw", self.disk], check=True)

    def bytes_of(self) -> dict[str, str]:
        """The hash of each file that a run must make the same again; of the report, without what is measured."""
        found = {}
        for path in sorted(path for path in self.out.rglob("*") if path.is_file()):
            name, content = path.relative_to(self.out).as_posix(), path.read_bytes()
            if _MEASURED.fullmatch(name):
                continue
            if name == "report.json":
                content = json.dumps(_without_times(json.loads(content)), sort_keys=True).encode()
            if name == "artifact/README.md":
                content = re.sub(rb"[\d.,]+", b"#", content)
            found[name] = hashlib.sha256(content.replace(bytes(self.out), b"RUN")).hexdigest()
        return found


def _without_times(found: object) -> object:
    if isinstance(found, dict):
        return {key: _without_times(value) for key, value in found.items() if key not in _TIMES}
    return [_without_times(one) for one in found] if isinstance(found, list) else found


def differences(a: dict[str, str], b: dict[str, str]) -> list[str]:
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def disturb(
    name: str, undisturbed: Attempt, attempt: Attempt, count: int, seed: int, faults: tuple[str, ...]
) -> Iterator[dict[str, object]]:
    """End one run `count` times at moments that follow from the seed; yield a row for each once it is compared."""
    takes, draw = undisturbed.seconds(), random.Random(seed)
    stages = sorted(draw.choices(STAGES, k=count), key=STAGES.index)
    rows = []
    for i, stage in enumerate(stages):
        share, fault = round(draw.random(), 3), faults[(seed + i) % len(faults)]
        if row := attempt.strike(stage, share, fault, takes):
            rows.append({"run": name, "seed": seed, "aimed": stage, "share": share} | row)
    attempt.finish()
    differing = differences(undisturbed.bytes_of(), attempt.bytes_of())
    left = [path.name for path in attempt.out.iterdir() if path.name.startswith(".kdexport-") or ".old-" in path.name]
    for row in rows:
        yield row | {"same_bytes": not differing and not left, "differing": differing + left}


def as_json(rows: list[dict[str, object]]) -> str:
    lines = (json.dumps({key: value for key, value in row.items() if key != "said"}) for row in rows)
    return "[\n" + ",\n".join(lines) + "\n]\n"


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--moments", type=int, default=50)
    given.add_argument("--seed", type=int, default=1)
    given.add_argument("--a-run", type=int, default=10, help="moments in one run")
    given.add_argument("--out", type=Path)
    asked = given.parse_args()
    sys.path.insert(0, str(Path(__file__).parent.parent))
    os.environ["HF_HUB_OFFLINE"] = "1"
    from kdexport.data import demo

    home = Path(tempfile.mkdtemp(prefix="kills-"))
    demo.write_bbc_news(home / "bbc.jsonl")
    articles = [json.loads(line) for line in (home / "bbc.jsonl").read_bytes().splitlines()]
    random.Random(0).shuffle(articles)
    write_rows(home, articles)
    rows: list[dict[str, object]] = []
    with disk(home / "disk") as mounted:
        faults = FAULTS if mounted else (*SIGNALS, "open files")
        undisturbed: dict[str, Attempt] = {}
        seed = asked.seed
        while len(rows) < asked.moments:
            name = list(specs(home))[seed % 2]
            if name not in undisturbed:
                undisturbed[name] = Attempt(specs(home)[name], home / "disk", f"{name}-undisturbed")
                undisturbed[name].finish()
                print(f"{name}: {undisturbed[name].seconds()}", flush=True)
            attempt = Attempt(specs(home)[name], home / "disk", "disturbed")
            for row in disturb(name, undisturbed[name], attempt, asked.a_run, seed, faults):
                rows.append({"moment": len(rows) + 1} | row)
                print(json.dumps({key: value for key, value in rows[-1].items() if value != ""}), flush=True)
            if asked.out:
                asked.out.write_text(as_json(rows[: asked.moments]))
            shutil.rmtree(attempt.out)
            shutil.rmtree(attempt.cache)
            seed += 1
    shutil.rmtree(home)
    rows = rows[: asked.moments]
    bad = [row for row in rows if not (row["proper"] and row["same_bytes"])]
    print(f"{len(rows)} moments, {len(rows) - len(bad)} of them ended properly and with the same bytes")
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
