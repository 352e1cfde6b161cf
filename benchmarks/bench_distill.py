"""Soft targets against a plain loop, and a training step of the Trainer against a plain PyTorch loop.

The two sides take turns, so that drift hits both alike; the ratio of their medians is printed and recorded.
"""

import time
from statistics import median

import msgspec
import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from kdexport.distill.losses import objective, total
from kdexport.distill.order import ByLength
from kdexport.distill.store import Store, content_keys
from kdexport.distill.train import TrainConfig, fit
from kdexport.models.inference import logits_of
from kdexport.tasks import load_task


def take_turns(benchmark, ours, plain, rounds: int) -> float:
    """Median of plain ÷ ours over rounds; `ours` is what pytest-benchmark records."""
    seconds = {ours: [], plain: []}

    def once(side):
        started = time.perf_counter()
        side()
        seconds[side].append(time.perf_counter() - started)

    once(plain), once(ours)  # warm up
    seconds = {ours: [], plain: []}
    benchmark.pedantic(lambda: once(ours), setup=lambda: once(plain), rounds=rounds)
    ratios = [p / o for p, o in zip(seconds[plain], seconds[ours], strict=True)]
    benchmark.extra_info["plain_over_ours"] = [round(r, 3) for r in ratios]
    print(f"\n{benchmark.name}: plain ÷ ours {median(ratios):.3f} [{min(ratios):.3f}–{max(ratios):.3f}]")
    return median(ratios)


@pytest.mark.benchmark(group="soft targets")
def bench_soft_targets(benchmark, teacher, rows):
    """Length-sorted batches padded to the longest, against batches of 32 in the order of the file."""
    task, some = load_task(teacher), rows[:512]
    model = AutoModelForSequenceClassification.from_pretrained(teacher).eval()

    @torch.inference_mode()
    def plain():
        batches = [task.encode(some[i : i + 32]) for i in range(0, len(some), 32)]
        return [model(**{k: torch.from_numpy(v) for k, v in batch.items()}).logits.numpy() for batch in batches]

    def ours():
        return logits_of(model, task, some)

    assert np.abs(np.concatenate(plain()) - ours()).max() < 1e-4
    ratio = take_turns(benchmark, ours, plain, rounds=3)
    benchmark.extra_info["texts_per_second"] = round(len(some) / benchmark.stats.stats.median)
    print(f"{benchmark.extra_info['texts_per_second']} texts a second")
    assert ratio > 0.9


@pytest.mark.benchmark(group="soft targets")
def bench_soft_targets_from_cache(benchmark, rows, tmp_path):
    """What a second student pays: opening the store and looking every text up."""
    contents = [row["text"] for row in rows]
    Store(tmp_path).add(content_keys(contents), np.zeros((len(contents), 5), dtype=np.float32))
    found = benchmark(lambda: Store(tmp_path).look_up(content_keys(contents)))
    print(f"\n{len(contents) / benchmark.stats.stats.median:,.0f} texts a second")
    assert found.shape == (len(contents), 5)


@pytest.mark.benchmark(group="training step")
def bench_training_step(benchmark, student, rows, tmp_path):
    """A step of the Trainer with our loss, against one of a plain loop over the same batches.

    Six epochs less two, so that what each side does once (opening the model, tokenising) is not counted.
    """
    task, some = load_task(student), rows[:1024]
    soft = np.random.default_rng(0).normal(size=(len(some), 5)).astype(np.float32)
    recipe = TrainConfig(epochs=6, learning_rate=5e-4, batch_size=32, seed=0, temperature=2.0, alpha=0.9)

    def ours(epochs):
        model = AutoModelForSequenceClassification.from_pretrained(student)
        how = msgspec.structs.replace(recipe, epochs=epochs)
        fit(model, task, some, soft, how, validation=some[:1], work=tmp_path, title="train")

    def plain(epochs):
        model = AutoModelForSequenceClassification.from_pretrained(student).train()
        encoded, labels = task.tokenize(some), torch.from_numpy(task.label_array(some))
        optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01, fused=True)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=32 * epochs)
        order = ByLength([len(e["input_ids"]) for e in encoded], 32, 0)
        for epoch in range(epochs):
            order.set_epoch(epoch)
            for batch in torch.tensor(list(order)).split(32):
                arrays = task.collate([encoded[i] for i in batch])
                logits = model(**{k: torch.from_numpy(v) for k, v in arrays.items()}).logits
                targets = torch.from_numpy(soft[batch])
                terms = objective(logits, labels[batch], targets, {"kl": 1.0}, temperature=2.0, alpha=0.9)
                total(terms).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()

    def seconds_a_step(side):
        times = []
        for epochs in (2, 6):
            started = time.perf_counter()
            side(epochs)
            times.append(time.perf_counter() - started)
        return (times[1] - times[0]) / (4 * 32)

    pairs = []
    benchmark.pedantic(lambda: pairs.append([seconds_a_step(plain), seconds_a_step(ours)]), rounds=4)
    ratios = [p / o for p, o in pairs]
    benchmark.extra_info["plain_over_ours"] = [round(r, 3) for r in ratios]
    step = 1e3 * median(o for _, o in pairs)
    print(f"\nplain ÷ ours {median(ratios):.3f} [{min(ratios):.3f}–{max(ratios):.3f}], {step:.1f} ms a step")
