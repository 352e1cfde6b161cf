"""Writing with a language model: the prompt at once, then a token at a time through the key-value cache. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import msgspec
import numpy as np
from msgspec import Meta

from kdexport.tasks.base import Generates
from kdexport.tasks.metrics import Array, log_softmax

Finish = Literal["length", "stop", "end"]

# A token whose bytes are not whole characters yet is decoded to this.
_PARTIAL = "\ufffd"
# Below it nothing but the most probable token is left, and a quotient may be too large for a float.
_COLDEST = 1e-6


Temperature = Annotated[float, Meta(ge=0, le=100)]
Share = Annotated[float, Meta(gt=0, le=1)]
Stop = Annotated[str, Meta(min_length=1, max_length=256)]
MAX_STOPS = 16
Stops = Annotated[list[Stop], Meta(max_length=MAX_STOPS)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class Sampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a token is chosen, and when it is enough. At temperature 0 it is the most probable one."""

    max_new_tokens: Annotated[int, Meta(ge=1)] = 64
    temperature: Temperature = 0.0
    top_k: Annotated[int, Meta(ge=0)] = 0
    top_p: Share = 1.0
    stop: Stops = []
    seed: Seed | None = None


class Piece(NamedTuple):
    """What one token adds: its text (none while a character or a stop text may not be whole), id, log probability.

    `finish` is why it is the last: length (all tokens that were asked for, or that the model reads), stop (one of the
    texts that stop) or end (the model ended it).
    """

    text: str
    id: int
    log_p: float
    finish: Finish | None


class Written(msgspec.Struct, frozen=True):
    """What a model wrote after a prompt, and why it stopped."""

    completion: str
    tokens: int
    prompt_tokens: int
    finish: Finish

    def to_dict(self, scores: bool) -> dict[str, Any]:
        """Return what the command line prints."""
        return {"completion": self.completion, "tokens": self.tokens, "finish": self.finish}


class Steps(Protocol):
    """A model that goes on from what it has read."""

    task: Any

    def read(self, ids: Sequence[int], past: Any = None) -> tuple[Array, Any]:
        """Tokens, and the cache of those before them → logits [V] of the next one, and the cache with them."""


def stream(model: Steps, prompt: str, how: Sampling) -> Iterator[Piece]:
    """Write after a prompt, a piece a token; the prompt's last tokens count where it is too long.

    Args:
        model: a `Predictor` of a language model.
        prompt: may be empty.
        how: what to take of the model's probabilities.
    """
    task: Generates = model.task
    room = min(how.max_new_tokens, task.config.max_length - 1)
    ids = task.prompt(prompt, room)
    draw = np.random.default_rng(how.seed)
    logits, past = model.read(ids)
    written: list[int] = []
    told = 0  # characters
    while True:
        chosen, log_p = choose(logits, how, draw)
        finish: Finish | None = "end" if chosen == task.config.end_id else None
        if not finish:
            written.append(chosen)
            finish = "length" if len(written) == room else None
        text = task.text_of(written)
        if (stop := _first_stop(text, how.stop)) is not None:
            text, finish = text[:stop], "stop"
        ready = len(text) if finish else max(told, _sure(text, how.stop))
        yield Piece(text[told:ready], chosen, log_p, finish)
        told = ready
        if finish:
            return
        logits, past = model.read([chosen], past)


def write(model: Steps, prompt: str, how: Sampling) -> Written:
    """All that `stream` gives, as one."""
    pieces = list(stream(model, prompt, how))
    room = min(how.max_new_tokens, model.task.config.max_length - 1)
    finish = pieces[-1].finish
    assert finish
    return Written("".join(p.text for p in pieces), len(pieces), len(model.task.prompt(prompt, room)), finish)


def choose(logits: Array, how: Sampling, draw: np.random.Generator) -> tuple[int, float]:
    """A token of logits [V], and its log probability under the model.

    The `top_k` most probable ones stay (all for 0), of these the fewest whose probabilities sum to `top_p` (Holtzman et
    al. 2020, https://arxiv.org/abs/1904.09751, section 3.1), after softening by the temperature.
    """
    logs = log_softmax(logits.astype(np.float64))
    if how.temperature == 0:
        best = int(logs.argmax())
        return best, float(logs[best])
    order = np.argsort(-logs, kind="stable")[: how.top_k or None]
    shares = np.exp(log_softmax(logs[order] / max(how.temperature, _COLDEST)))
    kept = int(np.searchsorted(np.cumsum(shares), how.top_p * shares.sum())) + 1
    shares = shares[:kept] / shares[:kept].sum()
    chosen = int(order[draw.choice(len(shares), p=shares)])
    return chosen, float(logs[chosen])


def timed(
    read: Callable[[Sequence[int], Any], tuple[Array, Any]], ids: Sequence[int], count: int
) -> tuple[list[int], float]:
    """The most probable tokens after a prompt, so many whatever they are; and the seconds until the first was known."""
    started = time.perf_counter()
    logits, past = read(ids, None)
    written = [int(logits.argmax())]
    first = time.perf_counter() - started
    while len(written) < count:
        logits, past = read(written[-1:], past)
        written.append(int(logits.argmax()))
    return written, first


def _first_stop(text: str, stops: Sequence[str]) -> int | None:
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return min(found, default=None)


def _sure(text: str, stops: Sequence[str]) -> int:
    """How much of a text stays as it is, whatever comes: no half character, and no beginning of a text that stops."""
    end = len(text) - 1 if text.endswith(_PARTIAL) else len(text)
    for stop in stops:
        at = max(0, end - len(stop) + 1)
        while (at := text.find(stop[0], at, end)) >= 0:
            if stop.startswith(text[at:end]):
                end = at
                break
            at += 1
    return end
