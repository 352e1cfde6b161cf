"""Logits by content, on disk: what was computed once is never computed again.

One folder a teacher (the hash of its weights, configuration, tokenizer and maximal length) in a cache that all runs
share, in it shards of hash of the text → logits: they serve a second student, a run that was killed, and added rows.
A shard is named after the hash of its content, which shows damage.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from kdexport.errors import counted, first_line
from kdexport.files import sync_one
from kdexport.progress import warn
from kdexport.tasks.metrics import Array


class Store:
    """Content → logits float32 [*shape], in a folder of shards that only ever grows.

    Shards of another shape are skipped. An `optional` store is a cache: where it can't be written or read, it goes on
    in memory with a warning, and renames damaged shards to `NAME.npz.damaged`. Any other raises OSError.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...] | None = None, *, optional: bool = False) -> None:
        self._folder, self._shape, self._optional = folder, shape, optional
        self._logits: dict[bytes, Array] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._give_up(error)
        skipped = [(shard, why) for shard in sorted(folder.glob("*.npz")) if (why := self._read(shard))]
        if skipped:
            shard, why = skipped[0]
            warn(f"soft targets: {counted(len(skipped), 'file')} of {folder} computed again ({shard.name}: {why})")

    def missing(self, contents: Iterable[str]) -> list[str]:
        """Return the distinct contents that have no logits yet, in order."""
        return [content for content in dict.fromkeys(contents) if content_key(content) not in self._logits]

    def add(self, contents: Sequence[str], logits: Array) -> None:
        """Write one shard, atomically."""
        keys = np.frombuffer(b"".join(map(content_key, contents)), np.uint8).reshape(-1, 16)
        name = _name(keys, logits)
        neighbour = self._folder / f".{os.getpid()}.tmp"
        try:
            with neighbour.open("wb") as file:
                np.savez(file, keys=keys, logits=logits)
            sync_one(neighbour)
            neighbour.replace(self._folder / f"{name}.npz")
            sync_one(self._folder)
        except OSError as error:
            self._give_up(error)
        finally:
            with suppress(OSError):
                neighbour.unlink(missing_ok=True)
        self._logits |= zip(map(bytes, keys), logits, strict=True)

    def look_up(self, contents: Iterable[str]) -> Array:
        """Return logits float32 [N, *shape] in the order of the contents."""
        return np.stack([self._logits[content_key(content)] for content in contents])

    def _read(self, shard: Path) -> str | None:
        """Take a shard's logits; return why they can't be taken, or None."""
        try:
            with np.load(shard) as arrays:
                keys, logits = arrays["keys"], arrays["logits"]
            if shard.stem != _name(keys, logits):
                raise ValueError("its checksum differs")
        except (OSError, MemoryError) as error:  # too many open files, no memory: the shard may be as it should be
            if not self._optional:
                raise
            return first_line(error)
        except Exception as error:  # zipfile, zlib, struct and numpy each have their own for a damaged file
            if self._optional:
                with suppress(OSError):
                    shard.rename(f"{shard}.damaged")
            return first_line(error)
        if self._shape not in (None, logits.shape[1:]):
            return f"its logits are of shape {logits.shape[1:]}, not {self._shape}"
        self._logits |= zip(map(bytes, keys), logits, strict=True)
        return None

    def _give_up(self, error: OSError) -> None:
        if not self._optional:
            raise error
        warn(f"soft targets: the cache {self._folder} can't be written ({error.strerror}); they stay in memory only")


def _name(keys: Array, logits: Array) -> str:
    sums = hashlib.sha256(keys.tobytes())
    sums.update(str((logits.dtype.str, logits.shape)).encode())
    sums.update(np.ascontiguousarray(logits).data)
    return sums.hexdigest()[:24]


def content_key(content: str) -> bytes:
    """Return 16 bytes that stand for a content."""
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def cache_folder() -> Path:
    """Return `$KDEXPORT_CACHE`, or `kdexport/` in the user's cache folder."""
    if own := os.environ.get("KDEXPORT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdexport"
