"""The one loop that runs batches: in the rows' order, whatever the batches hold."""

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from kdexport.tasks import task_class
from kdexport.tasks.batches import in_batches
from kdexport.tasks.config import TaskConfig


def test_outputs_are_in_the_rows_order_and_batches_hold_rows_of_similar_length():
    config = TaskConfig(task="text-classification", labels=["a"], inputs=["input_ids"], max_length=64, pad_id=0)
    words = {f"w{i}": i for i in range(64)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    task = task_class("text-classification")(config, tokenizer)
    draw = np.random.default_rng(0)
    rows = [{"text": " ".join(f"w{i}" for i in draw.integers(1, 64, n))} for n in draw.integers(1, 60, 37)]
    widths, done = [], []

    def run(arrays):
        widths.append(arrays["input_ids"].shape)
        return arrays["input_ids"].sum(axis=1, keepdims=True)

    found = in_batches(task, rows, run, 5, done.append)
    sums = [sum(int(word[1:]) for word in row["text"].split()) for row in rows]
    assert found[:, 0].tolist() == sums
    assert sum(done) == 37
    assert [rows for rows, _ in widths] == [5] * 7 + [2]
    lengths = [width for _, width in widths]
    assert lengths == sorted(lengths, reverse=True)  # memory runs out at once or never
    assert np.array_equal(found, in_batches(task, rows, run))
