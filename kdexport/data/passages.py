"""Split texts of any length into passages that fit a language model, without loss or overlap.

A passage ends at a word boundary, preferably at the end of a line, so that its tokens are those of the whole text.
"""

import re
from collections.abc import Callable, Iterator

from tokenizers import Tokenizer

# Characters tokenised together, extended to a whole line.
_BLOCK = 100_000
# A passage ends at the last line end after this fraction of it, if there is one.
_FULL = 0.75

Cut = Callable[[str], list[str]]


def cutter(tokenizer: Tokenizer, most: int) -> Cut:
    """Return a function from a text to its passages of at most `most` tokens, special ones included."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    room = most - tokenizer.num_special_tokens_to_add(False)

    def cut(text: str) -> list[str]:
        found = []
        for block in _blocks(text):
            ends = [end for _, end in tokenizer.encode(block, add_special_tokens=False).offsets]
            start = at = 0  # in characters, and in tokens
            while at < len(ends):
                beyond = ends[at + room] if at + room < len(ends) else None
                # A character may be several tokens: if they don't all fit, it moves to the next passage.
                some = [end for end in ends[at : at + room] if start < end != beyond] or ends[at : at + room]
                stop = len(block) if beyond is None else _end_of_passage(block, start, some)
                found.append(block[start:stop])
                start = stop
                while at < len(ends) and ends[at] <= stop:
                    at += 1
        return [passage for passage in found if passage.strip()]

    return cut


def _end_of_passage(text: str, start: int, ends: list[int]) -> int:
    """Return the end of a passage from `start`; `ends` are the ends of the tokens that fit."""
    last = ends[-1]
    line = text.rfind("\n", start + int(_FULL * (last - start)), last) + 1
    if line in ends:
        return line
    words = [end for end in ends if end > start and re.match(r"\s", text[end : end + 1])]
    return words[-1] if words else last


def _blocks(text: str) -> Iterator[str]:
    """Yield parts of a text that end with a line, so that no token crosses a boundary."""
    start = 0
    while start < len(text):
        stop = text.find("\n", start + _BLOCK) + 1 or len(text)
        yield text[start:stop]
        start = stop
