"""The server always stops, and nothing unread stops it: logs, signals, loads without end, processes of the bench."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import pytest
import uvloop
from endless import endless
from serve_process import served
from wire import Wire, ask, assert_refused, is_well, request

from kdexport import progress
from kdexport.cli.use import _keys
from kdexport.progress import Outlet
from kdexport.runtime.predictor import tensors_of
from kdexport.serve.accesslog import AccessLog
from kdexport.serve.http import Request, Stream
from kdexport.serve.registry import Models
from kdexport.serve.server import Server
from kdexport.serve.settings import Settings
from kdexport.tasks import load_task

# Far more than any of this takes; without the bounds it would be for ever.
LONG = 30.0
WORD = "zebra"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def eventually(holds) -> None:
    ends = time.monotonic() + LONG
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.02)


def kdexport(*arguments: object, **how: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "kdexport", *map(str, arguments)], **how)


@contextmanager
def quiet_server(*arguments: object, code: int = 0, **how: object):
    """A server whose stderr may not be read; its ports are chosen beforehand."""
    port, admin_port = free_port(), free_port()
    process = kdexport("serve", *arguments, "--port", port, "--admin-port", admin_port, **how)
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        assert process.poll() is None, "it ended"
        try:
            return ask(url, "/ping").status == 200
        except ConnectionError:
            return False

    try:
        eventually(ready)
        yield url, f"http://127.0.0.1:{admin_port}", process
        process.send_signal(signal.SIGTERM)
        assert process.wait(LONG) == code
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def unread():
    """A pipe with nobody who reads it, already full."""
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    try:
        while True:
            os.write(writes, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(writes, True)
    yield writes
    os.close(reads)
    os.close(writes)


# --- stdout


def test_a_log_that_nobody_reads_stops_nothing(finished, unread):
    with served(f"news={finished}", output=unread) as server:
        with Wire(server.url) as wire:
            for _ in range(1000):
                assert wire.send(request("/ping")).answer().status == 200
        took = []
        for _ in range(20):
            began = time.monotonic()
            assert ask(server.url, "/v2/health/ready").status == 200
            took.append(time.monotonic() - began)
        assert median(took) < 0.1
        assert is_well(server.url)
        assert ask(server.admin, "/metrics").status == 200


def lines_of(reads: int, count: int) -> list[bytes]:
    found = b""
    while found.count(b"\n") < count:
        found += os.read(reads, 65536)
    return found.splitlines()


def test_what_nobody_reads_is_dropped_counted_and_said_when_there_is_room_again(monkeypatch):
    monkeypatch.setattr(progress, "_MOST_WAITING", 300_000)
    reads, writes = os.pipe()
    dropped = []
    outlet = Outlet(writes, on_dropped=dropped.append)
    bundle = b"a line\n" * 1000
    for _ in range(100):
        outlet.put(bundle)
    assert 0 < sum(dropped) < 100_000
    found = lines_of(reads, 100_001 - sum(dropped))
    assert set(found) == {b"a line", note := b"%d lines were dropped, as nobody read them" % sum(dropped)}
    assert found.count(note) == 1
    outlet.put(b"the next\n")
    assert lines_of(reads, 1) == [b"the next"]
    outlet.close()
    os.close(reads)
    os.close(writes)


def test_a_disk_that_was_full_is_written_to_again(tmp_path):
    place = os.open("/dev/full", os.O_WRONLY)
    dropped = []
    log = AccessLog("all", place, dropped.append)

    async def main() -> None:
        log.request(Request({"method": "GET", "path": "/lost", "headers": []}, None), 200, 0.1)
        log.flush()
        while not dropped:
            await asyncio.sleep(0.01)
        os.dup2(os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT), place)
        log.request(Request({"method": "GET", "path": "/\x80\x9b\x7f\u00a0é\x1b", "headers": []}, None), 200, 0.1)
        log.close()

    asyncio.run(main())
    first, second = (tmp_path / "log").read_bytes().splitlines()
    assert json.loads(first)["dropped"] == 1
    # Controls, which a terminal would obey, are escaped; letters are not.
    assert rb'"/\u0080\u009b\u007f' + "\u00a0é".encode() + rb'\u001b"' in second
    assert json.loads(second)["path"] == "/\x80\x9b\x7f\u00a0é\x1b"
    os.close(place)


# --- stderr


@pytest.mark.parametrize("which", ["full", "closed pipe", "closed", "unread"])
def test_a_broken_stderr_changes_nothing(finished, unread, which):
    reads, closed = os.pipe()
    os.close(reads)
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        stderr = {"full": full, "closed pipe": closed, "closed": None, "unread": unread}[which]
        how = {"stderr": stderr, "stdout": subprocess.DEVNULL}
        if which == "closed":
            how["preexec_fn"] = lambda: os.close(2)
        with quiet_server(f"news={finished}", "--drain-delay", "100ms", **how) as (url, admin, process):
            found = ask(admin, "/v2/repository/models/news/load", b"")
            assert (found.status, found.json["load"]) == (200, True)
            process.send_signal(signal.SIGHUP)
            assert is_well(url)
            eventually(lambda: b'{model="news",outcome="ok"} 3.0' in ask(admin, "/metrics").body)
        assert kdexport("serve", "/nowhere", **how).wait(LONG) == 2
        assert kdexport("compare", "/nowhere", "/nowhere", **how).wait(LONG) == 2
    os.close(closed)


def test_lines_on_a_broken_stderr_are_no_errors(monkeypatch, tmp_path):
    progress.console.cache_clear()
    with open("/dev/full", "w", buffering=1) as full:  # noqa: PTH123
        monkeypatch.setattr(sys, "stderr", full)
        progress.say("one thing")
        progress.warn("another")
        monkeypatch.undo()
        os.dup2(os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT), full.fileno())
    progress.console.cache_clear()


# --- signals before the server is there


SIGNALS = [
    ("serve", signal.SIGTERM, 0),
    ("serve", signal.SIGINT, 130),
    ("run", signal.SIGTERM, 143),
    ("run", signal.SIGINT, 130),
]


@pytest.fixture
def importing(tmp_path):
    """Start a command whose imports take long; it is there once they have begun."""
    (tmp_path / "typer.py").write_text("import time; print('importing', flush=True); time.sleep(60)")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    started = []

    def start(command: str) -> subprocess.Popen:
        pipe = subprocess.PIPE
        process = kdexport(command, "x", stdout=pipe, stderr=pipe, env=os.environ | {"PYTHONPATH": path})
        started.append(process)
        assert process.stdout.readline() == b"importing\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("command", "number", "code"), SIGNALS)
def test_a_signal_during_the_imports_ends_the_process_in_order(importing, command, number, code):
    process = importing(command)
    process.send_signal(number)
    _, said = process.communicate(timeout=LONG)
    assert (process.returncode, said) == (code, b"")


def test_a_reload_during_the_imports_does_not_end_the_server(importing):
    process = importing("serve")
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)


# --- models without end


@pytest.fixture(scope="module")
def stuck(finished, tmp_path_factory):
    """An artifact that can't be loaded to its end."""
    return endless(finished / "artifact", tmp_path_factory.mktemp("stuck") / "artifact")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_model_is_loaded_ends_the_server(stuck, number):
    port = free_port()
    process = kdexport("serve", stuck, "--port", port, "--admin-port", "-1", stderr=subprocess.PIPE)

    def loading() -> bool:
        try:
            return ask(f"http://127.0.0.1:{port}", "/ping").status == 503
        except ConnectionError:
            return False

    eventually(loading)
    process.send_signal(number)
    _, said = process.communicate(timeout=LONG)
    assert (process.returncode, said) == (0, b"")


