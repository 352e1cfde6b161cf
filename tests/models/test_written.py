"""A Whisper with the tokens alone that its training texts need: the same texts, here and in other runtimes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tones import wav
from transformers import AutoTokenizer, WhisperForConditionalGeneration
from whispers import write_whisper

import kdexport as package
from kdexport.errors import SpecError
from kdexport.models.inference import logits_of
from kdexport.models.loading import ModelAndProcessor
from kdexport.models.saving import save_model, save_writer
from kdexport.models.transcriber import Transcriber, audio_of
from kdexport.models.written import trim_writer
from kdexport.pipeline.export_model import export
from kdexport.tasks import load_task

TASK = "automatic-speech-recognition"


def sound(seconds: float, seed: int) -> dict[str, bytes]:
    random, times = np.random.default_rng(seed), np.arange(int(seconds * 16_000)) / 16_000
    tones = sum(np.sin(2 * np.pi * random.uniform(80, 2000) * times) for _ in range(4))
    return {"audio": wav((0.1 * tones).tolist(), 16_000)}


ROWS = [sound(0.5 + seed / 5, seed) for seed in range(6)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A multilingual Whisper that writes German."""
    source, folder = (tmp_path_factory.mktemp(name) for name in ("source", "whole"))
    write_whisper(source, languages=("en", "de"))
    model = Transcriber.from_pretrained(source).eval()
    model.generation_config.language, model.generation_config.suppress_tokens = "de", [5, 300]
    save_writer(model, str(source), folder, audio_of(model.config), TASK, 1)
    save_model(ModelAndProcessor(model, None), folder)
    return folder


@pytest.fixture(scope="module")
def outputs(whole):
    task = load_task(whole)
    return logits_of(Transcriber.open(whole, task), task, ROWS)


@pytest.fixture(scope="module")
def trimmed(whole, outputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trimmed")
    model = Transcriber.open(whole, load_task(whole))
    save_writer(model, str(whole), folder, audio_of(model.config), TASK, 1)
    assert 256 < trim_writer(model, folder, outputs) < 320
    save_model(ModelAndProcessor(model, None), folder)
    return folder


def test_texts_whose_tokens_stay_are_written_as_before(whole, trimmed, outputs):
    task = load_task(trimmed)
    found = logits_of(Transcriber.open(trimmed, task), task, ROWS)
    assert task.raw(found) == load_task(whole).raw(outputs)
    assert len({*task.raw(found)}) > 2
    assert (task.confidence(found, ROWS) >= load_task(whole).confidence(outputs, ROWS) - 1e-6).all()


def test_any_text_can_still_be_written(trimmed):
    tokenizer = Tokenizer.from_file(str(trimmed / "tokenizer.json"))
    for text in ("no sugar thanks", "Grüße, 世界 \U0001f600", "ab\tc"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_every_rule_names_the_same_token_as_before(whole, trimmed):
    def meaning(folder: Path):
        names = {i: token for token, i in Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab().items()}
        rules = json.loads((folder / "generation_config.json").read_text())
        config = json.loads((folder / "config.json").read_text())
        single = {key: names[value] for key, value in rules.items() if key.endswith("_token_id")}
        single |= {f"config {key}": names[config[key]] for key in ("eos_token_id", "decoder_start_token_id")}
        maps = {key: {name: names[i] for name, i in rules[key].items()} for key in ("lang_to_id", "task_to_id")}
        decoder = load_task(folder).config.decoder
        start = [names[token] for token in decoder.start]
        return (
            single,
            maps,
            start,
            [names[i] for i in rules["begin_suppress_tokens"]],
            names[load_task(folder).config.end_id],
        )

    assert meaning(trimmed) == meaning(whole)
    assert len(load_task(trimmed).config.decoder.never) < 2  # what was suppressed is gone
    model = WhisperForConditionalGeneration.from_pretrained(trimmed)
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(trimmed)) == model.proj_out.weight.shape[0]
    assert torch.equal(model.proj_out.weight, model.model.decoder.embed_tokens.weight)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recordings")
    for i, row in enumerate(ROWS):
        (folder / f"{i}.wav").write_bytes(row["audio"])
    (folder / "metadata.csv").write_text("\n".join(["file_name", *(f"{i}.wav" for i in range(len(ROWS)))]) + "\n")
    return folder


@pytest.fixture(scope="module")
def exported(whole, recordings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "artifact"
    export(whole, folder, data=recordings, vocabulary="corpus", variants="fp32")
    return folder


def test_an_export_is_smaller_and_writes_the_same(whole, recordings, exported, outputs):
    files = [str(recordings / f"{i}.wav") for i in range(len(ROWS))]
    assert [found.text for found in package.load(exported).predict(files)] == load_task(whole).raw(outputs)
    assert json.loads((exported / "config.json").read_text())["vocab_size"] < 320


def test_optimum_reads_it(recordings, exported, optimum):
    files = [str(recordings / f"{i}.wav") for i in range(3)]
    found = optimum("ORTModelForSpeechSeq2Seq", exported, "encoder_model.onnx", files)
    for text, answer in zip(found, package.load(exported).predict(files), strict=True):
        assert text.startswith(answer.text[:12])  # ours ends where a loop begins


def test_a_vocabulary_needs_the_recordings_that_it_is_of(whole, tmp_path):
    for name, said in (("corpus", "needs recordings. Name them with --data"), ("train", "is unknown. Take whole or")):
        with pytest.raises(SpecError, match=f"--vocabulary {name} {said}"):
            export(whole, tmp_path / "none", vocabulary=name)
