"""Answers of endpoints by content, on disk: what was paid for once is never paid for again.

One sqlite file in the cache that all runs share, a row an answer, committed at once: a process that is killed at any
moment loses none that came. Keys are hashes of path and body (model, prompt, parameters): neither the URL nor the
endpoint's key is in the file.
"""

import hashlib
import json
import sqlite3
import time
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from kdexport.distill.store import cache_folder
from kdexport.errors import RunError, first_line
from kdexport.progress import warn

_VERSION = 1  # of the file's format
_LOCKED_S = 60.0  # another process may be writing


class Answer(NamedTuple):
    """The bytes of an answer, and how long it took."""

    body: bytes
    seconds: float


class Answers:
    """Key → answer, in a file that several processes may share; a damaged one is renamed, with a warning."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file or cache_folder() / f"answers-{_VERSION}" / "answers.sqlite"
        self._rows = self._open()

    def __len__(self) -> int:
        return int(self._do("SELECT count(*) FROM answers")[0][0])

    def get(self, key: bytes) -> Answer | None:
        """Return the answer with this key, or None; a row whose checksum differs is none."""
        for body, seconds, checksum in self._do("SELECT body, seconds, checksum FROM answers WHERE key = ?", key):
            if isinstance(body, bytes) and zlib.crc32(body) == checksum:
                return Answer(body, float(seconds))
        return None

    def put(self, key: bytes, answer: Answer) -> None:
        """Store an answer before anything else happens."""
        self._do("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)", key, *answer, zlib.crc32(answer.body))

    def close(self) -> None:
        """Close the file."""
        self._rows.close()

    def _open(self) -> sqlite3.Connection:
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            return self._connect()
        except sqlite3.OperationalError as error:
            raise self._unusable(error) from None
        except OSError as error:
            raise self._unusable(error) from None
        except sqlite3.DatabaseError as error:
            self._put_aside(error)
            return self._connect()

    def _connect(self) -> sqlite3.Connection:
        # Calls are made on a thread of their own, while the one that opened the file waits.
        rows = sqlite3.connect(self._file, timeout=_LOCKED_S, isolation_level=None, check_same_thread=False)
        try:
            rows.execute("PRAGMA journal_mode = WAL")
            rows.execute("PRAGMA synchronous = NORMAL")  # a loss of power may take the last answers, a kill takes none
            rows.execute(
                "CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, body BLOB, seconds REAL, checksum INTEGER)"
            )
        except sqlite3.Error:
            rows.close()
            raise
        return rows

    def _do(self, statement: str, *values: Any) -> list[Any]:
        try:
            return self._rows.execute(statement, values).fetchall()
        except sqlite3.OperationalError as error:
            raise self._unusable(error) from None
        except sqlite3.DatabaseError as error:
            self._rows.close()
            self._put_aside(error)
            self._rows = self._open()
            return self._rows.execute(statement, values).fetchall()

    def _put_aside(self, error: sqlite3.DatabaseError) -> None:
        aside = f"{self._file}.damaged-{time.time_ns()}"
        for ending in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                Path(f"{self._file}{ending}").rename(f"{aside}{ending}")
        warn(f"the file of answers {self._file} is damaged ({first_line(error)}); it is now {Path(aside).name}")

    def _unusable(self, error: Exception) -> RunError:
        what = f"the file of answers {self._file} can't be used: {first_line(error)}"
        return RunError(what, "Make room, or set KDEXPORT_CACHE to a folder that can be written")


def key_of(path: str, body: dict[str, Any]) -> bytes:
    """Return what stands for a call: 16 bytes."""
    canonical = json.dumps([path, body], sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).digest()
