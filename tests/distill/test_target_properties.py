"""Soft targets on disk: whatever was written, in whatever parts and order, is what is read, or nothing is."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kdexport.distill.store import Store, content_key, content_keys
from kdexport.distill.targets import SoftTargets, writing
from kdexport.tasks.packed import compact, whole

HALVES = st.integers(0, 2) | st.sampled_from([2**63, 2**64 - 1])  # few, so that keys share a first half
KEYS = st.tuples(HALVES, HALVES)


@pytest.fixture
def fresh(tmp_path):
    """Give an empty folder for each example."""

    def make() -> Path:
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        return tmp_path / "store"

    return make


def array_of(keys):
    return np.array(keys, np.uint64).reshape(-1, 2)


def logits_of(keys, width):
    """Logits that say which key they belong to."""
    first, second = np.array(keys, np.float64).reshape(-1, 2).T
    return (first[:, None] * 3 + second[:, None] + np.arange(width) / 7).astype(np.float32)


@st.composite
def shards(draw):
    """Lists of keys, no key twice, and how many logits each has."""
    every = draw(st.lists(KEYS, unique=True, max_size=16))
    parts, width = [], draw(st.integers(1, 3))
    while every:
        n = draw(st.integers(1, len(every)))
        parts.append(every[:n])
        every = every[n:]
    return parts, width


@given(shards(), st.data())
def test_logits_are_found_by_any_keys_in_any_order_now_and_after_opening_again(fresh, parts_and_width, data):
    parts, width = parts_and_width
    folder = fresh()
    store = Store(folder)
    early = Store(folder)
    for keys in parts:
        store.add(array_of(keys), logits_of(keys, width))
    early.refresh()
    every = [key for keys in parts for key in keys]
    asked = data.draw(st.lists(KEYS, max_size=20))
    for each in (store, early, Store(folder), Store(folder, np.dtype((np.float32, (width,))))):
        assert each.has(array_of(asked)).tolist() == [key in every for key in asked]
        there = [key for key in asked if key in every]
        assert np.array_equal(each.look_up(array_of(there)).reshape(-1, width), logits_of(there, width))
        if len(there) < len(asked):
            with pytest.raises(KeyError):
                each.look_up(array_of(asked))


@effort(max_examples=80)
@given(shards().filter(lambda found: found[0]), st.data())
def test_damage_anywhere_in_a_shard_gives_no_wrong_logits(fresh, parts_and_width, data):
    parts, width = parts_and_width
    folder = fresh()
    store = Store(folder)
    for keys in parts:
        store.add(array_of(keys), logits_of(keys, width))
    file = data.draw(st.sampled_from(sorted(folder.glob("*.npy"))))
    content = bytearray(file.read_bytes())
    how = data.draw(st.sampled_from(["flip", "cut", "grow", "empty", "swap"]))
    at = data.draw(st.integers(0, len(content) - 1))
    if how == "flip":
        content[at] ^= data.draw(st.integers(1, 255))
    elif how == "cut":
        content = content[:at]
    elif how == "grow":
        content += data.draw(st.binary(min_size=1, max_size=40))
    elif how == "empty":
        content = bytearray()
    else:
        content = bytearray(data.draw(st.binary(max_size=200)))
    file.write_bytes(content)
    optional = data.draw(st.booleans())
    again = Store(folder, optional=optional)
    every = [key for keys in parts for key in keys]
    there = [key for key, found in zip(every, again.has(array_of(every)), strict=True) if found]
    assert np.array_equal(again.look_up(array_of(there)).reshape(-1, width), logits_of(there, width))
    others = [keys for keys in parts if not {*keys} <= {*there}]
    assert len(others) <= 1
    assert how == "grow" or len(others) == 1 or not others
    for keys in others:  # computed again
        again.add(array_of(keys), logits_of(keys, width))
    assert Store(folder, optional=optional).has(array_of(every)).all()


@given(st.lists(st.text(), unique=True, max_size=20))
def test_contents_have_keys_of_their_own(contents):
    keys = content_keys(contents)
    assert keys.shape == (len(contents), 2)
    assert len({*map(bytes, keys)}) == len(contents)
    assert [bytes(key) for key in keys] == [content_key(content) for content in contents]


class Plain:
    """A task whose soft targets are as its outputs are."""

    answer_shape = (2,)
    unpack = staticmethod(np.asarray)


class Packed:
    """A task whose soft targets take half the bytes."""

    answer_shape = (2, 5)
    unpack = staticmethod(whole)


@pytest.mark.parametrize("task", [Plain(), Packed()], ids=["plain", "packed"])
@given(data=st.data())
def test_soft_targets_of_any_files_are_those_of_one_array(tmp_path, task, data):
    counts = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    every = data.draw(arrays(np.float32, (sum(counts), *task.answer_shape), elements=st.integers(0, 30)))
    stored = compact(every, 40) if isinstance(task, Packed) else every
    files, start = [], 0
    for i, count in enumerate(counts):
        files.append(tmp_path / f"{i}.npy")
        with writing(files[-1], count) as file:
            block = data.draw(st.integers(1, count))
            for at in range(start, start + count, block):
                file.add(stored[at : min(at + block, start + count)])
        start += count
        assert np.array_equal(np.load(files[-1]), stored[start - count : start])
    targets = SoftTargets(task, *files)
    places = st.integers(-start, start - 1)
    assert len(targets) == start
    for chosen in (data.draw(st.lists(places, max_size=6)), data.draw(st.slices(start))):
        if isinstance(chosen, list):
            chosen = np.array(chosen, np.int64)
        assert np.array_equal(targets[chosen], every[chosen])
    some = np.array(data.draw(st.lists(places, min_size=1, max_size=6)), np.int64)
    taken = pickle.loads(pickle.dumps(targets.take(some)))
    assert np.array_equal(taken[:], every[some])
    again = data.draw(st.lists(st.integers(0, len(some) - 1), max_size=4))
    assert np.array_equal(taken.take(again)[:], every[some][np.array(again, np.int64)])
    assert np.array_equal(list(taken), every[some])
