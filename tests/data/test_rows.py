"""Rows, tokens and soft targets on disk are those that were written, in whatever part and order they are asked for."""

import pickle
import tracemalloc

import numpy as np
import pytest
import torch

from kdexport.data.rows import Rows, copy_rows, write_rows
from kdexport.distill.losses import objective, total
from kdexport.distill.targets import SoftTargets, writing
from kdexport.errors import RunError
from kdexport.tasks.inputs import ragged
from kdexport.tasks.packed import compact, packed_lines, whole


@pytest.fixture
def given():
    texts = ["plain", "", "two\nlines\r\n", "\u2028 and \x85", "\U0001f600"]
    return [{"id": f"a.csv:{i}", "text": text, "label": None if i % 2 else "x"} for i, text in enumerate(texts, 1)]


def test_rows_come_back_letter_by_letter_in_any_part_and_order(given, tmp_path):
    rows = write_rows(tmp_path, "train", iter(given))
    assert list(rows) == list(Rows(tmp_path / "train.jsonl")) == given
    assert rows[-1] == given[-1]
    assert [row["id"] for row in rows[1:4][::-1]] == ["a.csv:4", "a.csv:3", "a.csv:2"]
    assert list(rows.take([3, 0, 3])) == [given[3], given[0], given[3]]
    assert list(rows.where(lambda row: row["label"])) == given[1::2]
    with pytest.raises(IndexError):
        rows[5]


def test_rows_of_several_files_are_one_sequence_which_a_process_can_hand_to_another(given, tmp_path):
    both = write_rows(tmp_path, "train", given[:2]) + write_rows(tmp_path, "test", given[2:])
    some = pickle.loads(pickle.dumps(both.take([4, 1])))
    assert list(both) == given
    assert list(some) == [given[4], given[1]]
    assert len(pickle.dumps(both)) < 2_000
    assert list(copy_rows(tmp_path, "mixed", both.take([2, 0]))) == [given[2], given[0]]
    assert not Rows()
    assert list(Rows() + both) == given


def test_bytes_of_rows_lie_beside_them_and_move_with_the_folder(tmp_path):
    (tmp_path / "a").mkdir()
    write_rows(tmp_path / "a", "train", [{"id": "1", "image": b"one"}, {"id": "2", "image": b"three"}])
    moved = (tmp_path / "a").rename(tmp_path / "b")
    first, second = Rows(moved / "train.jsonl")
    assert second["image"] == f"{moved.absolute()}/train.blob#3+5"
    again = write_rows(moved, "heard", [first], blob="train")
    assert again[0] == first
    assert (moved / "train.blob").read_bytes() == b"onethree"


def test_a_line_that_is_no_row_and_a_file_that_is_gone_are_named(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"id": "1"}\n{"id": \n')
    assert Rows(tmp_path / "train.jsonl")[0] == {"id": "1"}
    with pytest.raises(RunError, match=r"its train rows can't be read"):
        Rows(tmp_path / "train.jsonl")[1]
    with pytest.raises(RunError, match=r"its test rows can't be read .*No such file"):
        Rows(tmp_path / "test.jsonl")


def test_encoded_rows_end_to_end_are_those_one_by_one(monkeypatch):
    monkeypatch.setattr(ragged, "_AT_ONCE", 3)
    random = np.random.default_rng(0)
    encoded = [
        {"ids": random.integers(0, 70_000 if i == 7 else 200, n), "places": random.integers(-2, 5, n // 2)}
        for i, n in enumerate((4, 1, 9, 2, 0, 3, 5, 6))
    ]
    found = ragged.Ragged(iter(encoded))
    assert len(found) == 8
    for one, other in zip(found, encoded, strict=True):
        assert {name: array.tolist() for name, array in one.items()} == {k: v.tolist() for k, v in other.items()}
        assert one["ids"].dtype == np.int64
    assert found[-1]["ids"].tolist() == encoded[-1]["ids"].tolist()
    assert found.sizes("places") == [len(one["places"]) for one in encoded]


class Plain:
    answer_shape = (2,)
    unpack = staticmethod(np.asarray)


def test_soft_targets_of_two_files_are_looked_up_by_place(tmp_path):
    every = np.arange(14, dtype=np.float32).reshape(7, 2)
    for name, part in (("a", every[:5]), ("b", every[5:])):
        with writing(tmp_path / name, len(part)) as file:
            file.add(part[:1])
            file.add(part[1:])
    assert (np.load(tmp_path / "a") == every[:5]).all()
    targets = SoftTargets(Plain(), tmp_path / "a", tmp_path / "b")
    assert (targets[[6, 0, 5]] == every[[6, 0, 5]]).all()
    assert (targets.take([6, 1])[[0]] == every[[6]]).all()
    assert (np.stack(list(targets)) == every).all()
    assert (pickle.loads(pickle.dumps(targets))[[4]] == every[[4]]).all()


@pytest.mark.parametrize("vocabulary", [500, 70_000])
def test_probabilities_of_tokens_take_half_the_bytes_and_lose_a_thousandth(vocabulary):
    random = np.random.default_rng(0)
    logits = random.normal(0, 3, (2, 5, vocabulary))
    logs = (logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))).astype(np.float32)
    actual = random.integers(0, vocabulary, (2, 5))
    packed = np.stack([packed_lines(one, ids, 16, ids) for one, ids in zip(logs, actual, strict=True)])
    records = compact(packed, vocabulary)
    assert records.nbytes == packed.nbytes * (4 + 16 * (4 if vocabulary == 500 else 6)) // (4 + 16 * 8)
    found = whole(records)
    assert (found[..., 0] == packed[..., 0]).all()
    assert (found[..., 1::2] == packed[..., 1::2]).all()
    assert np.abs(found[..., 2::2] / packed[..., 2::2] - 1).max() < 1e-3


@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_a_student_learns_the_same_from_half_the_bytes(spread):
    random = np.random.default_rng(0)
    logits = random.normal(0, spread, (32, 2_000))
    logs = (logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))).astype(np.float32)
    ids = random.integers(0, 2_000, 32)
    packed = packed_lines(logs, ids, 64, ids)
    start = torch.tensor(logits + random.normal(0, 1, logits.shape), dtype=torch.float32)

    def gradient(targets):
        student = start.clone().requires_grad_()
        terms = objective(
            student,
            torch.from_numpy(ids),
            torch.from_numpy(targets),
            {"kl": 1.0},
            temperature=1.0,
            alpha=1.0,
            packed=True,
        )
        total(terms).backward()
        return student.grad

    exact, found = gradient(packed), gradient(whole(compact(packed[None], 2_000))[0])
    assert (found - exact).norm() < 0.01 * exact.norm()


def test_a_part_of_many_rows_costs_no_more_than_its_rows(tmp_path):
    rows = write_rows(tmp_path, "many", ({"i": i} for i in range(100_000)))
    tracemalloc.start()
    assert [row["i"] for row in rows[99_990:99_980:-5]] == [99_990, 99_985]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000
