"""The ASGI application: path and method → handler; errors → `{"error": …}`.

A request passes key → body within its limits → the protocol's `parse` → rows → the batcher → the protocol's `render`.
Protocols are independent of each other and of batching.
"""

import asyncio
import re
import time
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, nullcontext
from functools import partial
from typing import Any

from kdexport import __version__
from kdexport.runtime.generation import Piece
from kdexport.runtime.predictor import allowed_cores
from kdexport.serve import http, openapi, page
from kdexport.serve.accesslog import AccessLog
from kdexport.serve.batching import Batcher
from kdexport.serve.connection import respond
from kdexport.serve.generating import Generator, awaited
from kdexport.serve.hosts import Hosts
from kdexport.serve.http import RETRY, SMALL, ClientGone, Refused, Request, Response, Stream, answer, refusal
from kdexport.serve.large import Limiter, check_answer, off_loop
from kdexport.serve.metrics import Metrics
from kdexport.serve.protocols import embeddings, huggingface, oip, openai, rerank, tei, tgi, transcriptions
from kdexport.serve.registry import Models, Tokens, Version
from kdexport.serve.settings import Settings
from kdexport.serve.tracing import Tracer
from kdexport.tasks.base import reads_texts

Handler = Callable[[Request], Awaitable[Response | Stream]]
AnyQuery = huggingface.AnyQuery | embeddings.Query | rerank.RerankQuery
Parser = Callable[[bytes], AnyQuery]
Prompt = tgi.Query | openai.Query
_OF_MODEL = re.compile(r"(/v2)?/models/([^/]*)(?:/versions/([^/]*))?(/.*)?")
# Paths that need no key; `POST /` does.
OPEN = {"/", "/v2", "/v2/", "/v2/health/live", "/v2/health/ready", "/health", "/ping", "/openapi.json"}


