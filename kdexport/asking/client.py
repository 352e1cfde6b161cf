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
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import msgspec

from kdexport.asking.answers import Answer, Answers, key_of
from kdexport.errors import EndpointError, counted
from kdexport.progress import warn
from kdexport.spec.teachers import Address

# Of one call: faults that may pass, and answers that say "not now".
_MOST_FAULTS, _MOST_LIMITED = 8, 10
_IN_A_ROW = 20  # calls that failed for good, with none answered between
_FIRST_WAIT_S, _LONGEST_WAIT_S, _LONGEST_PAUSE_S = 0.5, 30.0, 120.0
_CONNECT_S, _DRAIN_S, _LOOK_S = 10.0, 8.0, 0.2
_MOST_BYTES = 16 * 1024 * 1024
_SECRET = 8  # characters; a shorter key is a word such as EMPTY, which an answer may hold
_BUSY, _PASSING = {429, 503}, {408, 409, 425}
_NO_CREDIT = re.compile(r"insufficient_quota|exceeded your current quota|insufficient balance|billing", re.I)
_TOO_LONG = re.compile(
    r"context.?(length|size|window)|maximum context|(prompt|input|request|sequence)\w* (is |are )?too (long|large)|"
    r"too many tokens|(exceed|less than|at most|reduce|<=).{0,60}(tokens?\b|context|length of the)|max_model_len",
    re.I | re.S,
)
_NO_MODEL = re.compile(
    r"not.?found|does not exist|doesn't exist|unknown|invalid model|not a valid model|no such|not exist", re.I
)


class Call(NamedTuple):
    """A request to a path below the endpoint's URL."""

    path: str
    body: dict[str, Any]


class Reply(msgspec.Struct, frozen=True):
    """A JSON object that the server gave with status 200."""

    body: dict[str, Any]
    seconds: float
    cached: bool


class Failed(NamedTuple):
    """Why one call has no answer; the run goes on."""

    why: str
    status: int | None = None
    too_long: bool = False


class Counts(msgspec.Struct):
    """What was sent and what it cost; `cached` and its tokens cost nothing this time."""

    sent: int = 0
    cached: int = 0
    retried: int = 0
    limited: int = 0
    failed: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cached_tokens_in: int = 0
    cached_tokens_out: int = 0


class _Again(NamedTuple):
    """A fault that may pass; `busy`: the server asks for fewer calls, and perhaps for a pause."""

    why: str
    status: int | None = None
    busy: bool = False
    after: float | None = None


class _Refused(NamedTuple):
    """What would meet every further call as well."""

    status: int | None
    message: str


