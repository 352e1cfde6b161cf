"""The language of a multilingual Whisper: heard or asked for, and the same in data, student, artifact and server."""

from __future__ import annotations

import json

import httpx
import numpy as np
import pytest
import torch
from serve_process import served
from tones import wav
from transformers import WhisperForConditionalGeneration
from transformers.models.whisper.tokenization_whisper import LANGUAGES
from whispers import write_whisper

import kdexport as package
from kdexport import spec
from kdexport.data import prepare, read_rows, read_summary
from kdexport.distill.student import build_writer
from kdexport.distill.teachers import transcriber_of
from kdexport.distill.transcripts import prepare_transcriber, transcribed
from kdexport.errors import SpecError
from kdexport.models.loading import ModelAndProcessor
from kdexport.models.saving import save_model
from kdexport.models.spoken import choose_language
from kdexport.models.transcriber import Transcriber, writer_of
from kdexport.pipeline.export_model import export
from kdexport.runtime import artifact
from kdexport.tasks import load_task
from kdexport.tasks.inputs.languages import NAMES, code_of

TASK = "automatic-speech-recognition"


def sound(seconds: float, seed: int) -> bytes:
    random, times = np.random.default_rng(seed), np.arange(int(seconds * 16_000)) / 16_000
    tones = sum(np.sin(2 * np.pi * random.uniform(80, 2000) * times) for _ in range(4))
    return wav((0.1 * tones).tolist(), 16_000)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    return write_whisper(tmp_path_factory.mktemp("multilingual"), languages=("en", "de", "fr"))


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recordings")
    for seed in range(12):
        (folder / f"{seed}.wav").write_bytes(sound(0.5 + seed / 10, seed))
    lines = [f"{seed}.wav,one latte please" for seed in range(12)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text", *lines]) + "\n")
    return folder


def settings(whisper, recordings, **given):
    asked = {"task": TASK, "teacher.model": str(whisper), "data.train": str(recordings), "student.model": "spread:2"}
    return spec.load(None, asked | {f"data.{key}": value for key, value in given.items()})


def prepared(how, out):
    out.mkdir()
    prepare(how.data, how.task, 0, out, transcribe=transcriber_of(how))
    return out


def test_names_are_whispers():
    assert NAMES == LANGUAGES
    assert [*map(code_of, ("German", "de-AT", "<|de|>", "pt_BR", "haitian creole", "xx"))] == [
        "de", "de", "de", "pt", "ht", "xx"
    ]  # fmt: skip


def test_a_language_is_heard_as_transformers_hears_it(whisper):
    model = Transcriber.from_pretrained(whisper).eval()
    bands = torch.from_numpy(
        writer_of(whisper, model, TASK).encode([{"audio": sound(1.0, i)} for i in range(4)])["input_features"]
    )
    plain = WhisperForConditionalGeneration.from_pretrained(whisper).eval()
    theirs = plain.detect_language(bands).tolist()
    tokens = plain.generation_config.lang_to_id
    ours = [tokens[f"<|{model.languages[best]}|>"] for best in model.language_of(bands).argmax(axis=1)]
    assert ours == theirs


def test_what_the_teacher_hears_is_said_and_follows_to_the_student(whisper, recordings, tmp_path, capsys):
    data = prepared(settings(whisper, recordings), tmp_path / "data")
    language = read_summary(data).language
    assert f"({language}) in 8 recordings" in (said := capsys.readouterr().err)
    assert "data.language names another" in said
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    teacher.mkdir()
    student.mkdir()
    rows = read_rows(data, "train")
    prepare_transcriber(read_summary(data), str(whisper), rows, teacher)
    ids = WhisperForConditionalGeneration.from_pretrained(whisper).generation_config.lang_to_id
    built = build_writer(spec.Student(), "spread:2", teacher, rows, student)
    save_model(ModelAndProcessor(built.opened.model, None), student)
    for folder in (teacher, student):
        config = load_task(folder).config
        assert config.language == language
        assert config.decoder.start[1] == ids[f"<|{language}|>"]
        assert len(config.decoder.start) == 4


def test_a_student_of_one_alphabet_has_the_language_too(whisper, recordings, tmp_path):
    how = spec.load(
        None, {"task": TASK, "teacher.model": str(whisper), "data.train": str(recordings), "data.language": "German"}
    )
    data = prepared(how, tmp_path / "data")
    (tmp_path / "teacher").mkdir()
    prepare_transcriber(read_summary(data), str(whisper), read_rows(data, "train"), tmp_path / "teacher")
    assert load_task(tmp_path / "teacher").config.language == "de"


def test_texts_in_another_language_are_no_texts_of_the_cache(whisper, recordings, tmp_path, monkeypatch):
    monkeypatch.setenv("KDEXPORT_CACHE", str(tmp_path))
    rows = [{"audio": str(recordings / "3.wav"), "label": None, "sha256": "3"}]
    for language in ("de", "fr", "de"):
        transcribed(rows, TASK, str(whisper), None, language)
    found = [json.loads(file.read_bytes())["3"][0] for file in (tmp_path / "transcripts").iterdir()]
    assert len(set(found)) == len(found) == 2


def test_another_rule_of_the_teacher_makes_other_transcripts(recordings, tmp_path, monkeypatch):
    monkeypatch.setenv("KDEXPORT_CACHE", str(tmp_path / "cache"))
    teacher = write_whisper(tmp_path / "teacher", languages=("en", "de"))
    rules = json.loads((teacher / "generation_config.json").read_text())
    rows = [{"audio": str(recordings / "3.wav"), "label": None, "sha256": "3"}]
    transcribed(rows, TASK, str(teacher), None, "de")
    (teacher / "generation_config.json").write_text(json.dumps(rules | {"suppress_tokens": list(range(100))}))
    transcribed(rows, TASK, str(teacher), None, "de")
    first, second = (json.loads(file.read_bytes())["3"][0] for file in (tmp_path / "cache/transcripts").iterdir())
    assert first != second


def test_another_teacher_in_the_same_folder_transcribes_again(recordings, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KDEXPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("kdexport.pipeline.run._teachers", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    for seed, built in ((0, True), (0, False), (1, True)):
        teacher = write_whisper(tmp_path / "teacher", languages=("en", "de"), seed=seed)
        with pytest.raises(KeyboardInterrupt):
            package.run(data=recordings, teacher=teacher, task=TASK, out=tmp_path / "run")
        assert ("hears" in capsys.readouterr().err) is built


def test_a_language_that_the_teacher_lacks_is_refused_before_any_work(whisper, recordings, tmp_path):
    with pytest.raises(
        SpecError, match=r"the language 'klingon' is none that teacher .* knows\. Name one of its 3, such as en, de, fr"
    ):
        settings(whisper, recordings, language="klingon")
    english = write_whisper(tmp_path / "tiny.en")
    with pytest.raises(
        SpecError, match=r"the language 'de' is none that teacher .*tiny\.en knows\. Name a multilingual Whisper"
    ):
        settings(english, recordings, language="de")
    assert settings(english, recordings, language="english").data.language == "english"
    unnamed = write_whisper(tmp_path / "unnamed", languages=("en", "de"))
    rules = json.loads((unnamed / "generation_config.json").read_text())
    (unnamed / "generation_config.json").write_text(json.dumps(rules | {"lang_to_id": {}}))
    config = json.loads((unnamed / "config.json").read_text())
    (unnamed / "config.json").write_text(json.dumps(config | {"vocab_size": 51_865}))  # as a multilingual one has
    with pytest.raises(SpecError, match=r"Add lang_to_id to its generation_config\.json"):
        settings(unnamed, recordings, language="de")


def test_a_language_that_nobody_names_is_said(whisper, capsys):
    model = Transcriber.from_pretrained(whisper)
    assert choose_language(model, str(whisper), None, [], task=TASK, key="--language") == "en"
    assert "knows 3 languages, and writes English (en); --language names another" in capsys.readouterr().err


def test_a_language_that_is_forced_stays(whisper):
    model = Transcriber.from_pretrained(whisper)
    rules = model.generation_config
    rules.forced_decoder_ids = [[1, rules.lang_to_id["<|fr|>"]], *rules.forced_decoder_ids[1:]]
    assert choose_language(model, str(whisper), None, [], task=TASK, key="--language") == "fr"
    assert choose_language(model, str(whisper), "de", [], task=TASK, key="--language") == model.language == "de"


@pytest.fixture(scope="module")
def german(whisper, tmp_path_factory):
    folder = tmp_path_factory.mktemp("german") / "artifact"
    export(whisper, folder, variants="fp32", language="german")
    return folder


def test_export_writes_the_language_that_is_named(whisper, german, tmp_path):
    task, rules = artifact.read_manifest(german).task, json.loads((german / "generation_config.json").read_text())
    assert (task.language, rules["language"], rules["task"]) == ("de", "de", "transcribe")
    assert task.decoder.start[1] == rules["lang_to_id"]["<|de|>"]
    with pytest.raises(SpecError, match=r"'xx' is none that"):
        export(whisper, tmp_path / "none", language="xx")


def test_the_server_answers_in_the_models_language_and_refuses_others(german):
    content = sound(1.0, 0)
    expected = package.load(german).predict([content])[0].text
    with served(f"orders={german}") as found:

        def ask(**more):
            fields = {"model": "orders", "response_format": "verbose_json", **more}
            return httpx.post(f"{found.url}/v1/audio/transcriptions", data=fields, files={"file": ("a.wav", content)})

        for language in ({}, {"language": "de"}, {"language": "German"}, {"language": "de-AT"}):
            answer = ask(**language).json()
            assert (answer["language"], answer["text"]) == ("de", expected)
        refused = ask(language="fr")
        assert refused.status_code == 400
        assert "orders recognises German (de) alone: language may be absent, or de" in refused.text
