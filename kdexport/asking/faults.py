"""Classify a server's response: an answer, a fault of this call alone, one that may pass, or one that ends the run."""

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

_LONGEST_PAUSE_S = 120.0
_SECRET = 8  # characters; a shorter key is a word such as EMPTY, which an answer may hold
_NO_CREDIT = re.compile(r"insufficient_quota|insufficient (balance|credit)", re.I)
_TOO_LONG = re.compile(
    r"context.?(length|size|window)|maximum context|too many tokens|max_model_len|"
    r"(prompt|input|request|sequence)\w* (is |are )?too (long|large)|"
    r"(exceed|less than|reduce|<=).{0,60}(tokens?\b|context|length of the)|token\w*.{0,60}(exceed|<=)",
    re.I,
)
_NO_MODEL = re.compile(r"not.?found|n.t exist|not exist|unknown|invalid model|not a valid|no such", re.I)


class Failed(NamedTuple):
    """Why one call has no answer; the run goes on."""

    why: str
    status: int | None = None
    too_long: bool = False


class Again(NamedTuple):
    """A fault that may pass; where `busy`, the server needs fewer calls, and a pause of `after` seconds."""

    why: str
    status: int | None = None
    busy: bool = False
    after: float | None = None


class Refused(NamedTuple):
    """A fault that ends the run. `status` is 0 if nothing listens there, and None after too many failed calls."""

    status: int | None
    message: str


def judged(
    path: str, model: str, status: int, headers: Mapping[str, str], content: bytes, key: str
) -> dict[str, Any] | Failed | Again | Refused:
    """Return the JSON object of an answer to a call, or what went wrong."""
    body = json_object(content)
    if status == 200:
        if body is None:
            return Again("an answer that is no JSON object", status)
        if isinstance(body.get("choices"), list) and body["choices"]:
            return body
    whole = content[:4000].decode(errors="replace")
    message, too_long = _message(body, whole, key), bool(_TOO_LONG.search(whole))
    why = f"{status}: {message}"
    if status == 200:
        failed = "error" in (body or {}) and too_long
        return Failed(why, status, too_long=True) if failed else Again(f"an answer without choices: {message}", status)
    if status in (401, 402, 403) or (status == 429 and _NO_CREDIT.search(whole)):
        return Refused(status, message)
    if 300 <= status < 400:
        return Refused(status, safe(headers.get("location", ""), key))
    if status in (429, 503):
        return Again(why, status, True, retry_after(headers.get("retry-after")))
    if status in (408, 409, 425) or (status >= 500 and status != 501):
        return Again(why, status)
    if status == 413 or (status in (400, 422) and too_long):
        return Failed(why, status, too_long=True)
    # At other paths a model that only chats may be unknown, or nothing be there: the questions do without them.
    if status in (404, 405) and path == "/chat/completions":
        return Refused(status, message)
    if status in (400, 422) and model in message and _NO_MODEL.search(message):
        return Refused(404, message)
    return Failed(why, status)


def retry_after(value: str | None) -> float | None:
    """Return the seconds that a header asks for, given as seconds or as a date; None where it can't be read."""
    try:
        seconds = float(value or "")
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value or "") - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):  # the second for a date without a zone
            return None
    return min(_LONGEST_PAUSE_S, max(0.0, seconds)) if seconds == seconds else None


def json_object(content: bytes) -> dict[str, Any] | None:
    """Return a JSON object, or None where there is none."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def safe(text: str, key: str) -> str:
    """Return the first line of a server's text, short, without the key and without what a terminal obeys."""
    lines = [*filter(None, map(str.strip, text[:4000].splitlines())), ""]
    line = without_key(lines[0].encode(errors="replace"), key).decode()
    return "".join(c if c.isprintable() else " " for c in line[:200])


def without_key(content: bytes, key: str) -> bytes:
    """Return what a server sent without the key, which some echo."""
    return content.replace(key.encode(), b"***") if len(key) >= _SECRET else content


def _message(body: dict[str, Any] | None, whole: str, key: str) -> str:
    """Return what a server says went wrong: OpenAI's error.message, or what others have in its place."""
    found: Any = (body or {}).get("error") or body or {}
    for name in ("message", "detail", "msg", "type"):
        if isinstance(found, dict) and isinstance(found.get(name), str):
            return safe(found[name], key)
    return safe(found if isinstance(found, str) else whole, key)
