"""Language models behind the server: prompts wait for a thread, which writes until it is enough or nobody waits.

Prompts are rows of a `Batcher` of their own, whose batches are of one: its bounds, deadlines and threads are theirs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from kdexport.runtime.generation import Piece, Sampling, stream, timed
from kdexport.runtime.predictor import Predictor
from kdexport.serve.http import ClientGone, Refused, Request
from kdexport.tasks.base import can_generate

_WARM_UP = 8  # tokens


class Job:
    """One prompt, and what was written after it so far."""

    def __init__(self, prompt: str, how: Sampling) -> None:
        self.prompt, self.how = prompt, how
        self.prompt_tokens, self.pieces = 0, list[Piece]()
        self.first_s = 0.0
        self.over = False  # nobody waits for the rest
        self.gone: Callable[[], bool] = lambda: False
        self.tell: Callable[[Piece], None] = lambda _: None
        self._made = time.monotonic()

    def add(self, piece: Piece) -> None:
        """Note what one more token adds, and tell whoever waits."""
        if not self.pieces:
            self.first_s = time.monotonic() - self._made
        self.pieces.append(piece)
        self.tell(piece)

    @property
    def completion(self) -> str:
        """All that was written."""
        return "".join(piece.text for piece in self.pieces)


class Writer:
    """A language model as a batcher runs it: rows are `Job`s, one at a time on each thread.

    `rate` is the tokens a second that one thread writes, `most` how many the model may write after a prompt.
    """

    def __init__(self, predictor: Predictor) -> None:
        task = predictor.task
        assert can_generate(task)
        self._predictor, self._task = predictor, task
        self.since = int(time.time())
        self.room = task.config.max_length - 1
        prompt = task.prompt(task.examples()[0]["text"], _WARM_UP)
        started = time.perf_counter()
        timed(predictor.read, prompt, _WARM_UP)
        self.rate = _WARM_UP / (time.perf_counter() - started)

    def run(self, rows: Sequence[Any]) -> list[Any]:
        """The jobs, done; the first token that nobody waits for is the last."""
        for job in rows:
            job.prompt_tokens = len(self._task.prompt(job.prompt, job.how.max_new_tokens))
            for piece in stream(self._predictor, job.prompt, job.how):
                if not math.isfinite(piece.log_p):  # JSON has no NaN
                    raise Refused(500, "the model's answer is not a finite number")
                job.add(piece)
                if job.over or job.gone():
                    raise ClientGone
        return list(rows)

    def bucket(self, cost: int) -> int:
        """One queue: the oldest prompt is next, whatever its length."""
        return 1

    def most(self, bucket: int) -> int:
        """Prompts of a batch."""
        return 1


@contextmanager
def awaited(request: Request, jobs: Sequence[Job]) -> Iterator[None]:
    """While a request waits for its jobs; afterwards they end, and what was written is noted for log and metrics."""
    for job in jobs:
        job.gone = request.gone
    try:
        yield
    finally:
        for job in jobs:
            job.over = True
        request.tokens = sum(len(job.pieces) for job in jobs)
        request.first_s = min((job.first_s for job in jobs if job.pieces), default=0.0)


def job_of(writer: Writer, prompt: str, given: dict[str, Any], max_chars: int, status: int = 422) -> Job:
    """A prompt within its limits.

    Args:
        writer: the model.
        prompt: the text to go on from.
        given: of `Sampling`; None is what was not given.
        max_chars: characters of a prompt.
        status: of what is refused for what is given.

    Raises:
        Refused: the prompt is too long (413), or the model can't write like that.
    """
    if len(prompt) > max_chars:
        raise Refused(413, f"a text may have {max_chars:,} characters")
    try:
        how = msgspec.convert({key: value for key, value in given.items() if value is not None}, Sampling)
    except msgspec.ValidationError as error:
        raise Refused(status, f"the request is not as it should be: {error}") from None
    if how.max_new_tokens > writer.room:
        raise Refused(status, f"the model writes at most {writer.room} tokens; {how.max_new_tokens} are asked for")
    return Job(prompt, how)
