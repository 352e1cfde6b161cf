"""The batcher by itself, on a model that doubles numbers; several are bugs that other servers have had."""

from __future__ import annotations

import asyncio
import math
import random
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import asynccontextmanager
from functools import wraps

import pytest

from kdexport.serve.batching import Batcher
from kdexport.serve.http import ClientGone, Refused

LENGTHS = (8, 64, 512)


class Panic(BaseException):
    """Rust's panics reach Python as such: no `Exception`."""


class Doubler:
    """Doubles numbers and notes its batches; while `hold` is clear, a batch that has begun does not end."""

    def __init__(self, most: int = 8) -> None:
        self.most_rows, self.batches = most, list[list[float]]()
        self.hold = threading.Event()
        self.hold.set()

    def run(self, rows):
        self.batches.append(list(rows))
        assert self.hold.wait(10)
        for row in rows:
            if isinstance(row, BaseException):
                raise row
        return [Refused(500, "not finite") if math.isnan(row) else 2 * row for row in rows]

    def bucket(self, cost: int) -> int:
        return min(length for length in LENGTHS if cost <= length)

    def most(self, bucket: int) -> int:
        return self.most_rows


def with_a_loop(test: Callable[..., Coroutine[object, object, None]]) -> Callable[..., None]:
    @wraps(test)
    def run(*arguments: object, **named: object) -> None:
        asyncio.run(asyncio.wait_for(test(*arguments, **named), 20))

    return run


@asynccontextmanager
async def batching(**changes):
    batcher = Batcher(
        **{"threads": 1, "max_batch_tokens": 1024, "max_wait": 0.0, "max_queue": 1e9, "rate": 1000.0} | changes
    )
    yield batcher
    await batcher.close()


def ask(batcher, model, rows, cost=8, timeout=10.0, gone=lambda: False) -> asyncio.Task:
    """Begin a request; its rows wait once the loop has gone round."""
    costs = cost if isinstance(cost, list) else [cost] * len(rows)
    return asyncio.ensure_future(batcher.run(model, rows, costs, timeout, gone))


async def until(condition: Callable[[], object]) -> None:
    ends = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < ends
        await asyncio.sleep(0.001)


@asynccontextmanager
async def busy(batcher, model):
    """The one thread holds a first batch, [0]; what is asked inside waits until the block ends."""
    model.hold.clear()
    first = ask(batcher, model, [0])
    await until(lambda: model.batches)
    yield
    await asyncio.sleep(0)  # what was asked is queued now
    model.hold.set()
    await first


async def refused(request: asyncio.Task) -> Refused:
    with pytest.raises(Refused) as raised:
        await request
    return raised.value


@with_a_loop
async def test_a_row_that_comes_alone_runs_alone_and_at_once():
    model = Doubler()
    async with batching() as batcher:
        ticket = await ask(batcher, model, [3])
        assert ticket.results == [6]
        assert ticket.arrived <= ticket.started <= ticket.done_at
    assert model.batches == [[3]]


@with_a_loop
async def test_what_came_while_a_batch_ran_is_the_next_batch():
    model = Doubler()
    async with batching() as batcher:
        async with busy(batcher, model):
            requests = [ask(batcher, model, [i]) for i in (1, 2, 3)]
        assert [(await request).results for request in requests] == [[2], [4], [6]]
    assert model.batches == [[0], [1, 2, 3]]


@with_a_loop
async def test_a_free_thread_takes_what_waits_while_another_is_busy():
    slow, model = Doubler(), Doubler()
    async with batching(threads=2) as batcher, busy(batcher, slow):
        assert (await ask(batcher, model, [1])).results == [2]


@with_a_loop
async def test_the_oldest_row_is_first_and_lengths_and_models_are_not_mixed():
    model, other = Doubler(), Doubler()
    async with batching() as batcher:
        async with busy(batcher, model):
            asked = [(1, 60, model), (2, 5, model), (3, 60, other), (4, 60, model), (5, 5, model)]
            requests = [ask(batcher, to, [row], cost) for row, cost, to in asked]
        await asyncio.gather(*requests)
    assert model.batches == [[0], [1, 4], [2, 5]]
    assert other.batches == [[3]]


