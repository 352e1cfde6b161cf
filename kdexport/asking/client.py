"""Calls to a language model behind an endpoint that speaks OpenAI's protocol.

`Endpoint.send` answers from the store what it can, and sends the rest: several calls at once, fewer while the server is
busy, each again after a fault that may pass. What comes is stored at once, also while an interrupt waits.
"""

import asyncio
import heapq
import ipaddress
import json
import random
import re
import signal
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import msgspec

from kdexport.asking.answers import Answer, Answers, key_of
from kdexport.asking.faults import Again, Refused, json_object, judged, safe, without_key
from kdexport.asking.faults import Failed as Failed
from kdexport.errors import EndpointError, counted
from kdexport.progress import warn
from kdexport.spec.teachers import Address

# Of one call: faults that may pass, and answers that say "not now".
_MOST_FAULTS, _MOST_LIMITED = 8, 10
_IN_A_ROW = 20  # calls that failed for good, with none answered between
_SILENT_S = 600.0  # without an answer, or five deadlines where that is longer
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_CONNECT_S, _DRAIN_S, _LOOK_S = 10.0, 8.0, 0.2
_MOST_BYTES = 16 * 1024 * 1024


class Call(NamedTuple):
    """A request to a path below the endpoint's URL."""

    path: str
    body: dict[str, Any]


class Reply(msgspec.Struct, frozen=True):
    """A JSON object that the server gave with status 200."""

    body: dict[str, Any]
    seconds: float
    cached: bool


class Counts(msgspec.Struct):
    """Numbers of calls and tokens. Calls from the cache, `cached`, and their tokens cost nothing this time."""

    sent: int = 0
    cached: int = 0
    retried: int = 0
    limited: int = 0
    failed: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cached_tokens_in: int = 0
    cached_tokens_out: int = 0


_Outcome = tuple[Answer, dict[str, Any]] | Failed | Again | Refused


class _Job(msgspec.Struct):
    """A call on its way to an answer."""

    key: bytes
    call: Call
    faults: int = 0
    limited: int = 0


