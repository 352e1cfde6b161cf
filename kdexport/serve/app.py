"""The ASGI application: a path and a method → a handler; what goes wrong → `{"error": …}`.

A request's way: key → body within its caps → the protocol's `parse` → rows → the batcher → the protocol's
`render`. Protocols know nothing of each other, nor of batching.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, nullcontext
from types import ModuleType
from typing import Any

import msgspec

from kdexport import __version__
from kdexport.runtime.generation import Piece
from kdexport.runtime.predictor import allowed_cores
from kdexport.serve import openapi, page
from kdexport.serve.accesslog import AccessLog
from kdexport.serve.batching import Batcher
from kdexport.serve.connection import respond
from kdexport.serve.hosts import Hosts
from kdexport.serve.http import (
    EVENTS,
    SMALL,
    ClientGone,
    Headers,
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
    refusal,
)
from kdexport.serve.large import Turns, check_answer, off_loop
from kdexport.serve.metrics import Metrics
from kdexport.serve.protocols import huggingface, oip, openai, tei, tgi
from kdexport.serve.registry import Models, Version
from kdexport.serve.settings import Settings
from kdexport.serve.tracing import Tracer
from kdexport.serve.writing import Writer, awaited
from kdexport.tasks.base import reads_texts

Handler = Callable[[Request], Awaitable[Response | Stream]]
# Nginx's code for a client that went away; it is never sent, only logged and counted.
_CLIENT_GONE = 499
_RETRY: Headers = [(b"retry-after", b"1")]


class App:
    """Everything behind the public port.

    `ready` says yes once `loaded` is set, until `draining` is. From `closing` on every answer also closes its
    connection.
    """

    def __init__(self, models: Models, settings: Settings) -> None:
        self.models, self.settings = models, settings
        self.metrics = Metrics()
        self.log = AccessLog(settings.access_log, on_dropped=self.metrics.log_dropped.inc)
        self.hosts: Hosts | None = None  # of the port that is listened on; None where another server listens
        self.tracer = Tracer(settings.tracing)
        self.turns = Turns(max(4, 2 * (settings.threads or allowed_cores())))
        self.batcher: Batcher | None = None
        self.writing: Batcher | None = None
        self.loaded = self.draining = self.closing = False
        self.running = 0
        self._keys = Keys(settings.api_keys)
        self._open: dict[str, dict[str, Handler]] = {
            "/": {"GET": self.page, "POST": self.infer},
            "/v2": {"GET": self.server_metadata},
            "/v2/": {"GET": self.server_metadata},
            "/v2/health/live": {"GET": self.live},
            "/v2/health/ready": {"GET": self.health},
            "/health": {"GET": self.health},
            "/ping": {"GET": self.health},
            "/openapi.json": {"GET": self.openapi},
        }
        self._keyed: dict[str, dict[str, Handler]] = {
            "/predict": {"POST": self.predict},
            "/invocations": {"POST": self.predict},
            "/info": {"GET": self.info},
            "/v1/completions": {"POST": self.complete},
            "/v1/models": {"GET": self.writers},
        }
        self.metrics.watch("kdexport_ready", "1 when ready", lambda: float(self.ready))
        self.metrics.watch("kdexport_waiting_rows", "Rows that wait", lambda: self._batcher_has("waiting_rows"))
        self.metrics.watch("kdexport_waiting_tokens", "Tokens that wait", lambda: self._batcher_has("waiting_tokens"))
        self.metrics.watch("kdexport_tokens_per_second", "What the threads do", lambda: self._batcher_has("rate"))
        self.metrics.watch("kdexport_waiting_prompts", "Prompts that wait", self._waiting_prompts)
        self.metrics.watch_models(
            lambda: [(name, v.version, v.variant) for name, v in self.models.in_service().items()]
        )

    @property
    def ready(self) -> bool:
        """Whether requests are answered, and will be."""
        return self.loaded and not self.draining and self.models.ready

    def full(self) -> int:
        """Seconds to come again after, while there is too much work; 0 while there is not."""
        return self.batcher.full() if self.batcher else 0

    def refused(self) -> None:
        """Note a request that was refused before it was read."""
        self.metrics.refused.inc()
        self.log.refused()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, as ASGI has it."""
        if scope["type"] != "http":
            raise RuntimeError(f"an ASGI {scope['type']} is not spoken here")
        began = time.monotonic()
        request = Request(scope, receive, self.turns)
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
            response = Response(b"", _CLIENT_GONE)
        except Exception as error:
            # The client learns that it was us, the operator what it was.
            fault = "".join(traceback.format_exception(error))
            response = refusal(Refused(500, "the server could not answer this; its log says why"))
        finally:
            self.running -= 1
            if request.large:
                request.end()
        seconds = time.monotonic() - began
        self.metrics.request(request, response.status, seconds)
        self.log.request(request, response.status, seconds, fault)
        if isinstance(response, Stream) or response.status == _CLIENT_GONE:
            return
        if begun:  # what went wrong since then is the last event
            await send({"type": "http.response.body", "body": event(response.body)})
            return
        headers = [*response.headers, (b"content-length", b"%d" % len(response.body))]
        if self.closing:
            headers.append((b"connection", b"close"))
        await respond(send, response.status, headers, response.body)

    async def _send(self, request: Request, stream: Stream, send: Send) -> None:
        """All events of a stream, as they come."""
        headers = [*EVENTS, (b"connection", b"close")] if self.closing else EVENTS
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
        path = request.path
        routes = self._open.get(path)
        if routes is None or (path == "/" and request.method == "POST"):
            if self._keys:
                self._keys.check(request)
            routes = routes or self._keyed.get(path)
        if routes is not None:
            return await _of_method(routes, request)(request)
        match path.split("/"):
            case ["", "models", name]:
                return await _of_method({"POST": self.infer}, request)(request, name)
            case ["", "v2", "models", name, "versions", version, *rest]:
                return await self._model(request, rest, name, version)
            case ["", "v2", "models", name, *rest]:
                return await self._model(request, rest, name, None)
        raise Refused(404, "there is nothing at this path; /openapi.json says what there is")

    # --- answers from the models

    async def infer(self, request: Request, name: str | None = None) -> Response | Stream:
        """`POST /` and `POST /models/{name}`: Hugging Face's API."""
        request.protocol = "huggingface"
        body = await request.body(self.settings)
        return await self._by_task(request, self.version(request, name), body)

    async def _by_task(self, request: Request, version: Version, body: bytes) -> Response | Stream:
        if not version.writer:
            return await self._classified(request, version, body)
        query = await off_loop(len(body), tgi.parse, body, version.writer, self.settings.max_chars)
        return await self._written(request, version, query, tgi)

    async def complete(self, request: Request) -> Response | Stream:
        """`POST /v1/completions`: OpenAI's."""
        request.protocol = "openai"
        body = await request.body(self.settings)
        asked = await off_loop(len(body), openai.read, body)
        version = self.version(request, asked.model)
        if not version.writer:
            raise Refused(404, f"{version.name} is for {version.task.name}, and writes nothing")
        query = openai.understood(asked, version.writer, self.settings.max_chars)
        return await self._written(request, version, query, openai)

    async def _written(self, request: Request, version: Version, query: Any, protocol: ModuleType) -> Response | Stream:
        """What a language model writes, at once or as it comes; until the first token a failure has its own status."""
        request.end()  # writing takes long, and no memory
        if query.stream:
            events = self._events(request, version, query, protocol)
            return Stream(await anext(events), events)
        await self.run(request, version, [query.job], [query.job.how.max_new_tokens])
        return Response(protocol.render(version, query))

    async def _events(
        self, request: Request, version: Version, query: Any, protocol: ModuleType
    ) -> AsyncGenerator[bytes, None]:
        job, index, loop = query.job, 0, asyncio.get_running_loop()
        pieces: asyncio.Queue[Piece | None] = asyncio.Queue()
        job.tell = lambda piece: loop.call_soon_threadsafe(pieces.put_nowait, piece)
        running = asyncio.ensure_future(self.run(request, version, [job], [job.how.max_new_tokens]))
        running.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield protocol.render_piece(version, query, index, piece)
                index += 1
            await running
        finally:
            running.cancel()

    async def _classified(self, request: Request, version: Version, body: bytes) -> Response:
        protocol = huggingface.TASKS[version.task.name]
        if len(body) <= SMALL:  # without a coroutine: this is most requests' way
            query, rows, costs = self._understood(version, protocol.parse, body)
        else:
            query, rows, costs = await off_loop(len(body), self._understood, version, protocol.parse, body)
        size = protocol.entries(version, query) * version.entry_bytes
        if size > SMALL:
            check_answer(size, huggingface.LESS)
        results = await self.run(request, version, rows, costs)
        if size <= SMALL:
            return Response(protocol.render(version, query, results))
        return Response(await off_loop(size, protocol.render, version, query, results))

    async def predict(self, request: Request) -> Response | Stream:
        """`POST /predict` and `POST /invocations`: text-embeddings-inference's; images and sound as at `POST /`.

        What a language model is asked at `/invocations`, too.
        """
        request.protocol = "tei"
        body = await request.body(self.settings)
        version = self.version(request)
        task = version.task
        if not reads_texts(task) or (version.writer and request.path == "/invocations"):
            return await self._by_task(request, version, body)
        if "tei" not in task.protocols:
            raise Refused(404, f"{version.name} is for {task.name}; POST / answers for it")
        query, rows, costs = await off_loop(len(body), self._understood, version, tei.parse, body)
        size = check_answer(len(rows) * len(task.labels) * version.entry_bytes, "give fewer texts")
        if query.uncut and await asyncio.to_thread(lambda: any(map(task.is_cut, rows))):
            raise Refused(422, f"a text has more than {version.task.config.max_length} tokens, and truncate is false")
        results = await self.run(request, version, rows, costs)
        return Response(await off_loop(size, tei.render, version, query, results))

    async def _model(self, request: Request, rest: list[str], name: str, version: str | None) -> Response | Stream:
        """`/v2/models/{name}[/versions/{version}]…`: the Open Inference Protocol."""
        request.protocol = "oip"
        if rest == ["infer"]:
            return await _of_method({"POST": self._infer}, request)(request, name, version)
        if rest == ["ready"]:
            return await _of_method({"GET": self._model_ready}, request)(name, version)
        if rest == []:
            return await _of_method({"GET": self._metadata}, request)(request, name, version)
        raise Refused(404, "there is nothing at this path; /openapi.json says what there is")

    async def _infer(self, request: Request, name: str, asked: str | None) -> Response:
        body = await request.body(self.settings)
        version = self.version(request, name, asked)
        limits = self.settings.max_rows, self.settings.max_chars
        query = await off_loop(len(body), oip.parse, request, body, version, *limits)
        size = oip.answer_size(version, query)
        results = await self.run(request, version, query.rows, query.costs, query.timeout)
        return await off_loop(size, oip.render, version, query, results)

    async def _metadata(self, request: Request, name: str, asked: str | None) -> Response:
        return answer(oip.metadata(self.version(request, name, asked)))

    async def _model_ready(self, name: str, asked: str | None) -> Response:
        self.models.find(name, asked)
        return self._health({"name": name})

    def version(self, request: Request, name: str | None = None, asked: str | None = None) -> Version:
        """The version that a request means; noted for the log.

        Raises:
            Refused: there is none (404), or not yet, or not any more (503).
        """
        if not self.loaded:
            raise Refused(503, "the models are being loaded", _RETRY)
        version = self.models.find(name, asked)
        request.model = version.name
        return version

    def _understood(
        self, version: Version, parse: Callable[[bytes], Any], body: bytes
    ) -> tuple[Any, list[Any], list[int]]:
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
        """A request's rows (a language model's jobs) through their batcher; times are noted for the log."""
        model: Version | Writer = version.writer or version
        batcher = self.writing if version.writer else self.batcher
        assert batcher is not None
        request.rows = len(rows)
        timeout = min(timeout or self.settings.timeout, self.settings.timeout)
        with awaited(request, rows) if version.writer else nullcontext():
            ticket = await batcher.run(model, rows, costs, timeout, request.gone)
        request.queued_s = ticket.started - ticket.arrived
        request.run_s = ticket.done_at - ticket.started
        return ticket.results

    async def end_threads(self) -> None:
        """Finish what waits, then end the threads."""
        for batcher in filter(None, (self.batcher, self.writing)):
            await batcher.close()

    # --- about the server

    async def live(self, _: Request) -> Response:
        """Whether the process is worth keeping; a dead consumer ends it, so an answer is a yes."""
        return answer({"live": True})

    async def health(self, _: Request) -> Response:
        """Whether requests are answered."""
        return self._health({"live": True})

    def _health(self, content: dict[str, Any]) -> Response:
        response = answer(content | {"ready": self.ready}, 200 if self.ready else 503)
        return response if self.ready else msgspec.structs.replace(response, headers=[*response.headers, *_RETRY])

    async def server_metadata(self, _: Request) -> Response:
        """`GET /v2`."""
        return answer({"name": "kdexport", "version": __version__, "extensions": oip.EXTENSIONS})

    async def info(self, request: Request) -> Response:
        """`GET /info`, in text-embeddings-inference's words."""
        version = self.version(request)
        if version.writer:
            return answer(tgi.info(version, version.writer))
        return answer(tei.info(version, self.settings))

    async def writers(self, _: Request) -> Response:
        """`GET /v1/models`: the language models, as OpenAI lists them."""
        return answer(openai.models(self.models.in_service().values()))

    async def openapi(self, _: Request) -> Response:
        """What there is, for machines."""
        versions = self.models.in_service().values()
        served = openapi.Served(
            tuple(self.models.names()),
            tuple(version.version for version in versions),
            tuple((version.name, version.writer.room) for version in versions if version.writer),
        )
        return answer(openapi.document(served, self.settings))

    async def page(self, _: Request) -> Response:
        """What there is, for people; the card is not shown to those without a key."""
        versions = list(self.models.in_service().values())
        return page.render(versions, with_card=not self._keys)

    def _waiting_prompts(self) -> float:
        return float(self.writing.waiting_rows) if self.writing else 0.0

    def _batcher_has(self, what: str) -> float:
        return float(getattr(self.batcher, what)) if self.batcher else 0.0


def _of_method(routes: dict[str, Callable[..., Any]], request: Request) -> Callable[..., Awaitable[Response | Stream]]:
    handler = routes.get("GET" if request.method == "HEAD" else request.method)
    if handler is None:
        allowed = ", ".join(["HEAD", *routes] if "GET" in routes else routes)
        raise Refused(405, f"{request.method} is not for this path", [(b"allow", allowed.encode())])
    return handler