@pytest.mark.parametrize(
    ("most", "tokens", "cost", "sizes"),
    [
        (4, 1024, 8, [4, 4, 2]),
        (100, 24, 8, [3, 3, 3, 1]),
        (100, 24, 6, [3, 3, 3, 1]),  # padded: a batch of length 8 takes 8 a row
        (100, 64, 60, [1] * 10),
        (100, 64, 500, [1] * 10),  # longer than the bound: each alone, and nothing waits behind it for ever
    ],
)
@with_a_loop
async def test_batches_keep_their_bounds(most, tokens, cost, sizes):
    model = Doubler(most)
    async with batching(max_batch_tokens=tokens) as batcher:
        async with busy(batcher, model):
            request = ask(batcher, model, list(range(10)), cost)
        assert (await request).results == [2 * row for row in range(10)]
    assert [len(batch) for batch in model.batches[1:]] == sizes


@with_a_loop
async def test_more_than_may_wait_is_refused_whole_with_a_time_to_come_back():
    model = Doubler()
    async with batching(max_queue=0.1, rate=1000.0) as batcher:  # 100 tokens may wait
        async with busy(batcher, model):
            large = ask(batcher, model, [1] * 100)  # 800 tokens: what waits is bounded, not what comes
            await until(lambda: batcher.waiting_rows == 100)
            too_much = await refused(ask(batcher, model, [2] * 4))  # large as well: it would take 32 ms
            assert too_much.status == 429
            assert too_much.headers == [(b"retry-after", b"1")]
            assert (batcher.waiting_rows, batcher.waiting_tokens) == (100, 800)
        assert (await large).results == [2] * 100
        assert (await ask(batcher, model, [3] * 100)).results == [6] * 100
        assert all(2 not in batch for batch in model.batches)
        assert (batcher.waiting_rows, batcher.waiting_tokens) == (0, 0)


@with_a_loop
async def test_large_requests_wait_in_a_lane_of_their_own_and_small_ones_go_first():
    model = Doubler()
    async with batching(max_queue=0.1, rate=1000.0) as batcher:
        async with busy(batcher, model):
            large = ask(batcher, model, [1] * 100)
            await until(lambda: batcher.waiting_rows == 100)
            assert batcher.full() == 0  # whoever asks for little is not turned away at the door
            small = [ask(batcher, model, [i]) for i in (2, 3, 4)]
            await until(lambda: batcher.waiting_rows == 103)
        await asyncio.gather(large, *small)
        assert model.batches[1] == [2, 3, 4]


@with_a_loop
async def test_small_requests_have_a_bound_too_and_keep_no_large_one_out():
    model = Doubler()
    async with batching(max_queue=0.1, rate=1000.0) as batcher:
        async with busy(batcher, model):
            small = [ask(batcher, model, [5]) for _ in range(12)]
            await until(lambda: batcher.waiting_rows == 12)
            assert (await refused(ask(batcher, model, [6]))).status == 429
            large = ask(batcher, model, [7] * 100)
            await until(lambda: batcher.waiting_rows == 112)
        await asyncio.gather(large, *small)


@with_a_loop
async def test_a_large_request_has_a_turn_at_last_whatever_else_there_is():
    model = Doubler()
    async with batching(max_queue=0.1, rate=1000.0) as batcher:
        async with busy(batcher, model):
            large = ask(batcher, model, [1] * 100)
            await until(lambda: batcher.waiting_rows == 100)
            await asyncio.sleep(0.25)
            small = ask(batcher, model, [2])
            await until(lambda: batcher.waiting_rows == 101)
        await asyncio.gather(large, small)
        assert model.batches[1:3] == [[1] * 8, [2]]


@with_a_loop
async def test_without_lanes_all_wait_their_turn():
    model = Doubler()
    async with batching(max_queue=0.1, rate=1000.0, lanes=False) as batcher:
        async with busy(batcher, model):
            large = ask(batcher, model, [1] * 16)
            await until(lambda: batcher.waiting_rows == 16)
            assert (await refused(ask(batcher, model, [2]))).status == 429
        await large


@with_a_loop
async def test_retry_after_is_the_time_that_the_queue_takes():
    model = Doubler()
    async with batching(max_queue=0.1, rate=100.0) as batcher:
        async with busy(batcher, model):
            large = ask(batcher, model, [1] * 100)
            await until(lambda: batcher.waiting_tokens)
            assert (await refused(ask(batcher, model, [2]))).headers == [(b"retry-after", b"8")]
        await large


@with_a_loop
async def test_a_request_that_cannot_be_queued_leaves_nothing_behind():
    # Ray Serve 66140: a size that can't be told must not stop those that can.
    model = Doubler()
    async with batching() as batcher:
        async with busy(batcher, model):
            with pytest.raises(ValueError, match="min"):
                await ask(batcher, model, [1, 2], [8, 10_000])
            with pytest.raises(ValueError, match="shorter"):
                await ask(batcher, model, [1, 2], [8])
            assert batcher.waiting_rows == 0
        assert (await ask(batcher, model, [3])).results == [6]
    assert model.batches == [[0], [3]]