class Endpoint:
    """A model at an address; `counts` and `seconds`, the latencies of what was sent, grow over all calls of `send`."""

    def __init__(
        self, address: Address, key: str | None, *, store: Answers, concurrency: int, timeout_s: float
    ) -> None:
        self.counts, self.seconds = Counts(), list[float]()
        self._address, self._store, self._timeout_s = address, store, timeout_s
        self._key = (key or "").strip()
        if not re.fullmatch(r"[\x21-\x7e]*", self._key):  # httpx would quote it in its error
            what = "the endpoint's key holds spaces or characters that no header can carry"
            raise EndpointError(what, "Set the variable that teacher.ask.key names to the key alone")
        self._pace = _Pace(concurrency)
        self._reached, self._in_a_row, self._heard, self._stop = False, 0, 0.0, False

    def send(self, calls: Sequence[Call], advance: Callable[[int], object] = lambda done: None) -> list[Reply | Failed]:
        """Return what became of each call, in order; the same call twice is sent once.

        `advance` is called from another thread. Ctrl-C and SIGTERM take effect when calls that are under way have been
        answered and stored, after seconds; a second one at once.

        Raises:
            EndpointError: no further call would be answered either.
        """
        keys = [key_of(*call) for call in calls]
        different = dict(zip(keys, calls, strict=True))
        found: dict[bytes, Reply | Failed] = {key: reply for key in different if (reply := self._stored(key))}
        jobs = [_Job(key, call) for key, call in different.items() if key not in found]
        advance(len(calls) - len(jobs))
        refused = self._in_a_thread(jobs, found, advance) if jobs else None
        results = []
        for key in keys:
            if (result := found.get(key)) is not None:
                results.append(result)
                if isinstance(result, Reply):
                    self._count(result)
                    found[key] = msgspec.structs.replace(result, cached=True)  # for the same call once more
        if refused:
            raise self._error(refused)
        return results

    def waiting(self, calls: Sequence[Call]) -> int:
        """Return how many different calls have no stored answer."""
        return sum(self._store.get(key) is None for key in {key_of(*call) for call in calls})

    def models(self) -> list[str]:
        """Return the models that the server lists; none where it lists none."""
        try:
            with httpx.Client(**self._options()) as client:
                with client.stream("GET", f"{self._address.url}/models", timeout=_CONNECT_S) as response:
                    content = b""
                    for chunk in response.iter_bytes():
                        content += chunk
                        if len(content) > _MOST_BYTES:
                            return []
            listed = json.loads(content)["data"]
            return [safe(each["id"], self._key) for each in listed if isinstance(each["id"], str)]
        except (httpx.HTTPError, ImportError, ValueError, RecursionError, KeyError, TypeError):
            return []

    def _stored(self, key: bytes) -> Reply | None:
        answer = self._store.get(key)
        body = json_object(answer.body) if answer else None
        return Reply(body, answer.seconds, cached=True) if answer and body is not None else None

    def _count(self, reply: Reply) -> None:
        tokens_in, tokens_out = _tokens(reply.body)
        if reply.cached:
            self.counts.cached += 1
            self.counts.cached_tokens_in += tokens_in
            self.counts.cached_tokens_out += tokens_out
        else:
            self.counts.sent += 1
            self.counts.tokens_in += tokens_in
            self.counts.tokens_out += tokens_out
            self.seconds.append(reply.seconds)

    def _in_a_thread(
        self, jobs: list[_Job], found: dict[bytes, Reply | Failed], advance: Callable[[int], object]
    ) -> Refused | None:
        """Run the loop beside this thread, which is free for signals, and may be that of a notebook's own loop."""
        ended: Future[Refused | None] = Future()

        def run() -> None:
            try:
                ended.set_result(asyncio.run(self._answer_all(jobs, found, advance)))
            except BaseException as error:
                ended.set_exception(error)

        self._stop = False
        with self._signals_wait():
            threading.Thread(target=run, name="endpoint", daemon=True).start()
            return ended.result()

    @contextmanager
    def _signals_wait(self) -> Iterator[None]:
        """Let the first Ctrl-C or SIGTERM stop further calls, and take effect when the block has ended."""
        came: list[int] = []
        mine = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if mine else ()
        before = {n: handler for n in numbers if (handler := signal.getsignal(n)) not in (None, signal.SIG_IGN)}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def note(number: int, _: Any) -> None:
            came.append(number)
            self._stop = True
            if len(came) > 1:
                restore()
                signal.raise_signal(number)

        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            restore()
            if len(came) == 1:
                signal.raise_signal(came[0])
                raise KeyboardInterrupt

    async def _answer_all(
        self, jobs: list[_Job], found: dict[bytes, Reply | Failed], advance: Callable[[int], object]
    ) -> Refused | None:
        """Fill `found`; return what ended it before that, if anything did."""
        fresh, again = deque(jobs), list[tuple[float, bytes, _Job]]()  # the second by when they are due
        flying: dict[asyncio.Task[_Outcome], tuple[float, _Job]] = {}
        refused: Refused | None = None

        def landed(task: asyncio.Task[_Outcome]) -> Refused | None:
            started, job = flying.pop(task)
            outcome = task.result()
            if isinstance(outcome, Again) and (wait := self._wait_after(outcome, job, started)) is not None:
                heapq.heappush(again, (time.monotonic() + wait, job.key, job))
                return Refused(None, outcome.why) if time.monotonic() > self._heard + silent_s else None
            self._heard = time.monotonic()
            match outcome:
                case Refused():
                    return outcome
                case Again() | Failed():
                    failed = outcome if isinstance(outcome, Failed) else Failed(outcome.why, outcome.status)
                    found[job.key] = failed
                    self.counts.failed += 1
                    self._in_a_row += not failed.too_long
                case answer, body:
                    self._store.put(job.key, answer)
                    found[job.key] = Reply(body, answer.seconds, cached=False)
                    self._pace.answered()
                    self._in_a_row = 0
            advance(1)
            last = found[job.key]
            return Refused(None, last.why) if isinstance(last, Failed) and self._in_a_row >= _IN_A_ROW else None

        self._heard, silent_s = time.monotonic(), max(_SILENT_S, 5 * self._timeout_s)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        try:
            client = httpx.AsyncClient(**self._options(), limits=limits)
        except (ImportError, ValueError) as error:  # a proxy of the environment that needs a package, or is none
            return Refused(0, safe(str(error), self._key))
        async with client:
            while (fresh or again or flying) and not (refused or self._stop):
                now = time.monotonic()
                while len(flying) < int(self._pace.allowed) and self._pace.until <= now:
                    if again and again[0][0] <= now:
                        job = heapq.heappop(again)[-1]
                    elif fresh and len(again) < _IN_A_ROW:  # more would only meet the same fault
                        job = fresh.popleft()
                    else:
                        break
                    flying[asyncio.create_task(self._attempt(client, job.call))] = now, job
                wait = max(again[0][0] if again else 0.0, self._pace.until) - now
                wait = wait if 0 < wait < _LOOK_S else _LOOK_S
                if not flying:
                    await asyncio.sleep(wait)
                    continue
                done, _ = await asyncio.wait(flying, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    refused = landed(task) or refused
            if flying:
                done, late = await asyncio.wait(flying, timeout=_DRAIN_S)
                for task in done:
                    landed(task)
                for task in late:
                    task.cancel()
        return refused

    def _wait_after(self, fault: Again, job: _Job, started: float) -> float | None:
        """Return the seconds until a call may go out again; None when it went out often enough."""
        limited = fault.busy and fault.status is not None
        job.limited, job.faults = job.limited + limited, job.faults + (not limited)
        if fault.busy:
            self._pace.busy(started, fault.after)
        if fault.status == 429:
            if not self.counts.limited:
                warn("the endpoint says that calls come too quickly (429): fewer at once from here on")
            self.counts.limited += 1
        if job.limited >= _MOST_LIMITED or job.faults >= _MOST_FAULTS:
            return None
        self.counts.retried += 1
        return 0.0 if limited else _wait(job.faults)

    async def _attempt(self, client: httpx.AsyncClient, call: Call) -> _Outcome:
        started = time.perf_counter()
        try:
            async with asyncio.timeout(self._timeout_s):
                content = json.dumps(call.body).encode()
                async with client.stream("POST", f"{self._address.url}{call.path}", content=content) as response:
                    self._reached = True
                    body = bytearray()
                    async for chunk in response.aiter_bytes():
                        body += chunk
                        if len(body) > _MOST_BYTES:
                            return Again(f"an answer of more than {_MOST_BYTES // 2**20} MB", response.status_code)
        except TimeoutError:
            return Again(f"no answer within {self._timeout_s:g} s", busy=True)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol, httpx.ProxyError) as error:
            why = safe(str(error), self._key) or type(error).__name__
            return Again(why) if self._reached else Refused(0, why)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            return Again(f"the connection broke ({safe(str(error), self._key) or type(error).__name__})")
        content = without_key(bytes(body), self._key)
        outcome = judged(call.path, self._address.model, response.status_code, response.headers, content, self._key)
        if isinstance(outcome, dict):
            return Answer(content, time.perf_counter() - started), outcome
        return outcome

    def _error(self, refused: Refused) -> EndpointError:
        status, message = refused
        url = self._address.url
        kept = f"{counted(self.counts.sent + self.counts.cached, 'answer')} kept: the same command goes on from there"
        if status in (401, 403):
            quoted = f": {message}" if status == 403 and message else ""
            what = f"{url} refuses the key ({status}){quoted}" if self._key else f"{url} wants a key ({status})"
            return EndpointError(what, "Set the environment variable that teacher.ask.key names to a valid key")
        if status in (402, 429):
            return EndpointError(f"{url} says that the account has no credit left: {message}", f"Top it up; {kept}")
        if status in (404, 405):
            listed = self.models()
            if self._address.model not in listed and (listed or self._address.model in message):
                served = f"It serves {', '.join(listed[:10])}" if listed else "Look up the names of its models"
                return EndpointError(f"{url} has no model {self._address.model!r}", served)
            what = f"{url}/chat/completions is not there ({status}): {message}"
            return EndpointError(what, "Write the URL that stands before /chat/completions, most often one with /v1")
        if status is None:
            return EndpointError(f"{url} answers no more; the last call failed with {message}", f"Look at it; {kept}")
        if status:
            return EndpointError(f"{url} leads elsewhere ({status}): {message}", "Write that URL if you trust it")
        at = urlsplit(url)
        port = at.port or (443 if at.scheme == "https" else 80)
        fix = f"Is the server running, on port {port}?" if _local(url) else "Check the URL and the network"
        return EndpointError(f"{url} can't be reached ({message})", fix)

    def _options(self) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        timeout = httpx.Timeout(None, connect=_CONNECT_S)
        # A proxy of the environment can't reach this machine's own ports.
        proxied = not _local(self._address.url)
        return {"headers": headers, "timeout": timeout, "trust_env": proxied, "verify": _certificates(proxied)}


