"""The most probable path of characters through words of a list, for speech with a closed vocabulary."""

from collections.abc import Sequence

import numpy as np

from kdexport.errors import ArtifactError
from kdexport.tasks.metrics import Array

# States outside words: blank before the first word, space, and blank behind a space. A word may begin behind each.
_BEFORE, _SPACE, _GAP = range(3)
_OUTSIDE = 3
_NEVER = np.float32(-np.inf)


class Lexicon:
    """The Viterbi path of CTC's logits through words that single spaces separate.

    States are those outside words, and for each word its characters with a blank behind each. `labels[0]` is blank.
    """

    def __init__(self, words: Sequence[str], labels: Sequence[str]) -> None:
        index = {label: i for i, label in enumerate(labels)}
        if strange := {*"".join(words)} - {*labels}:
            raise ArtifactError(f"words of the closed vocabulary have {min(strange)!r}, which is no label")
        self._has_space = " " in index
        symbols, firsts, ends = [0, index.get(" ", 0), 0], list[int](), list[int]()
        skips = [False] * _OUTSIDE
        for word in words:
            characters = [index[character] for character in word]
            firsts.append(len(symbols))
            for before, character in zip([None, *characters], characters, strict=False):
                symbols += [character, 0]
                # two equal characters need a blank between them
                skips += [before is not None and before != character, False]
            ends += [len(symbols) - 2, len(symbols) - 1]
        self._symbols, self._firsts, self._ends = np.array(symbols), np.array(firsts), np.array(ends)
        follows = np.ones(len(symbols), bool)
        follows[[_BEFORE, _SPACE, *firsts]] = False
        self._follows, self._skips = _allowed(follows), _allowed(np.array(skips))

    def path(self, logs: Array) -> Array:
        """Return the label of each step, int64 [T], of log probabilities [T, V]."""
        steps, states = len(logs), len(self._symbols)
        came, entered, left = np.zeros((steps, states), np.int8), np.zeros(steps, int), np.zeros(steps, int)
        # from the same state, from the one before, from the second before, from outside words or from a word's end
        options = np.full((4, states), _NEVER)
        score = np.full(states, _NEVER)
        score[[_BEFORE, *self._firsts]] = logs[0, self._symbols[[_BEFORE, *self._firsts]]]
        for step in range(1, steps):
            entered[step] = score[:_OUTSIDE].argmax()
            left[step] = self._ends[score[self._ends].argmax()]
            options[0] = score
            options[1, 1:] = score[:-1] + self._follows[1:]
            options[2, 2:] = score[:-2] + self._skips[2:]
            options[3, self._firsts] = score[entered[step]]
            if self._has_space:
                options[3, _SPACE] = score[left[step]]
            came[step] = options.argmax(axis=0)
            score = options.max(axis=0) + logs[step, self._symbols]
        lasts = np.array([_BEFORE, _SPACE, _GAP, *self._ends])
        state = int(lasts[score[lasts].argmax()])
        found = np.empty(steps, int)
        for step in range(steps - 1, -1, -1):
            found[step] = self._symbols[state]
            how = came[step, state]
            state = state - how if how < 3 else int(left[step] if state == _SPACE else entered[step])
        return found


def _allowed(which: Array) -> Array:
    return np.where(which, np.float32(0), _NEVER)
