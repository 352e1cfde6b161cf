"""Speech recognition from a folder of recordings to a transcript, with tones for letters, and by a Whisper."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from tones import sentences, wav, write_folder

import kdexport as package
from kdexport import spec
from kdexport.data import prepare, read_rows, read_summary
from kdexport.errors import DataError, SpecError
from kdexport.pipeline.run import run as run_pipeline
from kdexport.results import read_report
from kdexport.tasks.inputs.media import bytes_of

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
TASK = "automatic-speech-recognition"
QUICK = {"bench.rounds": 1, "bench.round_seconds": 0.2, "bench.precision": None, "bench.batch_sizes": []}


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tones")
    for seed, (split, count) in enumerate({"train": 200, "validation": 30, "test": 40}.items()):
        write_folder(folder / split, sentences(count, seed), seed=1000 * seed)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The example's teacher, smaller."""
    folder = tmp_path_factory.mktemp("teacher") / "small"
    shutil.copytree(ROOT / "examples" / "teachers" / "digits-ctc", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"kind": "conv", "width": 48, "kernel": 5, "num_mel_bins": 40}
    (folder / "config.json").write_text(json.dumps(config))
    extractor = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(extractor | {"num_mel_bins": 40}))
    return folder


@pytest.fixture(scope="module")
def finished(tones, teacher, cache, tmp_path_factory):
    os.environ["KDEXPORT_CACHE"] = str(cache)
    out = tmp_path_factory.mktemp("run") / "tones"
    how = {"epochs": 24, "learning_rate": 5e-3, "batch_size": 16}
    given = {"task": TASK, "data.train": str(tones), "teacher.model": str(teacher)}
    given |= {
        "teacher.train": how,
        "distill.learning_rate": 5e-3,
        "student.model": "conv:48",
        "distill.epochs": 30,
        "distill.batch_size": 16,
    }
    run_pipeline(spec.load(None, QUICK | given), out)
    return out


@pytest.mark.slow
def test_a_student_hears_what_its_teacher_hears(finished):
    report = read_report(finished / "report.json")
    best = report.variant(report.recommended)
    assert report.metric == "word error rate"
    assert report.variant("teacher-torch").metric.value < 0.2
    assert best.metric.value < 0.3
    assert set(best.further) == {"substitutions", "deletions", "insertions", "character error rate"}


@pytest.mark.slow
def test_an_artifact_writes_what_was_said_and_when(finished, tmp_path):
    model = package.load(finished)
    rows = read_rows(finished / "data", "test")[:8]
    files = [tmp_path / f"{i}.wav" for i in range(len(rows))]
    for file, row in zip(files, rows, strict=True):
        file.write_bytes(bytes_of(row["audio"]))
    answers = model.predict(files)
    right = [answer.text == row["label"] for answer, row in zip(answers, rows, strict=True)]
    assert sum(right) >= 4
    for answer in answers:
        assert " ".join(word.word for word in answer.words) == answer.text
        times = [time for word in answer.words for time in (word.start, word.end)]
        assert times == sorted(times)
    (silence,) = model.predict([wav([0.0] * 8000)])
    assert silence.text == ""


@pytest.mark.slow
def test_a_list_of_the_words_makes_fewer_errors(finished):
    rows = read_rows(finished / "data", "test")
    free = package.load(finished)
    listed = package.load(finished, words=[row["label"] for row in rows])
    logits = free.logits(rows)
    sums = [model.task.stats(logits, rows).sum(axis=0) for model in (free, listed)]
    without, with_words = (float(free.task.value(one)) for one in sums)
    assert with_words < without or without == 0


@pytest.mark.slow
def test_the_alphabet_comes_beside_the_model_for_other_runtimes(finished):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(finished / "artifact")
    assert tokenizer.decode([2, 2, 0, 2, 1, 3]) == "aa b"


# --- data that can't be learned from

BAD = [
    (b"", "it is empty"),
    (wav([]), "it holds no sound"),
    (wav([0.0] * 8_000 * 600), "it lasts 600 s"),
    (
        wav([0.0] * 8_000)[:24] + (1_000_003).to_bytes(4, "little") + wav([0.0] * 8_000)[28:],
        "1,000,003 samples a second",
    ),
    (b"fLaC" + bytes(400), "it is no sound that can be read"),
    (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(5_000), "it is no sound file"),
]


