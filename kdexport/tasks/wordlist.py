"""Paths of characters that spell listed words alone: Viterbi's algorithm over a trie of the words.

The trie is arrays with an entry for each beginning of a word, so a step of time is a few operations of numpy. Entry 0
is the empty one: the start, and what follows a space.
"""

from collections.abc import Iterable, Sequence
from math import inf

import numpy as np

from kdexport.errors import DataError
from kdexport.tasks.inputs.transcripts import normalised
from kdexport.tasks.metrics import Array, log_softmax

# The log probability of a blank above which nothing else is tried.
_CERTAIN = -1e-3


class WordList:
    """The words that a text may have, for a model whose characters are `labels`, blank first."""

    def __init__(self, words: Iterable[str], labels: Sequence[str]) -> None:
        index = {character: i for i, character in enumerate(labels) if i}
        listed = sorted({word for text in words for word in normalised(text).split()})
        places = {"": 0}
        for word in listed:
            if unknown := sorted({*word} - index.keys()):
                raise DataError(f"the word {word!r} has {unknown[0]!r}, which the model does not write", "Leave it out")
            for end in range(1, len(word) + 1):
                places.setdefault(word[:end], len(places))
        if not listed:
            raise DataError("the list of words holds no word", "Write one a line, or in a column named text")
        _, *begun = places
        self._has_space = " " in index
        self._label = np.array([index.get(" ", 0), *(index[one[-1]] for one in begun)])
        self._parent = np.array([0, *(places[one[:-1]] for one in begun)])
        self._twice = (self._label == self._label[self._parent]) & (self._parent > 0)  # a blank must part the two
        self._ends = np.array([0, *(places[word] for word in listed)])

    def path(self, logits: Array) -> Array:
        """Return the label of each step, int64 [T], of the most probable path of logits [T, V] that spells words."""
        logs = log_softmax(logits.astype(np.float64))
        path = np.zeros(len(logs), np.int64)
        logs = logs[: 1 + max(np.flatnonzero(logs[:, 0] < _CERTAIN), default=0)]
        # The best path to each entry that is at a blank now, and at its last character.
        blank, spoken = np.full((2, len(self._label)), -inf)
        blank[0] = 0.0
        # A bit for each step and entry: a long list has a million of them, and a recording 1,500 steps.
        was_spoken, entered = np.zeros((2, len(logs), len(self._label) // 8 + 1), np.uint8)
        left = np.zeros(len(logs), np.int64)  # the entry before a space
        for t, step in enumerate(logs):
            _set_bits(was_spoken[t], spoken > blank)
            both = np.maximum(blank, spoken)
            if step[0] > _CERTAIN:
                blank, spoken = both + step[0], np.full(len(both), -inf)
                continue
            before = np.where(self._twice, blank[self._parent], both[self._parent])
            left[t] = self._ends[both[self._ends].argmax()]
            before[0] = both[left[t]] if self._has_space else -inf
            _set_bits(entered[t], before > spoken)
            spoken = np.maximum(before, spoken) + step[self._label]
            blank = both + step[0]
        place = self._ends[np.maximum(blank, spoken)[self._ends].argmax()]
        speaks = spoken[place] > blank[place]
        for t in range(len(logs) - 1, -1, -1):
            path[t] = self._label[place] if speaks else 0
            if not speaks:
                speaks = _bit(was_spoken[t], place)
            elif _bit(entered[t], place):
                came = self._parent[place] if place else left[t]
                speaks = _bit(was_spoken[t], came) and not self._twice[place]
                place = came
        return path


def _set_bits(packed: Array, values: Array) -> None:
    packed[: -(-len(values) // 8)] = np.packbits(values, bitorder="little")


def _bit(packed: Array, place: int) -> bool:
    return bool(packed[place // 8] >> place % 8 & 1)
