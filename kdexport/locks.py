"""Locks on folders: one process at a time, on local disks and on network file systems.

On a local disk the kernel's `flock` decides alone; it ends with its holder, however that died. A network file system
may carry it to no other host, or know none. There the holder also writes its host, its pid and a counter into the file
every few seconds, and a newcomer watches whether that of another host moves. Counters are compared, never clocks.
"""

import errno
import fcntl
import os
import re
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from secrets import token_hex

import msgspec

from kdexport.errors import RunError
from kdexport.progress import warn

BEAT_S, WATCH_S = 2.0, 10.0
_SETTLE_S = 0.5  # two newcomers write at once: the later one stays
_SIZE = 400  # of the line, always, so that one write replaces another
_NETWORK = {
    "9p", "afs", "beegfs", "ceph", "cifs", "fuse", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "smb3",
    "smbfs", "vboxsf", "virtiofs",
}  # fmt: skip


class _Holder(msgspec.Struct):
    host: str
    pid: int
    boot: str  # of the kernel: hosts may share a name
    token: str
    beat: int


class Lock:
    """The lock of a file, held until `close`; the file is made where it is missing.

    Raises:
        RunError: another process holds it; `what` names the folder.
        OSError: the file can't be opened.
    """

    def __init__(self, file: Path, what: Path) -> None:
        self._file, self._what, self._lost = file, what, ""
        self._end = threading.Event()
        self._beats: threading.Thread | None = None
        network = is_network(file.parent)
        # Open for reading, where that is enough: its disk can be mounted read-only meanwhile.
        self._fd = os.open(file, os.O_CREAT | os.O_CLOEXEC | (os.O_RDWR if network else os.O_RDONLY), 0o666)
        try:
            locked = self._flock()
            if network or not locked:
                self._hold_by_beats(locked)
        except BaseException:
            os.close(self._fd)
            raise

    def check(self) -> None:
        """Raise a RunError if another process took the lock over, while this one stood still or had no network."""
        if self._lost:
            raise RunError(f"{self._what} was taken over by another kdexport ({self._lost})", "Wait for it")

    def rename(self, file: Path) -> None:
        """Rename the locked file."""
        self._file = self._file.rename(file)

    def close(self) -> None:
        """Release the lock."""
        if self._beats:
            self._end.set()
            self._beats.join(BEAT_S)
            if not self._lost:
                with suppress(OSError):
                    os.ftruncate(self._fd, 0)
        os.close(self._fd)

    def _flock(self) -> bool:
        """Return whether the kernel gave the lock; False where the file system knows none."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise self._in_use(_read(self._file)) from None
            return False
        return True

    def _hold_by_beats(self, locked: bool) -> None:
        before, boot = _read(self._file), _boot()
        here = _holder(before)
        # The kernel would have refused, had the holder been one of its own processes.
        if before and not (locked and here and here.boot == boot):
            until = time.monotonic() + WATCH_S
            while time.monotonic() < until:
                time.sleep(BEAT_S / 4)
                if (now := _read(self._file)) and now != before:
                    raise self._in_use(now)
            warn(f"{self._what}: its lock is taken over from {_name(before)}, which shows no life")
        if not locked:  # opened for reading alone on what looked like a local disk
            os.close(self._fd)
            self._fd = os.open(self._file, os.O_RDWR | os.O_CLOEXEC)
        self._mine = _Holder(socket.gethostname()[:100], os.getpid(), boot, token_hex(8), 0)
        self._write()
        time.sleep(min(_SETTLE_S, BEAT_S))
        if not self._is_mine(found := _read(self._file)):
            raise self._in_use(found)
        self._beats = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._beats.start()

    def _beat(self) -> None:
        while not self._end.wait(BEAT_S):
            with suppress(OSError):  # a network that is away for a while
                if (found := _read(self._file)) and not self._is_mine(found):
                    self._lost = _name(found)
                    return
                self._mine.beat += 1
                self._write()

    def _is_mine(self, line: bytes) -> bool:
        found = _holder(line)
        return found is not None and found.token == self._mine.token

    def _write(self) -> None:
        os.pwrite(self._fd, msgspec.json.encode(self._mine).ljust(_SIZE), 0)
        os.fsync(self._fd)

    def _in_use(self, line: bytes) -> RunError:
        who = f" ({_name(line)})" if line else ""
        return RunError(f"{self._what} is in use by another kdexport{who}", "Wait for it, or name another folder")


def is_network(folder: Path) -> bool:
    """Return whether a folder is on a network file system, where `flock` may not reach other hosts.

    `$KDEXPORT_FILE_SYSTEM` names the type of all folders, like `nfs`, where /proc/self/mountinfo doesn't tell it, as on
    a file system that only its vendor knows; tests use it too. Without either, a folder is on a local disk.
    """
    kind = os.environ.get("KDEXPORT_FILE_SYSTEM") or _mounted_as(folder.resolve())
    return kind in _NETWORK or kind.startswith("fuse.")


def _mounted_as(folder: Path) -> str:
    found = Path("/"), ""
    with suppress(OSError), Path("/proc/self/mountinfo").open(encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            fields, _, kind = line.partition(" - ")
            place = Path(re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), fields.split(" ")[4]))
            if folder.is_relative_to(place) and len(place.parts) >= len(found[0].parts):
                found = place, kind.split(" ")[0]
    return found[1]


def _read(file: Path) -> bytes:
    """Read the lock file by its name: opening it again asks a network file system's server for what it holds now."""
    with suppress(OSError):
        return file.read_bytes()
    return b""


def _holder(line: bytes) -> _Holder | None:
    with suppress(msgspec.DecodeError):
        return msgspec.json.decode(line, type=_Holder)
    return None


def _name(line: bytes) -> str:
    found = _holder(line)
    return f"host {found.host}, pid {found.pid}" if found else "an unknown process"


def _boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()
