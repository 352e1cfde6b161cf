"""The ASGI application: a path and a method → a handler; what goes wrong → `{"error": …}`.

A request's way: key → body within its caps → the protocol's `parse` → rows → the batcher → the protocol's
`render`. Protocols know nothing of each other, nor of batching.
"""

from __future__ import annotations

import asyncio
import re
import time
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, nullcontext
from types import ModuleType
from typing import Any

from kdexport import __version__
from kdexport.runtime.generation import Piece
from kdexport.runtime.predictor import allowed_cores
from kdexport.serve import openapi, page
from kdexport.serve.accesslog import AccessLog
from kdexport.serve.batching import Batcher
from kdexport.serve.connection import respond
from kdexport.serve.generating import Generator, awaited
from kdexport.serve.hosts import Hosts
from kdexport.serve.http import (
    CLIENT_GONE,
    CLOSE,
    EVENTS,
    RETRY,
    SMALL,
    ClientGone,
    Keys,
    Receive,
    Refused,
    Request,
    Response,
    Scope,
    Send,
    Stream,
    answer,
    event,
    failure,
    refusal,
)  # fmt: skip
from kdexport.serve.large import Limiter, check_answer, off_loop
from kdexport.serve.metrics import Metrics
from kdexport.serve.protocols import huggingface, oip, openai, tei, tgi
from kdexport.serve.registry import Models, Version
from kdexport.serve.settings import Settings
from kdexport.serve.tracing import Tracer
from kdexport.tasks.base import reads_texts

Handler = Callable[[Request, str | None, str | None], Awaitable[Response | Stream]]
_OF_MODEL = re.compile(r"(/v2)?/models/([^/]*)(?:/versions/([^/]*))?(/.*)?")
# What needs no key; `POST /` does.
OPEN = {"/", "/v2", "/v2/", "/v2/health/live", "/v2/health/ready", "/health", "/ping", "/openapi.json"}


