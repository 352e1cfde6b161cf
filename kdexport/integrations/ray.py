"""An artifact as a Ray Serve deployment, whose replicas batch independently.

    from ray import serve
    from kdexport.integrations.ray import deployment

    serve.run(deployment(["tickets=/mnt/runs/tickets"], num_replicas=2, ray_actor_options={"num_cpus": 4}))

serves on Ray's HTTP port. In a Serve config file it is `import_path: kdexport.integrations.ray:application` with
`args: {artifacts: […]}`. Replicas read the folders on their nodes, and use as many threads as they have CPUs. Ray has
its own access log, metrics and gRPC.
"""

import os
from collections.abc import Sequence
from typing import Any

import msgspec

from kdexport.errors import MissingPackage
from kdexport.progress import warn
from kdexport.serve.app import App
from kdexport.serve.http import Receive, Scope, Send
from kdexport.serve.registry import Models, named_sources
from kdexport.serve.server import start_threads
from kdexport.serve.settings import Settings

# Far more than our queue accepts: the rest gets a 429, while Ray's own queue is unbounded.
_ONGOING_PER_THREAD = 256
_LOG = "errors"  # Ray logs all requests, but not our internal errors


def deployment(artifacts: Sequence[str], settings: Settings | None = None, **ray_options: Any) -> Any:
    """Return an application for `ray.serve.run` of artifacts, `[NAME=]FOLDER[:VARIANT]` with the default first.

    `settings` default their `threads` to the replica's CPUs; `ray_options` are those of `ray.serve.deployment`.
    """
    named_sources(artifacts)  # fail here, not in a replica's log
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # for a Ray that this process starts
    try:
        from ray import serve
    except ImportError:
        raise MissingPackage("ray[serve]", "ray") from None
    settings = settings or Settings(access_log=_LOG)
    actor = {"num_cpus": settings.threads or 1} | ray_options.pop("ray_actor_options", {})
    threads = settings.threads or max(1, int(actor["num_cpus"]))
    settings = msgspec.structs.replace(settings, threads=threads)
    ongoing = _ONGOING_PER_THREAD * threads
    options = {"name": "kdexport", "max_ongoing_requests": ongoing, "graceful_shutdown_timeout_s": settings.grace}
    options |= ray_options

    def build() -> _Replicated:
        return _Replicated(artifacts, settings)

    return serve.deployment(serve.ingress(build)(_Replica), ray_actor_options=actor, **options).bind()


def application(args: dict[str, Any]) -> Any:
    """Return `deployment` for Serve's config files: its arguments, with `settings` as a mapping."""
    settings = msgspec.convert({"access_log": _LOG} | args.get("settings", {}), Settings)
    return deployment(**args | {"settings": settings})


class _Replicated:
    """A replica's ASGI application; it loads its models at once, so that Ray reports errors."""

    def __init__(self, artifacts: Sequence[str], settings: Settings) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        models = Models(named_sources(artifacts), settings.max_batch, settings.max_batch_tokens)
        self._versions = [models.load(name) for name in models.names]
        self._app = App(models, settings)

    def check(self) -> None:
        if not self._app.ready:
            raise RuntimeError("the replica does not answer")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        # ASGI's path includes the route prefix.
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        await self._app({**scope, "path": path}, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        app = self._app
        await receive()
        start_threads(app, self._versions, self._die)
        app.loaded = True
        await send({"type": "lifespan.startup.complete"})
        await receive()
        app.draining = True
        await app.end_threads()
        app.log.close()
        app.tracer.close()
        await send({"type": "lifespan.shutdown.complete"})

    def _die(self, error: BaseException) -> None:
        warn(f"a batching thread died, Ray will replace the replica: {error!r}")
        self._app.loaded = False


class _Replica:
    """Health checks of a replica."""

    app: _Replicated  # from Ray's ingress

    def check_health(self) -> None:
        # Ray replaces a replica that raises here.
        self.app.check()
