"""Text generation in the server: prompts are rows of their own `Batcher`, in batches of one."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from kdexport.runtime.generation import Finish, Piece, Sampling, stream, timed
from kdexport.runtime.predictor import Predictor
from kdexport.serve.http import ClientGone, Refused, Request
from kdexport.tasks.base import can_generate

_WARM_UP = 8  # tokens


class Job:
    """One prompt, and the text generated so far."""

    def __init__(self, prompt: str, how: Sampling) -> None:
        self.prompt, self.how = prompt, how
        self.prompt_tokens, self.pieces = 0, list[Piece]()
        self.first_s = 0.0
        self.over = False  # the request has ended
        self.gone: Callable[[], bool] = lambda: False
        self.tell: Callable[[Piece], object] = lambda _: None
        self._made = time.monotonic()

    def add(self, piece: Piece) -> None:
        """Add a token and pass it on."""
        if not self.pieces:
            self.first_s = time.monotonic() - self._made
        self.pieces.append(piece)
        self.tell(piece)

    @property
    def finish(self) -> Finish:
        """The finish reason, once generation has ended."""
        finish = self.pieces[-1].finish
        assert finish
        return finish

    @property
    def completion(self) -> str:
        """The generated text."""
        return "".join(piece.text for piece in self.pieces)


class Generator:
    """A language model for a `Batcher`, with `Job`s as rows.

    `rate` is the tokens/s of one thread, `room` the most new tokens.
    """

    def __init__(self, predictor: Predictor) -> None:
        task = predictor.task
        assert can_generate(task)
        self._predictor, self._task = predictor, task
        self.room = task.config.max_length - 1
        prompt = task.prompt(task.examples()[0]["text"], _WARM_UP)
        started = time.perf_counter()
        timed(predictor.read, prompt, _WARM_UP)
        self.rate = _WARM_UP / (time.perf_counter() - started)

    def run(self, rows: Sequence[Any]) -> list[Any]:
        """Run the jobs; stop generating when the client disconnects."""
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
        """Return 1: one queue for prompts of any length."""
        return 1

    def most(self, bucket: int) -> int:
        """Return 1: one prompt per batch."""
        return 1


@contextmanager
def awaited(request: Request, jobs: Sequence[Job]) -> Iterator[None]:
    """Wait for a request's jobs; then end them, and record their tokens for log and metrics."""
    for job in jobs:
        job.gone = request.gone
    try:
        yield
    finally:
        for job in jobs:
            job.over = True
        request.tokens = sum(len(job.pieces) for job in jobs)
        request.first_s = min((job.first_s for job in jobs if job.pieces), default=0.0)


def job_of(generator: Generator, prompt: str, given: dict[str, Any], max_chars: int, status: int = 422) -> Job:
    """Return a job of a prompt and parameters of `Sampling` (None: default); refuse invalid ones with `status`."""
    if len(prompt) > max_chars:
        raise Refused(413, f"a text may have {max_chars:,} characters")
    try:
        how = msgspec.convert({key: value for key, value in given.items() if value is not None}, Sampling)
    except msgspec.ValidationError as error:
        raise Refused(status, f"invalid request: {error}") from None
    if how.max_new_tokens > generator.room:
        raise Refused(status, f"the model writes at most {generator.room} tokens; {how.max_new_tokens} are asked for")
    return Job(prompt, how)
