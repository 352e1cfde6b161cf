"""Find out what an endpoint's model can be asked for, and choose by it how probabilities are read."""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

import msgspec

from kdexport.asking.client import Call, Endpoint, Failed, Reply
from kdexport.asking.reading import choices_of, object_in, positions_of, score_of, text_of
from kdexport.errors import ModelError, SpecError
from kdexport.spec.ask import Ask

Constrained = Literal["", "json_schema", "guided_choice", "grammar"]
_SAY = [
    {"role": "system", "content": "Answer with one word."},
    {"role": "user", "content": "Which is the capital of France?"},
]
# A word that no model says of itself.
_WORD = "xyzzyq"
_PROMPT, _NEXT = "The capital of France is", " Paris"
# Most tokens of an answer that thinks first.
_THOUGHTS = 4096


class Abilities(msgspec.Struct, frozen=True):
    """Features of a server's API for one model, found by `probe`."""

    top: int  # likeliest tokens that it gives at each place; 0: no log-probabilities
    echo: bool  # it scores a text that is given
    constrained: Constrained  # how it can be held to some answers
    n: bool  # several answers to one call
    limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    temperature: bool = True  # it can be set
    system: bool = True  # there is a message for instructions
    thinks: bool = False  # before it answers

    def line(self) -> str:
        """Return what the server does for this model, as the rest of a sentence about it."""
        tops = f"log-probabilities of {self.top} tokens" if self.top else "no log-probabilities"
        held = f"can be held to given answers ({self.constrained})" if self.constrained else "can't be held to answers"
        echo = "scores given texts" if self.echo else "scores no given texts"
        return f"gives {tops}, {echo}, {held}{', and thinks before it answers' if self.thinks else ''}"

    def body(self, messages: Sequence[Mapping[str, str]], tokens: int, temperature: float = 0.0) -> dict[str, Any]:
        """Return the body of a chat call, without the model's name."""
        if not self.system and messages[0]["role"] == "system":
            first = f"{messages[0]['content']}\n\n{messages[1]['content']}"
            messages = [{"role": "user", "content": first}, *messages[2:]]
        found: dict[str, Any] = {"messages": list(messages), self.limit: _THOUGHTS if self.thinks else tokens}
        return found | ({"temperature": temperature} if self.temperature else {})

    def held_to(self, answers: Sequence[str], *, several: bool = False) -> dict[str, Any]:
        """Return what a body has besides to hold the model to these answers, or to a list of them."""
        one: dict[str, Any] = {"type": "string", "enum": list(answers)}
        if self.constrained == "json_schema":
            inner = {"labels": {"type": "array", "items": one}} if several else {"label": one}
            schema = {"type": "object", "properties": inner, "required": [*inner], "additionalProperties": False}
            named = {"name": "answer", "strict": True, "schema": schema}
            return {"response_format": {"type": "json_schema", "json_schema": named}}
        if several or not self.constrained:
            return {}
        if self.constrained == "guided_choice":  # vLLM; its newer versions know the second name
            return {"guided_choice": list(answers), "structured_outputs": {"choice": list(answers)}}
        return {"grammar": "root ::= " + " | ".join(msgspec.json.encode(answer).decode() for answer in answers)}


