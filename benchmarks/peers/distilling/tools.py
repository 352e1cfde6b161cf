"""Who is compared: how each tool is installed, what it is told, and what it costs to write."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import kdexport.distill

HERE = Path(__file__).resolve().parent
ADAPTERS = HERE / "adapters"
ENVIRONMENTS = HERE.parents[2] / ".benchmarks" / "peers"
OURS = "kdexport"
DISTILL = Path(kdexport.distill.__file__).parent


class Failed(Exception):
    """A tool can't be installed, or its distillation failed; the others are measured without it."""


@dataclass(frozen=True)
class Tool:
    """A tool with its settings; `settings` says in words what was chosen."""

    name: str
    peer: str  # whose environment it runs in
    settings: str
    options: dict[str, Any] = field(default_factory=dict)  # for the adapter, beside what all get
    spec: Path | None = None  # kdexport's

    @property
    def adapter(self) -> Path:
        return ADAPTERS / f"with_{self.peer}.py"

    @property
    def python(self) -> str:
        return sys.executable if self.peer == OURS else str(ENVIRONMENTS / self.peer / "bin" / "python")

    @property
    def told(self) -> list[str]:
        """All that decides what this tool does: an earlier result stands only for the same."""
        files = [self.adapter, *([self.spec] if self.spec else [])]
        files += sorted(DISTILL.glob("*.py")) if self.peer == OURS else [self.requirements]
        return [path.read_text() for path in files]

    @property
    def requirements(self) -> Path:
        return HERE / f"requirements-{self.peer}.txt"

    def user_lines(self) -> int:
        """Lines that a user writes: those between the adapter's marks, and those of a spec; no blanks, no comments."""
        text = self.adapter.read_text().partition("# --- what a user writes\n")[2].partition("# --- end")[0]
        lines = (text + (self.spec.read_text() if self.spec else "")).splitlines()
        return sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in lines)


def tools(best: Path) -> list[Tool]:
    """All that are compared; kdexport with `best` only where that holds a setting."""
    all_of_them = [
        Tool(
            name="TextBrewer",
            peer="textbrewer",
            settings="GeneralDistiller, ce at T = 8, no weight on labels; the teacher reads every batch",
            options={"cached": False},
        ),
        Tool(
            name="TextBrewer, cached",
            peer="textbrewer",
            settings="BasicDistiller, ce at T = 8, no weight on labels, is_caching_logits: the teacher reads each "
            "text once, batches stay as they were first drawn and come in a new order",
            options={"cached": True},
        ),
        Tool(
            name="torchdistill",
            peer="torchdistill",
            settings="KDLoss at T = 3, alpha = 0.9 (which is the labels' weight), targets given; the teacher reads "
            "every batch",
            options={"targets": True},
        ),
        Tool(
            name="torchdistill, no targets",
            peer="torchdistill",
            settings="the same with targets None, as its GLUE example has it: KL at T = 3 alone, without T²",
            options={"targets": False},
        ),
        Tool(
            name=OURS,
            peer=OURS,
            settings="kl at T = 4, alpha = 1 (no weight on labels); the teacher reads each text once",
            spec=HERE / "plain.yaml",
        ),
    ]
    if yaml.safe_load(best.read_text()):
        ours = Tool(f"{OURS}, best", OURS, f"as {best.name} says: {yaml.safe_load(best.read_text())}", spec=best)
        all_of_them.append(ours)
    return all_of_them


def install(peer: str) -> None:
    """Make a peer's environment, unless it is there and made from the requirements as they are.

    PyTorch comes first and by itself: pip takes the CPU build where it is told of one (`PIP_FIND_LINKS`, say).

    Raises:
        Failed: pip could not.
    """
    wanted, place = HERE / f"requirements-{peer}.txt", ENVIRONMENTS / peer
    made = place / "requirements.txt"
    if peer == OURS or (made.exists() and made.read_text() == wanted.read_text()):
        return
    print(f"installing {peer} …", file=sys.stderr, flush=True)
    torch = next(line for line in wanted.read_text().splitlines() if line.startswith("torch=="))
    pip = [str(place / "bin" / "pip"), "install", "--quiet"]
    for step in (
        [sys.executable, "-m", "venv", "--clear", str(place)],
        [*pip, "--constraint", str(wanted), torch],
        [*pip, "--requirement", str(wanted)],
    ):
        done = subprocess.run(step, capture_output=True, text=True)
        if done.returncode:
            reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr[-300:]]
            raise Failed(f"{peer} can't be installed: {reason[-1]}")
    made.write_text(wanted.read_text())
