"""One process at a time, whatever the file system knows of locks, and however the last holder died."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time

import msgspec
import pytest

from kdexport import locks
from kdexport.errors import RunError
from kdexport.locks import Lock
from kdexport.output import Output, making

HOLD = """
import sys, time
from pathlib import Path
from kdexport.output import Output
out = Output(Path(sys.argv[1]), "bench")
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(locks, "BEAT_S", 0.05)
    monkeypatch.setattr(locks, "WATCH_S", 0.6)


@pytest.fixture
def nfs(monkeypatch, quick):
    monkeypatch.setenv("KDEXPORT_FILE_SYSTEM", "nfs")


@pytest.fixture
def no_flock(monkeypatch, quick):
    """A file system that knows no locks, as an NFS whose server runs no lock daemon."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)


def holder(folder):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def of_another_host(file, beat=1):
    """What a holder of another host has written, as a network file system shows it."""
    line = msgspec.json.encode(locks._Holder("node7", 4711, "another-boot", "token", beat))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(line.ljust(400))


@pytest.mark.parametrize("kind", ["ext4", "nfs"])
def test_a_lock_ends_with_its_holder_even_by_kill_9(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("KDEXPORT_FILE_SYSTEM", kind)
    process = holder(tmp_path / "out")
    with pytest.raises(RunError, match="is in use by another kdexport") as refused:
        Output(tmp_path / "out", "bench")
    if kind == "nfs":
        assert f"(host {socket.gethostname()}, pid {process.pid})" in str(refused.value)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    started = time.monotonic()
    with Output(tmp_path / "out", "bench"):
        assert time.monotonic() - started < locks.WATCH_S  # of this host: the kernel knows that it is dead


def test_on_a_network_a_holder_of_another_host_that_lives_is_named_and_a_dead_one_followed(tmp_path, nfs, capsys):
    file = tmp_path / "out" / ".kdexport" / "lock"
    of_another_host(file)
    beat = (
        "import sys, time\nfor n in range(100): open(sys.argv[1], 'r+').write(sys.argv[2] % (n + 2)); time.sleep(0.05)"
    )
    line = file.read_text().replace('"beat":1', '"beat":%d')
    living = subprocess.Popen([sys.executable, "-c", beat, str(file), line])
    with pytest.raises(RunError, match=r"is in use by another kdexport \(host node7, pid 4711\)"):
        Output(tmp_path / "out", "bench")
    living.kill()
    living.wait()
    of_another_host(file)
    with Output(tmp_path / "out", "bench") as out:
        assert "taken over from host node7, pid 4711" in capsys.readouterr().err
        out.write("file", b"mine")
        before = file.read_bytes()
        time.sleep(0.3)
        assert file.read_bytes() != before  # for newcomers from elsewhere to see
    assert file.read_bytes() == b""  # nobody has to wait for a holder that finished


def test_clocks_that_jump_mean_nothing(tmp_path, nfs):
    file = tmp_path / "out" / ".kdexport" / "lock"
    for moved in (-1e9, 1e9):
        of_another_host(file)
        os.utime(file, (time.time() + moved,) * 2)
        with Output(tmp_path / "out", "bench"):
            pass


def test_a_holder_that_was_taken_over_writes_nothing_more(tmp_path, nfs):
    with Output(tmp_path / "out", "bench") as out:
        of_another_host(tmp_path / "out" / ".kdexport" / "lock")
        time.sleep(0.3)
        with pytest.raises(RunError, match=r"was taken over by another kdexport \(host node7, pid 4711\)"):
            out.write("file", b"mine")
    assert not (tmp_path / "out" / "file").exists()


def test_a_file_system_without_locks_is_no_fault(tmp_path, no_flock):
    with Output(tmp_path / "out", "bench"), pytest.raises(RunError, match="in use by another kdexport"):
        Output(tmp_path / "out", "bench")
    with Output(tmp_path / "out", "bench"):
        pass


def test_work_of_another_host_that_lives_is_not_cleared_away(tmp_path, nfs):
    theirs = tmp_path / ".out.kdexport-abc"
    with making(tmp_path / "other") as work:
        left = work.rename(theirs)
        with making(tmp_path / "out"):
            assert (left / "lock").exists()
        theirs.rename(work)


@pytest.mark.parametrize(
    ("kind", "network"), [("nfs4", True), ("fuse.sshfs", True), ("lustre", True), ("ext4", False), ("overlay", False)]
)
def test_the_type_of_a_file_system_tells_whether_it_is_a_networks(tmp_path, monkeypatch, kind, network):
    monkeypatch.setenv("KDEXPORT_FILE_SYSTEM", kind)
    assert locks.is_network(tmp_path) is network


def test_the_type_is_read_from_the_kernels_list(tmp_path):
    assert locks._mounted_as(tmp_path) not in ("", "proc")
    assert locks._mounted_as(locks.Path("/proc/self")) == "proc"
    assert not locks.is_network(tmp_path)


def test_a_lock_needs_no_file_that_is_open_for_writing(tmp_path):
    lock = Lock(tmp_path / "lock", tmp_path)
    assert fcntl.fcntl(lock._fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    lock.close()
