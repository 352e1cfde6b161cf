"""Logits by content, on disk: what is damaged, of another shape, or can't be written."""

import errno
from pathlib import Path

import numpy as np
import pytest

from kdexport.distill import store as store_module
from kdexport.distill.store import Store, cache_folder, content_keys, targets_folder


def keys(*contents):
    return content_keys(contents)


def row_of(columns):
    return np.dtype((np.float32, (columns,)))


def test_a_damaged_shard_is_left_out_and_computed_again(tmp_path):
    store = Store(tmp_path)
    store.add(keys("a", "b"), np.eye(2, dtype=np.float32))
    store.add(keys("c"), np.ones((1, 2), dtype=np.float32))
    shard = next(p for p in tmp_path.glob("*.npy") if b"" in p.read_bytes())
    shard.write_bytes(shard.read_bytes()[:40])
    again = Store(tmp_path)
    assert 0 < again.has(keys("a", "b", "c")).sum() < 3
    assert shard.exists()  # the record of a stage lists it


def test_a_cache_renames_damaged_shards_and_keeps_those_that_the_machine_could_not_open(tmp_path, monkeypatch, capfd):
    store = Store(tmp_path, optional=True)
    store.add(keys("a"), np.ones((1, 2), dtype=np.float32))
    (good,) = tmp_path.glob("*.npy")
    store.add(keys("b"), np.ones((1, 2), dtype=np.float32))
    bad = next(path for path in tmp_path.glob("*.npy") if path != good)
    bad.write_bytes(b"")
    for error in (OSError(errno.EMFILE, "Too many open files"), MemoryError()):
        with monkeypatch.context() as patched:
            patched.setattr(np, "load", raises(error))
            assert not Store(tmp_path, optional=True).has(keys("a", "b")).any()
            with pytest.raises(type(error)):
                Store(tmp_path)
        assert good.exists()
        assert bad.exists()
    assert "MemoryError" in capfd.readouterr().err
    assert Store(tmp_path, optional=True).has(keys("a", "b")).tolist() == [True, False]
    assert [path.name for path in tmp_path.iterdir() if path != good] == [f"{bad.name}.damaged"]


def raises(error):
    def fail(*_, **__):
        raise error

    return fail


def test_logits_that_were_changed_and_logits_of_another_shape_are_left_out(tmp_path):
    Store(tmp_path).add(keys("a", "b"), np.eye(2, dtype=np.float32))
    assert Store(tmp_path, row_of(2)).has(keys("a", "b")).all()
    assert not Store(tmp_path, row_of(3)).has(keys("a", "b")).any()
    (shard,) = tmp_path.glob("*.npy")
    records = np.load(shard)
    records["logits"][0, 0] = np.nan
    np.save(shard, records)
    assert not Store(tmp_path, row_of(2)).has(keys("a", "b")).any()


def test_shards_of_other_processes_are_found_beside_those_that_found_no_room(tmp_path, monkeypatch):
    store = Store(tmp_path, optional=True)
    with monkeypatch.context() as patched:
        patched.setattr(np, "save", raises(OSError(errno.ENOSPC, "No space left on device")))
        store.add(keys("a"), np.zeros((1, 2), np.float32))
    Store(tmp_path).add(keys("b"), np.ones((1, 2), np.float32))
    store.refresh()
    assert store.look_up(keys("b", "a")).tolist() == [[1, 1], [0, 0]]


def test_contents_are_told_apart_though_half_of_their_keys_is_equal(tmp_path):
    store, alike = Store(tmp_path), np.array([[7, 1], [7, 2], [3, 9], [7, 3]], np.uint64)
    store.add(alike[:3], np.arange(3, dtype=np.float32)[:, None])
    assert store.has(alike).tolist() == [True, True, True, False]
    store.add(alike[3:], np.full((1, 1), 3, np.float32))
    assert store.look_up(alike[::-1])[:, 0].tolist() == [3, 2, 1, 0]
    with pytest.raises(KeyError):
        store.look_up(np.array([[7, 4]], np.uint64))


def test_a_cache_that_can_t_be_written_is_gone_on_without(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "cache", row_of(2), optional=True)
    store.add(keys("a"), np.ones((1, 2), dtype=np.float32))
    assert store.look_up(keys("a")).tolist() == [[1, 1]]
    assert "can't be written" in capfd.readouterr().err
    with pytest.raises(OSError, match="Not a directory"):
        Store(tmp_path / "file" / "logits")


def test_the_cache_lies_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.delenv("KDEXPORT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path.home() / ".cache" / "kdexport"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "kdexport"
    monkeypatch.setenv("KDEXPORT_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    assert targets_folder("abc").parent.parent == tmp_path / "own"
    assert targets_folder("abc") != targets_folder("abd")


def test_a_shard_has_one_name_however_much_of_it_is_hashed_at_once(tmp_path, monkeypatch):
    Store(tmp_path).add(keys(*"abcdefg"), np.arange(14, dtype=np.float32).reshape(7, 2))
    for size in (1, 24, 50, 1000):
        monkeypatch.setattr(store_module, "_HASHED_AT_ONCE", size)
        assert Store(tmp_path).has(keys(*"abcdefg")).all()


def test_what_was_written_a_part_at_a_time_is_looked_up_in_one_array_of_its_type(tmp_path):
    store = Store(tmp_path)
    assert store.look_up(keys()).shape == (0,)
    for i, name in enumerate("abc"):
        store.add(keys(name), np.full((1, 2, 3), i, np.float16))
    found = store.look_up(keys("c", "a", "c"))
    assert found.dtype == np.float16
    assert found[:, 1, 2].tolist() == [2, 0, 2]
    assert len([*tmp_path.iterdir()]) == 3  # no neighbour is left
