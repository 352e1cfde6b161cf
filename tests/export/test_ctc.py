"""Recognisers that read characters along time, as ONNX: what they hear in a batch of any company."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tones import say

from kdexport import spec
from kdexport.export import export_student, read_candidates
from kdexport.models.convolution import build_conv
from kdexport.models.inference import logits_of
from kdexport.models.saving import save_model, save_task
from kdexport.runtime.predictor import Predictor
from kdexport.tasks import load_task
from kdexport.tasks.config import AudioConfig, TaskConfig

LABELS = ["<pad>", " ", "a", "b", "c", "d"]
TASK = "automatic-speech-recognition"


@pytest.mark.parametrize("kind", ["conv", "gru"])
def test_a_graph_hears_what_pytorch_hears_in_any_company(kind, tmp_path):
    torch.manual_seed(0)
    texts = ["a", "ab", "ab cd", "abcd dcba aa", "dcba abcd dcba abcd", "c"]
    rows = [{"audio": say(text, i), "label": text} for i, text in enumerate(texts)]
    how = AudioConfig(rate=16_000, length=3_000, mels=40, steps=10)
    teacher = TaskConfig(task=TASK, labels=LABELS, inputs=["input_values"], audio=how)
    student = build_conv(25, teacher, rows, recurrent=kind == "gru")  # an odd number for the two directions
    assert student.model.config.kind == kind
    folder = tmp_path / "student"
    folder.mkdir()
    save_task(student, None, LABELS, folder, task=TASK, function="none", rows=rows)
    save_model(student, folder)
    task = load_task(folder)
    rows += task.probes()
    alone = logits_of(student.model, task, rows, batch_size=1)
    assert np.abs(logits_of(student.model, task, rows) - alone).max() < 1e-4
    export_student(spec.Export(variants=("fp32", "fp16", "int8")), folder, tmp_path, rows)
    candidates = {candidate.name: tmp_path / candidate.file for candidate in read_candidates(tmp_path)}
    assert set(candidates) == {"fp32", "fp16"} | ({"int8"} if kind == "conv" else set())
    predictor = Predictor(task, candidates["fp32"], threads=1)
    for size in (1, 2, 7, 32):
        assert np.abs(predictor.logits(rows, size) - alone).max() < 1e-4
    halved = Predictor(task, candidates["fp16"], threads=1).logits(rows)
    assert np.abs(halved - alone)[alone > -29].max() < 0.05 * np.abs(alone[alone > -29]).max()
