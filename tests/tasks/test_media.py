"""Images and sound: the same arrays as Hugging Face's processors make, and what is said of files that are no good."""

from __future__ import annotations

import io
import os
import shutil
import wave

import numpy as np
import pytest
from PIL import Image
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    AutoFeatureExtractor,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessor,
    DeiTImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
)

from kdexport import spec
from kdexport.data import prepare, read_rows, read_summary
from kdexport.errors import DataError, ModelError, SpecError
from kdexport.export.quantize import convolves
from kdexport.tasks import task_class
from kdexport.tasks.config import TaskConfig
from kdexport.tasks.inputs import audio, images
from kdexport.tasks.inputs.media import bytes_of, inline


def picture(width=40, height=30, mode="RGB", seed=0) -> bytes:
    bands = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (height, width, *bands)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def sound(seconds=0.5, rate=8000, channels=1, seed=0, hertz=440) -> bytes:
    t = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(0, 0.02, len(t))
    samples = np.repeat((0.3 * np.sin(2 * np.pi * hertz * t) + noise)[:, None], channels, axis=1)
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((samples * 32767).astype("<i2").tobytes())
    return file.getvalue()


def image_task(how):
    return task_class("image-classification")(
        TaskConfig(task="image-classification", labels=["a", "b"], inputs=["pixel_values"], image=how)
    )


def audio_task(how):
    return task_class("audio-classification")(
        TaskConfig(task="audio-classification", labels=["a", "b"], inputs=["input_values"], audio=how)
    )


# --- the same arrays


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessor(),
        ViTImageProcessor(size={"height": 20, "width": 31}, resample=3, image_mean=[0.1, 0.2, 0.3], do_normalize=True),
        ConvNextImageProcessor(size={"shortest_edge": 64}),
        ConvNextImageProcessor(size={"shortest_edge": 384}),
        DeiTImageProcessor(),
    ],
    ids=["vit", "vit-odd", "convnext-crop", "convnext-384", "deit"],
)
@pytest.mark.parametrize("size", [(40, 30), (300, 61)])
def test_images_as_hugging_face_reads_them(processor, size):
    content = picture(*size)
    task = image_task(images.config_of(processor.to_dict(), 3))
    ours = task.encode([{"image": content}])["pixel_values"]
    theirs = processor(Image.open(io.BytesIO(content)), return_tensors="np")["pixel_values"]
    assert ours.dtype == np.float32
    assert ours.shape == theirs.shape == (1, *task.shapes()["pixel_values"][1:])
    assert np.abs(ours - theirs).max() < 1e-5


def test_what_our_students_read_is_what_their_processor_says():
    rows = [{"image": picture(28, 28, "L", seed)} for seed in range(5)]
    how = images.fitted(rows, (224, 224))
    assert (how.channels, how.resize) == (1, [28, 28])
    again = images.config_of(ViTImageProcessor(**images.processor_of(how)).to_dict(), how.channels)
    assert again == how
    values = image_task(how).encode(rows)["pixel_values"]
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_grey_and_colour_are_converted(mode):
    row = {"image": picture(mode=mode)}
    for channels in (1, 3):
        how = images.ImageConfig(channels=channels, resize=[8, 8], mean=[0.5] * channels, std=[0.5] * channels)
        assert image_task(how).encode([row])["pixel_values"].shape == (1, channels, 8, 8)


@pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values")  # so it is of AST's own 128 bands
@pytest.mark.parametrize("seconds", [0.02, 0.4, 3.0])
@pytest.mark.parametrize(("rate", "mels"), [(16_000, 128), (8_000, 40)])
def test_mel_bands_as_ast_makes_them(seconds, rate, mels):
    extractor = ASTFeatureExtractor(sampling_rate=rate, num_mel_bins=mels, max_length=96, mean=-3.0, std=2.5)
    content = sound(seconds, rate)
    task = audio_task(audio.config_of(extractor.to_dict(), []))
    ours = task.encode([{"audio": content}])["input_values"]
    samples = audio.decoded(content).samples
    samples = np.pad(samples, (0, max(0, 400 - len(samples))))  # theirs fails on less than a frame
    theirs = extractor(samples, sampling_rate=rate, return_tensors="np")["input_values"]
    assert ours.shape == theirs.shape == (1, 96, mels)
    assert np.abs(ours - theirs).max() < 1e-3
    assert audio.config_of(ASTFeatureExtractor(**audio.extractor_of(task.config.audio)).to_dict(), []) == (
        task.config.audio
    )


