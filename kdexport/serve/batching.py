"""Dynamic batching on a few threads: work-conserving, with bounded queues and deadlines.

A request is accepted whole or refused. Its rows wait in queues by model and length, so that batches are of similar
length. An idle thread takes the oldest row and the rows of its queue that fit, without waiting for more: under load
the queues fill while batches run, so batches grow by themselves.

Large requests have their own queues and bound. Small ones go first between their batches, so large requests, however
many, delay a small one by a batch and never starve it.
"""

import asyncio
import math
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from kdexport.serve.http import FULL, ClientGone, Refused

_NEWEST = 0.02  # weight of the newest batch in the moving average of the rate
_FIRST_S = 0.5  # weight of the first guess of the rate, as a time
_LARGE = 0.25  # fraction of the queue limit above which a request is large; so is one of more than a batch
_PATIENCE_S = 0.2  # longest wait of a large request behind small ones


class Model(Protocol):
    """A model as a batcher runs it."""

    def run(self, rows: Sequence[Any]) -> list[Any]:
        """Return one result per row, in order; an exception as a result fails that row alone."""

    def bucket(self, cost: int) -> int:
        """Return the padded length of a row in tokens; rows of one bucket may share a batch."""

    def most(self, bucket: int) -> int:
        """Return the largest batch, in rows."""


class Ticket:
    """One request's rows; the future has their results, in order."""

    __slots__ = ("arrived", "done_at", "future", "gone", "left", "results", "started")

    def __init__(self, future: asyncio.Future[list[Any]], rows: int, gone: Callable[[], bool], arrived: float) -> None:
        self.future, self.gone, self.arrived = future, gone, arrived
        self.results: list[Any] = [None] * rows
        self.left = rows
        self.started = self.done_at = 0.0

    def fail(self, error: Exception) -> None:
        """End with an error, unless it is done."""
        if not self.future.done():
            self.future.set_exception(error)


Item = tuple[Ticket, int, Any, int]  # ticket, index of the row, row, cost in tokens
Key = tuple[Model, int]  # of a queue: model and padded length


class _Lane:
    """Queues by model and length, bounded together."""

    def __init__(self) -> None:
        self.queues: defaultdict[Key, deque[Item]] = defaultdict(deque)
        self.tokens = self.rows = 0
        self.served = 0.0  # when a batch was last taken

    def since(self, key: Key) -> float:
        return self.queues[key][0][0].arrived

    def oldest(self) -> Key:
        return min(self.queues, key=self.since)


