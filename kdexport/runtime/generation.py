"""Text generation: the prompt in one pass, then a token at a time through the key-value cache. No torch."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import msgspec
import numpy as np
from msgspec import Meta

from kdexport.tasks.base import Generates
from kdexport.tasks.metrics import Array, log_softmax

Finish = Literal["length", "stop", "end"]

# The decoder's replacement for an incomplete character.
_PARTIAL = "\ufffd"
# Lower temperatures are greedy, and their quotients may overflow.
_COLDEST = 1e-6

Temperature = Annotated[float, Meta(ge=0, le=100)]
Share = Annotated[float, Meta(gt=0, le=1)]
Stop = Annotated[str, Meta(min_length=1, max_length=256)]
MAX_STOPS = 16
Stops = Annotated[list[Stop], Meta(max_length=MAX_STOPS)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class Sampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sampling parameters and stopping criteria. Temperature 0 is greedy decoding."""

    max_new_tokens: Annotated[int, Meta(ge=1)] = 64
    temperature: Temperature = 0.0
    top_k: Annotated[int, Meta(ge=0)] = 0
    top_p: Share = 1.0
    stop: Stops = []
    seed: Seed | None = None


class Piece(NamedTuple):
    """A generated token: its text (empty while a character or a stop sequence may be incomplete), id, log probability.

    `finish` is the stop reason: length (of the request or the model's context), stop (a stop sequence) or end (the end
    token).
    """

    text: str
    id: int
    log_p: float
    finish: Finish | None


class Written(msgspec.Struct, frozen=True):
    """A completion and its stop reason."""

    completion: str
    tokens: int
    prompt_tokens: int
    finish: Finish

    def to_dict(self, scores: bool) -> dict[str, Any]:
        """Return the command line's output."""
        return {"completion": self.completion, "tokens": self.tokens, "finish": self.finish}


class Steps(Protocol):
    """A model with a key-value cache."""

    task: Any

    def read(self, ids: Sequence[int], past: Any = None) -> tuple[Array, Any]:
        """Read tokens after a cache of earlier ones: return the next token's logits [V] and the extended cache."""


def stream(model: Steps, prompt: str, how: Sampling) -> Iterator[Piece]:
    """Generate after a prompt, a piece per token; a prompt that is too long loses its beginning."""
    task: Generates = model.task
    room = min(how.max_new_tokens, task.config.max_length - 1)
    ids = task.prompt(prompt, room)
    draw = np.random.default_rng(how.seed)
    logits, past = model.read(ids)
    written: list[int] = []
    sent = 0  # characters
    while True:
        chosen, log_p = choose(logits, how, draw)
        finish: Finish | None = "end" if chosen == task.config.end_id else None
        if not finish:
            written.append(chosen)
            finish = "length" if len(written) == room else None
        text = task.text_of(written)
        stops = [at for stop in how.stop if (at := text.find(stop)) >= 0]
        if stops:
            text, finish = text[: min(stops)], "stop"
        ready = len(text) if finish else max(sent, _sure(text, how.stop))
        yield Piece(text[sent:ready], chosen, log_p, finish)
        sent = ready
        if finish:
            return
        logits, past = model.read([chosen], past)


def write(model: Steps, prompt: str, how: Sampling) -> Written:
    """Generate a whole completion; see `stream`."""
    pieces = list(stream(model, prompt, how))
    room = min(how.max_new_tokens, model.task.config.max_length - 1)
    finish = pieces[-1].finish
    assert finish
    return Written("".join(p.text for p in pieces), len(pieces), len(model.task.prompt(prompt, room)), finish)


def choose(logits: Array, how: Sampling, draw: np.random.Generator) -> tuple[int, float]:
    """Sample a token from logits [V]; return it with its log probability under the model.

    First temperature, then the `top_k` most probable tokens (0: all), then of these the smallest set whose
    probabilities sum to `top_p` (Holtzman et al. 2020, https://arxiv.org/abs/1904.09751, section 3.1).
    """
    logs = log_softmax(logits.astype(np.float64))
    if how.temperature == 0:
        best = int(logs.argmax())
        return best, float(logs[best])
    order = np.argsort(-logs, kind="stable")[: how.top_k or None]
    p = np.exp(log_softmax(logs[order] / max(how.temperature, _COLDEST)))
    p = p[: int(np.searchsorted(np.cumsum(p), how.top_p * p.sum())) + 1]
    chosen = int(order[draw.choice(len(p), p=p / p.sum())])
    return chosen, float(logs[chosen])


def timed(
    read: Callable[[Sequence[int], Any], tuple[Array, Any]], ids: Sequence[int], count: int
) -> tuple[list[int], float]:
    """Decode exactly `count` tokens greedily; return them with the seconds to the first."""
    started = time.perf_counter()
    logits, past = read(ids, None)
    written = [int(logits.argmax())]
    first = time.perf_counter() - started
    while len(written) < count:
        logits, past = read(written[-1:], past)
        written.append(int(logits.argmax()))
    return written, first


def _sure(text: str, stops: Sequence[str]) -> int:
    """Return the length of the text that is final: no partial character, and no beginning of a stop sequence."""
    end = len(text) - 1 if text.endswith(_PARTIAL) else len(text)
    for stop in stops:
        at = max(0, end - len(stop) + 1)
        while (at := text.find(stop[0], at, end)) >= 0:
            if stop.startswith(text[at:end]):
                end = at
                break
            at += 1
    return end