class _Pace:
    """The number of calls allowed at once: it grows by one per round of answers, and halves when the server is busy."""

    def __init__(self, most: int) -> None:
        self._most = self.allowed = float(most)
        self.until = self._since = 0.0
        self._busy_in_a_row = 0

    def answered(self) -> None:
        self.allowed = min(self._most, self.allowed + 1 / self.allowed)
        self._busy_in_a_row = 0

    def busy(self, started: float, after: float | None) -> None:
        """Slow down, once for all calls that were under way together, and pause."""
        now = time.monotonic()
        if started >= self._since:
            self.allowed, self._since = max(1.0, self.allowed / 2), now
            self._busy_in_a_row += 1
        self.until = max(self.until, now + (_wait(self._busy_in_a_row) if after is None else after))


def _wait(faults: int) -> float:
    """Return a random time, at most twice as long after each further fault."""
    return random.uniform(0, min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** (faults - 1)))


def _tokens(body: dict[str, Any]) -> tuple[int, int]:
    usage = body.get("usage")
    found = [usage.get(name) if isinstance(usage, dict) else 0 for name in ("prompt_tokens", "completion_tokens")]
    first, second = (n if isinstance(n, int) and n > 0 else 0 for n in found)
    return first, second


@cache
def _certificates(of_environment: bool) -> ssl.SSLContext:
    return httpx.create_ssl_context(trust_env=of_environment)


def _local(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
