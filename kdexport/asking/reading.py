"""Read what a language model answered: from the probabilities of its tokens, or from its words."""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np

from kdexport.asking.client import Failed, Reply
from kdexport.tasks.metrics import Array, log_softmax

# Less probability than this on all options together says nothing about any of them.
LEAST_MASS = 0.01
# An option is never less likely than this, so that logits stay finite.
_FLOOR = 1e-6
# Tokens and characters of an answer that are looked at.
_FURTHEST, _LONGEST = 64, 20_000
# Answers that were never given count for so many, shared by all options, in the frequencies of samples.
_PRIOR = 0.5
# What may stand before an answer: spaces, quotes, and marks of emphasis.
_OPENING = " \t\r\n\"'`“”‘’*([_"
# Spaces as tokenizers of bytes and of SentencePiece write them, where a server gives its tokens as they are.
_SPACES = str.maketrans({"▁": " ", "Ġ": " ", "Ċ": "\n"})
_THOUGHT = re.compile(r"\A(?:.*</think>|\s*<think>.*\Z)\s*", re.DOTALL)
_REFUSAL = re.compile(
    r"\b(sorry|unable|cannot|can ?not|as an ai|(?:ca|wo)n['’]t|not (?:able|comfortable))\b", re.IGNORECASE
)


class Reading(NamedTuple):
    """The labels' probabilities of one text, as an answer gives them."""

    logits: Array | None  # float32 [C]: log probabilities, or a logit for each of several labels; None: no answer
    mass: float  # probability of the options before they were made to sum to one
    why: str  # no answer because of: refusal, unparsable, too long, or what failed
    said: str  # the beginning of the answer


class Position(NamedTuple):
    """A token of the answer, and the likeliest ones in its place with their probabilities."""

    token: bytes
    top: list[tuple[bytes, float]]


def choices_of(reply: Reply) -> list[dict[str, Any]]:
    """Return the answers of a reply; a reply of another shape has none."""
    return [each for each in _list(reply.body, "choices") if isinstance(each, dict)]


def text_of(choice: dict[str, Any]) -> str:
    """Return an answer's text without the thoughts before it."""
    content = object_in(choice, "message").get("content", choice.get("text"))
    if isinstance(content, list):  # parts, as of models that also write pictures
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return _THOUGHT.sub("", content).strip()[:_LONGEST] if isinstance(content, str) else ""


def positions_of(choice: dict[str, Any]) -> list[Position]:
    """Return an answer's tokens, in either of the two shapes that servers give, without the thoughts before it."""
    logprobs = object_in(choice, "logprobs")
    found = [_chat_position(each) for each in _list(logprobs, "content") if isinstance(each, dict)]
    found = found or [_position(token, p, top) for token, p, top in _legacy(logprobs)]
    said = b"".join(each.token for each in found)
    if b"</think>" not in said:
        return [] if said.lstrip().startswith(b"<think>") else found
    thoughts = said.rindex(b"</think>") + len(b"</think>")
    ends = np.cumsum([len(each.token) for each in found])
    return found[int(np.searchsorted(ends, thoughts)) + 1 :]


def shares_of(positions: Sequence[Position], options: Sequence[str], fold: bool) -> Array:
    """Return the probability of each option as the answer, float64 [C]; `fold`: in upper or lower case.

    What begins several options counts for them in equal parts, unless it came: then its next position tells.
    """
    shares, names = np.zeros(len(options)), [_clean(option.encode(), fold) for option in options]

    def visit(i: int, before: bytes, weight: float) -> None:
        last, seen = i + 1 == len(positions), False
        for token, p in positions[i].top:
            came = not seen and token == positions[i].token
            seen |= came
            text, further = _clean(before + token, fold), came and not last
            whole = [c for c, name in enumerate(names) if _stands(name, text)]
            longer = [c for c, name in enumerate(names) if name.startswith(text) and name != text] if text else []
            # A letter that goes on as a word was no answer.
            goes_on = further and _clean(positions[i + 1].token, fold, strip=False)[:1].isalnum()
            if further and (not text or longer or (text in names and goes_on)):
                visit(i + 1, before + token, weight * p)
            elif whole:
                shares[max(whole, key=lambda c: len(names[c]))] += weight * p
            elif longer:
                shares[longer] += weight * p / len(longer)

    positions = positions[:_FURTHEST]
    if positions:
        visit(0, b"", 1.0)
    return shares


def log_probabilities(shares: Array, positions: Sequence[Position]) -> Array:
    """Return log probabilities of options that sum to one, float32 [C].

    What a server leaves out of its likeliest tokens is shared by the options that it does not name, as far as options
    have a part in those that it gives.
    """
    first = next((each for each in positions if _clean(each.token, False)), positions[0])
    given, mass, unnamed = [p for _, p in first.top], float(shares.sum()), shares <= 0
    rest = max(0.0, 1 - sum(given)) * min(1.0, mass) / max(1, int(unnamed.sum()))
    floor = max(min([rest, *given]), _FLOOR * mass)
    return log_softmax(np.log(np.maximum(shares, floor))).astype(np.float32)