@with_a_loop
async def test_a_request_without_rows_is_answered():
    async with batching() as batcher:
        assert (await ask(batcher, Doubler(), [])).results == []


@with_a_loop
async def test_after_its_deadline_a_request_gets_504_and_costs_nothing():
    model = Doubler()
    async with batching() as batcher:
        async with busy(batcher, model):
            late, patient = ask(batcher, model, [1, 2], timeout=0.01), ask(batcher, model, [3])
            assert (await refused(late)).status == 504
        assert (await patient).results == [6]
    assert model.batches == [[0], [3]]


@with_a_loop
async def test_a_deadline_during_the_run_is_kept_and_the_batch_goes_on():
    model = Doubler()
    async with batching() as batcher:
        model.hold.clear()
        late = ask(batcher, model, [1], timeout=0.01)
        assert (await refused(late)).status == 504
        waiting = ask(batcher, model, [2])
        model.hold.set()
        assert (await waiting).results == [4]


@with_a_loop
async def test_rows_of_a_client_that_has_gone_do_not_run_and_its_handler_ends():
    model = Doubler()
    async with batching() as batcher:
        async with busy(batcher, model):
            gone, here = ask(batcher, model, [1, 2], gone=lambda: True), ask(batcher, model, [3])
        with pytest.raises(ClientGone):
            await gone
        assert (await here).results == [6]
    assert model.batches == [[0], [3]]


@with_a_loop
async def test_a_cancelled_waiter_does_not_disturb_its_batch():
    # Ray Serve 41199: a result for a cancelled future ended the loop. Once while it waits, once while it runs.
    model = Doubler()
    async with batching() as batcher:
        async with busy(batcher, model):
            waits, other = ask(batcher, model, [1]), ask(batcher, model, [2])
            await until(lambda: batcher.waiting_rows == 2)
            waits.cancel()
        assert (await other).results == [4]
        model.hold.clear()
        runs, beside = ask(batcher, model, [3]), ask(batcher, model, [4])
        await until(lambda: [3] in model.batches or [3, 4] in model.batches)
        runs.cancel()
        model.hold.set()
        assert (await beside).results == [8]
        assert (await ask(batcher, model, [5])).results == [10]
    assert all(1 not in batch for batch in model.batches)


@pytest.mark.parametrize("error", [ValueError("bad"), Panic("a Rust panic"), SystemExit(1), StopIteration()], ids=repr)
@with_a_loop
async def test_a_row_that_fails_fails_its_own_request_only(error):
    model, deaths = Doubler(), []
    async with batching(on_death=deaths.append) as batcher:
        async with busy(batcher, model):
            before, bad, after = (ask(batcher, model, rows) for rows in ([1], [2, error, 3], [4, 5]))
        assert [(await before).results, (await after).results] == [[2], [8, 10]]
        with pytest.raises((ValueError, RuntimeError)) as raised:
            await bad
        assert str(error) in str(raised.value)
        assert (await ask(batcher, model, [6])).results == [12]
        with pytest.raises((ValueError, RuntimeError)):
            await ask(batcher, model, [error])
    assert not deaths


@with_a_loop
async def test_a_result_may_be_an_error_of_one_row():
    model = Doubler()
    async with batching() as batcher:
        async with busy(batcher, model):
            good, bad = ask(batcher, model, [1]), ask(batcher, model, [float("nan"), 2])
        assert (await good).results == [2]
        assert (await refused(bad)).status == 500
    assert len(model.batches) == 2


@pytest.mark.parametrize("change", [lambda results: results[:-1], lambda results: [*results, 0], lambda _: []])
@with_a_loop
async def test_another_number_of_results_than_rows_is_an_error_for_all(change):
    # MLServer 1306 and 1911: one caller got the results of all, the others none.
    model = Doubler()
    right = model.run
    model.run = lambda rows: change(right(rows))
    async with batching() as batcher:
        for rows in ([1], [1, 2, 3]):
            with pytest.raises(RuntimeError, match="results for"):
                await ask(batcher, model, rows)
        model.run = right
        assert (await ask(batcher, model, [4])).results == [8]


@with_a_loop
async def test_a_thread_that_dies_is_told_and_nobody_waits_for_it():
    model, deaths = Doubler(), []
    async with batching(on_death=deaths.append) as batcher:
        async with busy(batcher, model):
            waiting = [ask(batcher, model, [1]), ask(batcher, model, [2], 60)]
            await until(lambda: batcher.waiting_rows == 2)
            model.most = lambda bucket: 1 // 0
        assert [(await refused(request)).status for request in waiting] == [503, 503]
        assert isinstance(deaths[0], ZeroDivisionError)
        assert batcher.waiting_rows == batcher.waiting_tokens == 0
        assert (await refused(ask(batcher, model, [3]))).status == 503


