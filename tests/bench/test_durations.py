"""Figures of recordings: real-time factor, latency by duration, encoder and decoder of a recogniser that writes."""

from __future__ import annotations

import json
import time

import msgspec
import numpy as np
import pytest
from made_reports import F1, made
from made_reports import variant as a_variant
from tones import wav
from whispers import TEXTS, write_whisper

from kdexport import spec
from kdexport.bench.engine import read_rounds
from kdexport.bench.subjects import of_file, of_model, open_target
from kdexport.export import export_student
from kdexport.models.loading import ModelAndProcessor
from kdexport.models.saving import save_model, save_writer
from kdexport.models.transcriber import Transcriber, audio_of, cut
from kdexport.pipeline.bench import measure
from kdexport.report import page_of
from kdexport.report.page import html
from kdexport.report.table import headers, real_time, table
from kdexport.results import read_report
from kdexport.tasks import kinds, load_task

TASK = "automatic-speech-recognition"
SECONDS = (0.5, 0.5, 0.8, 0.8, 1.1, 1.1, 1.5, 1.5)
# Once, so that its sum is that of a round; and no more than what the figures need.
QUICK = spec.Bench(rounds=1, round_seconds=0.2, precision=None, batch_sizes=())


def sound(seconds):
    return wav(np.random.default_rng(0).normal(0, 0.1, int(seconds * 16_000)).clip(-1, 1), 16_000)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A smaller Whisper in PyTorch, and in `onnx/` its two files."""
    folder = tmp_path_factory.mktemp("student")
    whisper = write_whisper(tmp_path_factory.mktemp("whisper"))
    teacher = Transcriber.from_pretrained(whisper).eval()
    made, how = cut(teacher, [0, 3], audio_of(teacher.config, 1.6)), audio_of(teacher.config, 1.6)
    save_writer(made, str(whisper), folder, how, TASK, 1, 1.6)
    save_model(ModelAndProcessor(made, None), folder)
    (folder / "onnx").mkdir()
    export_student(spec.Export(variants=("fp32",)), folder, folder / "onnx")
    return folder


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spoken")
    rows = []
    for i, seconds in enumerate(SECONDS):
        (folder / f"{i}.wav").write_bytes(sound(seconds))
        rows.append({"audio": str(folder / f"{i}.wav"), "text": TEXTS[i % len(TEXTS)]})
    (folder / "spoken.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder / "spoken.jsonl"


@pytest.fixture(scope="module")
def measured(student, spoken, tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    names = [str(student), str(student / "onnx" / "encoder_model.onnx")]
    measure(names, QUICK, out, texts=spec.Data(train=str(spoken)))
    return out


def test_the_real_time_factor_is_all_time_by_all_seconds_of_the_rows(measured):
    report = read_report(measured / "report.json")
    for variant in report.variants:
        (times,) = read_rounds(measured, variant.name)
        whole, rest = divmod(len(times), len(SECONDS))
        lasted = whole * sum(SECONDS)
        least, most = (sum(sorted(SECONDS, reverse=way)[:rest]) for way in (False, True))  # in an order of its own
        took = times.sum() / 1e3
        assert took / (lasted + most) * 0.999 <= variant.latency_ms.real_time_factor <= took / (lasted + least) * 1.001
    assert report.bench.durations == {"p5": 0.5, "p50": 0.95, "p95": 1.5, "p100": 1.5}


def test_each_quarter_of_the_recordings_has_a_latency(measured):
    for variant in read_report(measured / "report.json").variants:
        (times,) = read_rounds(measured, variant.name)
        cells = [cell for cell in variant.cells if cell.scenario == "duration"]
        seen = [cell.at for cell in cells]
        assert seen == [at for at in (0.5, 0.8, 1.1, 1.5) if at in seen]
        assert len(seen) == 4 or len(times) < len(SECONDS)  # a busy machine gives few samples
        assert sum(cell.samples for cell in cells) == len(times)
        assert min(cell.p50_ms for cell in cells) <= np.median(times) * 1.001
        assert max(cell.p50_ms for cell in cells) >= np.median(times) * 0.999


def test_encoder_and_decoder_are_parts_of_the_whole(student, spoken):
    rows = [json.loads(line) for line in spoken.read_text().splitlines()]
    task = load_task(student)
    file = student / "onnx" / "encoder_model.onnx"
    (model,) = of_model("student", student, ["torch"], ["cpu"])
    for target in (model, *of_file("student", student, file, ["onnxruntime"], ["cpu"])):
        opened = open_target(target, 1)
        for row in rows[:3]:
            arrays = opened.encode([row])
            started = time.perf_counter()
            logits = opened.run(arrays)
            took = 1e3 * (time.perf_counter() - started)
            run, first = opened.parts()[-1], opened.first_ms()[-1]
            assert 0 < run.encoder_ms < first <= run.encoder_ms + run.decoder_ms <= took
            assert 0 <= run.steps - len(task.ids_of(logits[0])) <= task.config.decoder.most
            assert run.steps > 1


def test_a_report_shows_what_is_known_of_recordings(measured):
    report, page = read_report(measured / "report.json"), (measured / "report.html").read_text()
    place = headers(report).index("real-time factor")
    for variant, cells in zip(report.variants, table(report), strict=True):
        found = variant.latency_ms
        assert found.encoder_p50 < found.first_token_p50 < found.model_p50
        assert found.decoder_p50 < found.model_p50
        assert found.tokens_per_second > 0
        assert cells[place] == real_time(variant)
        assert f"<td>{real_time(variant)}</td>" in page
    assert "<figcaption>By duration of the recording</figcaption>" in page
    assert '<th scope="col">encoder ms</th><th scope="col">decoder ms</th>' in page
    assert "real recordings of 0.5 to 1.5 s" in page


def test_recordings_of_one_duration_are_not_split(student, tmp_path):
    (tmp_path / "one.wav").write_bytes(sound(1.0))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"audio": str(tmp_path / "one.wav"), "text": "one"}) + "\n")
    names = [str(student / "onnx" / "encoder_model.onnx")]
    (variant,) = measure(names, QUICK, tmp_path / "out", texts=spec.Data(train=str(tmp_path / "rows.jsonl"))).variants
    (times,) = read_rounds(tmp_path / "out", variant.name)
    assert variant.latency_ms.real_time_factor == pytest.approx(times.sum() / 1e3 / len(times), rel=1e-4)
    assert not [cell for cell in variant.cells if cell.scenario == "duration"]
    assert "By duration" not in (tmp_path / "out" / "report.html").read_text()


def test_small_factors_keep_their_digits_and_texts_have_none():
    text = a_variant("student-int8", 0.9, (0.8, 0.95))
    latency = msgspec.structs.replace(
        text.latency_ms, real_time_factor=0.000524, real_time_factor_ci95=(0.00049, 0.00056)
    )
    heard = msgspec.structs.replace(text, latency_ms=latency)
    assert real_time(heard) == "0.00052 [0.00049–0.00056]"
    assert "real-time factor" in headers(made([text, heard], F1))
    assert table(made([text, heard], F1))[0][headers(made([text, heard], F1)).index("real-time factor")] == "–"
    assert "real-time" not in html(page_of(made([text], F1)))
    report = made([heard], F1)
    lasted = msgspec.structs.replace(report.bench, durations={"p5": 0.5, "p50": 30.0, "p95": 120.0, "p100": 121.0})
    assert "of 0.5 to 120 s (5th to 95th" in html(page_of(msgspec.structs.replace(report, bench=lasted)))


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: f"{kind.name}-{kind.problem}")
def test_recordings_last_as_long_as_they_are_read_and_other_rows_do_not(kind, monkeypatch):
    task = kind.__new__(kind)
    for longest in (0.5, 0.2):
        monkeypatch.setattr(kind, "longest", longest, raising=False)
        wanted = pytest.approx(min(0.4, longest)) if kind.modality == "audio" else None
        assert task.duration({"text": "a", "audio": sound(0.4), "image": "i.png"}) == wanted
