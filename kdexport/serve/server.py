"""The server's process: bind, load, serve, reload, drain.

SIGTERM and Ctrl-C: `ready` turns false; after `drain_delay` the port closes; accepted requests are answered, each
response closing its connection; then the process ends. During the first load it ends at once. SIGHUP reloads.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import uvicorn
import uvloop

from kdexport.errors import ArtifactError, KdexportError, SpecError, counted, first_line
from kdexport.progress import say, unwaiting_stderr, warn
from kdexport.runtime.predictor import allowed_cores
from kdexport.serve.admin import Admin
from kdexport.serve.app import App
from kdexport.serve.batching import Batcher
from kdexport.serve.connection import limited
from kdexport.serve.hosts import Hosts
from kdexport.serve.registry import Models, Version, named_sources
from kdexport.serve.settings import Settings

if TYPE_CHECKING:  # gRPC is an extra
    from kdexport.serve.grpc import Listener

_LINGER_S = 0.5  # for a request on an idle connection that was under way when the port closed
_THREADS_END_S = 1.0  # for the threads to end: a batch may hang


def serve(artifacts: list[str], settings: Settings) -> int:
    """Serve artifacts, `[NAME=]FOLDER[:VARIANT]`, the default first, until a signal ends it; return the exit code."""
    # Batches run in parallel; threads within one would compete with the others.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    models = Models(named_sources(artifacts), settings.max_batch, settings.max_batch_tokens)
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))  # a connection is a file
    with unwaiting_stderr(), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(Server(models, settings).run())


class Server:
    """The app, its ports and its signals."""

    def __init__(self, models: Models, settings: Settings) -> None:
        self.models, self.settings = models, settings
        self.app = App(models, settings)
        self._stop = asyncio.Event()
        self._loading = asyncio.Lock()
        self._stuck: dict[str, threading.Thread] = {}  # loads that went past their deadline
        self._code = 0

    async def run(self) -> int:
        """Start, serve, drain."""
        began = time.monotonic()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload_soon)
        settings = self.settings
        limits = {"full": self.app.full, "on_refused": self.app.refused}
        public = await self._listen(self.app, settings.host, settings.port, "--port", **limits)
        admin = None
        if settings.admin_port is not None:
            asked = Admin(self.app, self.reload)
            admin = await self._listen(asked, settings.admin_host, settings.admin_port, "--admin-port")
        grpc = await self._listen_grpc() if settings.grpc_port is not None else None
        try:
            versions = await self._load_all()
            if versions is not None:
                start_threads(self.app, versions, self._die)
                gc.collect()
                gc.freeze()  # the models stay; later collections skip them
                self.app.loaded = True
                self._say_ready(public, admin, time.monotonic() - began)
                await self._stop.wait()
                await self._drain(public, grpc)
                say(f"stopped: {counted(self.app.answered, 'request')} answered")
        finally:
            for server in filter(None, (public, admin)):
                await _close(server)
            if grpc:
                await grpc.stop(0)
            self.app.log.close()
            await asyncio.to_thread(self.app.tracer.close)
        return self._code

    def _reload_soon(self) -> None:
        self._reloads = asyncio.ensure_future(self.reload_all())  # an unreferenced task may be collected

    async def reload_all(self) -> None:
        """Reload every model."""
        for name in self.models.names:
            try:
                await self.reload(name)
            except Exception as error:  # the version in service is intact
                warn(f"{name} was not reloaded, the version before serves on: {first_line(error)}")

    async def reload(self, name: str) -> Version:
        """Load a model's folder beside the version in service, check it, then swap."""
        async with self._loading:  # one at a time: memory
            version = await self._load(name)
        say(f"{name}: version {version.version} serves")
        return version

    async def _load_all(self) -> list[Version] | None:
        """Load all models; return None if the server is stopped first."""

        async def load() -> list[Version]:
            async with self._loading:
                return [await self._load(name) for name in self.models.names]

        loading, stopping = asyncio.ensure_future(load()), asyncio.ensure_future(self._stop.wait())
        await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            loading.cancel()
            return None
        stopping.cancel()
        return loading.result()

    async def _load(self, name: str) -> Version:
        try:
            version = await self._read(name)
        except KdexportError:
            self.app.metrics.loads.labels(name, "refused").inc()
            raise
        self.models.use(version)
        self.app.metrics.loads.labels(name, "ok").inc()
        return version

    async def _read(self, name: str) -> Version:
        # On its own thread, abandoned at the deadline: a graph or a disk may hang.
        if name in self._stuck and self._stuck[name].is_alive():
            raise ArtifactError(f"{name}: an earlier load has not ended, so no other is begun", "Restart the server")
        loop = asyncio.get_running_loop()
        found: asyncio.Future[Version | Exception] = loop.create_future()

        def read() -> None:
            outcome: Version | Exception
            try:
                outcome = self.models.read(name)
            except BaseException as error:
                outcome = error if isinstance(error, Exception) else RuntimeError(repr(error))
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(found.set_result, outcome)

        thread = threading.Thread(target=read, name=f"load {name}", daemon=True)
        thread.start()
        await asyncio.wait((found,), timeout=self.settings.load_timeout)
        if not found.done():
            self._stuck[name] = thread
            raise ArtifactError(
                f"{name} was not loaded within {self.settings.load_timeout:g} s", "Allow more with --load-timeout"
            )
        if isinstance(outcome := found.result(), Exception):
            raise outcome
        return outcome

    def _die(self, error: BaseException) -> None:
        """End the process, to be restarted: without the thread requests would hang."""
        self.app.loaded = False
        self._code = 1
        self._stop.set()
        warn(f"a batching thread died, the server ends: {error!r}")

    async def _drain(self, public: uvicorn.Server, grpc: Listener | None) -> None:
        app, settings = self.app, self.settings
        app.draining = True
        if self._code == 0 and settings.drain_delay:
            say(f"draining: requests are taken in for {settings.drain_delay:g} s more")
            await asyncio.sleep(settings.drain_delay)
        app.closing = True
        await _close_port(public)
        if self._code:
            return
        ending = asyncio.ensure_future(grpc.stop(settings.grace)) if grpc else None
        ends = time.monotonic() + settings.grace
        quiet = time.monotonic()
        while time.monotonic() < ends and public.server_state.connections:
            if app.running:
                quiet = time.monotonic()
            elif time.monotonic() - quiet > _LINGER_S:
                break
            await asyncio.sleep(0.01)
        if ending:
            await ending
        if app.running:
            warn(f"{counted(app.running, 'request')} not finished within {settings.grace:g} s")
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(app.end_threads(), _THREADS_END_S)

    async def _listen(self, app: App | Admin, host: str, port: int, flag: str, **limits: Any) -> uvicorn.Server:
        settings = self.settings
        kind = limited(read_timeout=settings.read_timeout, max_connections=settings.max_connections, **limits)
        config = uvicorn.Config(
            app, http=kind, ws="none", lifespan="off", interface="asgi3", proxy_headers=False, server_header=False,
            access_log=False, log_config=None, timeout_keep_alive=int(settings.keep_alive), timeout_graceful_shutdown=1,
        )  # fmt: skip
        config.load()
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # we log what matters
        server = uvicorn.Server(config)
        server.lifespan = config.lifespan_class(config)
        door = _bind(host, port, flag)
        # Metrics and the index of models need no key on the admin port, with keys or without.
        open_to_all = isinstance(app, Admin) or not settings.api_keys
        app.hosts = Hosts(door.getsockname()[0], host, settings.allow_host, open_to_all)
        await server.startup(sockets=[door])
        server.door = door  # type: ignore[attr-defined]
        server.ticking = asyncio.ensure_future(server.main_loop())  # type: ignore[attr-defined]
        return server

    async def _listen_grpc(self) -> Listener:
        from kdexport.serve.grpc import listen

        host, port = self.settings.host, self.settings.grpc_port
        assert port is not None
        _bind(host, port, "--grpc-port").close()  # gRPC's own error of a taken port is unreadable
        listener = await listen(self.app, host, port)
        say(f"gRPC on {listener.address}")
        return listener

    def _say_ready(self, public: uvicorn.Server, admin: uvicorn.Server | None, seconds: float) -> None:
        for name, version in self.models.in_service().items():
            size = version.manifest.variants[version.variant].size_bytes
            say(f"{name}: {version.variant}, {size / 1e6:.1f} MB, version {version.version}")
        say(f"ready after {seconds:.2f} s on {_url(public)}" + (f", admin on {_url(admin)}" if admin else ""))


