"""Hash files, and write them so that each is the old one or the new one, whatever happens."""

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import msgspec

from kdexport.errors import KdexportError, RunError

TEMPORARY = ".kdexport-tmp"


def is_place(name: str) -> bool:
    """Return whether a name is a local path, existing or not, rather than a hub id."""
    path = Path(name)
    nested = len(path.parts) > 1 and path.parent.exists()
    return path.exists() or name.startswith((".", "/", "~")) or nested or len(path.parts) > 2


def digest(value: object) -> str:
    """Return the sha256 of a JSON-able value, independent of the order of keys."""
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(folder: Path, *, without: frozenset[str] = frozenset()) -> dict[str, str]:
    """Return relative path → sha256 of every file below a folder, but for the top-level names in `without`."""
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {name.as_posix(): hash_file(folder / name) for name in names if name.parts[0] not in without}


def entries(place: Path) -> Iterator[Path]:
    """Yield all files and links below a folder, or the place itself if it is none."""
    if place.is_symlink() or not place.is_dir():
        yield place
        return
    for here, folders, files in os.walk(place):
        yield from (Path(here, name) for name in files)
        yield from (path for name in folders if (path := Path(here, name)).is_symlink())


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON, atomically."""
    write_bytes(path, as_json(value))


def as_json(value: object) -> bytes:
    """Return a value as indented JSON, as `write_json` writes it."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def sync(place: Path) -> None:
    """Push a file, or a folder with all that is below it, to the disk, so that a power cut after it loses nothing."""
    if place.is_dir():
        for path in place.iterdir():
            if not path.is_symlink():
                sync(path)
    sync_one(place)


def sync_one(place: Path) -> None:
    """Push a file's bytes, or a folder's own names, to the disk."""
    try:
        opened = os.open(place, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):  # some file systems sync no folders
            raise


def write_bytes(path: Path, content: bytes, *, new: bool = False) -> None:
    """Write a file atomically. `new`: replace none."""
    with written(path, new=new) as file:
        file.write(content)


@contextmanager
def written(path: Path, *, new: bool = False) -> Iterator[BinaryIO]:
    """Open a neighbour of a random name, which is synced and renamed when the block ends. `new`: replace none."""
    neighbour = path.with_name(f".{path.name[:64]}.{secrets.token_hex(6)}{TEMPORARY}")
    try:
        with neighbour.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if new:
            os.link(neighbour, path)
        else:
            neighbour.replace(path)
        sync_one(path.parent)
    except OSError as error:
        error.filename, error.filename2 = str(path), None  # a full disk names no file
        raise
    finally:
        neighbour.unlink(missing_ok=True)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Raise one line for the user where the machine is at fault, however a library reports it; see `fault_of`."""
    try:
        yield
    except Exception as error:
        if fault := fault_of(error, folder):
            raise fault from error
        raise


def fault_of(error: BaseException, folder: Path | None) -> RunError | None:
    """Return the line for an error that comes of a full or read-only disk, or of too many open files; else None.

    safetensors, torch, onnxruntime and imports each raise classes and words of their own: where an error has no number,
    the process and the folder, if one is known, are asked.
    """
    again = "run the same command again: finished stages are kept"
    chain = list(_chain(error))
    unknown = not any(isinstance(each, KdexportError) or getattr(each, "errno", None) for each in chain)
    ask = folder if unknown else None
    if _names(chain, errno.EMFILE, errno.ENFILE) or _cannot_open():  # safetensors says that a file is missing
        return RunError("too many files are open", f"Raise the limit (ulimit -n 1024) and {again}")
    if _names(chain, errno.EROFS) or (ask and os.statvfs(_existing(ask)).f_flag & os.ST_RDONLY):
        return RunError(f"{folder or 'a folder'} is on a read-only file system", f"Mount it for writing and {again}")
    if _names(chain, errno.ENOSPC, errno.EDQUOT) or (ask and _is_full(_existing(ask))):
        return RunError(f"the disk is full: {folder or 'nothing more can be written'}", f"Make room and {again}")
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _names(chain: Iterable[BaseException], *codes: int) -> bool:
    return any(
        getattr(each, "errno", None) == code or os.strerror(code) in str(each) for each in chain for code in codes
    )


def _cannot_open() -> bool:
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        return True
    return False


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _is_full(there: Path) -> bool:
    usage = shutil.disk_usage(there)
    return usage.total > 0 and usage.free < 2**16  # /proc and its kind have no size
