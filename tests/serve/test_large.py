"""Large requests take limiter, and a flood of them costs the server little and shuts nobody out."""

from __future__ import annotations

import asyncio
import gzip
import http.client
import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
from limits import MOST_MB, begin_peak, memory_mb
from serve_process import served
from wire import GOOD, ask, is_well

from kdexport.serve.http import Refused
from kdexport.serve.large import Limiter

LARGE = json.dumps({"inputs": ["(" * 99_000] * 19}).encode()


@pytest.fixture(scope="module")
def server(finished):
    with served(f"news={finished}", "--access-log", "off", "--threads", "2") as found:
        assert is_well(found.url)
        yield found


def post(server, body: bytes, **headers: str) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    connection.request("POST", "/", body, headers)
    return connection


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzipped"])
def test_many_large_requests_at_once_are_answered_in_turn_or_refused(server, packed):
    body, headers = (gzip.compress(LARGE), {"Content-Encoding": "gzip"}) if packed else (LARGE, {})
    before = begin_peak(server.process.pid)

    def large(_: int) -> int:
        return post(server, body, **headers).getresponse().status

    def small(_: int) -> int:
        return ask(server.url, "/", GOOD).status

    with ThreadPoolExecutor(64) as pool:
        flood = [pool.submit(large, i) for i in range(120)]
        good = Counter(pool.map(small, range(60)))
        statuses = Counter(one.result() for one in flood)
    assert set(statuses) <= {200, 429}
    assert statuses[200] >= 8
    assert good == {200: 60}
    assert memory_mb(server.process.pid) - before <= MOST_MB


def test_a_client_that_is_refused_again_and_again_is_read_from_later_and_later(server):
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)

    def seconds(body: bytes, status: int) -> float:
        began = time.monotonic()
        connection.request("POST", "/", body)
        answer = connection.getresponse()
        answer.read()
        assert answer.status == status
        return time.monotonic() - began

    too_long = json.dumps({"inputs": "x" * 100_001}).encode()
    waited = [seconds(too_long, 413) for _ in range(8)]
    assert sum(waited[2:]) >= 0.01 * sum(range(2, 8))
    seconds(GOOD, 200)  # and that is forgotten
    assert min(seconds(GOOD, 200) for _ in range(3)) < max(waited)


def test_turns_are_bounded_in_number_and_in_bytes():
    async def main() -> None:
        limiter = Limiter(1)
        await limiter.acquire(1)
        waiting = [asyncio.ensure_future(limiter.acquire(5)) for _ in range(16)]
        await asyncio.sleep(0)
        with pytest.raises(Refused, match="too much work"):
            await limiter.acquire(5)
        limiter.release(0, True)
        await waiting[0]
        for one in waiting[1:]:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        with pytest.raises(Refused, match="too much work"):
            await limiter.acquire(0.01)
        limiter.release(0, True)
        await limiter.acquire(1)
        limiter.reserve(60_000_000)
        with pytest.raises(Refused, match="too much work"):
            limiter.reserve(10_000_000)
        limiter.release(60_000_000, False)
        limiter.reserve(10_000_000)

    asyncio.run(main())