_Outcome = tuple[Answer, dict[str, Any]] | Failed | _Again | _Refused


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
        self._reached, self._in_a_row, self._stop = False, 0, False

    def send(self, calls: Sequence[Call], advance: Callable[[int], object] = lambda done: None) -> list[Reply | Failed]:
        """Return what became of each call, in order; the same call twice is sent once.

        `advance` is called from another thread. Ctrl-C and SIGTERM take effect when calls that are under way have been
        answered and stored, after seconds; a second one at once.

        Raises:
            EndpointError: no further call would be answered either.
        """
        keys = [key_of(*call) for call in calls]
        found: dict[bytes, Reply | Failed] = {}
        waiting: dict[bytes, Call] = {}
        for key, call in zip(keys, calls, strict=True):
            if key not in found and (stored := self._stored(key)):
                found[key] = stored
            if key in found:
                self._count_cached(found[key])
                advance(1)
            elif key in waiting:
                advance(1)
            else:
                waiting[key] = call
        if waiting:
            refused = self._in_a_thread([_Job(key, call) for key, call in waiting.items()], found, advance)
            if refused:
                raise self._error(refused)
        seen, results = set[bytes](), list[Reply | Failed]()
        for key in keys:
            result = found[key]
            if key in waiting and key in seen:
                self._count_cached(result)
                result = msgspec.structs.replace(result, cached=True) if isinstance(result, Reply) else result
            seen.add(key)
            results.append(result)
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
            return [self._safe(each["id"]) for each in listed if isinstance(each["id"], str)]
        except (httpx.HTTPError, ValueError, RecursionError, KeyError, TypeError):
            return []

    def _stored(self, key: bytes) -> Reply | None:
        answer = self._store.get(key)
        body = _object(answer.body) if answer else None
        return Reply(body, answer.seconds, cached=True) if answer and body is not None else None

    def _count_cached(self, reply: Reply | Failed) -> None:
        if isinstance(reply, Reply):
            self.counts.cached += 1
            tokens_in, tokens_out = _tokens(reply.body)
            self.counts.cached_tokens_in += tokens_in
            self.counts.cached_tokens_out += tokens_out

    def _in_a_thread(
        self, jobs: list[_Job], found: dict[bytes, Reply | Failed], advance: Callable[[int], object]
    ) -> _Refused | None:
        """Run the loop beside this thread, which is free for signals, and may be that of a notebook's own loop."""
        ended: Future[_Refused | None] = Future()

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
    ) -> _Refused | None:
        """Fill `found`; return what ended it before that, if anything did."""
        ready = [(0.0, place, job) for place, job in enumerate(jobs)]  # when, in which order
        flying: dict[asyncio.Task[_Outcome], tuple[int, float, _Job]] = {}
        refused: _Refused | None = None

        def landed(task: asyncio.Task[_Outcome]) -> _Refused | None:
            place, started, job = flying.pop(task)
            outcome = task.result()
            if isinstance(outcome, _Again):
                outcome, wait = self._after_fault(outcome, job, started)
                if isinstance(outcome, _Again):
                    heapq.heappush(ready, (time.monotonic() + wait, place, job))
                    return None
            if isinstance(outcome, _Refused):
                return outcome
            if isinstance(outcome, Failed):
                found[job.key] = outcome
                self.counts.failed += 1
                self._in_a_row += not outcome.too_long
            else:
                found[job.key] = self._take(job.key, *outcome)
            advance(1)
            if self._in_a_row >= _IN_A_ROW and isinstance(outcome, Failed):
                return _Refused(None, outcome.why)
            return None

        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(**self._options(), limits=limits) as client:
            while (ready or flying) and not (refused or self._stop):
                now = time.monotonic()
                while ready and len(flying) < int(self._pace.allowed) and max(ready[0][0], self._pace.until) <= now:
                    _, place, job = heapq.heappop(ready)
                    flying[asyncio.create_task(self._attempt(client, job.call))] = (place, now, job)
                wait = max(ready[0][0], self._pace.until) - now if ready else _LOOK_S
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

    def _take(self, key: bytes, answer: Answer, body: dict[str, Any]) -> Reply:
        self._store.put(key, answer)
        self._pace.answered()
        self._in_a_row = 0
        self.counts.sent += 1
        self.seconds.append(answer.seconds)
        tokens_in, tokens_out = _tokens(body)
        self.counts.tokens_in += tokens_in
        self.counts.tokens_out += tokens_out
        return Reply(body, answer.seconds, cached=False)

    def _after_fault(self, fault: _Again, job: _Job, started: float) -> tuple[_Again | Failed, float]:
        """Return the fault with the time to wait, or that the call failed for good."""
        if fault.busy:
            self._pace.busy(started, fault.after)
        if fault.status == 429:
            if not self.counts.limited:
                warn("the endpoint says that it gets too many calls (429): fewer at once from here on")
            self.counts.limited += 1
        limited = fault.busy and fault.status is not None
        job.limited, job.faults = job.limited + limited, job.faults + (not limited)
        if job.limited >= _MOST_LIMITED or job.faults >= _MOST_FAULTS:
            return Failed(fault.why, fault.status), 0.0
        self.counts.retried += 1
        return fault, 0.0 if limited else _wait(job.faults)

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
                            return _Again(f"an answer of more than {_MOST_BYTES // 2**20} MB", response.status_code)
        except TimeoutError:
            return _Again(f"no answer within {self._timeout_s:g} s", busy=True)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol, httpx.ProxyError) as error:
            why = self._safe(str(error)) or type(error).__name__
            return _Again(why) if self._reached else _Refused(None, why)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            return _Again(f"the connection broke ({self._safe(str(error)) or type(error).__name__})")
        answer = Answer(self._hidden(bytes(body)), time.perf_counter() - started)
        return self._judge(call, response, answer)

    def _judge(self, call: Call, response: httpx.Response, answer: Answer) -> _Outcome:
        """Sort an answer: taken, a fault of this call, one that may pass, or one that meets every call."""
        status, body = response.status_code, _object(answer.body)
        message = self._message(body, answer.body) or response.reason_phrase
        if status == 200:
            choices = (body or {}).get("choices")
            if body is not None and isinstance(choices, list) and choices:
                return answer, body
            if _TOO_LONG.search(message) and body is not None and "error" in body:
                return Failed(message, status, too_long=True)
            return _Again(f"an answer without choices ({message})" if body else "an answer that is no JSON", status)
        if status in (401, 402, 403) or (status == 429 and _NO_CREDIT.search(_whole(answer.body))):
            return _Refused(status, message)
        if status in _BUSY:
            return _Again(f"{status}: {message}", status, True, _retry_after(response.headers.get("retry-after")))
        if status in _PASSING or (status >= 500 and status != 501):
            return _Again(f"{status}: {message}", status)
        if 300 <= status < 400:
            return _Refused(status, self._safe(response.headers.get("location", "")))
        if status == 413 or (status in (400, 422) and _TOO_LONG.search(_whole(answer.body))):
            return Failed(f"{status}: {message}", status, too_long=True)
        # A chat model may be unknown at other paths, which the questions then do without.
        if status in (404, 405) and call.path == "/chat/completions":
            return _Refused(status, message)
        if status in (400, 404, 422) and self._address.model in message and _NO_MODEL.search(message):
            return _Refused(404, message)
        return Failed(f"{status}: {message}", status)

    def _error(self, refused: _Refused) -> EndpointError:
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
            named = self._address.model in message or (listed and self._address.model not in listed)
            if named and self._address.model not in listed:
                served = f"It serves {', '.join(listed[:10])}" if listed else "Ask its documentation for the models"
                return EndpointError(f"{url} has no model {self._address.model!r}", served)
            what = f"{url}/chat/completions is not there ({status})"
            return EndpointError(what, "Write the URL that stands before /chat/completions, most often one with /v1")
        if status is not None:
            return EndpointError(f"{url} leads elsewhere ({status}): {message}", "Write that URL if you trust it")
        if self._reached:
            what = f"{url}: {_IN_A_ROW} calls in a row failed, the last one with: {message}"
            return EndpointError(what, f"Look at the server; {kept}")
        port = urlsplit(url).port
        fix = f"Is the server running, on port {port or 80}?" if _local(url) else "Check the URL and the network"
        return EndpointError(f"{url} can't be reached ({message})", fix)

    def _options(self) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        timeout = httpx.Timeout(None, connect=_CONNECT_S)
        # A proxy of the environment can't reach this machine's own ports.
        return {"headers": headers, "timeout": timeout, "trust_env": not _local(self._address.url)}

    def _message(self, body: dict[str, Any] | None, content: bytes) -> str:
        """Return what a server says went wrong, in a line."""
        found: Any = (body or {}).get("error") or body or {}
        for name in ("message", "detail", "msg", "type"):
            if isinstance(found, dict) and isinstance(found.get(name), str):
                return self._safe(found[name])
        return self._safe(found if isinstance(found, str) else _whole(content))

    def _safe(self, text: str) -> str:
        """Return the first line of a server's text, short, without the key and what a terminal obeys."""
        lines = [*filter(None, map(str.strip, text[:4000].splitlines())), ""]
        line = self._hidden(lines[0].encode(errors="replace")).decode()
        return "".join(c if c.isprintable() else " " for c in line[:200])

    def _hidden(self, content: bytes) -> bytes:
        return content.replace(self._key.encode(), b"***") if len(self._key) >= _SECRET else content


class _Pace:
    """How many calls may be under way: one more after each round of answers, half when the server is busy."""

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


def _retry_after(value: str | None) -> float | None:
    """Return the seconds that a header asks for, given as seconds or as a date; None where it can't be read."""
    try:
        seconds = float(value or "")
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value or "") - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return None
    return min(_LONGEST_PAUSE_S, max(0.0, seconds)) if seconds == seconds else None


def _object(content: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _whole(content: bytes) -> str:
    return content[:4000].decode(errors="replace")


def _tokens(body: dict[str, Any]) -> tuple[int, int]:
    usage = body.get("usage")
    found = [usage.get(name) if isinstance(usage, dict) else 0 for name in ("prompt_tokens", "completion_tokens")]
    first, second = (n if isinstance(n, int) and n > 0 else 0 for n in found)
    return first, second


def _local(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
