"""A run is a folder of stages; a stage is a folder that is complete or absent.

A stage is built in `.<name>.tmp` beside its own folder. Its `stage.json`, written last, holds the key (the
hash of all that went in) and the sha256 of every file that came out; then the folder is renamed into place.
A stage whose key stands is skipped, so a run that was killed at any moment goes on where it was, and what
one stage wrote is known to the next by content, never by time.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from kdexport.errors import KdexportError, RunError
from kdexport.progress import say

_KEY_FILE = ".key"
_STAGE_FILE = "stage.json"


class StageRecord(msgspec.Struct, frozen=True):
    """`stage.json`: what went in, what came out, and how long it took."""

    name: str
    key: str
    inputs: dict[str, Any]
    outputs: dict[str, str]
    seconds: float

    @property
    def content(self) -> str:
        """Hash of what came out; part of the key of every stage that reads it."""
        return digest(self.outputs)


class Run:
    """An open run folder. Only one process may have it open.

    Raises:
        RunError: the folder is in use, can't be written, or holds something that is not a run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            strangers = folder.exists() and any(folder.iterdir()) and not (folder / ".lock").exists()
            if strangers:
                raise RunError(f"{folder} is not empty and not a run folder", "Name another with --out")
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / ".lock").open("w")
        except OSError as error:
            raise RunError(f"run folder {folder} can't be used: {error.strerror}", "Name another with --out") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise RunError(f"run folder {folder} is in use by another kdexport", "Wait for it, or use --out") from None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._lock.close()

    def stage(
        self,
        name: str,
        *,
        version: int,
        settings: object,
        reads: Iterable[Path],
        build: Callable[[Path], None],
    ) -> Path:
        """Build a stage unless it stands, and return its folder.

        Args:
            name: the stage's folder in the run.
            version: of the stage's code; raised when its result would differ.
            settings: the part of the spec that it follows.
            reads: finished stages, or plain files and folders, that it reads.
            build: writes the stage's files into the folder that it is given. What an interrupted call left
                there is still there at the next call with the same key, so long work may go on from it.
        """
        inputs = {
            "version": version,
            "settings": msgspec.to_builtins(settings),
            "reads": [self._content(path) for path in reads],
        }
        key = digest([name, inputs])
        folder, work = self.folder / name, self.folder / f".{name}.tmp"
        if not _stands(folder, key) and _stands(work, key):  # killed between the last write and the rename
            move_into_place(work, folder)
        if _stands(folder, key):
            say(f"{name}: done before")
            return folder
        started = time.monotonic()
        with disk_errors(self.folder):
            if not (work / _KEY_FILE).exists() or (work / _KEY_FILE).read_text() != key:
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir()
                write_text(work / _KEY_FILE, key)
            build(work)
            record = StageRecord(name, key, inputs, hash_files(work), round(time.monotonic() - started, 3))
            write_json(work / _STAGE_FILE, record)
            move_into_place(work, folder)
        say(f"{name}: {record.seconds:.1f} s", style="dim")
        return folder

    def _content(self, path: Path) -> tuple[str, str]:
        """Name and hash: of one of this run's own stages from its record, of anything else from its bytes.

        A stage of another run is the user's to edit, so its record says nothing of what it holds now.
        """
        if path.parent == self.folder and (path / _STAGE_FILE).is_file():
            return path.name, read_record(path).content
        return path.name, hash_file(path) if path.is_file() else digest(hash_files(path))


def read_record(folder: Path) -> StageRecord:
    """The record of a finished stage."""
    try:
        return msgspec.json.decode((folder / _STAGE_FILE).read_bytes(), type=StageRecord)
    except (OSError, msgspec.DecodeError) as error:
        raise RunError(f"{folder} holds no finished stage ({error})", "Run kdexport run again") from None


def digest(value: object) -> str:
    """Sha256 of a JSON-able value, independent of the order of keys."""
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()


def hash_file(path: Path) -> str:
    """Sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(folder: Path) -> dict[str, str]:
    """Relative path → sha256 of every file below a folder; a finished stage's own record is left out."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (_STAGE_FILE, _KEY_FILE))
    return {p.relative_to(folder).as_posix(): hash_file(p) for p in paths}


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either the old one or the new one, whatever happens."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON, atomically."""
    write_bytes(path, msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: into a neighbour, synced, then renamed."""
    neighbour = path.with_name(f".{path.name}.tmp")
    with neighbour.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    neighbour.replace(path)


class disk_errors:
    """Turn a full disk, however a library reports it, into one line for the user."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if not isinstance(error, Exception) or isinstance(error, KdexportError):
            return
        # safetensors, torch and onnxruntime each raise a class of their own for ENOSPC.
        full = (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or (
            "No space left" in str(error) or shutil.disk_usage(self.folder).free < 2**16
        )
        if full:
            raise RunError(
                f"the disk is full: {self.folder}",
                "Make room and run the same command again: finished stages are kept",
            ) from error


def _stands(folder: Path, key: str) -> bool:
    try:
        return read_record(folder).key == key
    except RunError:
        return False


def move_into_place(work: Path, folder: Path) -> None:
    """Rename a complete folder over an older one; a kill between the two renames loses nothing."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    (work / _KEY_FILE).unlink(missing_ok=True)
    if folder.exists():
        folder.rename(old)
    work.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