def probe(endpoint: Endpoint, model: str) -> Abilities:
    """Find out what a model can be asked for, in a few short calls; raise ModelError if it can't be asked."""
    abilities = _of_chat(endpoint, model)
    prompt: dict[str, Any] = {"prompt": _PROMPT + _NEXT, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    scored = _asked(endpoint, model, "/completions", prompt)
    echo = isinstance(scored, Reply) and score_of(scored, _PROMPT, _NEXT) is not None
    abilities = _held(endpoint, model, msgspec.structs.replace(abilities, echo=echo))
    two = _asked(endpoint, model, "/chat/completions", abilities.body(_SAY, 1, 0.7) | {"n": 2})
    return msgspec.structs.replace(abilities, n=isinstance(two, Reply) and len(choices_of(two)) == 2)


def _of_chat(endpoint: Endpoint, model: str) -> Abilities:
    """Ask for log-probabilities, and leave out what the server objects to."""
    can = Abilities(top=20, echo=False, constrained="", n=False)
    while True:
        body = can.body(_SAY, 16) | ({"logprobs": True, "top_logprobs": can.top} if can.top else {})
        (reply,) = endpoint.send([Call("/chat/completions", {"model": model} | body)])
        if isinstance(reply, Reply):
            break
        less = _less(can, reply)
        if less == can:
            raise ModelError(f"teacher.model: {model} can't be asked ({reply.why})", "Try it with curl")
        can = less
    choice: dict[str, Any] = next(iter(choices_of(reply)), {})
    given = max((len(each.top) for each in positions_of(choice)), default=0)
    return msgspec.structs.replace(can, top=min(can.top, given), thinks=_thinks(choice))


def _less(can: Abilities, failed: Failed) -> Abilities:
    """Return the abilities without the one that the server's error names, or unchanged where it names none."""
    objections: dict[str, dict[str, Any]] = {
        "max_completion_tokens": {"limit": "max_completion_tokens"},
        "temperature": {"temperature": False},
        "system": {"system": False},
    }
    for word, change in objections.items():
        less = msgspec.structs.replace(can, **change)
        if less != can and re.search(rf"\b{word}\b", failed.why, re.IGNORECASE):
            return less
    fewer = {20: 5, 5: 0}.get(can.top, 0) if "top" in failed.why or "greater" in failed.why else 0
    return msgspec.structs.replace(can, top=fewer)


def _thinks(choice: dict[str, Any]) -> bool:
    message = object_in(choice, "message")
    aloud = "<think>" in str(message.get("content") or "")[:20]
    # With 16 tokens for an answer of one word, an empty one went to thoughts that stay hidden.
    hidden = choice.get("finish_reason") == "length" and not text_of(choice)
    return bool(aloud or hidden or message.get("reasoning_content") or message.get("reasoning"))


def _held(endpoint: Endpoint, model: str, can: Abilities) -> Abilities:
    """Find the first way that holds the model to a word which it would never say."""
    for way in get_args(Constrained)[1:]:
        held = msgspec.structs.replace(can, constrained=way)
        reply = _asked(endpoint, model, "/chat/completions", held.body(_SAY, 32) | held.held_to([_WORD]))
        if isinstance(reply, Reply) and any(_WORD in text_of(choice) for choice in choices_of(reply)):
            return held
    return can


def _asked(endpoint: Endpoint, model: str, path: str, body: dict[str, Any]) -> Reply | Failed | None:
    """Ask a model that has answered before, whose refusal means that the server lacks this alone."""
    try:
        return endpoint.send([Call(path, {"model": model} | body)])[0]
    except ModelError:
        return None


def choose_by(how: Ask, labels: Mapping[str, str] | Sequence[str], abilities: Abilities) -> tuple[str, str]:
    """Return how probabilities are read, and a remark for the user or an empty text.

    Raise SpecError for a way that the server can't be asked in.
    """
    by = how.by or ("letters" if abilities.top else "samples")
    if by in ("letters", "words") and not abilities.top:
        raise SpecError(f"teacher.ask.by: {by} needs log-probabilities, and the server gives none", "Set it to samples")
    if by == "scores" and not abilities.echo:
        what = "teacher.ask.by: scores needs a server that scores given texts (echo), and this one doesn't"
        raise SpecError(what, f"Set it to {'letters' if abilities.top else 'samples'}")
    if by == "words" and (pair := _alike(list(labels))):
        return "letters", f"read by letters, as {pair[0]!r} and {pair[1]!r} begin alike"
    if how.by is None and by == "samples":
        return by, f"the server gives no log-probabilities: probabilities are frequencies of {how.samples} answers"
    return by, ""


def check_labels(labels: Mapping[str, str] | Sequence[str]) -> None:
    """Raise SpecError for labels that no prompt can list."""
    seen: dict[str, str] = {}
    for label in labels:
        plain = "".join(label.split()).casefold()
        if not plain:
            raise SpecError("data.labels: a label is empty", "Give it a name")
        if plain in seen:
            raise SpecError(
                f"data.labels: {seen[plain]!r} and {label!r} differ in case or spaces alone", "Rename or merge them"
            )
        seen[plain] = label
    if not 2 <= len(labels) <= 676:
        raise SpecError(f"data.labels: {len(labels)} labels; a language model is asked for 2 to 676", "List them all")


def _alike(labels: Sequence[str]) -> tuple[str, str] | None:
    """Return two labels that share their first word, or of which one begins the other."""
    by_start = sorted((re.findall(r"[^\W_]+", label.casefold()) or [label], label) for label in labels)
    for (first, one), (second, other) in pairwise(by_start):
        if first[0] == second[0] or other.casefold().startswith(one.casefold()):
            return one, other
    return None
