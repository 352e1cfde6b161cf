"""Listed words alone: prefix beam search, against all texts by their CTC loss, and what a user relies on."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from kdexport.errors import DataError
from kdexport.tasks import beam
from kdexport.tasks.beam import WordList
from kdexport.tasks.metrics import log_softmax

LABELS = ["<pad>", " ", *"abcdefghijklmnopqrstuvwxyz"]
ALL_PATHS = list(itertools.product(range(4), repeat=6))
WORDS = ["one", "two", "three", "four", "coffee", "tea", "to", "too", "on"]


def spelled(labels, path) -> str:
    """Read a path as CTC does."""
    return "".join(labels[one] for one, _ in itertools.groupby(path) if one).strip()


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
        ("caffee", "coffee"), ("cofee tee", "coffee tea"), ("onne tvo", "one two"), ("threee", "three"),
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


def test_the_most_probable_of_all_texts_is_found():
    """By the sums of all paths of six steps, those with more spaces included."""
    labels, listed = ["<pad>", " ", "a", "b"], ["a", "ab", "bb"]
    spells = [(path, "".join(labels[one] for one, _ in itertools.groupby(path) if one)) for path in ALL_PATHS]
    paths = [(list(path), re.sub(" +", " ", text).lstrip()) for path, text in spells]
    paths = [(path, text) for path, text in paths if {*text.split()} <= {*listed}]
    for seed in range(30):
        logs = log_softmax(np.random.default_rng(seed).normal(0, 2, (6, 4)))
        sums: dict[str, float] = {}
        for path, text in paths:
            sums[text] = sums.get(text, 0.0) + float(np.exp(logs[range(6), path].sum()))
        found = WordList(listed, labels)._search(logs)
        assert "".join(labels[one] for one in found) == max(sums, key=sums.get)


def test_the_path_is_the_best_one_of_its_text():
    logs = log_softmax(np.random.default_rng(0).normal(0, 1, (6, 4)))
    for labels in ([], [2], [2, 2], [2, 3, 2], [3, 3, 3]):
        spell = [path for path in ALL_PATHS if [one for one, _ in itertools.groupby(path) if one] == labels]
        best = max(spell, key=lambda path: logs[range(6), path].sum())
        assert beam._aligned(logs, labels).tolist() == list(best)


def test_an_alphabet_without_a_space_has_one_word():
    words = WordList(["ab", "b"], ["<pad>", "a", "b"])
    for seed in range(20):
        path = words.path(np.random.default_rng(seed).normal(0, 3, (9, 3)))
        assert spelled(["<pad>", "a", "b"], path) in ("", "ab", "b")


def test_the_work_is_bounded_by_the_steps_whatever_the_list(monkeypatch):
    draw = np.random.default_rng(0)
    many = {"".join(draw.choice(list(LABELS[2:]), draw.integers(2, 9))) for _ in range(20_000)}
    noise, counted, plain = draw.normal(0, 1, (40, len(LABELS))), [0], beam._sum

    def sum_of(a, b):
        counted[0] += 1
        return plain(a, b)

    monkeypatch.setattr(beam, "_sum", sum_of)
    words = WordList(many, LABELS)
    words.path(noise)
    assert counted[0] < 40 * beam._WIDTH * (3 + 2 * beam._MOST_CHARACTERS)
    spoken, counted[0] = counted[0], 0
    words.path(np.concatenate([np.full((5_000, len(LABELS)), -30.0) + 30 * np.eye(1, len(LABELS)), noise]))
    assert counted[0] < 1.5 * spoken, "silence costs little"


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


def test_rows_that_are_judged_again_are_not_searched_again(monkeypatch):
    words, rows = WordList(WORDS, LABELS), np.stack([logits_of(path_of(text)) for text in ("one two", "tea tea")])
    first = words.paths(rows)
    assert [spelled(LABELS, path) for path in first] == ["one two", "tea tea"]
    monkeypatch.setattr(WordList, "path", None)
    assert words.paths(rows.copy()) is first
    with pytest.raises(TypeError):
        words.paths(rows + 1.0)
