"""Texts of listed words alone: prefix beam search over the paths of characters.

After Graves et al. 2006 and Hannun et al. 2014 (https://arxiv.org/abs/1408.2873, algorithm 1); a trie of the words
limits how a prefix may go on, and the answer is the most probable path that spells the text found.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from heapq import nlargest
from math import exp, inf, log1p

import numpy as np

from kdexport.errors import DataError
from kdexport.tasks.inputs.transcripts import normalised
from kdexport.tasks.metrics import Array, log_softmax

# Prefixes kept at each step, and the characters that each of them may take there, the most probable ones.
_WIDTH, _MOST_CHARACTERS = 48, 10
# The log probability below which a character is skipped, and that beside the best prefix's below which a prefix is; and
# the log probability of a blank above which nothing else is tried.
_LEAST, _BEHIND, _CERTAIN = -25.0, -15.0, -1e-3
# Arrays of logits whose paths are remembered.
_REMEMBERED = 8


@dataclass(slots=True, eq=False)
class _Node:
    """A place in the trie; behind a whole word, a space leads to the root."""

    next: dict[int, _Node] = field(default_factory=dict)
    ends: bool = False


@dataclass(slots=True, eq=False)
class _Prefix:
    """The beginning of a text: 0 and its labels, its place in the trie, and the prefixes that are one label longer."""

    labels: list[int]
    place: _Node
    longer: dict[int, _Prefix] = field(default_factory=dict)

    def then(self, label: int) -> _Prefix:
        if label not in self.longer:
            self.longer[label] = _Prefix([*self.labels, label], self.place.next[label])
        return self.longer[label]


class WordList:
    """The words that a text may have, for a model whose characters are `labels`, blank first."""

    def __init__(self, words: Iterable[str], labels: Sequence[str]) -> None:
        index = {character: i for i, character in enumerate(labels) if i}
        self._space, self._root = index.get(" ", 0), _Node(ends=True)
        self._found: dict[bytes, list[Array]] = {}
        for word in {word for text in words for word in normalised(text).split()}:
            if unknown := sorted({*word} - index.keys()):
                raise DataError(f"the word {word!r} has {unknown[0]!r}, which the model does not write", "Leave it out")
            node = self._root
            for character in word:
                node = node.next.setdefault(index[character], _Node())
            node.ends = True
            if self._space:
                node.next[self._space] = self._root
        if not self._root.next:
            raise DataError("the list of words holds no word", "Write one a line, or in a column named text")

    def paths(self, logits: Array) -> list[Array]:
        """Return the path of each row of logits [N, T, V], from memory where they came before: figures share them."""
        key = blake2b(np.ascontiguousarray(logits).data).digest()
        if key not in self._found:
            self._found = dict(list(self._found.items())[1 - _REMEMBERED :])
            self._found[key] = [self.path(one) for one in logits]
        return self._found[key]

    def path(self, logits: Array) -> Array:
        """Return the label of each step, int64 [T], of the most probable text: one path of those that spell it."""
        return _aligned(logs := log_softmax(logits.astype(np.float64)), self._search(logs))

    def _search(self, logs: Array) -> list[int]:
        """Return the labels of the most probable text of these words."""
        beam = {_Prefix([0], self._root): (0.0, -inf)}
        for step, best in zip(logs.tolist(), np.argsort(-logs)[:, :_MOST_CHARACTERS].tolist(), strict=True):
            if step[0] > _CERTAIN:
                beam = {prefix: (_sum(*both), -inf) for prefix, both in beam.items()}
                continue
            sums = defaultdict[_Prefix, list[float]](lambda: [-inf, -inf])
            quiet = _sum(step[0], step[self._space]) if self._space else step[0]
            heard = [label for label in best if step[label] > _LEAST]
            for prefix, (blank, other) in beam.items():
                both, place, last, stays = _sum(blank, other), prefix.place, prefix.labels[-1], sums[prefix]
                if place is self._root:  # behind a space, and before any word, more of it changes nothing
                    stays[0] = both + quiet
                else:
                    stays[0], stays[1] = both + step[0], _sum(stays[1], other + step[last])
                for label in heard:
                    if label in place.next:
                        longer = sums[prefix.then(label)]
                        longer[1] = _sum(longer[1], (blank if label == last else both) + step[label])
            scores = {prefix: _sum(*both) for prefix, both in sums.items()}
            least = max(scores.values()) + _BEHIND
            likely = [prefix for prefix, score in scores.items() if score >= least]
            if len(likely) > _WIDTH:
                likely = nlargest(_WIDTH, likely, scores.__getitem__)
            beam = {prefix: (sums[prefix][0], sums[prefix][1]) for prefix in likely}
        found = max([one for one in beam if one.place.ends] or beam, key=lambda one: _sum(*beam[one]))
        unfinished = 0 if found.place.ends else [*found.labels[:0:-1], self._space].index(self._space)
        return found.labels[1 : len(found.labels) - unfinished]


def _aligned(logs: Array, labels: list[int]) -> Array:
    """Return the most probable path that spells these labels (Viterbi's algorithm)."""
    path = np.zeros(len(logs), np.int64)
    logs = logs[: 1 + max(np.flatnonzero(logs[:, 0] < _CERTAIN), default=0)]
    states = np.zeros(2 * len(labels) + 1, np.int64)
    states[1::2] = labels
    skips = np.zeros(len(states), bool)
    skips[3::2] = states[3::2] != states[1:-2:2]  # a blank must part two that are the same
    score, moves = np.full(len(states), -inf), np.zeros((len(logs), len(states)), np.int64)
    score[:2] = logs[0, states[:2]]
    for t in range(1, len(logs)):
        one, two = np.append(-inf, score)[:-1], np.where(skips, np.append([-inf, -inf], score)[:-2], -inf)
        moves[t] = np.argmax([score, one, two], axis=0)
        score = np.max([score, one, two], axis=0) + logs[t, states]
    place = len(states) - 1 - int(score[-2:].argmax() == 0 < len(labels))
    for t in range(len(logs) - 1, -1, -1):
        path[t] = states[place]
        place -= moves[t, place]
    return path


def _sum(a: float, b: float) -> float:
    """Return log(exp(a) + exp(b))."""
    low, high = sorted((a, b))
    return high if low == -inf else high + log1p(exp(low - high))
