"""The Dockerfile, read and carried out without an engine: as much of it as ours says.

`python tests/image.py BASE OUT` builds the server's image in the folder OUT/serve, as root, from BASE: a root folder
that stands for the image which the Dockerfile starts from; `start.sh` and `health.sh` in it are its ENTRYPOINT with
CMD, and its HEALTHCHECK. `tests/image_root.sh` makes a BASE, and starts what was built.
The tests install what the Dockerfile installs below a folder, without root and without the base.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from string import Template
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
Environment = dict[str, str]


class Stage(NamedTuple):
    """`FROM base AS name`, and what follows as (instruction, rest)."""

    name: str
    base: str
    steps: list[tuple[str, str]]

    def all(self, instruction: str) -> list[str]:
        return [rest for found, rest in self.steps if found == instruction]

    def command(self, instruction: str) -> list[str]:
        """What ENTRYPOINT, CMD or HEALTHCHECK runs, in its exec form."""
        return json.loads(re.search(r"\[.*\]", self.all(instruction)[-1])[0])


def read(dockerfile: Path = ROOT / "Dockerfile") -> dict[str, Stage]:
    """The stages, by name."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.startswith("#")]
    stages: dict[str, Stage] = {}
    for line in filter(None, re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()):
        instruction, rest = line.split(maxsplit=1)
        if instruction == "FROM":
            base, _, name = rest.split()
            stages[name] = stage = Stage(name, base, [])
        else:
            stage.steps.append((instruction, rest))
    return stages


def needed(target: str, stages: dict[str, Stage]) -> list[Stage]:
    """The stages that a target is made of, in order."""
    names, more = set(), [target]
    while more:
        if (stage := stages.get(more.pop())) is not None:
            names.add(stage.name)
            more += [stage.base, *re.findall(r"--from=(\S+)", " ".join(stage.all("COPY")))]
    return [stage for stage in stages.values() if stage.name in names]


class Build:
    """Carries out stages in folders below `out`, a folder each: commands run by chroot, starting from `base`."""

    def __init__(self, out: Path, base: Path) -> None:
        self.out, self.base = out, base
        self.path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

    def build(self, stages: list[Stage]) -> Environment:
        """Returns the last stage's environment."""
        left: dict[str, tuple[str, Environment]] = {}
        for stage in stages:
            root = self.start(stage)
            workdir, inherited = left.get(stage.base, ("/", {"PATH": self.path}))
            environment = dict(inherited)
            for instruction, rest in stage.steps:
                if instruction in ("ARG", "ENV"):
                    for name, _, value in (part.partition("=") for part in shlex.split(rest)):
                        environment[name] = Template(value).substitute(environment)
                elif instruction == "WORKDIR":
                    workdir = rest
                    (root / rest[1:]).mkdir(parents=True, exist_ok=True)
                elif instruction == "COPY":
                    self.copy(rest.split(), root, root / workdir[1:])
                elif instruction == "RUN":
                    self.run(re.sub(r"--mount=\S+\s+", "", rest), root, workdir, environment)
            left[stage.name] = workdir, environment
        return environment

    def start(self, stage: Stage) -> Path:
        """The stage's root, as its base left it."""
        root, known = self.out / stage.name, self.out / stage.base
        subprocess.run(["cp", "-a", known if known.exists() else self.base, root], check=True)
        return root

    def copy(self, words: list[str], root: Path, workdir: Path) -> None:
        """COPY, from the working tree or from another stage."""
        option, *words = words if words[0].startswith("--from=") else ["", *words]
        *sources, to = words
        place = root / to[1:] if to.startswith("/") else workdir / to
        for source in sources:
            origin = self.out / option.removeprefix("--from=") / source[1:] if option else ROOT / source
            if origin.is_dir():  # its content, not itself
                shutil.copytree(
                    origin, place, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
                )
            else:
                shutil.copy2(origin, place)

    def run(self, command: str, root: Path, workdir: str, environment: Environment) -> None:
        """RUN, with this machine's /proc, /dev, names and certificates in the root as long as it takes."""
        borrowed = ("/proc", "/sys", "/dev", "/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs")
        (root / "etc" / "hosts").touch()
        mounts = [f"mount --rbind {path} {shlex.quote(str(root) + path)}" for path in borrowed if Path(path).exists()]
        inner = f"cd {shlex.quote(workdir)} && {command}"
        outer = [*mounts, f"exec chroot {shlex.quote(str(root))} /bin/sh -ec {shlex.quote(inner)}"]
        pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        subprocess.run(["unshare", "--mount", "sh", "-ec", "\n".join(outer)], env={**pip, **environment}, check=True)


class Below(Build):
    """Carries out all stages in one folder, with a copy of this Python for the base's: a path of the image gets the
    folder's path before it. A command that names a path which no stage makes is about the base; `left_out` keeps it.
    """

    def __init__(self, out: Path) -> None:
        super().__init__(out, out)
        venv.create(out / "base", with_pip=True)
        self.path = f"{out / 'base' / 'bin'}:/usr/bin:/bin"
        self.left_out: list[str] = []

    def build(self, stages: list[Stage]) -> Environment:
        made = {words.split()[-1] for stage in stages for words in (*stage.all("WORKDIR"), *stage.all("COPY"))}
        paths = "|".join(re.escape(path) for path in made if path.startswith("/"))
        self.made = re.compile(rf"(?<![\w.-])({paths})\b")
        environment = super().build(stages)
        return {name: self.moved(value) for name, value in environment.items()}

    def moved(self, text: str) -> str:
        return self.made.sub(rf"{self.out}\1", text)

    def start(self, stage: Stage) -> Path:
        return self.out

    def copy(self, words: list[str], root: Path, workdir: Path) -> None:
        if not words[0].startswith("--from="):  # between stages there's nothing to copy
            super().copy(words, root, workdir)

    def run(self, command: str, root: Path, workdir: str, environment: Environment) -> None:
        if re.search(r"(?<![\w.-])/\w", self.made.sub("made", command)):
            self.left_out.append(command)
            return
        mine = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        moved = {name: self.moved(value) for name, value in environment.items()}
        subprocess.run(
            ["sh", "-ec", self.moved(command)],
            cwd=root / workdir[1:], env={**mine, **moved}, check=True, capture_output=True, text=True,
        )  # fmt: skip


def main() -> None:
    base, out = map(Path, sys.argv[1:])
    out.mkdir(parents=True)
    stages = read()
    serve = stages["serve"]
    environment = Build(out.resolve(), base.resolve()).build(needed("serve", stages))
    variables = ["env", "-i", *(f"{name}={value}" for name, value in environment.items())]
    for name, command in (
        ("start", serve.command("ENTRYPOINT") + serve.command("CMD")),
        ("health", serve.command("HEALTHCHECK")),
    ):
        line = f"cd {serve.all('WORKDIR')[-1]} && exec {shlex.join([*variables, *command])}\n"
        (out / "serve" / f"{name}.sh").write_text(line)


if __name__ == "__main__":
    main()