class Batcher:
    """Threads over shared queues, one batch at a time each; callbacks are called on the loop."""

    def __init__(
        self,
        *,
        threads: int,
        max_batch_tokens: int,  # padded; a longer row runs alone
        max_wait: float,  # seconds that a batch waits for more rows
        max_queue: float,  # longest expected wait in seconds; more work is refused with 429
        rate: float,  # first guess of the tokens/s of all threads
        on_batch: Callable[[int, int, float], None] = lambda *_: None,  # rows, tokens and seconds of every batch
        on_death: Callable[[BaseException], None] = lambda _: None,  # a thread died, and nothing runs any more
        lanes: bool = True,  # whether large requests have their own queues
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._threads, self._max_batch_tokens = threads, max_batch_tokens
        self._max_wait, self._max_queue = max_wait, max_queue
        # Tokens and seconds under load, exponentially weighted.
        self._done, self._took = _FIRST_S * rate, _FIRST_S
        self._last = time.monotonic()
        self._on_batch, self._on_death = on_batch, on_death
        self._small, self._large = _Lane(), _Lane()
        self._lanes = lanes
        self._lock = threading.Lock()
        # Idle threads, each waiting for its lock. Last in, first out: its caches are warm.
        self._resting: list[Any] = []
        self._usual = 0.0  # average tokens of a row; per request, a few large ones would shut out the small
        self._closed = False
        names = [f"consumer-{i}" for i in range(threads)]
        self._consumers = [threading.Thread(target=self._consume, name=name, daemon=True) for name in names]
        for consumer in self._consumers:
            consumer.start()

    async def run(
        self, model: Model, rows: Sequence[Any], costs: Sequence[int], timeout: float, gone: Callable[[], bool]
    ) -> Ticket:
        """Run one request's rows, and return when all are done; raise what `model.run` raised for one of them.

        Raises:
            Refused: the queue is full (429), the deadline passed (504), or the server is ending (503).
            ClientGone: the client disconnected while its rows waited.
        """
        ticket = self._submit(model, rows, costs, gone)
        if not rows:
            return ticket
        late = Refused(504, "the answer took longer than the request's deadline")
        timer = self._loop.call_later(timeout, ticket.fail, late)
        try:
            await ticket.future
        finally:
            timer.cancel()
        return ticket

    def _submit(self, model: Model, rows: Sequence[Any], costs: Sequence[int], gone: Callable[[], bool]) -> Ticket:
        ticket = Ticket(self._loop.create_future(), len(rows), gone, time.monotonic())
        tokens = sum(costs)
        rate = self.rate
        large = self._lanes and (tokens > self._max_batch_tokens or tokens > _LARGE * self._max_queue * rate)
        lane = self._large if large else self._small
        # Fallible work comes before the first row is queued: a request is accepted whole or not at all.
        items = [
            ((model, model.bucket(cost)), (ticket, i, row, cost))
            for i, (row, cost) in enumerate(zip(rows, costs, strict=True))
        ]
        with self._lock:
            if self._closed:
                raise Refused(503, "the server is ending")
            # An empty lane accepts a request of any size.
            if lane.tokens and (lane.tokens + tokens) / rate > self._max_queue:
                raise Refused(429, FULL, [(b"retry-after", b"%d" % self._retry_after(lane))])
            if rows and not large:
                self._usual += _NEWEST * (tokens / len(rows) - self._usual)
            for key, item in items:
                lane.queues[key].append(item)
            lane.tokens += tokens
            lane.rows += len(rows)
            self._wake(len(rows))
        return ticket

    @property
    def rate(self) -> float:
        """Tokens/s of all threads."""
        return max(self._done / self._took, 1.0)

    def full(self) -> int:
        """Return 0 while there is room for a row of average size, else Retry-After in seconds."""
        lane = self._small
        wait = (lane.tokens + self._usual) / self.rate
        return self._retry_after(lane) if lane.tokens and wait > self._max_queue else 0

    @property
    def waiting_tokens(self) -> int:
        """Queued tokens."""
        return self._small.tokens + self._large.tokens

    @property
    def waiting_rows(self) -> int:
        """Queued rows."""
        return self._small.rows + self._large.rows

    def _retry_after(self, lane: _Lane) -> int:
        return max(1, math.ceil(lane.tokens / self.rate))

    async def close(self) -> None:
        """Finish queued work, then end the threads."""
        with self._lock:
            self._closed = True
            self._wake(self._threads)
        while any(consumer.is_alive() for consumer in self._consumers):  # no join: a model may never end
            await asyncio.sleep(0.005)

    # --- on the threads

    def _wake(self, threads: int) -> None:
        for _ in range(min(threads, len(self._resting))):
            self._resting.pop().release()

    def _consume(self) -> None:
        bell = threading.Lock()
        bell.acquire()
        try:
            while (taken := self._take(bell)) is not None:
                self._run(*taken)
        except BaseException as error:
            self._tell(self._died, error)

    def _take(self, bell: Any) -> tuple[Model, list[Item]] | None:
        """Wait for the next batch; None when closed and empty."""
        while True:
            with self._lock:
                lane = self._next()
                key, wait = self._due(lane)
                if key is not None:
                    if batch := self._batch(lane, key):
                        return batch
                    continue
                if self._closed and not lane.queues:
                    return None
                self._resting.append(bell)
            if not bell.acquire(timeout=wait):
                with self._lock:
                    if bell in self._resting:
                        self._resting.remove(bell)
                    else:  # it was rung just now
                        bell.acquire()

    def _next(self) -> _Lane:
        # Small requests go first, unless a large one waits for too long.
        small, large = self._small, self._large
        if not large.queues:
            return small
        patient = time.monotonic() - max(large.since(large.oldest()), large.served) <= _PATIENCE_S
        return small if small.queues and patient else large

    def _due(self, lane: _Lane) -> tuple[Key | None, float]:
        """Return the queue whose turn it is, or None and the seconds until there is one, -1: until woken."""
        if not lane.queues:
            return None, -1
        key = lane.oldest()
        wait = lane.since(key) + self._max_wait - time.monotonic()
        if wait <= 0 or self._closed:
            return key, 0
        # The oldest may wait for more rows; full batches go.
        full = [key for key, queue in lane.queues.items() if len(queue) >= self._most(*key)]
        return min(full, key=lane.since, default=None), wait

    def _batch(self, lane: _Lane, key: Key) -> tuple[Model, list[Item]] | None:
        """Take a batch out of a queue; None when all its requests are done."""
        model, queue, most = key[0], lane.queues[key], self._most(*key)
        batch: list[Item] = []
        while queue and len(batch) < most:
            item = queue.popleft()
            lane.tokens -= item[3]
            lane.rows -= 1
            # Drop rows of finished (expired) requests and disconnected clients.
            if item[0].future.done():
                continue
            if item[0].gone():
                self._tell(item[0].fail, ClientGone())
                continue
            batch.append(item)
        if not queue:
            del lane.queues[key]
        lane.served = time.monotonic()
        return (model, batch) if batch else None

    def _most(self, model: Model, bucket: int) -> int:
        return max(1, min(model.most(bucket), self._max_batch_tokens // bucket))

    def _run(self, model: Model, batch: list[Item]) -> None:
        started = time.monotonic()
        try:
            results = _results(model, [row for _, _, row, _ in batch])
        except BaseException as error:  # a Rust panic of the tokenizer is no Exception
            # Run each row alone, so that a bad one fails alone.
            results = [error] if len(batch) == 1 else [_alone(model, item) for item in batch]
        ended = time.monotonic()
        tokens = sum(cost for _, _, _, cost in batch)
        self._learn(tokens, started, ended)
        self._tell(self._deliver, batch, results, tokens, started, ended)

    def _learn(self, tokens: int, started: float, ended: float) -> None:
        # By the wall clock: threads also wait for the loop, and for shared cores.
        with self._lock:
            if self._small.rows or self._large.rows:
                self._done += tokens - _NEWEST * self._done
                self._took += max(ended - max(self._last, started), 0.0) - _NEWEST * self._took
            self._last = ended

    def _tell(self, what: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(what, *arguments)
        except RuntimeError:  # the loop is closed
            return

    # --- on the loop again

    def _deliver(self, batch: list[Item], results: list[Any], tokens: int, started: float, ended: float) -> None:
        for (ticket, i, _, _), result in zip(batch, results, strict=True):
            if ticket.future.done():
                continue
            ticket.started = ticket.started or started
            ticket.done_at = ended
            if isinstance(result, BaseException):
                ticket.fail(_as_exception(result))
                continue
            ticket.results[i] = result
            ticket.left -= 1
            if not ticket.left:
                ticket.future.set_result(ticket.results)
        self._on_batch(len(batch), tokens, ended - started)

    def _died(self, error: BaseException) -> None:
        """Fail all queued requests, then call `on_death`."""
        with self._lock:
            self._closed = True
            lanes = self._small, self._large
            tickets = {item[0] for lane in lanes for queue in lane.queues.values() for item in queue}
            self._small, self._large = _Lane(), _Lane()
            self._wake(self._threads)
        for ticket in tickets:
            ticket.fail(Refused(503, "the server is ending"))
        self._on_death(error)


def _results(model: Model, rows: list[Any]) -> list[Any]:
    results = model.run(rows)
    if len(results) != len(rows):  # results must not go to other rows
        raise RuntimeError(f"the model gave {len(results)} results for {len(rows)} rows")
    return results


def _alone(model: Model, item: Item) -> Any:
    if item[0].future.done():
        return None
    try:
        return _results(model, [item[2]])[0]
    except BaseException as error:
        return error


def _as_exception(error: BaseException) -> Exception:
    # A future takes no BaseException, and no StopIteration.
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")