class App:
    """The public port: `ready` from `loaded` until `draining`; once `closing`, responses close their connections."""

    def __init__(self, models: Models, settings: Settings) -> None:
        self.models, self.settings = models, settings
        self.metrics = Metrics(self)
        self.log = AccessLog(settings.access_log, on_dropped=self.metrics.log_dropped.inc)
        self.hosts: Hosts | None = None  # of our own port; None in another server
        self.tracer = Tracer(settings.tracing)
        self.limiter = Limiter(max(4, 2 * (settings.threads or allowed_cores())))
        self.batcher: Batcher | None = None
        self.prompts: Batcher | None = None
        self.loaded = self.draining = self.closing = False
        self.running = self.answered = 0
        self.keys = http.Keys(settings.api_keys)
        tensors: dict[str, dict[str, Handler]] = {
            "": {"GET": self._metadata}, "/ready": {"GET": self._model_ready}, "/infer": {"POST": self._infer_tensors}
        }  # fmt: skip
        self.routes: dict[str, dict[str, Handler]] = {
            "/": {"GET": self._page, "POST": self._infer},
            "/models/{name}": {"POST": self._infer},
            "/v1/completions": {"POST": self._complete},
            "/v1/embeddings": {"POST": self._embed_listed},
            "/v1/audio/transcriptions": {"POST": self._transcribe},
            "/v1/rerank": {"POST": self._rerank_v1},
            "/v1/models": {"GET": self._openai_models},
            "/rerank": {"POST": self._rerank},
            "/embed": {"POST": partial(self._embed, embeddings.embed)},
            "/embed_all": {"POST": partial(self._embed, embeddings.embed_all, of_tokens=True)},
            "/similarity": {"POST": partial(self._embed, embeddings.similarity)},
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

    @property
    def ready(self) -> bool:
        """Return whether the server accepts requests."""
        return self.loaded and not self.draining and bool(self.models.in_service())

    def full(self) -> int:
        """Return Retry-After in seconds while there is too much work, else 0."""
        return self.batcher.full() if self.batcher else 0

    def refused(self) -> None:
        """Count and log a request refused before it was read."""
        self.metrics.refused.inc()
        self.log.refused()

    async def __call__(self, scope: http.Scope, receive: http.Receive, send: http.Send) -> None:
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
            response = Response(b"", http.CLIENT_GONE)
        except Exception as error:
            # The log has the traceback, the response does not.
            fault = "".join(traceback.format_exception(error))
            response = refusal(http.FAILURE)
        finally:
            self.running -= 1
            self.answered += 1
            request.end()
        seconds = time.monotonic() - began
        self.metrics.request(request, response.status, seconds)
        self.log.request(request, response.status, seconds, fault)
        if isinstance(response, Stream) or response.status == http.CLIENT_GONE:
            return
        if begun:  # the stream's last event is the error
            await send({"type": "http.response.body", "body": http.event(response.body)})
            return
        await respond(send, response, self.closing)

    async def _send(self, request: Request, stream: Stream, send: http.Send) -> None:
        headers = [*http.EVENTS, http.CLOSE] if self.closing else http.EVENTS
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
        path, prefix = request.path, None
        if (path not in self.routes or "{" in path) and (match := _OF_MODEL.fullmatch(path)):
            prefix, request.wanted_model, version, rest = match.groups()
            request.wanted_version = version
            path = f"{prefix or ''}/models/{{name}}{'' if version is None else '/versions/{version}'}{rest or ''}"
        if self.keys and (path not in OPEN or (path == "/" and request.method == "POST")):
            self.keys.check(request)
        if prefix:
            request.protocol = "oip"
        if path not in self.routes:
            raise Refused(404, "not found; see /openapi.json")
        methods = self.routes[path]
        handler = methods.get("GET" if request.method == "HEAD" else request.method)
        if handler is None:
            allowed = ", ".join(["HEAD", *methods] if "GET" in methods else methods)
            raise Refused(405, f"{request.method} is not for this path", [(b"allow", allowed.encode())])
        return await handler(request)

    # --- predictions

    async def _infer(self, request: Request) -> Response | Stream:
        request.protocol = "huggingface"
        body = await self._body(request)
        return await self._by_task(request, self.version(request), body)

    async def _by_task(self, request: Request, version: Version, body: bytes) -> Response | Stream:
        if version.task.embeds:
            return await self._classify(request, version, body, partial(embeddings.parse, version, self.settings))
        if not version.generator:
            return await self._classify(request, version, body, huggingface.parser(version.task))
        query = await off_loop(len(body), tgi.parse, body, version.generator, self.settings.max_chars)
        return await self._generate(request, version, query)

    async def _classify(
        self, request: Request, version: Version, body: bytes, parse: Parser, model: Tokens | None = None
    ) -> Response:
        if len(body) <= SMALL:  # most requests: without a coroutine
            query, costs = self._parsed(version, parse, body)
        else:
            query, costs = await off_loop(len(body), self._parsed, version, parse, body)
        size = query.entries(version) * version.entry_bytes
        if size > SMALL:
            check_answer(size, query.advice)
        task: Any = version.task
        if query.uncut and await asyncio.to_thread(lambda: any(map(task.is_cut, query.rows))):
            raise Refused(422, f"a text has more than {task.config.max_length} tokens, and truncate is false")
        results = await self.run(request, version, query.rows, costs, model=model)
        if size <= SMALL:
            return Response(query.render(version, results))
        return Response(await off_loop(size, query.render, version, results))

    async def _predict(self, request: Request) -> Response | Stream:
        # Images, sound, and at SageMaker's path language models, are handled as at `POST /`.
        request.protocol = "tei"
        body = await self._body(request)
        version = self.version(request)
        task = version.task
        if not reads_texts(task) or ((version.generator or task.embeds) and request.path == "/invocations"):
            return await self._by_task(request, version, body)
        if "tei" not in task.protocols or task.embeds:
            raise Refused(404, f"{version.name} is for {task.name}; POST / answers for it")
        return await self._classify(request, version, body, tei.parse)

    async def _embed(self, parse: Callable[..., AnyQuery], request: Request, of_tokens: bool = False) -> Response:
        request.protocol = "tei"
        body = await self._body(request)
        version = self.version(request)
        model = Tokens(version) if of_tokens else None
        return await self._classify(request, version, body, partial(parse, version, self.settings), model)

    async def _embed_listed(self, request: Request) -> Response:
        body, asked = await self._openai(request, embeddings.decode)
        version = self.version(request)
        return await self._classify(request, version, body, partial(embeddings.openai, asked, version, self.settings))

    async def _rerank(self, request: Request) -> Response:
        request.protocol = "tei"
        body = await self._body(request)
        return await self._classify(request, self._ranker(request), body, rerank.parse)

    async def _rerank_v1(self, request: Request) -> Response:
        body, asked = await self._openai(request, rerank.decode_v1)
        return await self._classify(request, self._ranker(request), body, partial(rerank.parse_v1, asked))

    def _ranker(self, request: Request) -> Version:
        version = self.version(request)
        if "rerank" not in version.task.protocols:
            raise Refused(404, f"{version.name} is for {version.task.name}, and ranks nothing")
        return version

    async def _infer_tensors(self, request: Request) -> Response:
        body = await self._body(request)
        version = self.version(request)
        query = await off_loop(len(body), oip.parse, request, body, version, self.settings)
        size = oip.answer_size(version, query)
        results = await self.run(request, version, query.rows, query.costs, query.timeout)
        return await off_loop(size, oip.render, version, query, results)

    async def _complete(self, request: Request) -> Response | Stream:
        _, asked = await self._openai(request, openai.decode)
        version = self.version(request)
        if not version.generator:
            raise Refused(404, f"{version.name} is for {version.task.name}, and writes nothing")
        query = openai.parse(asked, version.generator, self.settings.max_chars)
        return await self._generate(request, version, query)

    async def _openai(self, request: Request, decode: Callable[[bytes], Any]) -> tuple[bytes, Any]:
        """Return the body of a request of texts that names its model, and what it asks for."""
        request.protocol = "openai"
        body = await request.body(self.settings, self.settings.body_limit("text"))
        asked = await off_loop(len(body), decode, body)
        request.wanted_model = asked.model
        return body, asked

    async def _transcribe(self, request: Request) -> Response:
        request.protocol = "openai"
        body = await request.body(self.settings, self.settings.body_limit("audio"))
        kind = request.header(b"content-type") or b""
        asked = await off_loop(len(body), transcriptions.decode, kind, body)
        request.wanted_model = asked.model
        version = self.version(request)
        if not version.task.transcribes:
            raise Refused(404, f"{version.name} is for {version.task.name}, and transcribes nothing")
        asked = transcriptions.in_language(asked, version.name, version.task.config.language)
        response = await self._classify(request, version, asked.file, partial(transcriptions.parse, asked))
        response.headers = transcriptions.headers(asked)
        return response

    async def _generate(self, request: Request, version: Version, query: Prompt) -> Response | Stream:
        """Generate a text, at once or as a stream; an error before the first token has its own status."""
        request.end()  # generation takes long, and little memory
        if query.stream:
            events = self._events(request, version, query)
            return Stream(await anext(events), events)
        await self.run(request, version, [query.job], [query.job.how.max_new_tokens])
        return Response(query.render(version))

    async def _events(self, request: Request, version: Version, query: Prompt) -> AsyncGenerator[bytes, None]:
        job, index, loop = query.job, 0, asyncio.get_running_loop()
        pieces: asyncio.Queue[Piece | None] = asyncio.Queue()
        job.tell = lambda piece: loop.call_soon_threadsafe(pieces.put_nowait, piece)
        running = asyncio.ensure_future(self.run(request, version, [job], [job.how.max_new_tokens]))
        running.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield query.render_piece(version, index, piece)
                index += 1
            await running
        finally:
            running.cancel()

    def version(self, request: Request) -> Version:
        """Return the version that a request names (default: the first model's), and record it for the log."""
        if not self.loaded:
            raise Refused(503, "the models are being loaded", RETRY)
        version = self.models.find(request.wanted_model, request.wanted_version)
        request.model = version.name
        return version

    async def _body(self, request: Request) -> bytes:
        return await request.body(self.settings, self.settings.body_limit(self.models.reads(request.wanted_model)))

    def _parsed(self, version: Version, parse: Parser, body: bytes) -> tuple[AnyQuery, list[int]]:
        query = parse(body)
        rows, costs = oip.check_rows(version, query.rows, self.settings, 422)
        return query if rows is query.rows else query._replace(rows=rows), costs

    async def run(
        self,
        request: Request,
        version: Version,
        rows: Sequence[Any],
        costs: Sequence[int],
        timeout: float | None = None,
        model: Version | Tokens | None = None,
    ) -> list[Any]:
        """Run a request's rows (a language model's jobs) through their batcher; record the times for the log."""
        runs: Version | Generator | Tokens = version.generator or model or version
        batcher = self.prompts if version.generator else self.batcher
        assert batcher is not None
        request.rows = len(rows)
        timeout = min(timeout or self.settings.timeout, self.settings.timeout)
        with awaited(request, rows) if version.generator else nullcontext():
            ticket = await batcher.run(runs, rows, costs, timeout, request.gone)
        request.queued_s = ticket.started - ticket.arrived
        request.run_s = ticket.done_at - ticket.started
        return ticket.results

    async def end_threads(self) -> None:
        """Finish queued work, then end the threads."""
        for batcher in filter(None, (self.batcher, self.prompts)):
            await batcher.close()

    # --- about the server

    async def live(self, _: Request) -> Response:
        """Return true: a dead thread ends the process."""
        return answer({"live": True})

    async def health(self, _: Request) -> Response:
        """Return whether the server is ready."""
        return self._health({"live": True})

    async def _model_ready(self, request: Request) -> Response:
        return self._health({"name": self.models.find(request.wanted_model, request.wanted_version).name})

    def _health(self, content: dict[str, Any]) -> Response:
        response = answer(content | {"ready": self.ready}, 200 if self.ready else 503)
        response.headers += [] if self.ready else RETRY
        return response

    async def _metadata(self, request: Request) -> Response:
        return answer(oip.metadata(self.version(request)))

    async def _server_metadata(self, _: Request) -> Response:
        return answer({"name": "kdexport", "version": __version__, "extensions": oip.EXTENSIONS})

    async def _info(self, request: Request) -> Response:
        version = self.version(request)
        return answer(tgi.info(version, version.generator) if version.generator else tei.info(version, self.settings))

    async def _openai_models(self, _: Request) -> Response:
        return answer(openai.models(self.models.in_service().values()))

    async def _openapi(self, _: Request) -> Response:
        versions = self.models.in_service().values()
        generators = tuple((v.name, v.generator.room) for v in versions if v.generator)
        taggers = tuple(v.name for v in versions if v.task.has_words)
        hearers = tuple(v.name for v in versions if v.task.transcribes)
        names, ids = tuple(self.models.names), tuple(v.version for v in versions)
        embedders = tuple(v.name for v in versions if v.task.embeds)
        rankers = tuple(v.name for v in versions if "rerank" in v.task.protocols)
        served = openapi.Served(names, ids, generators, taggers, hearers, embedders, rankers)
        return answer(openapi.document(served, self.settings))

    async def _page(self, _: Request) -> Response:
        return page.render(list(self.models.in_service().values()), with_card=not self.keys)
