"""A recogniser that writes: PyTorch, its two ONNX files, quantized, in an artifact, and in other runtimes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import soundfile
import torch
from tones import wav
from transformers import WhisperForConditionalGeneration
from whispers import write_whisper

import kdexport as package
from kdexport import spec
from kdexport.errors import ArtifactError, DataError
from kdexport.export import export_student, read_candidates
from kdexport.models.inference import logits_of
from kdexport.models.loading import ModelAndProcessor
from kdexport.models.registry import open_trained
from kdexport.models.saving import save_model, save_writer
from kdexport.models.transcriber import Transcriber, audio_of, cut, writer_of
from kdexport.runtime import artifact
from kdexport.runtime.predictor import Predictor, golden_answers
from kdexport.tasks import load_task

TASK = "automatic-speech-recognition"


def sound(seconds: float, seed: int) -> dict[str, bytes]:
    random = np.random.default_rng(seed)
    times = np.arange(int(seconds * 16_000)) / 16_000
    tones = sum(np.sin(2 * np.pi * random.uniform(80, 2000) * times) for _ in range(4))
    return {"audio": wav((0.1 * tones + random.normal(0, 0.01, len(times))).tolist(), 16_000)}


ROWS = [sound(seconds, seed) for seed, seconds in enumerate((0.3, 1.0, 1.5, 0.7, 1.9))]


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    return write_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def student(whisper, tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    teacher = Transcriber.from_pretrained(whisper).eval()
    how = audio_of(teacher.config, 1.6)
    made = cut(teacher, [0, 3], how)
    save_writer(made, str(whisper), folder, how, TASK, 1, 1.6)
    save_model(ModelAndProcessor(made, None), folder)
    return folder


@pytest.fixture(scope="module")
def exported(student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    export_student(spec.Export(), student, folder)
    return folder


def test_it_writes_what_transformers_writes(whisper):
    model = Transcriber.from_pretrained(whisper).eval()
    writer = writer_of(whisper, model, TASK)
    bands = torch.from_numpy(writer.encode(ROWS)["input_features"])
    plain = WhisperForConditionalGeneration.from_pretrained(whisper).eval()
    start = writer.config.decoder.start
    for one in bands:
        theirs = plain.generate(
            one[None], decoder_input_ids=torch.tensor([start]), max_new_tokens=20, do_sample=False, num_beams=1,
            suppress_tokens=[*range(writer.config.end_id + 1, plain.config.vocab_size)],
        )[0].tolist()  # fmt: skip
        model.writes(writer, writer)
        ours = writer.ids_of(model.packed(one[None])[0])
        theirs = theirs[len(start) :] if theirs[: len(start)] == start else theirs
        assert ours[:12] == [token for token in theirs if token != writer.config.end_id][:12]


def test_a_student_has_the_teachers_encoder_and_a_window_as_long_as_asked_for(whisper, student):
    teacher, made = (WhisperForConditionalGeneration.from_pretrained(folder) for folder in (whisper, student))
    assert made.config.architectures == ["WhisperForConditionalGeneration"]
    assert made.config.decoder_layers == 2
    assert made.config.max_source_positions == 100  # two seconds, rounded up
    ours, theirs = made.state_dict(), teacher.state_dict()
    for mine, its in ((0, 0), (1, 3)):
        name = "model.decoder.layers.{}.fc1.weight"
        assert torch.equal(ours[name.format(mine)], theirs[name.format(its)])
    assert json.loads((student / "preprocessor_config.json").read_text())["n_samples"] == 32_000


def test_both_files_together_do_what_the_model_does_in_any_batch(student, exported):
    task, model = load_task(student), open_trained(student)
    rows = [*ROWS[:4], *task.probes()]
    reference = logits_of(model, task, rows)
    predictor = Predictor(task, exported / "encoder_model.onnx", threads=1)
    assert len({*task.raw(reference)}) > 2
    for size in (1, 3, None):
        assert task.difference(predictor.logits(rows, batch_size=size), reference) < 1e-4


def test_a_recording_of_several_windows_is_read_whole(whisper, tmp_path):
    model = Transcriber.from_pretrained(whisper).eval()
    save_writer(model, str(whisper), tmp_path, audio_of(model.config), TASK, 1, 5.0)
    save_model(ModelAndProcessor(model, None), tmp_path)
    task, rows = load_task(tmp_path), [sound(4.5, 0), ROWS[0], sound(3.0, 1)]
    export_student(spec.Export(variants=("fp32",)), tmp_path, tmp_path)
    found = Predictor(task, tmp_path / "encoder_model.onnx").logits(rows)
    assert task.difference(found, logits_of(model, task, rows)) < 1e-4
    assert len(task.ids_of(found[0])) > len(task.ids_of(found[1]))


def test_weights_of_both_branches_and_the_table_of_words_are_stored_once(student, exported):
    graph = onnx.load(exported / "decoder_model_merged.onnx").graph
    assert [node.op_type for node in graph.node] == ["If"]
    config = WhisperForConditionalGeneration.from_pretrained(student).config
    tables = [t for t in graph.initializer if sorted(t.dims) == sorted((config.vocab_size, config.d_model))]
    assert len(tables) == 1
    small = onnx.load(exported / "decoder_model_merged_quantized.onnx").graph
    tables = [t for t in small.initializer if sorted(t.dims) == sorted((config.vocab_size, config.d_model))]
    assert [table.data_type for table in tables] == [onnx.TensorProto.INT8]


def test_int8_has_a_candidate_whose_decoder_stays_in_fp32(student, exported):
    found = {c.name: c for c in read_candidates(exported)}
    assert {name: (c.precision, c.graph) for name, c in found.items()} == {
        "fp32": ("fp32", "plain"), "int8": ("int8", "plain"), "int8-mixed": ("int8", "mixed")
    }  # fmt: skip
    sizes = {name: artifact.size_of(exported / c.file) for name, c in found.items()}
    assert sizes["int8"] < sizes["int8-mixed"] < sizes["fp32"]
    task = load_task(student)
    for candidate in found.values():
        answers = Predictor(task, exported / candidate.file, threads=1).answer(ROWS[:2])
        assert all(isinstance(answer.text, str) and 0 <= answer.score <= 1 for answer in answers)


@pytest.fixture(scope="module")
def packed(student, exported, tmp_path_factory):
    out = tmp_path_factory.mktemp("artifact")
    chosen = {c.precision: (exported / c.file, c.graph) for c in read_candidates(exported) if c.graph == "plain"}
    golden = golden_answers(load_task(student), {name: file for name, (file, _) in chosen.items()})
    artifact.pack(student, chosen, "fp32", {}, out, golden)
    return out


def test_an_artifact_holds_and_checks_both_files(packed, tmp_path):
    variant = artifact.read_manifest(packed).variants["int8"]
    assert variant.file == "onnx/encoder_model_quantized.onnx"
    assert variant.decoder == "onnx/decoder_model_merged_quantized.onnx"
    assert variant.size_bytes == sum((packed / name).stat().st_size for name in (variant.file, variant.decoder))
    assert package.load(packed).predict([ROWS[0]["audio"]])[0].text
    copy = tmp_path / "copy"
    shutil.copytree(packed, copy)
    with (copy / "onnx" / "decoder_model_merged.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ArtifactError, match=r"decoder_model_merged\.onnx is not the file that was packed"):
        package.load(copy)
    package.load(copy, "int8")  # whose files are whole


@pytest.mark.parametrize(
    ("name", "value"), [("decoder", ""), ("decoder_sha256", None), ("decoder", "../elsewhere.onnx")]
)
def test_a_manifest_that_hides_the_decoder_is_refused(packed, tmp_path, name, value):
    copy = tmp_path / "copy"
    shutil.copytree(packed, copy)
    manifest = msgspec.json.decode((copy / artifact.MANIFEST).read_bytes())
    manifest["variants"]["fp32"][name] = value
    (copy / artifact.MANIFEST).write_bytes(msgspec.json.encode(artifact.sealed(manifest)))
    with pytest.raises(ArtifactError):
        package.load(copy)


@pytest.mark.parametrize("change", [{"end_id": None}, {"max_length": 0}, {"decoder": None}])
def test_a_task_without_what_its_decoder_needs_is_refused(packed, tmp_path, change):
    copy = tmp_path / "copy"
    shutil.copytree(packed, copy)
    manifest = msgspec.json.decode((copy / artifact.MANIFEST).read_bytes())
    manifest["task"] |= change
    (copy / artifact.MANIFEST).write_bytes(msgspec.json.encode(artifact.sealed(manifest)))
    with pytest.raises(ArtifactError):
        package.load(copy)


def test_a_list_of_words_is_refused(packed):
    with pytest.raises(DataError, match=r"this model writes any text\. Leave it out"):
        package.load(packed, words=["one"])


def test_recordings_longer_than_the_window_are_refused(packed):
    with pytest.raises(Exception, match=r"it lasts 2\.5 s; the model reads 2\.0|lasts 2\.5 s"):
        package.load(packed).predict([sound(2.5, 0)["audio"]])


def test_optimum_reads_it(packed, optimum, tmp_path):
    files = []
    for i, row in enumerate(ROWS[:3]):
        files.append(str(tmp_path / f"{i}.wav"))
        Path(files[-1]).write_bytes(row["audio"])
    found = optimum("ORTModelForSpeechSeq2Seq", packed, "encoder_model.onnx", files)
    predictor = package.load(packed)
    for text, answer in zip(found, predictor.predict(files), strict=True):
        assert text.startswith(answer.text[:12])  # ours ends where a loop begins


@pytest.mark.slow
def test_a_real_whisper_writes_what_transformers_pipeline_writes(tmp_path):
    from transformers import pipeline

    shared = Path(__file__).parents[3] / "shared"
    model, sounds = shared / "models" / "whisper-tiny.en", shared / "data" / "speech-samples"
    if not (model.is_dir() and sounds.is_dir()):
        pytest.skip("shared/models/whisper-tiny.en and shared/data/speech-samples are not beside the repository")
    files = [str(path) for name in ("librispeech4", "librivox5") for path in sorted((sounds / name).glob("*.wav"))[:3]]
    opened = Transcriber.from_pretrained(model).eval()
    save_writer(opened, str(model), tmp_path, audio_of(opened.config), TASK, 1)
    save_model(ModelAndProcessor(opened, None), tmp_path)
    export_student(spec.Export(variants=("fp32",)), tmp_path, tmp_path)
    predictor = Predictor(load_task(tmp_path), tmp_path / "encoder_model.onnx", threads=1)
    ask = pipeline("automatic-speech-recognition", str(model), device="cpu")
    raw = ({"raw": soundfile.read(file, dtype="float32")[0], "sampling_rate": 16_000} for file in files)
    theirs = [ask(one, generate_kwargs={"do_sample": False, "num_beams": 1})["text"] for one in raw]
    ours = [found.text for found in predictor.predict(files)]
    assert ours == [text.replace("<|notimestamps|>", "").strip() for text in theirs]