def test_a_model_that_is_never_loaded_is_refused_at_the_start(stuck):
    flags = ("--port", "0", "--admin-port", "-1", "--load-timeout", "300ms")
    process = kdexport("serve", f"news={stuck}", *flags, stderr=subprocess.PIPE)
    _, said = process.communicate(timeout=LONG)
    assert process.returncode == 2
    assert said == b"error: news was not loaded within 0.3 s. Allow more with --load-timeout\n"


def test_a_load_without_end_is_left_behind_once_and_the_server_serves_and_stops(finished, stuck, tmp_path):
    folder = shutil.copytree(finished / "artifact", tmp_path / "artifact")
    with served(f"news={folder}", f"other={finished}", "--load-timeout", "3s") as server:
        shutil.rmtree(folder)
        shutil.copytree(stuck, folder)
        load = "/v2/repository/models/{}/load"
        found = ask(server.admin, load.format("news"), b"")
        assert_refused(found, 400)
        assert "not loaded within 3 s" in found.json["error"]
        found = ask(server.admin, load.format("news"), b"")
        assert "an earlier load has not ended" in found.json["error"]
        assert ask(server.admin, load.format("other"), b"").status == 200
        assert is_well(server.url)
        server.process.send_signal(signal.SIGHUP)
    assert any("news was not reloaded" in line for line in server.log)


