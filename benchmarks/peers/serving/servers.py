"""Who is compared: how each server is installed, started, asked, watched and stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
HANDLERS = HERE / "handlers"
REPOSITORY = HERE.parents[2]
ENVIRONMENTS = REPOSITORY / ".benchmarks" / "peers"
PORT = 7011  # and the two after it, for those that want a port for gRPC, metrics or the like
_READY_S, _STOP_S = 120, 15


class Failed(Exception):
    """A server can't be installed or does not start; the others are measured without it."""


@dataclass(frozen=True)
class Server:
    """A server with its settings; `settings` says in words what was chosen."""

    name: str
    peer: str  # whose environment it runs in
    command: list[str]  # a program of that environment, and its arguments
    path: str
    body: Callable[[str], Any]
    answer: Callable[[Any], tuple[str, float]]
    settings: str
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{PORT}{self.path}"

    def bodies(self, texts: list[str], work: Path) -> Path:
        """A file of the requests' bodies, one a line."""
        path = work / f"{self.peer}.bodies"
        path.write_text("".join(json.dumps(self.body(text)) + "\n" for text in texts))
        return path

    @property
    def argv(self) -> list[str]:
        environment = Path(sys.prefix) if self.peer == "kdexport" else ENVIRONMENTS / self.peer
        return [str(environment / "bin" / self.command[0]), *self.command[1:]]


@dataclass
class Running:
    """A server that has given its first right answer."""

    server: Server
    process: subprocess.Popen[bytes]
    ready_s: float
    log: Path

    def tree(self) -> list[psutil.Process]:
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def rss_mb(self) -> float:
        """Of all its processes; pages that they share are counted in each."""
        return sum(process.memory_info().rss for process in self.tree()) / 1e6

    def cpu_seconds(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self.tree())


def our_server(artifact: Path, *more: str) -> Server:
    return Server(
        name="kdexport serve",
        peer="kdexport",
        command=["kdexport", "serve", f"{artifact}:int8", "--port", str(PORT), "--admin-port", str(PORT + 1), *more],
        path="/",
        body=lambda text: {"inputs": text, "parameters": {"top_k": 1}},
        answer=lambda answer: (answer[0][0]["label"], answer[0][0]["score"]),
        settings="as it comes, access log included",
    )


def peers() -> list[Server]:
    """The others, each with the settings that were best for it here.

    All have uvloop and httptools, write no access log, and run the file on one thread of ONNX Runtime that does not
    spin; two threads gave none of them more.
    """
    litserve = Server(
        name="LitServe",
        peer="litserve",
        command=["python", "-m", "with_litserve"],
        path="/predict",
        body=lambda text: {"input": text},
        answer=lambda answer: (answer["label"], answer["score"]),
        environment={"WORKERS": "1", "FRONT_ENDS": "1", "BATCH": "1"},
        settings="no batching, 1 worker, 1 front end, ZeroMQ queue",
    )
    return [
        Server(
            name="FastAPI + pipeline",
            peer="fastapi",
            command=f"uvicorn with_fastapi:app --port {PORT} --workers 2 --log-level warning".split(),
            path="/classify",
            body=lambda text: {"inputs": text},
            answer=lambda answer: (answer["label"], answer["score"]),
            settings="transformers' pipeline over Optimum's model in a sync endpoint, 2 workers",
        ),
        litserve,
        replace(
            litserve,
            name="LitServe, batching",
            environment={"WORKERS": "1", "FRONT_ENDS": "2", "BATCH": "16"},
            settings="batches of up to 16 without waiting, 1 worker, 2 front ends, ZeroMQ queue",
        ),
        Server(
            name="BentoML",
            peer="bentoml",
            command=f"bentoml serve with_bentoml:Classify --host 127.0.0.1 --port {PORT}".split(),
            path="/classify",
            body=lambda text: {"texts": [text]},
            answer=lambda answer: (answer[0]["label"], answer[0]["score"]),
            environment={"WORKERS": "2", "BATCH": "32", "BENTOML_DO_NOT_TRACK": "true"},
            settings="a batchable API, batches of up to 32 as its dispatcher chooses, 2 workers",
        ),
        Server(
            name="MLServer",
            peer="mlserver",
            command=["mlserver", "start", "."],
            path="/v2/models/classify/infer",
            body=lambda text: {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [text]}]},
            answer=lambda answer: (answer["outputs"][0]["data"][0], answer["outputs"][1]["data"][0]),
            environment={
                "MLSERVER_HOST": "127.0.0.1",
                "MLSERVER_HTTP_PORT": str(PORT),
                "MLSERVER_GRPC_PORT": str(PORT + 1),
                "MLSERVER_METRICS_PORT": str(PORT + 2),
                "MLSERVER_DEBUG": "false",
                "MLSERVER_GZIP_ENABLED": "false",
                "MLSERVER_PARALLEL_WORKERS": "0",
                "MLSERVER_MODEL_NAME": "classify",
                "MLSERVER_MODEL_IMPLEMENTATION": "with_mlserver.Model",
                "MLSERVER_MODEL_MAX_BATCH_SIZE": "32",
                "MLSERVER_MODEL_MAX_BATCH_TIME": "0.0001",
            },
            settings="a model of our own (its Hugging Face runtime does not load with this PyTorch), in the server's "
            "process, batches of up to 32 within 0.1 ms, no gzip",
        ),
    ]