class App:
    """The public port.

    `ready` says yes once `loaded` is set, until `draining` is. From `closing` on every answer also closes its
    connection.
    """

    def __init__(self, models: Models, settings: Settings) -> None:
        self.models, self.settings = models, settings
        self.metrics = Metrics()
        self.log = AccessLog(settings.access_log, on_dropped=self.metrics.log_dropped.inc)
        self.hosts: Hosts | None = None  # of the port that is listened on; None where another server listens
        self.tracer = Tracer(settings.tracing)
        self.limiter = Limiter(max(4, 2 * (settings.threads or allowed_cores())))
        self.batcher: Batcher | None = None
        self.prompts: Batcher | None = None
        self.loaded = self.draining = self.closing = False
        self.running = 0
        self._keys = Keys(settings.api_keys)
        tensors: dict[str, dict[str, Handler]] = {
            "": {"GET": self._metadata}, "/ready": {"GET": self._model_ready}, "/infer": {"POST": self._infer_tensors}
        }  # fmt: skip
        self.routes: dict[str, dict[str, Handler]] = {
            "/": {"GET": self._page, "POST": self._infer},
            "/models/{name}": {"POST": self._infer},
            "/v1/completions": {"POST": self._complete},
            "/v1/models": {"GET": self._language_models},
            "/predict": {"POST": self._predict},
            "/invocations": {"POST": self._predict},
            "/info": {"GET": self._info},
            "/ping": {"GET": self.health},
            "/health": {"GET": self.health},
            "/openapi.json": {"GET": self._openapi},
            "/v2": {"GET": self._server_metadata},
            "/v2/": {"GET": self._server_metadata},
            "/v2/health/live": {"GET": self.live},
            "/v2/health/ready": {"GET": self.health},
            **{f"/v2/models/{{name}}{rest}": route for rest, route in tensors.items()},
            **{f"/v2/models/{{name}}/versions/{{version}}{rest}": route for rest, route in tensors.items()},
        }
        watch = self.metrics.watch
        watch("kdexport_ready", "1 when ready", lambda: self.ready)
        watch("kdexport_waiting_rows", "Rows that wait", lambda: getattr(self.batcher, "waiting_rows", 0))
        watch("kdexport_waiting_tokens", "Tokens that wait", lambda: getattr(self.batcher, "waiting_tokens", 0))
        watch("kdexport_tokens_per_second", "What the threads do", lambda: getattr(self.batcher, "rate", 0))
        watch("kdexport_waiting_prompts", "Prompts that wait", lambda: getattr(self.prompts, "waiting_rows", 0))
        self.metrics.watch_models(lambda: [(name, v.version, v.variant) for name, v in models.in_service().items()])

    @property
    def ready(self) -> bool:
        """Whether the server accepts requests."""
        return self.loaded and not self.draining and self.models.ready

    def full(self) -> int:
        """Return the seconds to come again after while there is too much work, else 0."""
        return self.batcher.full() if self.batcher else 0

    def refused(self) -> None:
        """Note a request that was refused before it was read."""
        self.metrics.refused.inc()
        self.log.refused()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            raise RuntimeError(f"an ASGI {scope['type']} is not spoken here")
        began = time.monotonic()
        request = Request(scope, receive, self.limiter)
        fault, begun = "", False
        response: Response | Stream
        self.running += 1
        try:
            with self.tracer.span(request):
                response = await self._answer(request)
                if begun := isinstance(response, Stream):
                    await self._send(request, response, send)
        except Refused as refused:
            response = refusal(refused)
        except ClientGone:
            response = Response(b"", CLIENT_GONE)
        except Exception as error:
            # The client learns that it was us, the operator what it was.
            fault = "".join(traceback.format_exception(error))
            response = refusal(failure())
        finally:
            self.running -= 1
            if request.large:
                request.end()
        seconds = time.monotonic() - began
        self.metrics.request(request, response.status, seconds)
        self.log.request(request, response.status, seconds, fault)
        if isinstance(response, Stream) or response.status == CLIENT_GONE:
            return
        if begun:  # what went wrong since then is the last event
            await send({"type": "http.response.body", "body": event(response.body)})
            return
        await respond(send, response, self.closing)

    async def _send(self, request: Request, stream: Stream, send: Send) -> None:
        headers = [*EVENTS, CLOSE] if self.closing else EVENTS
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async with aclosing(stream.rest):
            await send({"type": "http.response.body", "body": stream.first, "more_body": True})
            async for one in stream.rest:
                if request.gone():
                    raise ClientGone
                await send({"type": "http.response.body", "body": one, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _answer(self, request: Request) -> Response | Stream:
        request.read_head()
        if self.hosts:
            self.hosts.check(request)
        path, prefix, name, version = request.path, None, None, None
        if (path not in self.routes or "{" in path) and (match := _OF_MODEL.fullmatch(path)):
            prefix, name, version, rest = match.groups()
            path = f"{prefix or ''}/models/{{name}}{'' if version is None else '/versions/{version}'}{rest or ''}"
        if self._keys and (path not in OPEN or (path == "/" and request.method == "POST")):
            self._keys.check(request)
        if prefix:
            request.protocol = "oip"
        if path not in self.routes:
            raise Refused(404, "there is nothing at this path; /openapi.json says what there is")
        methods = self.routes[path]
        handler = methods.get("GET" if request.method == "HEAD" else request.method)
        if handler is None:
            allowed = ", ".join(["HEAD", *methods] if "GET" in methods else methods)
            raise Refused(405, f"{request.method} is not for this path", [(b"allow", allowed.encode())])
        return await handler(request, name, version)

    # --- answers from the models

    async def _infer(self, request: Request, name: str | None, _: str | None) -> Response | Stream:
        request.protocol = "huggingface"
        body = await self._body(request, name)
        return await self._by_task(request, self.version(request, name), body)

    async def _by_task(self, request: Request, version: Version, body: bytes) -> Response | Stream:
        if not version.generator:
            return await self._classify(request, version, body, huggingface.protocol_of(version.task))
        query = await off_loop(len(body), tgi.parse, body, version.generator, self.settings.max_chars)
        return await self._generate(request, version, query, tgi)

    async def _classify(
        self, request: Request, version: Version, body: bytes, protocol: huggingface.TaskProtocol
    ) -> Response:
        if len(body) <= SMALL:  # without a coroutine: this is most requests' way
            query, rows, costs = self._parsed(version, protocol.parse, body)
        else:
            query, rows, costs = await off_loop(len(body), self._parsed, version, protocol.parse, body)
        size = protocol.entries(version, query) * version.entry_bytes
        if size > SMALL:
            check_answer(size, protocol.less)
        task: Any = version.task
        if getattr(query, "uncut", False) and await asyncio.to_thread(lambda: any(map(task.is_cut, rows))):
            raise Refused(422, f"a text has more than {task.config.max_length} tokens, and truncate is false")
        results = await self.run(request, version, rows, costs)
        if size <= SMALL:
            return Response(protocol.render(version, query, results))
        return Response(await off_loop(size, protocol.render, version, query, results))

    async def _predict(self, request: Request, *_: str | None) -> Response | Stream:
        # Images and sound are answered as at `POST /`; so are language models at SageMaker's path.
        request.protocol = "tei"
        body = await self._body(request)
        version = self.version(request)
        task = version.task
        if not reads_texts(task) or (version.generator and request.path == "/invocations"):
            return await self._by_task(request, version, body)
        if "tei" not in task.protocols:
            raise Refused(404, f"{version.name} is for {task.name}; POST / answers for it")
        return await self._classify(request, version, body, tei.PROTOCOL)

    async def _infer_tensors(self, request: Request, name: str | None, wanted: str | None) -> Response:
        body = await self._body(request, name)
        version = self.version(request, name, wanted)
        limits = self.settings.max_rows, self.settings.max_chars
        query = await off_loop(len(body), oip.parse, request, body, version, *limits)
        size = oip.answer_size(version, query)
        results = await self.run(request, version, query.rows, query.costs, query.timeout)
        return await off_loop(size, oip.render, version, query, results)

    async def _complete(self, request: Request, *_: str | None) -> Response | Stream:
        request.protocol = "openai"
        body = await request.body(self.settings, self.settings.body_limit("text"))
        asked = await off_loop(len(body), openai.decode, body)
        version = self.version(request, asked.model)
        if not version.generator:
            raise Refused(404, f"{version.name} is for {version.task.name}, and writes nothing")
        query = openai.parse(asked, version.generator, self.settings.max_chars)
        return await self._generate(request, version, query, openai)

    async def _generate(self, request: Request, version: Version, query: Any, api: ModuleType) -> Response | Stream:
        """Generate a text, at once or as a stream; until the first token a failure has its own status."""
        request.end()  # writing takes long, and no memory
        if query.stream:
            events = self._events(request, version, query, api)
            return Stream(await anext(events), events)
        await self.run(request, version, [query.job], [query.job.how.max_new_tokens])
        return Response(api.render(version, query))

    async def _events(
        self, request: Request, version: Version, query: Any, api: ModuleType
    ) -> AsyncGenerator[bytes, None]:
        job, index, loop = query.job, 0, asyncio.get_running_loop()
        pieces: asyncio.Queue[Piece | None] = asyncio.Queue()
        job.tell = lambda piece: loop.call_soon_threadsafe(pieces.put_nowait, piece)
        running = asyncio.ensure_future(self.run(request, version, [job], [job.how.max_new_tokens]))
        running.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield api.render_piece(version, query, index, piece)
                index += 1
            await running
        finally:
            running.cancel()

    def version(self, request: Request, name: str | None = None, wanted: str | None = None) -> Version:
        """Return the version that a request names, and note it for the log.

        Raises:
            Refused: there is none (404), or not yet, or not any more (503).
        """
        if not self.loaded:
            raise Refused(503, "the models are being loaded", RETRY)
        version = self.models.find(name, wanted)
        request.model = version.name
        return version

    async def _body(self, request: Request, name: str | None = None) -> bytes:
        return await request.body(self.settings, self.settings.body_limit(self.models.reads(name)))

    def _parsed(self, version: Version, parse: Callable[[bytes], Any], body: bytes) -> tuple[Any, list[Any], list[int]]:
        query = parse(body)
        rows, costs = oip.check_rows(version, query.rows, self.settings.max_rows, self.settings.max_chars, 422)
        return query if rows is query.rows else query._replace(rows=rows), rows, costs

    async def run(
        self,
        request: Request,
        version: Version,
        rows: Sequence[Any],
        costs: Sequence[int],
        timeout: float | None = None,
    ) -> list[Any]:
        """Run a request's rows (a language model's jobs) through their batcher, and note the times for the log."""
        model: Version | Generator = version.generator or version
        batcher = self.prompts if version.generator else self.batcher
        assert batcher is not None
        request.rows = len(rows)
        timeout = min(timeout or self.settings.timeout, self.settings.timeout)
        with awaited(request, rows) if version.generator else nullcontext():
            ticket = await batcher.run(model, rows, costs, timeout, request.gone)
        request.queued_s = ticket.started - ticket.arrived
        request.run_s = ticket.done_at - ticket.started
        return ticket.results

    async def end_threads(self) -> None:
        """Finish what waits, then end the threads."""
        for batcher in filter(None, (self.batcher, self.prompts)):
            await batcher.close()

    # --- about the server

    async def live(self, *_: Any) -> Response:
        """Answer yes: a dead consumer ends the process."""
        return answer({"live": True})

    async def health(self, *_: Any) -> Response:
        """Whether the server is ready."""
        return self._health({"live": True})

    async def _model_ready(self, _: Request, name: str | None, wanted: str | None) -> Response:
        return self._health({"name": self.models.find(name, wanted).name})

    def _health(self, content: dict[str, Any]) -> Response:
        response = answer(content | {"ready": self.ready}, 200 if self.ready else 503)
        response.headers += [] if self.ready else RETRY
        return response

    async def _metadata(self, request: Request, name: str | None, wanted: str | None) -> Response:
        return answer(oip.metadata(self.version(request, name, wanted)))

    async def _server_metadata(self, *_: Any) -> Response:
        return answer({"name": "kdexport", "version": __version__, "extensions": oip.EXTENSIONS})

    async def _info(self, request: Request, *_: str | None) -> Response:
        version = self.version(request)
        return answer(tgi.info(version, version.generator) if version.generator else tei.info(version, self.settings))

    async def _language_models(self, *_: Any) -> Response:
        return answer(openai.models(self.models.in_service().values()))

    async def _openapi(self, *_: Any) -> Response:
        versions = self.models.in_service().values()
        served = openapi.Served(
            tuple(self.models.names()),
            tuple(version.version for version in versions),
            tuple((version.name, version.generator.room) for version in versions if version.generator),
        )
        return answer(openapi.document(served, self.settings))

    async def _page(self, *_: Any) -> Response:
        return page.render(list(self.models.in_service().values()), with_card=not self._keys)
