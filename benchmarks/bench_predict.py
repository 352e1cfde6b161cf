"""Where a prediction's time goes: tokenising, the session's run, and both; int8 student, one thread, batch 1."""

from itertools import cycle

import pytest

from kdexport.runtime.predictor import Predictor
from kdexport.tasks import load_task


@pytest.fixture(scope="module")
def predictor(student, exported):
    return Predictor(load_task(student), exported / "model_quantized.onnx", threads=1)


@pytest.mark.benchmark(group="predict one text")
def bench_end_to_end(benchmark, predictor, rows):
    texts = cycle(row["text"] for row in rows[:256])
    answers = benchmark(lambda: predictor.predict(next(texts)))
    assert len(answers) == 1


@pytest.mark.benchmark(group="predict one text")
def bench_tokenise(benchmark, predictor, rows):
    some = cycle(rows[:256])
    arrays = benchmark(lambda: predictor.task.encode([next(some)]))
    assert arrays["input_ids"].shape[0] == 1


@pytest.mark.benchmark(group="predict one text")
def bench_session_run(benchmark, predictor, rows):
    encoded = cycle([predictor.task.encode([row]) for row in rows[:256]])
    logits = benchmark(lambda: predictor.run(next(encoded)))
    assert logits.shape == (1, 5)
