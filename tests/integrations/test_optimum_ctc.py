"""Recognisers that read characters along time, as Optimum reads them with Hugging Face's extractors and tokenizers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tones import say
from transformers import ASTFeatureExtractor, Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

import kdexport as package
from kdexport.models.convolution import build_conv
from kdexport.models.loading import ModelAndProcessor
from kdexport.models.saving import save_model, save_task
from kdexport.pipeline.export_model import export
from kdexport.tasks.config import AudioConfig, TaskConfig

pytestmark = pytest.mark.slow

LABELS = ["<pad>", " ", "a", "b", "c", "d"]
TASK = "automatic-speech-recognition"
TEXTS = ["ab cd", "a", "dcba abcd b"]


def network(kind, rows):
    if kind == "wav2vec2":
        config = Wav2Vec2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, conv_dim=[32] * 7,
            num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, vocab_size=len(LABELS),
        )  # fmt: skip
        return ModelAndProcessor(Wav2Vec2ForCTC(config), Wav2Vec2FeatureExtractor())
    how = AudioConfig(rate=16_000, length=3_000, mels=40, steps=10)
    teacher = TaskConfig(task=TASK, labels=LABELS, inputs=["input_values"], audio=how)
    return build_conv(24, teacher, rows, recurrent=kind == "gru")


@pytest.fixture(scope="module", params=["conv", "gru", "wav2vec2"])
def artifact(request, tmp_path_factory):
    """A small network of one kind, as an artifact, and some recordings."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    files = [folder / f"{i}.wav" for i in range(len(TEXTS))]
    for i, (file, text) in enumerate(zip(files, TEXTS, strict=True)):
        file.write_bytes(say(text, i, 16_000))
    rows = [{"audio": str(file), "label": text} for file, text in zip(files, TEXTS, strict=True)]
    opened = network(request.param, rows)
    (folder / "model").mkdir()
    save_task(opened, None, LABELS, folder / "model", task=TASK, function="none", rows=rows)
    save_model(opened, folder / "model")
    export(str(folder / "model"), folder / "artifact", variants=("fp32",))
    return folder / "artifact", files


def test_optimum_gives_our_logits_and_texts(artifact, optimum):
    """For our features; and by Hugging Face's extractor, which pads bands with what the graph takes for padding."""
    folder, files = artifact
    model = package.load(folder)
    given = [model.task.encode([{"audio": str(file)}])["input_values"] for file in files]
    theirs = optimum("ORTModelForCTC", folder, "model.onnx", [*(one.tolist() for one in given), *map(str, files)])
    logits = [model.run({"input_values": features})[0] for features in given]
    for (found,), expected in zip(theirs[: len(files)], logits, strict=True):
        assert np.abs(np.array(found) - expected[: len(found)]).max() < 1e-4
        assert (expected[len(found) :, 0] == 0).all()
    for (text, found), expected in zip(theirs[len(files) :], logits, strict=True):
        assert np.abs(np.array(found) - expected[: len(found)]).max() < 1e-3
        assert " ".join(text.split()) == model.task.texts(expected[None])[0]


def test_transformers_extractor_gives_our_bands_and_exact_zeros_behind_them(artifact):
    folder, files = artifact
    task = package.load(folder).task
    if not task.config.audio.mels:
        pytest.skip("it reads waveforms")
    extractor = ASTFeatureExtractor.from_pretrained(folder)
    for file, text in zip(files, TEXTS, strict=True):
        ours = task.encode([{"audio": str(file)}])["input_values"][0]
        samples = np.frombuffer(say(text, files.index(file), 16_000)[44:], "<i2").astype(np.float32) / 32_768
        theirs = extractor(samples, sampling_rate=16_000, return_tensors="np")["input_values"][0]
        assert np.abs(theirs[: len(ours)] - ours).max() < 1e-3
        assert len(theirs) > len(ours)
        assert not theirs[len(ours) :].any()
