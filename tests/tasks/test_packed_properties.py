"""Packed outputs of language models: their lines, and their records on disk."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kdexport.tasks.metrics import log_softmax
from kdexport.tasks.packed import compact, drawn, drawn_of, most_probable, packed_lines, whole


@st.composite
def log_probabilities(draw, most=12):
    tokens, vocabulary = draw(st.integers(1, 4)), draw(st.integers(2, most))
    logits = draw(arrays(np.float32, (tokens, vocabulary), elements=st.floats(-20, 20, width=32)))
    return log_softmax(logits), draw(st.integers(1, vocabulary))


@given(log_probabilities(), st.data())
def test_lines_hold_the_actual_token_the_best_ones_in_order_and_samples_of_the_rest(found, data):
    logs, k = found
    n, vocabulary = logs.shape
    actual = data.draw(arrays(np.int64, n, elements=st.integers(0, vocabulary - 1)))
    lines = packed_lines(logs, actual, k, [3, 1])
    assert lines.shape == (n, 1 + 2 * k)
    assert (lines[:, 0] == logs[np.arange(n), actual]).all()
    ids, values = lines[:, 1::2].astype(int), lines[:, 2::2]
    assert (values == np.take_along_axis(logs, ids, axis=1)).all()
    top = k - drawn_of(k, vocabulary)
    for row, of_row in zip(logs, ids, strict=True):
        assert (row[of_row[:top]] == np.sort(row)[::-1][:top]).all()
        assert len({*of_row[:top]}) == top
        rest = np.exp(row.astype(float))
        rest[of_row[:top]] = 0
        assert not {*of_row[top:]} & {*of_row[:top]} or rest.sum() < 1e-12
    assert (ids[:, top:] == drawn(logs, ids[:, :top], k - top, np.array([3, 1]))).all()
    assert (packed_lines(logs, actual, k, [3, 1]) == lines).all()


def test_a_quarter_of_the_tokens_is_sampled_unless_they_are_all():
    assert [drawn_of(k, 8) for k in (3, 4, 7, 8, 9)] == [0, 1, 1, 0, 0]


def test_of_many_tokens_the_most_probable_are_those_of_a_sort_too():
    logs = np.random.default_rng(0).normal(size=(3, 3000))
    for k in (1, 48, 2999, 3000):
        assert (most_probable(logs, k) == np.argsort(-logs, axis=1)[:, :k]).all()


def test_samples_of_a_rest_without_mass_are_tokens_all_the_same():
    logs = np.array([[0.0, -1000.0, -1000.0, -1000.0, -1000.0, -1000.0]])
    assert drawn(logs, np.array([[0]]), 3, np.array([1])).max() < 6


@given(log_probabilities())
def test_the_most_probable_tokens_are_those_of_a_sort(found):
    logs, k = found
    best = most_probable(logs, k)
    assert (np.take_along_axis(logs, best, axis=1) == -np.sort(-logs, axis=1)[:, :k]).all()


@given(st.data(), st.sampled_from([5, 2**16, 2**16 + 1, 2**24]))
def test_records_come_back_whole(data, vocabulary):
    """Ids and the actual token's log probability exactly, the others with 11 bits."""
    rows, length, k = (data.draw(st.integers(0 if i == 0 else 1, 3)) for i in range(3))
    logs = st.floats(-60, 0, width=32)
    packed = data.draw(arrays(np.float32, (rows, length, 1 + 2 * k), elements=logs))
    ids = data.draw(arrays(np.int64, (rows, length, k), elements=st.integers(0, vocabulary - 1)))
    packed[..., 1::2] = ids
    records = compact(packed, vocabulary)
    assert records.dtype["ids"].base.itemsize == (2 if vocabulary <= 2**16 else 4)  # bytes of an id
    found = whole(records)
    assert found.shape == packed.shape
    assert found.dtype == np.float32
    assert (found[..., 0] == packed[..., 0]).all()
    assert (found[..., 1::2].astype(np.int64) == ids).all()
    assert np.allclose(found[..., 2::2], packed[..., 2::2], rtol=2**-11, atol=2**-24)
    assert (whole(compact(found, vocabulary)) == found).all()
    some = data.draw(st.lists(st.integers(0, max(rows - 1, 0)), max_size=4)) if rows else []
    assert (whole(compact(packed, vocabulary)[some]) == found[some]).all()
