"""Hash files, and write them so that each is the old one or the new one, whatever happens."""

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def write_bytes(path: Path, content: bytes, *, new: bool = False) -> None:
    """Write a file atomically: into a neighbour of a random name, synced, then renamed. `new`: replace none."""
    neighbour = path.with_name(f".{path.name[:64]}.{secrets.token_hex(6)}{TEMPORARY}")
    try:
        with neighbour.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if new:
            os.link(neighbour, path)
        else:
            neighbour.replace(path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None  # a full disk names no file
        raise
    finally:
        neighbour.unlink(missing_ok=True)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Raise one line for the user where the disk is full, however a library reports it."""
    try:
        yield
    except KdexportError:
        raise
    except Exception as error:  # safetensors, torch and onnxruntime each raise a class of their own for ENOSPC
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not (full or "No space left" in str(error) or _is_full(folder)):
            raise
        fix = "Make room and run the same command again: finished stages are kept"
        raise RunError(f"the disk is full: {folder}", fix) from error


def _is_full(folder: Path) -> bool:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    usage = shutil.disk_usage(there)
    return usage.total > 0 and usage.free < 2**16  # /proc and its kind have no size