def by_tokens(reply: Reply | Failed, options: Sequence[str], *, fold: bool) -> Reading:
    """Read the options' log probabilities from an answer's tokens."""
    if isinstance(reply, Failed):
        return failure(reply)
    choice = next(iter(choices_of(reply)), {})
    positions, said = positions_of(choice), text_of(choice)
    shares = shares_of(positions, options, fold)
    mass, why, begins = float(shares.sum()), why_not(choice), _clean(said.encode(), fold)
    names = [_clean(option.encode(), fold) for option in options]
    refused = why == "refusal" and not any(_stands(n, begins) or n.startswith(begins) for n in names)
    if mass < LEAST_MASS or refused:
        return Reading(None, min(mass, 1.0), why, said[:80])
    return Reading(log_probabilities(shares, positions), min(mass, 1.0), "", said[:80])


def score_of(reply: Reply, prompt: str, label: str) -> float | None:
    """Return the log probability of a label after its prompt; None where the reply does not hold the prompt."""
    logprobs = object_in(next(iter(choices_of(reply)), {}), "logprobs")
    tokens = [(token.translate(_SPACES), p) for token, p, _ in _legacy(logprobs)]
    # The prompt comes after a token of the beginning, with some tokenizers.
    begins = "".join(token for token, _ in tokens).find(prompt + label)
    if begins >= 0:
        starts = np.cumsum([-begins, *(len(token) for token, _ in tokens)]).tolist()
    else:  # characters of several tokens, which have no text of their own
        starts = [at for at in _list(logprobs, "text_offset") if isinstance(at, int)]
    inside = [p for at, (_, p) in zip(starts, tokens, strict=False) if len(prompt) <= at < len(prompt + label)]
    echoed = inside and min(starts) <= 0 and all(map(math.isfinite, inside))
    return sum(inside) if echoed else None


def by_scores(replies: Sequence[Reply | Failed], prompt: str, labels: Sequence[str]) -> Reading:
    """Read the log probabilities of labels that were scored one by one after the same prompt."""
    for reply in replies:
        if isinstance(reply, Failed):
            return failure(reply)
    scores = [score_of(r, prompt, label) for r, label in zip(replies, labels, strict=True) if isinstance(r, Reply)]
    known = np.array([score for score in scores if score is not None])
    if len(known) < len(labels):
        return Reading(None, 0.0, "unparsable", "")
    return Reading(log_softmax(known).astype(np.float32), min(1.0, float(np.exp(known).sum())), "", "")


def by_samples(
    answers: Sequence[dict[str, Any]], chosen: Sequence[set[int] | None], count: int, *, several: bool
) -> Reading:
    """Read log probabilities, or a logit a label, from how often each of `count` labels was chosen."""
    read = [each for each in chosen if each is not None]
    said = text_of(answers[0])[:80]
    if not read:
        return Reading(None, 0.0, why_not(answers[0]), said)
    counts, mass = np.array([sum(c in each for each in read) for c in range(count)]), len(read) / len(chosen)
    if several:
        logits = np.log(counts + _PRIOR / 2) - np.log(len(read) - counts + _PRIOR / 2)
    else:
        logits = np.log((counts + _PRIOR / count) / (len(read) + _PRIOR))
    return Reading(logits.astype(np.float32), mass, "", said)


def said_label(text: str, codes: Sequence[str], names: Sequence[str]) -> int | None:
    """Return the option that an answer names by its letters or its name, in whatever words; None where that is open."""
    text = next(iter(_values(text) or [text]))
    bare = text.strip(_OPENING + "])}.,:;!")
    for options, given in ((codes, bare.upper()), ([" ".join(n.casefold().split()) for n in names], bare.casefold())):
        if given in options:
            return options.index(given)
    any_code = "|".join(codes)
    marked = rf"\b({any_code})\)|\*\*({any_code})\*\*|(?i:answer|label|option)(?: is)?\W+({any_code})\b"
    found = {part for parts in re.findall(marked, text) for part in parts if part}
    begun = re.match(rf"\W*({any_code})\s*[).:\]]", text)
    if begun and found <= {begun[1]}:
        return codes.index(begun[1])
    named = _named(text, names) or {codes.index(code) for code in found}
    return named.pop() if len(named) == 1 else None


