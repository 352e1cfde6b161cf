"""A run is a folder of stages; a stage is a folder that is complete or absent.

A stage is built in `.kdexport-<name>` beside its own folder. Its `stage.json`, written last, holds the key (the hash of
all inputs) and the sha256, size and time of every file; then the folder is renamed into place. A stage with the same
key is skipped, so a killed run resumes, unless one of its files is missing or damaged: then it is put aside and made
again.
"""

import contextlib
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

from kdexport.errors import RunError
from kdexport.files import digest, disk_errors, entries, hash_file, hash_files, sync, write_json
from kdexport.output import PRIVATE, Output, move_aside
from kdexport.progress import say, warn

_KEY_FILE = ".key"
_STAGE_FILE = "stage.json"
# Whatever a run may write: its stages, and the files beside them.
_STAGES = re.compile(
    r"(data|asked|teacher|targets|ladder|verify|bench|artifact|(student|export|baseline|trial)(-[^.]*)?)"
)
_FILES = ("spec.yaml", "report.json", "report.md", "report.html")


class StageRecord(msgspec.Struct, frozen=True):
    """`stage.json`: of each file the sha256 (`outputs`), and size and time of change (`stamps`).

    `machine` made them; it has a name, the hash of its hardware, and a number of threads.
    """

    name: str
    key: str
    inputs: dict[str, Any]
    outputs: dict[str, str]
    seconds: float
    stamps: dict[str, tuple[int, int]] = {}
    machine: dict[str, Any] = {}


class Run(Output):
    """An open run folder. Only one process may have it open.

    `sources` are what the run reads, none of which may lie where it writes; `settings` is the text of `spec.yaml`,
    which is written once a stage may be built; `machine` is recorded with each stage.
    """

    def __init__(
        self, folder: Path, sources: Iterable[Path] = (), settings: str = "", machine: dict[str, Any] | None = None,
        *, move_aside: bool = False,
    ) -> None:  # fmt: skip
        home = folder.resolve()
        for source in sources:
            within = source.resolve().relative_to(home).parts if source.resolve().is_relative_to(home) else ()
            if within and (_STAGES.fullmatch(within[0]) or within[0] in _FILES or within[0].startswith(PRIVATE)):
                raise RunError(f"{source} lies where the run writes", "Move it, or name another folder with --out")
        super().__init__(folder, "run", move_aside=move_aside)
        self.check(*_FILES)
        self._settings, self._machine = settings, machine or {}
        self._looked_ahead, self._done = False, set[str]()

    def stage(
        self, name: str, *, version: int, settings: object, reads: Iterable[Path], build: Callable[[Path], None]
    ) -> Path:
        """Build a stage unless it is finished, and return its folder.

        Its key is made of the `version` of its code, the part of the spec that it depends on, and the content of the
        stages, files and folders that it reads. `build` writes its files into a folder, where those of an interrupted
        call with the same key still are, so that long work may resume.
        """
        content = [self._content(path) for path in reads]
        inputs = {"version": version, "settings": msgspec.to_builtins(settings), "reads": content}
        key = digest([name, inputs])
        folder, work = self.folder / name, self.work(name)
        self._done.add(name)
        if damage := _stands(folder, key) and _damage(folder):
            warn(f"{folder}: {damage}, so this stage is put aside and made again")
            move_aside(folder)
        # Killed between the last write and the rename; or the power failed, and what was written last is lost.
        if not _stands(folder, key) and _stands(work, key) and not _damage(work):
            self._finish(work, name)
        if _stands(folder, key):
            say(f"{name}: done before")
            return folder
        self._look_ahead(name, damaged=bool(damage))
        started = time.monotonic()
        with disk_errors(self.folder):
            if not (work / _KEY_FILE).exists() or (work / _KEY_FILE).read_text() != key:
                if work.exists() and not any((work / ours).is_file() for ours in (_KEY_FILE, _STAGE_FILE)):
                    raise RunError(f"{work} was not written by kdexport", "Move it elsewhere")
                self.begin(work, _KEY_FILE, key)
            build(work)
            sync(work)
            outputs, seconds = _outputs(work), round(time.monotonic() - started, 3)
            stamps = {path: _stamp(work / path) for path in outputs}
            record = StageRecord(name, key, inputs, outputs, seconds, stamps, self._machine)
            write_json(work / _STAGE_FILE, record)
            self._finish(work, name)
        say(f"{name}: {record.seconds:.1f} s", style="dim")
        return folder

    def _stranger(self, place: Path) -> str | None:
        """As for any output; a stage older than output records is known by its own record."""
        found = super()._stranger(place)
        if found and (place / _STAGE_FILE).is_file():
            with contextlib.suppress(RunError):
                names = {path.relative_to(place).as_posix() for path in entries(place)} - {_STAGE_FILE}
                outputs = read_record(place).outputs
                return None if names == outputs.keys() and _outputs(place) == outputs else found
        return found

    def _finish(self, work: Path, name: str) -> None:
        (work / _KEY_FILE).unlink(missing_ok=True)
        self.replace(work, name)

    def _look_ahead(self, name: str, *, damaged: bool) -> None:
        """Refuse before the first stage what the last one would have to refuse.

        A stage that is built changes most of those after it, so all that are still to come must be replaceable. One
        that is made again as it was before changes none: other damaged ones are put aside in their turn.
        """
        self.check(name)
        if not self._looked_ahead:
            there = {path.name for path in self.folder.iterdir() if _STAGES.fullmatch(path.name)}
            others = (other for other in there - self._done if not (damaged and _damage(self.folder / other)))
            self.check(*sorted(others))
            self._looked_ahead = True
            self.write_settings()

    def write_settings(self) -> None:
        """Write `spec.yaml`."""
        if self._settings:
            self.write("spec.yaml", self._settings.encode())

    def _content(self, path: Path) -> tuple[str, str]:
        """Return name and hash: of this run's stages from their records, of anything else from its bytes."""
        if path.parent == self.folder and (path / _STAGE_FILE).is_file():
            return path.name, digest(read_record(path).outputs)
        return path.name, hash_file(path) if path.is_file() else digest(_outputs(path))


def read_record(folder: Path) -> StageRecord:
    """Return the record of a finished stage."""
    try:
        return msgspec.json.decode((folder / _STAGE_FILE).read_bytes(), type=StageRecord)
    except (OSError, msgspec.DecodeError) as error:
        raise RunError(f"{folder} holds no finished stage ({error})", "Run kdexport run again") from None


def _outputs(folder: Path) -> dict[str, str]:
    """Return relative path → sha256 of a stage's files, without records."""
    return hash_files(folder, without=frozenset({_STAGE_FILE, _KEY_FILE, PRIVATE}))


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _stands(folder: Path, key: str) -> bool:
    try:
        return read_record(folder).key == key
    except RunError:
        return False


def _damage(folder: Path) -> str | None:
    """Return which file of a finished stage is missing or not as it was made, or None.

    A file is read where its size or time differs: reading all of a large run at each start would take long.
    """
    try:
        record = read_record(folder)
    except RunError:
        return None
    for name, found in record.outputs.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _stamp(path) != record.stamps.get(name) and hash_file(path) != found:
            return f"{name} is not as it was made"
    return None
