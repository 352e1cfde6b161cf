"""The admin port: metrics, health, and Triton's model repository protocol.

Loading and unloading need a key; without keys they are allowed on loopback alone.
"""

from collections.abc import Awaitable, Callable

from kdexport.errors import KdexportError
from kdexport.progress import warn
from kdexport.serve.app import App
from kdexport.serve.connection import respond
from kdexport.serve.hosts import Hosts
from kdexport.serve.http import Receive, Refused, Request, Response, Scope, Send, answer, refusal
from kdexport.serve.registry import Version

_METRICS = (b"content-type", b"text/plain; version=0.0.4; charset=utf-8")


class Admin:
    """The ASGI application of the admin port."""

    def __init__(self, app: App, reload: Callable[[str], Awaitable[Version]]) -> None:
        self._app, self._reload = app, reload
        self.hosts: Hosts | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = Request(scope, receive)
        try:
            response = await self._answer(request)
        except Refused as refused:
            response = refusal(refused)
        except Exception as error:  # of an unforeseen broken file
            warn(f"{request.method} {request.path[:256]!r} on the admin port failed: {error!r}")
            response = refusal(Refused(500, "the server could not do this; its log says why"))
        await respond(send, response)

    async def _answer(self, request: Request) -> Response:
        request.read_head()
        if self.hosts:
            self.hosts.check(request)
        if request.origin is not None:  # of a web page; tools send none
            raise Refused(403, "browsers' pages may not ask this port")
        match request.method, request.path.strip("/").split("/"):
            case "GET", ["metrics"]:
                return Response(self._app.metrics.text(), headers=[_METRICS])
            case "GET", ["v2", "health", "live"]:
                return await self._app.live(request)
            case "GET", ["v2", "health", "ready"]:
                return await self._app.health(request)
            case "POST", ["v2", "repository", "index"]:
                return answer(self._index())
            case "POST", ["v2", "repository", "models", name, ("load" | "unload") as what]:
                if self._app.keys:
                    self._app.keys.check(request)
                elif not (self.hosts and self.hosts.loopback):
                    raise Refused(403, "models are loaded and unloaded with an API key, or on loopback")
                return await self._change(name, what)
        raise Refused(404, "here are GET /metrics and POST /v2/repository/index, …/models/NAME/load and …/unload")

    def _index(self) -> list[dict[str, str]]:
        ready = {name: version.version for name, version in self._app.models.in_service().items()}
        gone = {"version": "", "state": "UNAVAILABLE", "reason": "unloaded"}
        return [
            {"name": name} | ({"version": ready[name], "state": "READY", "reason": ""} if name in ready else gone)
            for name in self._app.models.names
        ]

    async def _change(self, name: str, what: str) -> Response:
        if name not in self._app.models.names:
            raise Refused(404, "there is no such model here; a new one needs a new start")
        if what == "unload":
            self._app.models.unload(name)
            return answer({"name": name, "unload": True})
        try:
            version = await self._reload(name)
        except KdexportError as error:
            # It names a file, but only to those who may reload.
            raise Refused(400, f"{error}; the version before serves on") from None
        return answer({"name": name, "load": True, "version": version.version})
