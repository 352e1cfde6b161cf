"""Logits by content, on disk: what was computed once is never computed again.

One folder a teacher (the hash of its weights, configuration, tokenizer and maximal length) in a cache that all runs
share, in it shards of hash of the text → logits: they serve a second student, a run that was killed, and added rows.
A shard is an array of records in a `.npy` file, memory-mapped, and named after the hash of its content, which shows
damage.
"""

import hashlib
import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

from kdexport.errors import counted, first_line
from kdexport.files import sync_one
from kdexport.progress import warn
from kdexport.tasks.metrics import Array

_VERSION = 2  # of the shards' format
_HASHED_AT_ONCE = 1 << 24  # bytes


class Store:
    """Content → logits, in a folder of shards that only ever grows; in memory are 32 bytes a content.

    `dtype` is that of one content's logits; shards of another are skipped. An `optional` store is a cache: where it
    can't be written or read, it goes on in memory with a warning, and renames damaged shards to `NAME.npy.damaged`. Any
    other raises OSError.
    """

    def __init__(self, folder: Path, dtype: np.dtype | None = None, *, optional: bool = False) -> None:
        self._folder, self._dtype, self._optional = folder, dtype, optional
        self._shards: list[Path | Array] = []
        self._skipped: set[Path] = set()
        # The contents in the order of their keys' first halves: key, shard, and place in it.
        self._keys, self._of = np.zeros((0, 2), np.uint64), np.zeros((0, 2), np.int64)
        self.refresh()

    def refresh(self) -> None:
        """Take shards that were added to the folder by other processes."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._give_up(error)
        known = {shard for shard in self._shards if isinstance(shard, Path)}
        new = sorted({*self._folder.glob("*.npy")} - known - self._skipped)
        skipped = [(shard, why) for shard in new if (why := self._read(shard))]
        self._skipped.update(shard for shard, _ in skipped)
        if skipped:
            shard, why = skipped[0]
            warn(
                f"soft targets: {counted(len(skipped), 'file')} of {self._folder} computed again ({shard.name}: {why})"
            )

    def has(self, keys: Array) -> Array:
        """Return for each key of `content_keys` whether its logits are here: bool [N]."""
        return self._find(keys) >= 0

    def add(self, keys: Array, logits: Array) -> None:
        """Write one shard, atomically."""
        records = np.empty(len(keys), _record(logits.dtype, logits.shape[1:]))
        records["key"], records["logits"] = keys, logits
        self._dtype = self._dtype or records.dtype["logits"]
        neighbour = self._folder / f".{secrets.token_hex(6)}.tmp"
        name = self._folder / f"{_name(records)}.npy"
        shard: Path | Array = name
        try:
            with neighbour.open("wb") as file:
                np.save(file, records)
            sync_one(neighbour)
            neighbour.replace(name)
            sync_one(self._folder)
        except OSError as error:
            self._give_up(error)
            shard = records
        finally:
            with suppress(OSError):
                neighbour.unlink(missing_ok=True)
        self._take(shard, keys)

    def look_up(self, keys: Array) -> Array:
        """Return the logits of these keys, [N, …]; raise KeyError where one is missing."""
        places = self._find(keys)
        if (places < 0).any():
            raise KeyError("no logits for a content")
        of, found = self._of[places], None
        for i in np.unique(of[:, 0]):
            shard, here = self._shards[i], of[:, 0] == i
            records = np.load(shard, mmap_mode="r") if isinstance(shard, Path) else shard
            some = records["logits"][of[here, 1]]
            found = np.empty((len(keys), *some.shape[1:]), some.dtype) if found is None else found
            found[here] = some
        return np.zeros((0,)) if found is None else found

    def _find(self, keys: Array) -> Array:
        """Return the place of each key in the index, −1 where it is not: int64 [N]."""
        first = self._keys[:, 0]
        places = np.searchsorted(first, keys[:, 0])
        found = np.full(len(keys), -1)
        open_ = np.arange(len(keys))
        while len(open_ := open_[places[open_] < len(first)]):  # several keys may share a first half
            open_ = open_[first[places[open_]] == keys[open_, 0]]
            same = self._keys[places[open_], 1] == keys[open_, 1]
            found[open_[same]] = places[open_[same]]
            open_ = open_[~same]
            places[open_] += 1
        return found

    def _read(self, shard: Path) -> str | None:
        """Take a shard; return why it can't be taken, or None."""
        try:
            records = np.load(shard, mmap_mode="r")
            if records.dtype.names != ("key", "logits") or shard.stem != _name(records):
                raise ValueError("its checksum differs")
        except (OSError, MemoryError) as error:  # too many open files, no memory: the shard may be as it should be
            if not self._optional:
                raise
            return first_line(error)
        except Exception as error:  # numpy has several for a damaged file
            if self._optional:
                with suppress(OSError):
                    shard.rename(f"{shard}.damaged")
            return first_line(error)
        if self._dtype not in (None, records.dtype["logits"]):
            return "its logits are of another kind"
        self._take(shard, np.array(records["key"]))
        return None

    def _take(self, shard: Path | Array, keys: Array) -> None:
        of = np.stack([np.full(len(keys), len(self._shards)), np.arange(len(keys))], axis=1)
        self._shards.append(shard)
        keys, of = np.concatenate([self._keys, keys]), np.concatenate([self._of, of])
        order = np.argsort(keys[:, 0], kind="stable")
        self._keys, self._of = keys[order], of[order]

    def _give_up(self, error: OSError) -> None:
        if not self._optional:
            raise error
        warn(f"soft targets: the cache {self._folder} can't be written ({error.strerror}); they stay in memory only")


def _record(dtype: np.dtype, shape: tuple[int, ...]) -> np.dtype:
    return np.dtype([("key", np.uint64, (2,)), ("logits", dtype, shape)])


def _name(records: Array) -> str:
    sums = hashlib.sha256(str((records.dtype.descr, len(records))).encode())
    step = max(1, _HASHED_AT_ONCE // records.itemsize)
    for start in range(0, len(records), step):
        sums.update(np.ascontiguousarray(records[start : start + step]).tobytes())
    return sums.hexdigest()[:24]


def content_keys(contents: Iterable[str]) -> Array:
    """Return two numbers that stand for each content: uint64 [N, 2]."""
    return np.frombuffer(b"".join(map(content_key, contents)), np.uint64).reshape(-1, 2)


def content_key(content: str) -> bytes:
    """Return 16 bytes that stand for a content."""
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def cache_folder() -> Path:
    """Return `$KDEXPORT_CACHE`, or `kdexport/` in the user's cache folder."""
    if own := os.environ.get("KDEXPORT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdexport"


def targets_folder(identity: str) -> Path:
    """Return the folder of one teacher's logits in the cache; those of other versions lie elsewhere, untouched."""
    return cache_folder() / f"targets-{_VERSION}" / identity
