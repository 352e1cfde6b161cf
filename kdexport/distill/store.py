"""Logits by content, on disk: what was computed once is never computed again.

One folder a teacher (the hash of its weights, configuration, tokenizer and maximal length), in it shards of
(hash of the text → logits) in a cache that all runs share. What is there holds for a second student, after a kill,
and when rows are added.
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
    """Content → logits float32 [C], in a folder of shards that only ever grows."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._logits: dict[bytes, Array] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for shard in sorted(folder.glob("*.npz")):
            try:
                with np.load(shard) as arrays:
                    self._logits |= zip(map(bytes, arrays["keys"]), arrays["logits"], strict=True)
            except Exception:  # a shard that a disk lost part of; its texts are computed again
                warn(f"soft targets: {shard} is damaged and is left out")
                shard.unlink()

    def missing(self, contents: Iterable[str]) -> list[str]:
        """The distinct contents that have no logits yet, in order."""
        return [content for content in dict.fromkeys(contents) if content_key(content) not in self._logits]

    def add(self, contents: Sequence[str], logits: Array) -> None:
        """Write one shard, atomically."""
        keys = [content_key(content) for content in contents]
        path = self._folder / f"{hashlib.sha256(b''.join(keys)).hexdigest()[:24]}.npz"
        neighbour = path.with_name(f".{os.getpid()}.tmp")
        with neighbour.open("wb") as file:
            np.savez(file, keys=np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16), logits=logits)
        neighbour.replace(path)
        self._logits |= zip(keys, logits, strict=True)

    def look_up(self, contents: Iterable[str]) -> Array:
        """Logits float32 [N, C] in the order of the contents."""
        return np.stack([self._logits[content_key(content)] for content in contents])


def content_key(content: str) -> bytes:
    """16 bytes that stand for a content."""
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def cache_folder() -> Path:
    """`$KDEXPORT_CACHE`, or `kdexport/` in the user's cache folder."""
    if own := os.environ.get("KDEXPORT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdexport"
