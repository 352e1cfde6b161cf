"""One process from start to end: bind, load, serve, reload, drain.

SIGTERM and Ctrl-C: `ready` says no; after `drain_delay` nothing new is accepted; what was accepted is answered,
each answer closing its connection; then the process ends. While the models are still being loaded it ends at once.
SIGHUP: every model is loaded again from its folder.
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

from kdexport.errors import ArtifactError, KdexportError, SpecError, first_line
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

# Clients that hold a connection open without a request in flight get this long to send the one that they may
# have begun when the port closed.
_LINGER_S = 0.5
# How long threads may take to end: a batch whose requests have all expired may run on for ever.
_THREADS_END_S = 1.0


def serve(artifacts: list[str], settings: Settings) -> int:
    """Serve artifacts, `[NAME=]FOLDER[:VARIANT]` with the default first, until a signal ends it.

    Returns:
        The exit code: 0 after an orderly end, 1 when a thread of the batcher died.
    """
    # Batches already run side by side; a pool of threads inside each would only take turns with them.
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
                # What is loaded stays: the collector need not look through it again and again.
                gc.collect()
                gc.freeze()
                self.app.loaded = True
                self._say_ready(public, admin, time.monotonic() - began)
                await self._stop.wait()
                await self._drain(public, grpc)
        finally:
            for server in filter(None, (public, admin)):
                await _close(server)
            if grpc:
                await grpc.stop(0)
            self.app.log.close()
            await asyncio.to_thread(self.app.tracer.close)
        return self._code

    def _reload_soon(self) -> None:
        self._reloads = asyncio.ensure_future(self.reload_all())  # a task that nobody holds may be collected

    async def reload_all(self) -> None:
        """Reload every model."""
        for name in self.models.names():
            try:
                await self.reload(name)
            except Exception as error:  # whatever it is, the version that serves is whole
                warn(f"{name} was not reloaded, the version before serves on: {first_line(error)}")

    async def reload(self, name: str) -> Version:
        """Load a model's folder anew beside the version that serves, and swap when it has proved itself."""
        async with self._loading:  # one at a time: two would hold three versions in memory
            version = await self._load(name)
        say(f"{name}: version {version.version} serves")
        return version

    async def _load_all(self) -> list[Version] | None:
        """Load the first versions of all models; None when the server is to end before they are there."""

        async def load() -> list[Version]:
            async with self._loading:
                return [await self._load(name) for name in self.models.names()]

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
        # On a thread of its own, which is left behind at the deadline: a graph may have no end, a disk no answer.
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
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
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
        """End the process, for a new one: without its consumer no answer would ever come."""
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
            warn(f"{app.running} requests were not finished within {settings.grace:g} s")
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
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # what matters is said by us
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
        _bind(host, port, "--grpc-port").close()  # what gRPC itself says of a taken port is no sentence
        listener = await listen(self.app, host, port)
        say(f"gRPC on {listener.address}")
        return listener

    def _say_ready(self, public: uvicorn.Server, admin: uvicorn.Server | None, seconds: float) -> None:
        for name, version in self.models.in_service().items():
            size = version.manifest.variants[version.variant].size_bytes
            say(f"{name}: {version.variant}, {size / 1e6:.1f} MB, version {version.version}")
        say(f"ready after {seconds:.2f} s on {_url(public)}" + (f", admin on {_url(admin)}" if admin else ""))


def start_threads(app: App, versions: list[Version], on_death: Callable[[BaseException], None]) -> None:
    """Start threads for the app's models in the running loop: as many again for language models."""
    settings = app.settings
    threads = settings.threads or allowed_cores()
    start = partial(Batcher, threads=threads, on_death=on_death)
    app.batcher = start(
        max_batch_tokens=settings.max_batch_tokens,
        max_wait=settings.max_wait_ms / 1e3,
        max_queue=settings.max_queue_ms / 1e3,
        rate=threads * min((version.rate for version in versions if not version.generator), default=1.0),
        on_batch=app.metrics.batch,
    )
    app.prompts = start(
        max_batch_tokens=1,
        max_wait=0.0,
        max_queue=settings.max_writing_queue,
        rate=threads * min((version.generator.rate for version in versions if version.generator), default=1.0),
        lanes=False,
    )


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
    """Close the port. Connections that the kernel has made and nobody has taken yet are taken in: their clients know
    nothing of the difference, and may have sent a request."""
    door = server.door.dup()  # type: ignore[attr-defined]
    for listening in server.servers:
        listening.close()
    taken = []
    with contextlib.suppress(BlockingIOError):
        while True:
            taken.append(door.accept()[0])
    with contextlib.suppress(OSError):
        door.shutdown(socket.SHUT_RDWR)  # now: other descriptors of the socket may live on for a while
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
