"""Transcripts by the teacher, for recordings without any, and what makes them trustworthy.

A recogniser that writes freely invents words on silence, and loops. A transcript is left out where its tokens are
improbable, where it compresses too well, or where a run of four words returns: the limits of OpenAI's `transcribe`
(https://github.com/openai/whisper), and no repetition in what are single sentences. Where the sentences that can be
said are given, the nearest one is taken.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec.structs import replace

from kdexport import spec
from kdexport.data import Summary
from kdexport.data.read import read_lines
from kdexport.distill.store import cache_folder
from kdexport.distill.targets import SoftTargets
from kdexport.errors import ModelError
from kdexport.files import digest, hash_file, write_bytes, write_json
from kdexport.models.loading import ModelAndProcessor
from kdexport.models.saving import save_model, save_processor
from kdexport.models.spoken import choose_language
from kdexport.models.transcriber import Heard, Transcriber, audio_of, config_of, writer_of
from kdexport.progress import bar, say, warn
from kdexport.tasks.config import Arrays, Row, TaskConfig
from kdexport.tasks.inputs import audio
from kdexport.tasks.inputs.media import Encoded
from kdexport.tasks.inputs.transcripts import normalised
from kdexport.tasks.speech_seq2seq import SpeechSeq2Seq

Rows = list[dict[str, Any]]

_LEAST_LOG_P, _MOST_COMPRESSION, _MOST_REPEATS = -1.0, 2.4, 1
# A text is taken for a sentence that at most so many of its characters differ from.
_NEAR = 0.25
_BATCH = 8
_SAVED_EVERY = 64
_STEP_S = 0.02
_TOP_K = 16  # tokens with a probability in soft targets, as Whisper is sure of most


def transcribe(
    splits: Mapping[str, Sequence[dict[str, Any]]], task: str, model: str, settings: spec.Data
) -> tuple[dict[str, Rows], dict[str, dict[str, int]], str]:
    """Transcribe the rows of all splits that have no label, in the language of the spec, else of the train recordings.

    Returns:
        The rows by split, how many each filter left out, and the language's code; empty where it is not known.

    Raises:
        SpecError: the teacher does not know the language.
    """
    language = choose_language(
        _open(model).to(_device()), model, settings.language, splits["train"], task=task, key="data.language"
    )
    found = {name: transcribed(rows, task, model, settings.sentences, language) for name, rows in splits.items()}
    return {name: rows for name, (rows, _) in found.items()}, {name: why for name, (_, why) in found.items()}, language


def transcribed(
    rows: Sequence[dict[str, Any]], task: str, model: str, sentences: str | None, language: str = ""
) -> tuple[Rows, dict[str, int]]:
    """Give rows without a label what the teacher hears, marked `heard`; drop those that are not to be trusted.

    Returns:
        The rows, and how many each filter left out: `improbable`, `compressed`, `repeated`, `empty`, `no sentence`.
    """
    allowed = read_lines(Path(sentences)) if sentences else []
    found = _heard(task, model, [row for row in rows if row["label"] is None], language)
    kept, dropped = Rows(), Counter[str]()
    for row in rows:
        if row["label"] is not None:
            kept.append(row)
            continue
        heard = found[row["sha256"]]
        text = normalised(heard.text)
        if why := _doubt(heard, text):
            dropped[why] += 1
        elif allowed and (text := _nearest(text, allowed)) == "":
            dropped["no sentence"] += 1
        else:
            kept.append(row | {"label": text, "heard": True})
    if dropped:
        shares = ", ".join(f"{count:,} {why}" for why, count in dropped.most_common())
        warn(f"data: {dropped.total():,} of {len(found):,} transcripts by the teacher are left out: {shares}")
    return kept, dict(dropped)


def prepare_transcriber(data: Summary, model: str, rows: Rows, out: Path) -> None:
    """Write a Whisper as a teacher's folder, with `task.json`.

    Its answers are tokens with their probabilities for the problem seq2seq, else paths of the data's characters.
    """
    opened = _open(model, data.language)
    seconds, how = audio.speech_seconds(rows), audio_of(opened.config)
    if data.problem == "seq2seq":
        config = config_of(opened, save_processor(model, how, out), how, data.task, _TOP_K, seconds)
    else:
        save_processor(model, how, out)
        how = replace(how, steps=max(1, round(seconds / _STEP_S)))
        config = TaskConfig(
            task=data.task, labels=data.labels, inputs=["input_features"], function="none", audio=how,
            language=opened.language,
        )  # fmt: skip
    write_json(out / "task.json", config)
    save_model(ModelAndProcessor(opened, None), out)


def heard_once(
    model: Any, task: SpeechSeq2Seq, rows: Sequence[dict[str, Any]], soft: SoftTargets | None
) -> tuple[Rows, SoftTargets | None, Encoded]:
    """Return the rows that one window holds, their soft targets, and what a decoder learns them from.

    The encoder is frozen, so its states `heard` float16 [T, H] are computed once. The tokens are the teacher's, or
    those of the transcripts where there are no soft targets.

    Raises:
        ModelError: every recording is longer than the window.
    """
    chosen = [i for i, row in enumerate(rows) if task.windows(row) == 1]
    if not chosen:
        raise ModelError("all recordings are longer than what the student reads at once", "Raise student.seconds")
    if len(chosen) < len(rows):
        say(f"student: {len(rows) - len(chosen):,} of {len(rows):,} recordings are longer than a window, and left out")
    rows = [rows[i] for i in chosen]
    if soft is not None:
        soft = soft.take(chosen)
        rows = [row | {"tokens": task.ids_of(packed)} for row, packed in zip(rows, soft, strict=True)]

    return rows, soft, Encoded(rows, partial(_states, model, task))  # no closure: other processes get it pickled


def _states(model: Any, task: SpeechSeq2Seq, row: Row) -> Arrays:
    bands = torch.from_numpy(task.encode([row])["input_features"]).to(model.device)
    with torch.inference_mode():
        heard: Arrays = {"heard": model.encoded(bands)[0].half().cpu().numpy()}
    return heard | task.tokens(row)


def _open(model: str, language: str = "") -> Any:
    """Open a Whisper, set to a language if it knows several."""
    opened: Any = Transcriber.from_pretrained(model, dtype=torch.float32).eval()
    if language and len(opened.languages) > 1:
        opened.generation_config.language = language
    return opened


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _heard(task: str, model: str, rows: Rows, language: str) -> dict[str, Heard]:
    """Return what the teacher hears in each recording by its sha256, of which the cache has what was heard before."""
    if not rows:
        return {}
    kinds = ("*.safetensors", "*.bin", "*.json")  # weights, and what they write by
    files = {path.name: hash_file(path) for kind in kinds for path in Path(model).glob(kind)} or model
    file = cache_folder() / "transcripts" / f"{digest([files, _MOST_REPEATS, language])[:32]}.json"
    found = msgspec.json.decode(file.read_bytes(), type=dict[str, Heard]) if file.is_file() else {}
    missing = {row["sha256"]: row for row in rows if row["sha256"] not in found}
    if missing:
        say(f"data: the teacher transcribes {len(missing):,} recordings")
        transcriber = _open(model, language).to(_device())
        writer = writer_of(model, transcriber, task)
        transcriber.writes(writer, writer)
        file.parent.mkdir(parents=True, exist_ok=True)
        with bar("transcribe", len(missing)) as advance:
            for chunk in _chunks(list(missing), _SAVED_EVERY):
                for names in _chunks(chunk, _BATCH):
                    bands = torch.from_numpy(writer.encode([missing[name] for name in names])["input_features"])
                    found |= zip(names, transcriber.transcribe(bands.to(transcriber.device)), strict=True)
                    advance(len(names))
                write_bytes(file, msgspec.json.encode(found))
    return {row["sha256"]: found[row["sha256"]] for row in rows}


def _chunks(names: list[str], size: int) -> Iterator[list[str]]:
    return (names[i : i + size] for i in range(0, len(names), size))


def _doubt(heard: Heard, text: str) -> str:
    """Return why a transcript is not to be trusted, or an empty text."""
    if not text:
        return "empty"
    if heard.log_p < _LEAST_LOG_P:
        return "improbable"
    if heard.compression > _MOST_COMPRESSION:
        return "compressed"
    return "repeated" if heard.repeats > _MOST_REPEATS else ""


def _nearest(text: str, allowed: list[str]) -> str:
    from rapidfuzz import process
    from rapidfuzz.distance import Levenshtein

    found = process.extractOne(text, allowed, scorer=Levenshtein.normalized_distance, score_cutoff=_NEAR)
    return str(found[0]) if found else ""