def test_digits_beside_an_alphabet_without_any_are_named_with_how_to_mend_them(tmp_path):
    write_folder(tmp_path / "train", sentences(20))
    table = write_folder(tmp_path / "test", ["ab", "dd c"]) / "metadata.csv"
    table.write_text(table.read_text().replace("dd", "7"))
    wanted = (
        r"test.metadata\.csv, row 2: character '7' occurs in no row of train\. Spell numbers out, or add rows to tr"
    )
    with pytest.raises(DataError, match=wanted):
        prepare(spec.Data(train=str(tmp_path)), TASK, 0, tmp_path / "out")


def test_bad_recordings_of_a_folder_are_named_and_can_be_left_out(tmp_path, capsys):
    write_folder(tmp_path / "all", sentences(40))
    for i, (content, _) in enumerate(BAD):
        (tmp_path / "all" / f"{i}.wav").write_bytes(content)
    with pytest.raises(DataError) as error:
        prepare(spec.Data(train=str(tmp_path / "all")), TASK, 0, tmp_path / "out")
    assert "row 1: its audio" in str(error.value)
    assert "\n" not in str(error.value)
    prepare(spec.Data(train=str(tmp_path / "all"), skip_bad_rows=True), TASK, 0, tmp_path / "out")
    said = capsys.readouterr().err
    assert f"{len(BAD)} bad rows left out" in said
    assert sum(read_summary(tmp_path / "out").rows.values()) == 40 - len(BAD)


@pytest.mark.parametrize(("content", "said"), BAD, ids=[said for _, said in BAD])
def test_a_bad_recording_of_a_folder_is_named_with_the_reason(tmp_path, content, said):
    write_folder(tmp_path / "all", sentences(4))
    (tmp_path / "all" / "1.wav").write_bytes(content)
    with pytest.raises(DataError) as error:
        prepare(spec.Data(train=str(tmp_path / "all")), TASK, 0, tmp_path / "out")
    assert re.search(rf"metadata\.csv, row 2: its audio \S+1\.wav .*{said.removeprefix('it ')}", str(error.value))


# --- a Whisper as teacher


def whisper():
    if not (SHARED / "models" / "whisper-tiny.en").is_dir():
        pytest.skip("shared/models/whisper-tiny.en is not beside the repository")
    return str(SHARED / "models" / "whisper-tiny.en")


def spoken(folder, count):
    if not (source := SHARED / "data" / "coffee-orders" / "audio").is_dir():
        pytest.skip("shared/data/coffee-orders is not beside the repository")
    folder.mkdir()
    for path in sorted(source.glob("*.flac"))[:count]:
        shutil.copyfile(path, folder / path.name)
    (folder / "silence.wav").write_bytes(wav([0.0] * 16000, 16000))
    names = sorted(path.name for path in folder.iterdir())
    (folder / "metadata.csv").write_text("file_name\n" + "\n".join(names) + "\n")
    return folder


def test_a_whisper_transcribes_recordings_without_transcripts(tmp_path, cache, capsys):
    from kdexport.distill.transcripts import transcribed

    os.environ["KDEXPORT_CACHE"] = str(cache)
    folder = spoken(tmp_path / "orders", 6)
    given = {"task": TASK, "data.train": str(folder), "teacher.model": whisper()}
    settings = spec.load(None, given)
    from kdexport.data.sources import read_splits, to_rows
    from kdexport.tasks import task_class

    rows = to_rows(read_splits(settings.data)["train"], settings.data, task_class(settings.task), "if any").rows
    assert len(rows) == 7
    found, dropped = transcribed(rows, TASK, whisper(), None)
    assert len(found) + sum(dropped.values()) == 7
    texts = {row["id"]: row["label"] for row in found}
    assert sum("coffee" in text or "latte" in text or "mocha" in text or "cap" in text for text in texts.values()) >= 3
    assert all(row["heard"] for row in found)
    capsys.readouterr()
    again, _ = transcribed(rows, TASK, whisper(), None)  # from the cache
    assert again == found
    assert "transcribes" not in capsys.readouterr().err
    listed = tmp_path / "sentences.txt"
    listed.write_text("\n".join(list(texts.values())[:2]) + "\n")
    mended, left_out = transcribed(rows, TASK, whisper(), str(listed))
    assert {row["label"] for row in mended} <= set(list(texts.values())[:2])
    assert left_out["no sentence"] >= 1


