"""Output folders: a command replaces only files that kdexport wrote and nobody changed since.

`.kdexport/record.json` in a folder lists every file that was written there with its sha256. A file or folder is
replaced only if it holds exactly what the record lists. All else is the user's: the command refuses, before its work
begins where possible, or renames it to `NAME.old-1` with --move-aside. Names that begin with `.kdexport` are work in
progress.
"""

import contextlib
import glob
import hashlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, Self

import msgspec

from kdexport.errors import RunError
from kdexport.files import TEMPORARY, entries, fault_of, hash_file, hash_files, sync, sync_one, write_bytes, write_json
from kdexport.locks import Lock
from kdexport.progress import say

PRIVATE = ".kdexport"
_RECORD = "record.json"
_LOCK, _OLD = "lock", "old"
By = Literal["run", "bench", "export", "report", "compare"]


class Record(msgspec.Struct, forbid_unknown_fields=True):
    """`.kdexport/record.json`: the command that wrote a folder, and the sha256 that each of its files may have.

    There are two of a file that was replaced: a command may be killed at any moment, and finds either.
    """

    by: By
    files: dict[str, list[str]]

    def stranger(self, folder: Path, place: Path) -> str | None:
        """Return in words what differs from the record at a place in the folder, or None."""
        if not os.path.lexists(place):
            return None
        for path in entries(place):
            sums = self.files.get(path.relative_to(folder).as_posix())
            if sums is None or path.is_symlink() or not path.is_file():
                return f"{path} was not written by kdexport"
            if hash_file(path) not in sums:
                return f"{path} was changed after kdexport wrote it"
        return None


def read_record(folder: Path) -> Record | None:
    """Return the record of a folder that kdexport wrote, or None."""
    file = folder / PRIVATE / _RECORD
    try:
        return msgspec.json.decode(file.read_bytes(), type=Record) if file.is_file() else None  # a pipe may have no end
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


class Output:
    """A folder that a command writes into, open to one process at a time.

    Args:
        by: the command. `run` and `bench` need a folder of their own, `report` and `compare` add files to any.
        move_aside: rename files of others that are in the way, rather than refuse.

    Raises:
        RunError: the folder is in use, can't be written, or holds something else.
    """

    def __init__(self, folder: Path, by: By, *, move_aside: bool = False) -> None:
        self.folder, self._move_aside, self._private = folder, move_aside, folder / PRIVATE
        adds = by in ("report", "compare")
        try:
            record = read_record(folder)
            if record and record.by != by and not adds:
                raise RunError(f"{folder} holds what kdexport {record.by} wrote", "Name another folder")
            if not record and not (_is_fresh(folder) or ((adds or move_aside) and not self._private.exists())):
                raise RunError(
                    f"{folder} is not empty, and kdexport {by} did not write it",
                    "Name another folder, or pass --move-aside to rename what is in the way",
                )
            self._private.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(self._private / _LOCK, folder)
            try:
                self._record = read_record(folder) or Record(by, {})
                _remove(self._private / _OLD)
                write_json(self._private / _RECORD, self._record)
            except BaseException:
                self._lock.close()
                raise
        except OSError as error:
            fault = RunError(f"{folder} can't be used: {error.strerror}", "Name another folder")
            raise fault_of(error, folder) or fault from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def work(self, name: str) -> Path:
        """Return the folder in which to make `name`: beside it, so that relative paths stay right."""
        return self.folder / f"{PRIVATE}-{name}"

    def begin(self, work: Path, name: str, content: str) -> None:
        """Recreate a work folder with one file in it; a kill leaves none, the old or the new one."""
        new = self._private / "work"
        _remove(new)
        new.mkdir()
        write_bytes(new / name, content.encode())
        _swap(new, work, self._private / _OLD)

    def check(self, *names: str) -> None:
        """Raise a RunError where something under these names is not as kdexport wrote it, unless it is moved aside."""
        for name in names:
            self._stands_in_the_way(name)

    def _stranger(self, place: Path) -> str | None:
        return self._record.stranger(self.folder, place)

    def _stands_in_the_way(self, name: str) -> bool:
        place = self.folder / name
        return _in_the_way(self._stranger(place), place, self._move_aside)

    def write(self, name: str, content: bytes) -> None:
        """Write a file, atomically; see `check`."""
        found, place = hashlib.sha256(content).hexdigest(), self.folder / name
        # What is there already, letter by letter, is as good as written.
        same = place.is_file() and not place.is_symlink() and hash_file(place) == found
        if not same and self._stands_in_the_way(name):
            move_aside(place)
        with self._writing(name, {name: found}):
            write_bytes(self._private / "new", content)
            (self._private / "new").replace(self.folder / name)
            sync_one(self.folder)

    def replace(self, made: Path, name: str) -> None:
        """Move a file or folder that was made in this folder to its name; see `check`. A kill loses nothing."""
        if self._stands_in_the_way(name):
            move_aside(self.folder / name)
        sync(made)
        below = hash_files(made) if made.is_dir() else {"": hash_file(made)}
        with self._writing(name, {f"{name}/{path}".rstrip("/"): found for path, found in below.items()}):
            _swap(made, self.folder / name, self._private / _OLD)

    @contextlib.contextmanager
    def _writing(self, name: str, sums: dict[str, str]) -> Iterator[None]:
        """Record the new checksums beside the old ones while files are replaced, and alone once they are."""
        self._lock.check()
        files = self._record.files
        for path, found in sums.items():
            files[path] = [*(one for one in files.get(path, []) if one != found), found]
        write_json(self._private / _RECORD, self._record)
        yield
        for path in [path for path in files if path == name or path.startswith(f"{name}/")]:
            del files[path]
        files |= {path: [found] for path, found in sums.items()}


