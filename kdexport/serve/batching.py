"""Rows from many requests → batches on a few threads: work-conserving, bounded, deadlines kept.

A request is taken in whole or refused. Its rows wait in queues by model and length, so that a batch holds rows
of similar length. A thread that has nothing to do takes the oldest row and whatever of its queue fits beside it,
without waiting for more: under load the queues fill while batches run, so batches grow by themselves.

Requests that take long stand in a lane of their own, with a bound of their own. Between any two of their batches the
others go first, so a few large requests, or a flood of them, delay a small one by a batch, and never shut it out.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from kdexport.serve.http import FULL, ClientGone, Refused

# How much the newest batch says about the rate; a hundred batches are some tens of milliseconds.
_NEWEST = 0.02
_FIRST_S = 0.5  # how long the first guess weighs as much as what is found
# A request is large that takes more than a batch, or this share of the time that work may wait.
_LARGE = 0.25
# While there are small ones, a large request has a turn as often as this.
_PATIENCE_S = 0.2


class Model(Protocol):
    """A model as a batcher runs it."""

    def run(self, rows: Sequence[Any]) -> list[Any]:
        """Return one result a row, in their order; an exception as a result fails that row alone."""

    def bucket(self, cost: int) -> int:
        """Return the length in tokens that a row of this cost is padded to; rows of one bucket may share a batch."""

    def most(self, bucket: int) -> int:
        """Return how many rows a batch may have."""


class Ticket:
    """One request's rows on their way; its future gives their results, in order."""

    __slots__ = ("arrived", "done_at", "future", "gone", "left", "results", "started")

    def __init__(self, future: asyncio.Future[list[Any]], rows: int, gone: Callable[[], bool], arrived: float) -> None:
        self.future, self.gone, self.arrived = future, gone, arrived
        self.results: list[Any] = [None] * rows
        self.left = rows
        self.started = self.done_at = 0.0

    def fail(self, error: Exception) -> None:
        """End with an error, unless it has ended already."""
        if not self.future.done():
            self.future.set_exception(error)

    def expire(self) -> None:
        """End because its deadline has passed."""
        self.fail(Refused(504, "the answer took longer than the request's deadline"))


Item = tuple[Ticket, int, Any, int]  # whose, which of its rows, the row, its cost in tokens


class _Lane:
    """Rows that wait, by model and length: all are bounded together."""

    def __init__(self) -> None:
        self.queues: defaultdict[tuple[Model, int], deque[Item]] = defaultdict(deque)
        self.tokens = self.rows = 0
        self.served = 0.0  # when a batch was last taken

    def since(self, key: tuple[Model, int]) -> float:
        return self.queues[key][0][0].arrived

    def oldest(self) -> tuple[Model, int]:
        return min(self.queues, key=self.since)