@pytest.mark.parametrize("normalise", [True, False])
def test_waveforms_as_wav2vec2_reads_them(normalise):
    extractor = Wav2Vec2FeatureExtractor(do_normalize=normalise, return_attention_mask=True)
    rows = [{"audio": sound(seconds, 16_000)} for seconds in (0.3, 0.5)]
    how = audio.config_of(extractor.to_dict(), rows)
    assert how.length == pytest.approx(8000, abs=40)
    ours = audio_task(how).encode(rows)["input_values"]
    samples = [audio.decoded(row["audio"]).samples[: how.length] for row in rows]
    theirs = extractor(samples, sampling_rate=16_000, padding="max_length", max_length=how.length, return_tensors="np")
    assert np.abs(ours - theirs["input_values"]).max() < 1e-5


@pytest.mark.parametrize("task", ["image", "audio"])
def test_probes_and_examples_can_be_read(task):
    how = images.ImageConfig(channels=3, resize=[16, 16], mean=[0.5] * 3, std=[0.5] * 3)
    made = image_task(how) if task == "image" else audio_task(audio.AudioConfig(rate=8000, length=32, mels=20))
    arrays = made.encode([*made.probes(), *made.examples()])
    assert all(np.isfinite(array).all() and len(array) == 8 for array in arrays.values())


# --- data


def write_images(folder, count=8, labels=("cat", "dog")):
    for label in labels:
        for i in range(count):
            (folder / label).mkdir(parents=True, exist_ok=True)
            (folder / label / f"{i}.png").write_bytes(picture(28, 28, "L", seed=hash((label, i)) % 10_000))


def prepared(tmp_path, task="image-classification", **settings):
    out = tmp_path / "data"
    out.mkdir(exist_ok=True)
    prepare(spec.Data(**settings), task, 0, out)
    return out


def test_a_folder_of_folders(tmp_path):
    write_images(tmp_path / "all" / "train")
    write_images(tmp_path / "all" / "test", 3)
    out = prepared(tmp_path, train=str(tmp_path / "all"))
    assert read_summary(out).labels == ["cat", "dog"]
    assert read_summary(out).split_by_us == ["validation"]
    row = read_rows(out, "test")[0]
    assert row["image"] == str(tmp_path / "all" / "test" / "cat" / "0.png")
    assert len(row["sha256"]) == 64
    assert read_summary(out).duplicates.near is None


def test_a_parquet_of_bytes_becomes_a_blob_that_moves_with_its_run(tmp_path):
    import datasets

    pictures = [picture(28, 28, "L", seed) for seed in range(20)]
    table = {"img": [{"bytes": one, "path": None} for one in pictures], "label": [0, 1] * 10}
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "all.parquet")
    prepared(tmp_path, train=str(tmp_path / "all.parquet"))
    moved = shutil.move(tmp_path / "data", tmp_path / "elsewhere")
    rows = [row for split in ("train", "validation", "test") for row in read_rows(moved, split)]
    assert {bytes_of(row["image"]) for row in rows} == set(pictures)
    assert {row["label"] for row in rows} == {"cat", "dog"}
    assert "bytes" not in (moved / "train.jsonl").read_text()


