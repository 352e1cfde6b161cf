"""Texts of any length → passages that a language model reads whole; nothing is lost, and nothing is read twice.

A passage ends where a word does, best at the end of a line, so that its tokens are those that the whole text has there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from tokenizers import Tokenizer

# What is tokenised at once: whole lines, of about so many characters.
_BLOCK = 100_000
# A passage ends at the end of a line if this share of it, or more, is full by then.
_FULL = 0.75

Cut = Callable[[str], list[str]]


def cutter(tokenizer: Tokenizer, most: int) -> Cut:
    """The function from a text to its passages of at most so many tokens, special ones included."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    room = most - tokenizer.num_special_tokens_to_add(False)

    def tokens_of(text: str) -> list[tuple[int, int]]:
        return list(tokenizer.encode(text, add_special_tokens=False).offsets)

    def cut(text: str) -> list[str]:
        found = []
        for block in _blocks(text):
            ends = [end for _, end in tokens_of(block)]
            start = at = 0  # in characters, and in tokens
            while at < len(ends):
                beyond = ends[at + room] if at + room < len(ends) else None
                # A character may be several tokens: where not all of them have room, it is the next passage's.
                some = [end for end in ends[at : at + room] if start < end != beyond] or ends[at : at + room]
                stop = len(block) if beyond is None else _end_of_passage(block, start, some)
                found.append(block[start:stop])
                start = stop
                while at < len(ends) and ends[at] <= stop:
                    at += 1
        return [passage for passage in found if passage.strip()]

    return cut


def _end_of_passage(text: str, start: int, ends: list[int]) -> int:
    """Where a passage from `start` on ends, of the ends of the tokens that it has room for."""
    last = ends[-1]
    line = text.rfind("\n", start + int(_FULL * (last - start)), last) + 1
    if line in ends:
        return line
    words = [end for end in ends if end > start and re.match(r"\s", text[end : end + 1])]
    return words[-1] if words else last


def _blocks(text: str) -> Iterator[str]:
    """Parts of a text that end with a line, so that no token goes across."""
    start = 0
    while start < len(text):
        stop = text.find("\n", start + _BLOCK) + 1 or len(text)
        yield text[start:stop]
        start = stop


def read_text(path: Path) -> str:
    """A text file as it is, whatever its ends of lines."""
    return path.read_bytes().decode("utf-8-sig")