def move_aside(place: Path) -> None:
    """Rename a place to `NAME.old-1`, or the next free number; raise RunError if it holds the current folder."""
    if Path.cwd().is_relative_to(place.resolve()):
        raise RunError(f"{place} is the current folder, which can't be moved aside", "Name another folder")
    names = (f"{place.name}.old-{n}" for n in itertools.count(1))
    aside = next(path for path in map(place.with_name, names) if not os.path.lexists(path))
    place.rename(aside)
    say(f"{place} was moved aside, to {aside.name}")


# --- folders that are made whole, and then put into place


@contextlib.contextmanager
def making(place: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `place` to make it in; clear what killed calls left there."""
    place.parent.mkdir(parents=True, exist_ok=True)
    for left in place.parent.glob(f".{glob.escape(place.name)}{PRIVATE}-*"):
        with contextlib.suppress(OSError, RunError), contextlib.closing(Lock(left / _LOCK, left)):
            if (left / _OLD).exists() and not place.exists():  # killed between two renames
                (left / _OLD).rename(place)
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{place.name}{PRIVATE}-", dir=place.parent) as work:
        with contextlib.closing(Lock(Path(work) / "lock.new", place)) as lock:
            lock.rename(Path(work) / _LOCK)  # never seen unlocked
            yield Path(work)


def check_place(place: Path, mine: Iterable[str] | None = None, *, may_move: bool = False) -> bool:
    """Check that a folder of `publish` may be replaced; return whether it is to be moved aside first.

    Args:
        mine: top-level names to replace, where others may stand beside them; None for the whole.

    Raises:
        RunError: something there is not as kdexport wrote it.
    """
    return _in_the_way(_stranger(place, mine), place, may_move)


def publish(made: Path, place: Path, work: Path, mine: Iterable[str] | None = None, *, may_move: bool = False) -> None:
    """Move a folder that was made in `work` into its place, with a record of its files; see `check_place`.

    The old folder stands whole until the new one does; where others' files stay beside ours (`mine`), each top-level
    name is replaced by itself.
    """
    if check_place(place, mine, may_move=may_move):
        move_aside(place)
    made_now = {name: [found] for name, found in hash_files(made).items()}
    beside = mine is not None and _stranger(place, None) is not None
    if beside:  # a kill between two names leaves some old and some new: the record holds both
        before = read_record(place)
        both = {name: (before.files if before else {}).get(name, []) + found for name, found in made_now.items()}
        _write_record(place, both)
        sync(made)
        for path in sorted(made.iterdir()):
            _swap(path, place / path.name, work / _OLD)
        _write_record(place, made_now)
    else:
        _write_record(made, made_now)
        sync(made)
        place.parent.mkdir(parents=True, exist_ok=True)
        _swap(made, place, work / _OLD)


def _in_the_way(stranger: str | None, place: Path, may_move: bool) -> bool:
    if stranger and not may_move:
        mend = "Move it elsewhere, name another folder, or pass --move-aside"
        raise RunError(f"{stranger}, and {place} is to be replaced", mend)
    return stranger is not None


def _write_record(folder: Path, files: dict[str, list[str]]) -> None:
    (folder / PRIVATE).mkdir(exist_ok=True)
    write_json(folder / PRIVATE / _RECORD, Record("export", files))


def _swap(made: Path, place: Path, old: Path) -> None:
    if place.exists():
        place.rename(old)
    made.rename(place)
    sync_one(place.parent)
    _remove(old)


def _stranger(place: Path, mine: Iterable[str] | None) -> str | None:
    record = read_record(place) or Record("export", {})
    if not place.is_dir():
        return record.stranger(place.parent, place)
    names = {path.name for path in place.iterdir()}
    if record.files:
        names -= {PRIVATE}
        if others := [path for path in entries(place / PRIVATE) if path.name != _RECORD and path.suffix != TEMPORARY]:
            return f"{others[0]} was not written by kdexport"
    names &= names if mine is None else {*mine}
    return next(filter(None, (record.stranger(place, place / name) for name in sorted(names))), None)


def _is_fresh(folder: Path) -> bool:
    """Return whether a folder is absent, empty, or was begun by a call that was killed before it wrote anything."""
    if not folder.exists():
        return True
    private = folder / PRIVATE
    if {path.name for path in folder.iterdir()} - {PRIVATE} or private.is_symlink():
        return False
    return not private.exists() or all(path.name == _LOCK or path.suffix == TEMPORARY for path in private.iterdir())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