def install(peer: str) -> None:
    """Make a peer's environment, unless it is there and made from the requirements as they are.

    Raises:
        Failed: pip could not.
    """
    wanted, place = HERE / f"requirements-{peer}.txt", ENVIRONMENTS / peer
    made = place / "requirements.txt"
    if made.exists() and made.read_text() == wanted.read_text():
        return
    print(f"installing {peer} …", file=sys.stderr, flush=True)
    steps = [
        [sys.executable, "-m", "venv", "--clear", str(place)],
        [str(place / "bin" / "pip"), "install", "--quiet", "--requirement", str(wanted)],
    ]
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True)
        if done.returncode:
            reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr[-300:]]
            raise Failed(f"{peer} can't be installed: {reason[-1]}")
    made.write_text(wanted.read_text())


@contextmanager
def running(server: Server, artifact: Path, text: str, work: Path) -> Iterator[Running]:
    """Start a server, wait for its first answer, and stop it in the end with all of its processes.

    Raises:
        Failed: it ended, or did not answer in time.
    """
    place = work / server.peer
    place.mkdir(exist_ok=True)
    always = {"HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1"}
    if server.peer != "kdexport":
        always |= {"PYTHONPATH": str(HANDLERS), "ARTIFACT": str(artifact), "THREADS": "1", "PORT": str(PORT)}
    log = place / "log"
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            server.argv,
            cwd=place,
            env=os.environ | always | server.environment,
            stdout=subprocess.DEVNULL,
            stderr=output,
            start_new_session=True,  # its processes are one group, which can be ended whole
        )
    try:
        while not _answers(server, text):
            if process.poll() is not None or time.monotonic() - began > _READY_S:
                raise Failed(f"{server.name} does not answer; its last words: {log.read_text()[-400:]}")
            time.sleep(0.02)
        yield Running(server, process, time.monotonic() - began, log)
    finally:
        _stop(process)


def ask(server: Server, text: str) -> tuple[str, float]:
    """The label and score that a server gives a text."""
    body = json.dumps(server.body(text)).encode()
    request = urllib.request.Request(server.url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return server.answer(json.load(response))


def _answers(server: Server, text: str) -> bool:
    try:
        return bool(ask(server, text))
    except OSError:  # nobody listens yet, or it says that it is not ready
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask its group to end; end what is left of it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=_STOP_S)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