class Batcher:
    """N threads over shared queues.

    Args:
        threads: batches that run at once.
        max_batch_tokens: padded tokens of a batch; a longer row runs alone.
        max_wait: seconds that a batch waits for more rows.
        max_queue: seconds that new work may have to wait; beyond, requests are refused with 429.
        rate: first guess of the tokens a second of all threads; learnt while running.
        on_batch: called with (rows, tokens, seconds) of every batch, on the loop.
        on_death: called when a thread ends by an error that is ours, on the loop; nothing runs any more then.
        lanes: whether large requests stand apart; else all wait their turn.
    """

    def __init__(
        self,
        *,
        threads: int,
        max_batch_tokens: int,
        max_wait: float,
        max_queue: float,
        rate: float,
        on_batch: Callable[[int, int, float], None] = lambda *_: None,
        on_death: Callable[[BaseException], None] = lambda _: None,
        lanes: bool = True,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._threads, self._max_batch_tokens = threads, max_batch_tokens
        self._max_wait, self._max_queue = max_wait, max_queue
        # Tokens that were done, and the seconds that they took, while there was always more to do; old ones fade.
        self._done, self._took = _FIRST_S * rate, _FIRST_S
        self._last = time.monotonic()
        self._on_batch, self._on_death = on_batch, on_death
        self._small, self._large = _Lane(), _Lane()
        self._lanes = lanes
        self._lock = threading.Lock()
        # Threads that have nothing to do, each behind a lock that it waits for. The last to rest is the first to be
        # woken: its caches are warm, and under a light load the others sleep on.
        self._resting: list[Any] = []
        self._usual = 0.0  # tokens of a row; by whole requests, a few large ones would shut out the small
        self._closed = False
        self._consumers = [
            threading.Thread(target=self._consume, name=f"consumer-{i}", daemon=True) for i in range(threads)
        ]
        for consumer in self._consumers:
            consumer.start()

    async def run(
        self, model: Model, rows: Sequence[Any], costs: Sequence[int], timeout: float, gone: Callable[[], bool]
    ) -> Ticket:
        """Run one request's rows, and return when all are done.

        Raises:
            Refused: there is too much work waiting (429), the deadline passed (504), or nothing runs any more (503).
            ClientGone: the client went away while its rows waited.
            Exception: what `model.run` raised for one of the rows.
        """
        ticket = self._submit(model, rows, costs, gone)
        if not rows:
            return ticket
        timer = self._loop.call_later(timeout, ticket.expire)
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
        # All that may fail is done before the first row is queued: a request is taken in whole or not at all.
        items = [
            ((model, model.bucket(cost)), (ticket, i, row, cost))
            for i, (row, cost) in enumerate(zip(rows, costs, strict=True))
        ]
        with self._lock:
            if self._closed:
                raise Refused(503, "the server is ending")
            # What waits is bounded, not what comes: a request larger than the bound runs when nothing waits.
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
        """Tokens a second of all threads together."""
        return max(self._done / self._took, 1.0)

    def full(self) -> int:
        """Return 0 while there is room for a row of the usual size, else the seconds until there should be."""
        lane = self._small
        wait = (lane.tokens + self._usual) / self.rate
        return self._retry_after(lane) if lane.tokens and wait > self._max_queue else 0

    @property
    def waiting_tokens(self) -> int:
        """Tokens that wait."""
        return self._small.tokens + self._large.tokens

    @property
    def waiting_rows(self) -> int:
        """Rows that wait."""
        return self._small.rows + self._large.rows

    def _retry_after(self, lane: _Lane) -> int:
        return max(1, math.ceil(lane.tokens / self.rate))

    async def close(self) -> None:
        """Finish what waits, then end the threads."""
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
        """The oldest row and what fits beside it; None when closed and empty."""
        while True:
            with self._lock:
                lane = self._next()
                wait = self._pause(lane)
                if wait == 0:
                    if batch := self._batch(lane):
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
        """The lane whose turn it is: small requests go first, unless a large one waits for too long."""
        small, large = self._small, self._large
        if not large.queues:
            return small
        patient = time.monotonic() - max(large.since(large.oldest()), large.served) <= _PATIENCE_S
        return small if small.queues and patient else large

    def _pause(self, lane: _Lane) -> float:
        """How long to rest before there is a batch to take: 0 now, -1 until woken."""
        if not lane.queues:
            return -1
        if not self._max_wait or self._closed or any(len(q) >= self._most(*key) for key, q in lane.queues.items()):
            return 0
        return max(0.0, lane.since(lane.oldest()) + self._max_wait - time.monotonic())

    def _batch(self, lane: _Lane) -> tuple[Model, list[Item]] | None:
        """Take the oldest row's batch out of its queue; None when nobody waits for any of it."""
        key = lane.oldest()
        if self._max_wait and not self._closed and lane.since(key) + self._max_wait > time.monotonic():
            # The oldest may wait for more; what is full need not wait for it.
            key = min((k for k, queue in lane.queues.items() if len(queue) >= self._most(*k)), key=lane.since)
        model, queue, most = key[0], lane.queues[key], self._most(*key)
        batch: list[Item] = []
        while queue and len(batch) < most:
            item = queue.popleft()
            lane.tokens -= item[3]
            lane.rows -= 1
            # Rows whose request was answered (by its deadline) or whose client has gone cost nothing more.
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
        except BaseException as error:  # a panic of the tokenizer's Rust is no Exception
            # One bad row must not fail the others: each again, alone.
            results = [error] if len(batch) == 1 else [_alone(model, item) for item in batch]
        ended = time.monotonic()
        tokens = sum(cost for _, _, _, cost in batch)
        self._learn(tokens, started, ended)
        self._tell(self._deliver, batch, results, tokens, started, ended)

    def _learn(self, tokens: int, started: float, ended: float) -> None:
        """How fast work drains, by the clock: threads also wait for the loop, and for a core that others share."""
        with self._lock:
            if self._small.rows or self._large.rows:
                self._done += tokens - _NEWEST * self._done
                self._took += max(ended - max(self._last, started), 0.0) - _NEWEST * self._took
            self._last = ended

    def _tell(self, what: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(what, *arguments)
        except RuntimeError:  # the loop is closed: nobody is left to be told
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
        """Nothing that waits would ever run: say so to all, then to the owner."""
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
    if len(results) != len(rows):  # to give one row's result to another would be worse than none
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
    """What a future takes, and what a handler that catches `Exception` catches."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")