@with_a_loop
async def test_close_finishes_what_waits_and_takes_no_more():
    model = Doubler(most=1)
    async with batching(threads=2) as batcher:
        requests = [ask(batcher, model, [i]) for i in range(50)]
        await until(lambda: model.batches)
        await batcher.close()
        assert [(await request).results for request in requests] == [[2 * i] for i in range(50)]
        assert (await refused(ask(batcher, model, [1]))).status == 503


@with_a_loop
async def test_a_few_large_requests_do_not_shut_out_the_small():
    model = Doubler(most=1000)
    async with batching(max_queue=0.5, rate=1000.0) as batcher:  # 500 tokens may wait
        for _ in range(200):
            await ask(batcher, model, [1] * 128, cost=8)  # more than may wait, and one batch
        model.hold.clear()
        begun = ask(batcher, model, [1])
        await until(lambda: model.batches[-1] == [1])
        waiting = ask(batcher, model, [2])
        await until(lambda: batcher.waiting_rows)
        assert batcher.full() == 0
        model.hold.set()
        await asyncio.gather(begun, waiting)


@with_a_loop
async def test_with_max_wait_a_batch_waits_until_it_is_full_or_old_enough():
    model = Doubler(most=3)
    async with batching(max_wait=0.3) as batcher:
        began = time.monotonic()
        requests = [ask(batcher, model, [i]) for i in (1, 2)]
        await asyncio.sleep(0.02)
        assert not model.batches
        requests.append(ask(batcher, model, [3]))
        await asyncio.gather(*requests)
        assert time.monotonic() - began < 0.3
        assert (await ask(batcher, model, [4])).results == [8]
        assert time.monotonic() - began > 0.3
    assert model.batches == [[1, 2, 3], [4]]


@with_a_loop
async def test_a_batch_that_waits_for_more_does_not_hold_up_a_full_one():
    model = Doubler(most=2)
    async with batching(max_wait=5.0) as batcher:
        waiting = ask(batcher, model, [1])
        full = [ask(batcher, model, [i], 60) for i in (2, 3)]
        assert [(await request).results for request in full] == [[4], [6]]
        assert not waiting.done()
        await batcher.close()  # which waits for nothing
        assert (await waiting).results == [2]


@with_a_loop
async def test_in_a_storm_every_request_ends_and_gets_its_own_results():
    # Ray Serve 42705: rows were left behind in the queue, and waited for ever.
    model, told, dice = Doubler(most=7), [], random.Random(0)
    async with batching(threads=4, max_batch_tokens=600, on_batch=lambda *batch: told.append(batch)) as batcher:

        async def client(number: int) -> int:
            answered = 0
            for turn in range(40):
                rows = [1000 * number + turn + i / 100 for i in range(dice.choice((1, 1, 1, 2, 5, 20)))]
                costs = [dice.choice((3, 8, 9, 64, 300)) for _ in rows]
                gone, timeout = dice.random() < 0.05, 1e-5 if dice.random() < 0.05 else 10.0
                request = ask(batcher, model, rows, costs, timeout, lambda gone=gone: gone)
                if dice.random() < 0.05:
                    await asyncio.sleep(0)
                    request.cancel()
                try:
                    assert (await request).results == [2 * row for row in rows]
                    answered += 1
                except (Refused, ClientGone, asyncio.CancelledError):
                    pass
            return answered

        answered = await asyncio.gather(*(client(number) for number in range(100)))
        await until(lambda: batcher.waiting_rows == 0)
        assert batcher.waiting_tokens == 0
    assert sum(answered) > 3000
    assert all(len(batch) <= 7 for batch in model.batches)
    assert sum(rows for rows, _, _ in told) == sum(map(len, model.batches))


def test_a_thread_that_ends_its_batch_after_the_loop_ends_in_silence():
    model = Doubler()
    model.hold.clear()

    async def leave():
        batcher = Batcher(threads=1, max_batch_tokens=64, max_wait=0.0, max_queue=1.0, rate=1.0)
        request = ask(batcher, model, [1])
        await until(lambda: model.batches)
        request.cancel()
        return batcher

    batcher = asyncio.run(leave())
    model.hold.set()
    asyncio.run(batcher.close())  # waits for the thread
    assert model.batches == [[1]]
