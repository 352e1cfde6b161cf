"""Listed words alone: the best path of all that spell them, and what a user relies on."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest

from kdexport.errors import DataError
from kdexport.tasks.config import MOST_LETTERS, MOST_WORDS
from kdexport.tasks.metrics import log_softmax
from kdexport.tasks.wordlist import WordList

LABELS = ["<pad>", " ", *"abcdefghijklmnopqrstuvwxyz"]
ALL_PATHS = list(itertools.product(range(4), repeat=6))
WORDS = ["one", "two", "three", "four", "coffee", "tea", "to", "too", "on"]


def spelled(labels, path) -> str:
    """Read a path as CTC does."""
    return " ".join("".join(labels[one] for one, _ in itertools.groupby(path) if one).split())


def path_of(text: str, steps: int = 2) -> list[int]:
    """Return a path: each character for some steps, a blank before it."""
    return [label for c in text for label in [0, *[LABELS.index(c)] * steps]] + [0, 0]


def logits_of(path: list[int], noise: float = 0.0, seed: int = 0) -> np.ndarray:
    logits = np.full((len(path), len(LABELS)), -8.0)
    logits[np.arange(len(path)), path] = 4.0
    return logits + np.random.default_rng(seed).normal(0, noise, logits.shape) if noise else logits


@pytest.mark.parametrize("text", ["", "one", "one two three", "coffee tea too to on one", "four four"])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_certain_path_of_listed_words_is_what_greedy_reads(text, steps):
    logits = logits_of(path_of(text, steps))
    found = WordList(WORDS, LABELS).path(logits)
    assert spelled(LABELS, found) == text
    assert np.array_equal(found, logits.argmax(axis=1))


@pytest.mark.parametrize(
    ("heard", "written"),
    [
        ("caffee", "coffee"), ("cofee tee", "coffee tea"), ("onne fouv", "one four"), ("threee", "three"),
        ("fourr", "four"), ("coffe tea", "coffee tea"), (" one  two ", "one two"), ("oneone", "one one"),
    ],
)  # fmt: skip
def test_a_path_that_misspells_is_mended_to_the_listed_word(heard, written):
    logits = logits_of(path_of(heard))
    # What was meant has some probability beside what was written.
    for step, label in enumerate(path_of(heard)):
        if label:
            logits[step, [LABELS.index(c) for c in set(written) - {" "}]] += 7.0
        else:
            logits[step, 2 + step % 26] += 4.0
            logits[step, LABELS.index(" ")] += 5.0
    assert spelled(LABELS, WordList(WORDS, LABELS).path(logits)) == written


@pytest.mark.parametrize("spread", [0.5, 3.0, 10.0])
def test_words_that_are_not_listed_never_come_out(spread):
    words = WordList(WORDS, LABELS)
    for seed in range(20):
        logits = np.random.default_rng(seed).normal(0, spread, (seed % 40 + 1, len(LABELS)))
        assert {*spelled(LABELS, words.path(logits)).split()} <= {*WORDS}
        unlisted = logits_of(path_of("seven is five"), spread, seed)
        assert {*spelled(LABELS, words.path(unlisted)).split()} <= {*WORDS}


def test_the_most_probable_of_all_paths_is_found():
    """Of all paths of six steps that spell listed words, those with more spaces included."""
    labels, listed = ["<pad>", " ", "a", "b"], ["a", "ab", "bb"]
    spells = [path for path in ALL_PATHS if {*spelled(labels, path).split()} <= {*listed}]
    for seed in range(30):
        logits = np.random.default_rng(seed).normal(0, 2, (6, 4))
        best = max(spells, key=lambda path: log_softmax(logits)[range(6), path].sum())
        assert WordList(listed, labels).path(logits).tolist() == list(best)


def test_an_alphabet_without_a_space_has_one_word():
    words = WordList(["ab", "b"], ["<pad>", "a", "b"])
    for seed in range(20):
        path = words.path(np.random.default_rng(seed).normal(0, 3, (9, 3)))
        assert spelled(["<pad>", "a", "b"], path) in ("", "ab", "b")


def test_memory_is_bounded_for_long_lists_of_long_words():
    """The most words and letters that an artifact may have, and 200 steps."""
    random = np.random.default_rng(0)
    words = ["".join(LABELS[2 + i] for i in random.integers(0, 26, MOST_LETTERS)) for _ in range(MOST_WORDS)]
    listed, logits = WordList(words, LABELS), random.normal(size=(200, len(LABELS)))
    tracemalloc.start()
    listed.path(logits)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64e6


def test_silence_and_steps_behind_the_recording_change_nothing():
    words, logits = WordList(WORDS, LABELS), logits_of(path_of("one tea"), noise=0.5)
    silence = np.full((500, len(LABELS)), -30.0) + 30 * np.eye(1, len(LABELS))
    found = words.path(np.concatenate([silence, logits, silence]))
    assert np.array_equal(found[500:-500], words.path(logits))
    assert not found[:500].any()
    assert not found[-500:].any()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seven", "7up"], "the word '7up' has '7', which the model does not write"),
        ([], "the list of words holds no word"),
        (["", " - "], "the list of words holds no word"),
    ],
)
def test_words_that_can_not_be_written_are_refused(words, said):
    with pytest.raises(DataError, match=said):
        WordList(words, LABELS)