def start_threads(app: App, versions: list[Version], on_death: Callable[[BaseException], None]) -> None:
    """Start threads for the app's models in the running loop, and as many for language models."""
    settings = app.settings
    threads = settings.threads or allowed_cores()
    start = partial(Batcher, threads=threads, on_death=on_death)
    app.batcher = start(
        max_batch_tokens=settings.max_batch_tokens, max_wait=settings.max_wait_ms / 1e3,
        max_queue=settings.max_queue_ms / 1e3, on_batch=app.metrics.batch,
        rate=threads * min((version.rate for version in versions if not version.generator), default=1.0),
    )  # fmt: skip
    app.prompts = start(
        max_batch_tokens=1, max_wait=0.0, max_queue=settings.max_writing_queue, lanes=False,
        rate=threads * min((version.generator.rate for version in versions if version.generator), default=1.0),
    )  # fmt: skip


def _bind(host: str, port: int, flag: str) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SpecError(f"{host}:{port} can't be listened on: {reason}", f"Name another with {flag}") from None
    found.listen(2048)
    found.setblocking(False)
    return found


def _url(server: uvicorn.Server) -> str:
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _close_port(server: uvicorn.Server) -> None:
    """Close the port; connections in the kernel's backlog are still served."""
    door = server.door.dup()  # type: ignore[attr-defined]
    for listening in server.servers:
        listening.close()
    taken = []
    with contextlib.suppress(BlockingIOError):
        while True:
            taken.append(door.accept()[0])
    with contextlib.suppress(OSError):
        door.shutdown(socket.SHUT_RDWR)  # other descriptors of the socket may stay open
    door.close()
    make: Any = server.config.http_protocol_class
    factory = partial(make, config=server.config, server_state=server.server_state, app_state={})
    for connection in taken:
        connection.setblocking(False)
        await asyncio.get_running_loop().connect_accepted_socket(factory, connection)


async def _close(server: uvicorn.Server) -> None:
    server.should_exit = True
    await server.ticking  # type: ignore[attr-defined]
    await server.shutdown()