def said_labels(text: str, codes: Sequence[str], names: Sequence[str]) -> set[int] | None:
    """Return the options that an answer lists; an empty set where it says none, None where it lists nothing known."""
    parts = _values(text)
    if parts is None or parts == [text]:
        parts = [part for part in re.split(r"[,;\n]|\band\b|(?<=[A-Z])\s+(?=[A-Z]\b)", text) if part.strip()]
    found = {said_label(part, codes, names) for part in parts} - {None}
    if found or not parts or re.match(r"\W*(none|nothing|no label)", text, re.IGNORECASE):
        return {each for each in found if each is not None}
    return None


def why_not(choice: dict[str, Any]) -> str:
    """Return the reason why an answer names no label."""
    refused = object_in(choice, "message").get("refusal") or choice.get("finish_reason") == "content_filter"
    return "refusal" if refused or _REFUSAL.search(text_of(choice)[:200]) else "unparsable"


def failure(failed: Failed) -> Reading:
    """Return what a call that failed says of its text: nothing, and why."""
    filtered = re.search(r"content.?(filter|policy|management)", failed.why, re.IGNORECASE)
    return Reading(None, 0.0, "too long" if failed.too_long else "refusal" if filtered else failed.why, "")


def _named(text: str, names: Sequence[str]) -> set[int]:
    """Return the labels whose name stands in a text and is no part of a longer one that does."""
    there = [c for c, n in enumerate(names) if re.search(rf"(?<!\w){re.escape(n)}(?!\w)", text, re.IGNORECASE)]
    return {c for c in there if not any(names[c].casefold() in names[o].casefold() for o in there if o != c)}


def _values(text: str) -> list[str] | None:
    """Return the texts in an answer's JSON; None where it is none."""
    try:
        found = msgspec.json.decode(re.sub(r"\A```(?:json)?|```\Z", "", text.strip()))
    except (msgspec.DecodeError, RecursionError):
        return None
    if isinstance(found, dict):
        found = next(iter(found.values()), "")
    return [str(each) for each in found] if isinstance(found, list) else [str(found)]


def _stands(name: str, text: str) -> bool:
    """Return whether a text begins with an option that is not part of a longer word."""
    return text.startswith(name) and not text[len(name) : len(name) + 1].isalnum()


def _clean(token: bytes, fold: bool, *, strip: bool = True) -> str:
    """Return tokens as text; a character that is not yet whole is left out."""
    text = token.decode(errors="ignore").translate(_SPACES)
    text = text.lstrip(_OPENING) if strip else text
    return text.casefold() if fold else text


def object_in(found: dict[str, Any], key: str) -> dict[str, Any]:
    """Return an object inside another; an empty one where there is none."""
    return inner if isinstance(inner := found.get(key), dict) else {}


def _list(found: dict[str, Any], key: str) -> list[Any]:
    inner = found.get(key)
    return inner if isinstance(inner, list) else []


def _chat_position(found: dict[str, Any]) -> Position:
    top = [each for each in _list(found, "top_logprobs") if isinstance(each, dict)]
    return _position(_bytes(found), found.get("logprob"), [(_bytes(each), each.get("logprob")) for each in top])


def _position(token: bytes | str, p: object, top: Sequence[tuple[bytes | str, object]]) -> Position:
    """Return a position; the token that came stands among the likeliest, as it may not where a grammar chose it."""
    came = token.encode() if isinstance(token, str) else token
    pairs = [(each.encode() if isinstance(each, str) else each, q) for each, q in top]
    if came not in [each for each, _ in pairs]:
        pairs.append((came, p))
    known = [(each, _log_probability(q)) for each, q in pairs]
    return Position(came, [(each, math.exp(q)) for each, q in known if not math.isnan(q)])


def _log_probability(found: object) -> float:
    """Return a number of JSON as a log probability; NaN for anything else."""
    try:
        return min(float(found), 0.0) if isinstance(found, int | float) else math.nan
    except OverflowError:
        return math.nan


def _bytes(found: dict[str, Any]) -> bytes:
    """Return a token's bytes, which its text may lack: characters of several tokens come in parts."""
    given = found.get("bytes")
    if isinstance(given, list) and given and all(isinstance(b, int) and 0 <= b < 256 for b in given):
        return bytes(given)
    return str(found.get("token") or "").encode()


def _legacy(logprobs: dict[str, Any]) -> list[tuple[str, float, list[tuple[bytes | str, object]]]]:
    """Return the tokens of OpenAI's older shape, lists beside each other; the first of a prompt has no probability."""
    tokens, given = _list(logprobs, "tokens"), _list(logprobs, "token_logprobs")
    tops = _list(logprobs, "top_logprobs") or [None] * len(tokens)
    found: list[tuple[str, float, list[tuple[bytes | str, object]]]] = []
    for token, p, top in zip(tokens, given, tops, strict=False):
        likeliest = [*top.items()] if isinstance(top, dict) else []
        found.append((str(token), _log_probability(p), likeliest))
    return found
