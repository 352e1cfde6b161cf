"""Logits by content, on disk: what was computed once is never computed again.

One folder a teacher (the hash of its weights, configuration, tokenizer and maximal length), in it shards of
(hash of the text → logits) in a cache that all runs share. What is there holds for a second student, after a kill,
and when rows are added. A shard is named after the hash of what it holds, so a damaged one is known, and left out.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from kdexport.progress import warn
from kdexport.tasks.metrics import Array


class Store:
    """Content → logits float32 [*shape], in a folder of shards that only ever grows.

    Args:
        folder: made when it is absent.
        shape: of one row's logits; shards of another shape are left out.
        optional: go on in memory, with a warning, where the folder can't be written.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...] | None = None, *, optional: bool = False) -> None:
        self._folder, self._shape, self._optional = folder, shape, optional
        self._logits: dict[bytes, Array] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._give_up(error)
        left_out = []
        for shard in sorted(folder.glob("*.npz")):
            try:
                with np.load(shard) as arrays:
                    self._take(shard.stem, arrays["keys"], arrays["logits"])
            except Exception as error:  # whatever a damaged file raises; its texts are computed again
                left_out.append(f"{shard.name}: {error}")
        if left_out:
            warn(f"soft targets: {len(left_out)} files of {folder} are left out ({left_out[0]})")

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
            neighbour.replace(self._folder / f"{name}.npz")
        except OSError as error:
            self._give_up(error)
        self._take(name, keys, logits)

    def look_up(self, contents: Iterable[str]) -> Array:
        """Return logits float32 [N, *shape] in the order of the contents."""
        return np.stack([self._logits[content_key(content)] for content in contents])

    def _take(self, name: str, keys: Array, logits: Array) -> None:
        if name != _name(keys, logits):
            raise ValueError("its checksum differs")
        if self._shape is not None and logits.shape[1:] != self._shape:
            raise ValueError(f"its logits are of shape {logits.shape[1:]}, not {self._shape}")
        self._logits |= zip(map(bytes, keys), logits, strict=True)

    def _give_up(self, error: OSError) -> None:
        if not self._optional:
            raise error
        warn(
            f"soft targets: the cache {self._folder} can't be written ({error.strerror}); they are kept in memory only"
        )


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
