"""Training on images: each is decoded once, and what is learned is the same wherever it is cached."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from kdexport.distill import train
from kdexport.distill.train import TrainConfig, fit
from kdexport.tasks import task_class
from kdexport.tasks.config import ImageConfig, TaskConfig
from kdexport.tasks.inputs import cache

HOW = TrainConfig(epochs=3, learning_rate=1e-3, batch_size=8, seed=0)
INPUT = ImageConfig(channels=3, resize=[16, 16], mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4])


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder, random, found = tmp_path_factory.mktemp("images"), np.random.default_rng(0), []
    for i in range(30):
        values = random.integers(0, 128, (40, 30, 3)) + 120 * (i % 2)
        Image.fromarray(values.astype(np.uint8)).save(folder / f"{i}.jpg")
        found.append({"image": str(folder / f"{i}.jpg"), "label": "ab"[i % 2]})
    return found


def learned(task, rows, work):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=2, **shape))
    curve = fit(model, task, rows[:20], None, HOW, validation=rows[20:], work=work, title="t")
    return curve, [weights.tolist() for weights in model.parameters()]


def test_each_image_is_decoded_once_and_training_is_the_same(rows, tmp_path, monkeypatch):
    config = TaskConfig(task="image-classification", labels=["a", "b"], inputs=["pixel_values"], image=INPUT)
    kind, decoded = task_class("image-classification"), []
    task, compact = kind(config), kind.compact
    monkeypatch.setattr(kind, "compact", lambda self, content: decoded.append(content) or compact(self, content))
    try:
        found = {}
        for memory in (None, 0):
            cache.limit_memory(memory)
            decoded.clear()
            found[memory] = learned(task, rows, tmp_path)
            assert len(decoded) == len(set(decoded)) == len(rows)
    finally:
        cache.limit_memory(None)
    decoded.clear()
    monkeypatch.setattr(train, "cached", lambda *_: nullcontext())
    without = learned(task, rows, tmp_path)
    assert len(decoded) == HOW.epochs * len(rows)
    assert found[None] == found[0] == without
