"""Vectors: neighbours against brute force, smaller formats, parts of vectors."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdexport.errors import DataError
from kdexport.tasks.vectors import cosines, decoded, encoded, nearest, overlap, shortened, unit


def drawn(rows, width, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def test_cosines_are_those_of_each_row_with_the_same_row():
    a, b = np.array([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]]), np.array([[3.0, 4.0], [-2.0, 0.0], [1.0, 1.0]])
    assert cosines(a, b) == pytest.approx([1.0, -1.0, 0.0])


@given(st.integers(2, 40), st.integers(1, 12), st.integers(0, 99))
def test_the_nearest_are_those_of_the_whole_matrix_of_cosines(rows, k, seed):
    vectors = drawn(rows, 5, seed)
    similar = unit(vectors) @ unit(vectors).T
    np.fill_diagonal(similar, -np.inf)
    k = min(k, rows - 1)
    expected = np.sort(np.argsort(-similar, axis=1)[:, :k], axis=1)
    assert np.array_equal(np.sort(nearest(vectors, k), axis=1), expected)


def test_the_nearest_of_many_are_found_in_parts_as_at_once(monkeypatch):
    vectors = drawn(70, 6)
    whole = np.sort(nearest(vectors), axis=1)
    monkeypatch.setattr("kdexport.tasks.vectors._AT_ONCE", 16)
    assert np.array_equal(np.sort(nearest(vectors), axis=1), whole)


def test_the_nearest_of_very_many_are_those_among_some(monkeypatch):
    vectors = drawn(200, 6)
    monkeypatch.setattr("kdexport.tasks.vectors._MOST", 40)
    found = nearest(vectors, 5)
    assert found.shape == (200, 5)
    among = np.unique(found)
    assert 20 < len(among) <= 40
    similar = unit(vectors) @ unit(vectors[among]).T
    similar[np.arange(200)[:, None] == among] = -np.inf  # no vector is its own neighbour
    expected = among[np.argsort(-similar, axis=1)[:, :5]]
    assert np.array_equal(np.sort(found, axis=1), np.sort(expected, axis=1))
    assert overlap(vectors, 2 * vectors).min() == 1


def test_overlap_counts_shared_neighbours_whatever_the_width_and_the_length():
    vectors = drawn(60, 8)
    turned = vectors @ np.linalg.qr(drawn(8, 8, 1))[0]
    wider = np.concatenate([3 * turned, np.zeros((60, 4), np.float32)], axis=1)
    assert overlap(vectors, wider).min() == 1
    assert 0.0 < overlap(vectors, drawn(60, 8, 2)).mean() < 0.4  # ten of 59 by chance: 0.17
    by_hand = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    other = np.array([[1.0, 0.0], [0.0, 1.0], [0.1, 0.9]])
    assert overlap(by_hand, other, 1).tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("rows", [0, 1])
def test_a_single_vector_has_no_neighbour_to_lose(rows):
    assert overlap(drawn(rows, 4), drawn(rows, 4, 1)).tolist() == [1.0] * rows


def test_int8_vectors_rank_nearly_as_floats_and_have_one_scale_for_all():
    vectors = unit(drawn(200, 384))
    small = encoded(vectors, "int8")
    assert small.dtype == np.int8
    assert small.shape == vectors.shape
    back = decoded(small, "int8", 384)
    assert overlap(vectors, back).mean() > 0.9
    step, inside = 4 / (127 * 384**0.5), np.abs(vectors) < 4 / 384**0.5
    assert inside.mean() > 0.999
    assert np.abs(back * step - vectors)[inside].max() <= 0.51 * step
    assert np.array_equal(encoded(7 * vectors, "int8"), small)
    assert encoded(np.eye(3, 400, dtype=np.float32), "int8").max() == 127  # clipped, never wrapped around


@given(st.integers(1, 70), st.integers(0, 99))
def test_a_bit_of_a_binary_vector_is_the_sign_of_a_component(width, seed):
    vectors = drawn(3, width, seed)
    bits = encoded(vectors, "binary")
    assert bits.shape == (3, -(-width // 8))
    assert bits.dtype == np.uint8
    assert np.array_equal(decoded(bits, "binary", width), np.where(vectors > 0, 1.0, -1.0))
    a, b = (np.unpackbits(bits[i], count=width) for i in (0, 1))
    hamming = int((a != b).sum())
    assert decoded(bits, "binary", width)[0] @ decoded(bits, "binary", width)[1] == width - 2 * hamming


def test_the_first_bit_is_the_highest():
    assert encoded(np.array([[1.0, -1, -1, -1, -1, -1, -1, -1, 1.0]]), "binary").tolist() == [[128, 128]]


def test_a_part_of_a_vector_has_length_1_and_no_more_dimensions_than_the_whole():
    vectors = drawn(5, 8)
    part = shortened(vectors, 3)
    assert part.shape == (5, 3)
    assert np.linalg.norm(part, axis=1) == pytest.approx(np.ones(5))
    assert cosines(part, vectors[:, :3]) == pytest.approx(np.ones(5))
    assert shortened(vectors, None) is vectors
    assert shortened(vectors, 8) is vectors
    for asked in (9, 0):
        with pytest.raises(DataError, match=f"have 8 dimensions, not {asked}"):
            shortened(vectors, asked)