def test_the_server_ends_while_it_reloads(finished, stuck, tmp_path):
    folder = shutil.copytree(finished / "artifact", tmp_path / "artifact")
    with served(f"news={folder}") as server:
        shutil.rmtree(folder)
        shutil.copytree(stuck, folder)
        server.process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert is_well(server.url)


def test_the_server_ends_while_a_batch_never_does(finished, tmp_path):
    task = load_task(finished / "artifact")
    (row,) = task.tokenize([{"text": WORD}])
    token = int(row["input_ids"][1])
    folder = endless(finished / "artifact", tmp_path / "artifact", token)
    assert tensors_of(folder / "onnx" / "model.onnx")
    with served(f"news={folder}", "--timeout", "500ms", "--threads", "2") as server:
        assert is_well(server.url)
        assert_refused(ask(server.url, "/", json.dumps({"inputs": WORD}).encode()), 504)
        assert is_well(server.url)


# --- clients


def test_a_client_that_leaves_a_stream_with_more_requests_behind_it_is_no_fault():
    async def forever():
        while True:
            await asyncio.sleep(0.001)
            yield b"data: more\n\n"

    async def slow(*_: object) -> Stream:
        return Stream(b"data: first\n\n", forever())

    async def main() -> bytes:
        server = Server(Models({"news": (Path("x"), None)}, 32, 2048), Settings(access_log="off"))
        server.app.routes["/slow"] = {"GET": slow}
        public = await server._listen(server.app, "127.0.0.1", 0, "--port")
        port = public.servers[0].sockets[0].getsockname()[1]
        for _ in range(5):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request("/slow") + request("/ping") * 5)
            await reader.readuntil(b"more")
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        while server.app.running:
            await asyncio.sleep(0.01)
        return server.app.metrics.text()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        counted = runner.run(main())
    assert b'code="500"' not in counted
    assert b'kdexport_requests_total{code="499",model="",protocol=""} 5.0' in counted


# --- keys


def test_comments_are_no_keys_and_only_line_feeds_end_a_key(tmp_path):
    file = tmp_path / "keys.txt"
    file.write_bytes("# of the team\r\none\u2028key\r\n \t# more\n\n  two\x85keys\x0b \nthree#3".encode())
    assert _keys(file) == ("one\u2028key", "two\x85keys\x0b", "three#3")


# --- processes of the bench


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's end")
def test_what_the_bench_started_ends_when_it_is_killed(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import os, pathlib, time; pathlib.Path('pid').write_text(f'{os.getpid()}\\n'); time.sleep(60)"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    code = "from kdexport.bench.process import call; call('slow', b'', 1)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": path})
    pid = tmp_path / "pid"
    eventually(lambda: pid.exists() and pid.read_text().endswith("\n"))
    process.kill()
    process.wait()

    def ended() -> bool:
        try:
            return Path(f"/proc/{int(pid.read_text())}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except FileNotFoundError:
            return True

    eventually(ended)