def test_recordings_with_a_table(tmp_path):
    lines = ["file_name,label"]
    for i in range(12):
        (tmp_path / f"{i}.wav").write_bytes(sound(0.1 + i / 100, hertz=200 + 100 * (i % 2), seed=i))
        lines.append(f"{i}.wav,{i % 2}")
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    out = prepared(tmp_path, "audio-classification", train=str(tmp_path))
    assert sum(read_summary(out).rows.values()) == 12
    assert audio_task(audio.AudioConfig(rate=8000, length=20, mels=20)).remarks(read_rows(out, "train")) == []
    assert (
        "resampled to 16,000"
        in audio_task(audio.AudioConfig(rate=16_000, length=200, mels=20)).remarks(read_rows(out, "train"))[0]
    )


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("broken.png", picture()[:200], "broken image"),
        ("text.png", b"hello", "is no image"),
        ("empty.wav", b"", "is empty"),
        ("long.wav", sound(600, 400), "lasts 600 s"),
        ("music.wav", b"ID3" + bytes(50), "is no sound file"),
        ("silent.wav", sound(0.0), "holds no sound"),
    ],
)
def test_a_bad_file_is_named_or_left_out(tmp_path, name, content, said):
    task = "audio-classification" if name.endswith("wav") else "image-classification"
    for i in range(20):
        (tmp_path / f"{i}{name[-4:]}").write_bytes(sound(seed=i) if name.endswith("wav") else picture(seed=i))
    (tmp_path / name).write_bytes(content)
    files = [*(f"{i}{name[-4:]}" for i in range(20)), name]
    (tmp_path / "rows.csv").write_text("\n".join(["file,label", *(f"{f},{i % 2}" for i, f in enumerate(files))]))
    with pytest.raises(DataError, match=rf"rows\.csv, row 21: its {task[:5]} .*{name} .*{said}"):
        prepared(tmp_path, task, train=str(tmp_path / "rows.csv"))
    out = prepared(tmp_path, task, train=str(tmp_path / "rows.csv"), skip_bad_rows=True)
    assert read_summary(out).bad_rows == 1


def test_a_name_that_is_no_text_is_named_or_left_out(tmp_path):
    write_images(tmp_path / "all")
    (tmp_path / "all/cat" / os.fsdecode(b"caf\xe9.png")).write_bytes(picture(seed=99))
    with pytest.raises(DataError, match=r"its image .*caf\\xe9\.png has a name that is not UTF-8. Mend"):
        prepared(tmp_path, train=str(tmp_path / "all"))
    assert read_summary(prepared(tmp_path, train=str(tmp_path / "all"), skip_bad_rows=True)).bad_rows == 1


def test_a_label_of_one_split_only(tmp_path):
    write_images(tmp_path / "all" / "train")
    write_images(tmp_path / "all" / "test", 2, ("cat", "bird"))
    with pytest.raises(DataError, match="label 'bird' occurs in no row of train"):
        prepared(tmp_path, train=str(tmp_path / "all"))


def test_a_file_that_is_not_there(tmp_path):
    (tmp_path / "rows.csv").write_text("image,label\nnone.png,a\nnone.png,b\n")
    with pytest.raises(DataError, match=r"row 1: its image .*none\.png can't be read: No such file"):
        prepared(tmp_path, train=str(tmp_path / "rows.csv"))


def test_a_value_may_be_a_part_of_a_file_or_inline(tmp_path):
    (tmp_path / "a#1.bin").write_bytes(b"0123456789")
    assert bytes_of(f"{tmp_path}/a#1.bin#3+4") == b"3456"
    assert bytes_of(f"{tmp_path}/a#1.bin") == b"0123456789"
    assert bytes_of(inline(b"abc")) == b"abc"
    with pytest.raises(DataError, match="neither a path nor bytes but int"):
        bytes_of(3)


# --- settings


@pytest.mark.parametrize(
    ("key", "value"), [("data.max_length", 64), ("student.vocabulary", "whole"), ("data.text_pair", "b")]
)
def test_settings_of_texts_are_refused(key, value):
    given = {"task": "image-classification", "data.train": "x", "teacher.model": "y", key: value}
    with pytest.raises(SpecError, match=f"{key} has no effect on image-classification"):
        spec.load(None, given)


def test_students_of_texts_are_refused():
    from kdexport.spec import derive

    given = {"data.train": "x", "teacher.model": "y"}
    with pytest.raises(SpecError, match="'tiny' is none for audio-classification"):
        spec.load(None, given | {"task": "audio-classification", "student.model": "tiny"})
    with pytest.raises(SpecError, match="'conv' is none for text-classification"):
        spec.load(None, given | {"student.model": "conv"})
    media = spec.load(None, given | {"task": "image-classification", "budget.size_mb": 1})
    assert derive.students(media) == ("conv:8", "conv", "conv:24", "conv:32")