def test_rows_keep_their_own_transcripts(cache):
    from kdexport.distill.transcripts import transcribed

    rows = [{"label": "as it is", "audio": "a.wav", "sha256": "0"}]
    assert transcribed(rows, TASK, "nowhere", None) == (rows, {})


@pytest.mark.slow
def test_a_summary_counts_what_was_left_out(finished):
    assert read_summary(finished / "data").doubted == {}


# --- a smaller Whisper


@pytest.fixture(scope="module")
def smaller(cache, tmp_path_factory):
    """The example of a smaller Whisper, after one epoch over some orders."""
    os.environ["KDEXPORT_CACHE"] = str(cache)
    folder = tmp_path_factory.mktemp("whisper")
    source = SHARED / "data" / "coffee-orders" / "audio"
    model = whisper()
    if not source.is_dir():
        pytest.skip("shared/data/coffee-orders is not beside the repository")
    files = sorted(source.glob("*.flac"), key=lambda path: path.stat().st_size)[:20]  # the shortest
    for split, some in {"train": files[:12], "validation": files[12:15], "test": files[15:]}.items():
        lines = [json.dumps({"audio": str(path)}) for path in some]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    given = {"data.train": str(folder), "teacher.model": model, "distill.epochs": 1}
    run_pipeline(spec.load(ROOT / "examples" / "smaller-whisper.yaml", QUICK | given), folder / "run")
    return folder / "run"


@pytest.mark.slow
def test_layers_of_a_whisper_make_a_smaller_whisper(smaller):
    report = read_report(smaller / "report.json")
    files = {v.precision: v for v in report.variants if v.shipped}
    assert report.spec["data"]["problem"] == "seq2seq"
    assert report.distillation.origin.startswith("the teacher's encoder and layers 0, 3 of its decoder")
    assert files["fp32"].file == "onnx/encoder_model.onnx"
    assert files["fp32"].max_abs_diff < 1e-4
    assert files["int8"].size_bytes < 0.4 * files["fp32"].size_bytes
    assert report.variant("teacher-torch").metric.value < 0.5  # of its own words, but those that are left out
    assert all(v.metric is not None for v in files.values())


@pytest.mark.slow
def test_a_smaller_whisper_answers_and_is_served(smaller):
    model = package.load(smaller)
    row = read_rows(smaller / "data", "test")[0]
    answer = model.predict([row["audio"]])[0]
    assert answer.text
    assert answer.to_dict(True) == {"text": answer.text, "score": round(answer.score, 6), "words": []}
    assert {path.name for path in (smaller / "artifact" / "onnx").iterdir()} == {
        f"{part}{suffix}.onnx"
        for part in ("encoder_model", "decoder_model_merged") for suffix in ("", "_quantized")
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ({"student.model": ["spread:2", "conv:96"]}, r"'spread:2' is none for automatic-speech-recognition"),
        ({"student.model": "spread:5"}, r"the teacher's decoder has 4 layers, not 5\. Ask for fewer"),
        ({"student.model": "layers:0+4"}, r"the teacher's decoder has 4 layers, not 5"),
        ({"student.model": "spread:2", "distill.loss": "ctc"}, r"ctc is not for data\.problem seq2seq"),
        ({"student.model": "spread:2", "export.variants": ["fp32", "fp16"]}, r"fp16 is none for"),
    ],
)
def test_what_a_smaller_whisper_does_not_offer_is_refused(tmp_path, given, wrong):
    asked = {"task": TASK, "data.train": "orders", "teacher.model": whisper()}
    with pytest.raises(SpecError, match=wrong):
        spec.load(None, asked | given)


def test_layers_of_a_writer_need_a_writer(teacher):
    asked = {"task": TASK, "data.train": "orders", "teacher.model": str(teacher)}
    with pytest.raises(SpecError, match=r"'spread:2' is none for"):
        spec.load(None, asked | {"student.model": "spread:2"})
    with pytest.raises(SpecError, match=r"needs a teacher that writes"):
        spec.load(None, asked | {"data.problem": "seq2seq"})
