"""Large requests take turns, as reading them takes memory and time."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from kdexport.serve.http import FULL, RETRY, SMALL, Refused

_MAX_ANSWER = 16 * 1024 * 1024
# Of bodies above `SMALL`, read, waiting or under way.
_MOST_BYTES = 64 * 1024 * 1024
_MOST_WAITING = 16

# One thread: more would contend with the event loop for the GIL.
_THREAD = ThreadPoolExecutor(1, thread_name_prefix="large")
Found = TypeVar("Found")


class Limiter:
    """Bounds on large requests: how many at once, how many wait, and their bytes."""

    def __init__(self, at_once: int) -> None:
        self._free = asyncio.Semaphore(at_once)
        self._bytes = self._waiting = 0

    def reserve(self, size: int) -> None:
        """Reserve bytes of a body, or refuse them (429)."""
        if self._bytes + size > _MOST_BYTES:
            raise _full()
        self._bytes += size

    async def acquire(self, timeout: float) -> None:
        """Wait for a turn; refuse (429) if too many wait, or at the timeout."""
        if self._free.locked() and self._waiting >= _MOST_WAITING:
            raise _full()
        self._waiting += 1
        try:
            async with asyncio.timeout(timeout):
                await self._free.acquire()
        except TimeoutError:
            raise _full() from None
        finally:
            self._waiting -= 1

    def release(self, size: int, slot: bool) -> None:
        """Release bytes, and the turn."""
        self._bytes -= size
        if slot:
            self._free.release()


async def off_loop(size: int, work: Callable[..., Found], *arguments: Any) -> Found:
    """Call a function that processes this many bytes, on a thread if large, to keep the loop free."""
    if size <= SMALL:
        return work(*arguments)
    return await asyncio.get_running_loop().run_in_executor(_THREAD, work, *arguments)


def check_answer(size: int, advice: str) -> int:
    """Return the estimated bytes of a response, or refuse it (413)."""
    if size > _MAX_ANSWER:
        raise Refused(413, f"the answer would have {size >> 20} MiB, of {_MAX_ANSWER >> 20} at most: {advice}")
    return size


def _full() -> Refused:
    return Refused(429, FULL, RETRY)