def test_processors_that_do_more_are_refused():
    with pytest.raises(ModelError, match="has unsupported steps"):
        images.config_of({"image_processor_type": "DetrImageProcessor", "do_pad": True}, 3)
    with pytest.raises(ModelError, match="none of Wav2Vec2FeatureExtractor"):
        audio.config_of({"feature_extractor_type": "WhisperFeatureExtractor"}, [])
    with pytest.raises(ModelError, match="no fixed output size"):
        images.config_of({"size": {"shortest_edge": 256}, "image_mean": [0.5], "image_std": [0.5]}, 1)


def test_only_convolutions_are_calibrated(tmp_path):
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def model(op, *shape):
        weight = numpy_helper.from_array(np.ones(shape, np.float32), "w")
        graph = helper.make_graph(
            [helper.make_node(op, ["x", "w"], ["y"])],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [weight],
        )
        onnx.save(helper.make_model(graph), tmp_path / f"{op}.onnx")
        return tmp_path / f"{op}.onnx"

    assert convolves(model("Conv", 4, 4, 3, 3))
    assert not convolves(model("MatMul", 4, 4))


def test_extractors_open_by_their_file(tmp_path):
    how = audio.AudioConfig(rate=8000, length=32, mels=20, mean=-1.0, std=2.0)
    ASTFeatureExtractor(**audio.extractor_of(how)).save_pretrained(tmp_path)
    assert audio.config_of(AutoFeatureExtractor.from_pretrained(tmp_path).to_dict(), []) == how


# --- other people's models

NAMES = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64} | NAMES
MODELS = {
    "vit": lambda: (
        ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **SMALL)),
        ViTImageProcessor(size={"height": 32, "width": 32}),
    ),
    "convnext": lambda: (
        ConvNextForImageClassification(ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4, **NAMES)),
        ConvNextImageProcessor(size={"shortest_edge": 64}),
    ),
    "ast": lambda: (
        ASTForAudioClassification(ASTConfig(max_length=64, num_mel_bins=40, **SMALL)),
        ASTFeatureExtractor(num_mel_bins=40, max_length=64),
    ),
    "wav2vec2": lambda: (
        Wav2Vec2ForSequenceClassification(
            Wav2Vec2Config(conv_dim=[16] * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, **SMALL)
        ),
        Wav2Vec2FeatureExtractor(),
    ),
}


@pytest.mark.parametrize("family", MODELS)
def test_other_families_lose_layers_and_are_exported(family, tmp_path):
    from kdexport.export import export_student
    from kdexport.models.inference import logits_of
    from kdexport.models.loading import ModelAndProcessor
    from kdexport.models.registry import task_of
    from kdexport.models.saving import save_model, save_task
    from kdexport.models.shrink import keep_layers
    from kdexport.runtime.predictor import Predictor
    from kdexport.tasks import load_task

    model, processor = MODELS[family]()
    model = keep_layers(model, [0, 2]) if family != "convnext" else model.eval()
    name = "image-classification" if family in ("vit", "convnext") else "audio-classification"
    assert task_of(type(model.config)(architectures=[type(model).__name__]), tmp_path) == name
    rows = [{"audio": sound(0.5, 16_000, seed=seed)} for seed in range(3)] if name.startswith("audio") else []
    save_task(ModelAndProcessor(model, processor), None, ["a", "b"], tmp_path, task=name, rows=rows)
    save_model(ModelAndProcessor(model, processor), tmp_path)
    task = load_task(tmp_path)
    rows = [*rows, *task.probes(), *task.examples()]
    export_student(spec.Export(), tmp_path, tmp_path, rows)
    reference = logits_of(model, task, rows)
    for file, allowed in (("model.onnx", 1e-4), ("model_quantized.onnx", 0.1)):
        assert np.abs(Predictor(task, tmp_path / file, 1).logits(rows) - reference).max() < allowed
