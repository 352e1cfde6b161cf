"""A trained model, whoever trained it, as a model folder of ours."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdexport.errors import ModelError, SpecError, counted
from kdexport.models.inference import logits_of
from kdexport.models.loading import ModelAndProcessor, alphabet_of, open_classifier, open_config, own_labels
from kdexport.models.registry import task_of
from kdexport.models.saving import save_model, save_task, save_writer
from kdexport.models.spoken import choose_language
from kdexport.models.transcriber import Transcriber, audio_of, is_transcriber
from kdexport.models.written import trim_writer
from kdexport.progress import bar, say
from kdexport.tasks import DEFAULT, load_task, task_class
from kdexport.tasks.classes import function_of
from kdexport.tasks.config import Function

_AT_MOST = 512  # tokens, without --max-length
_LONGEST_S = 120.0  # of a recording that is read in several windows
_LARGEST_BYTES = 2**31  # of an ONNX file, which is one protobuf message


def take_trained(
    model: str, max_length: int | None, rows: Sequence[dict[str, Any]], out: Path,
    language: str | None = None, vocabulary: str | None = None,
) -> None:  # fmt: skip
    """Write a model folder with `task.json`, and `reference.npy`: its logits in PyTorch.

    Args:
        model: Hugging Face folder or hub id of a classifier or a language model.
        max_length: tokens of each text; what the model reads, but at most 512, when None.
        rows: what the reference is computed for, before the task's probes and examples.
        language: what a multilingual Whisper is to write; when None see `choose_language`.
        vocabulary: `corpus` leaves a Whisper the tokens alone that it writes for the rows.

    Raises:
        ModelError: it is no trained model that can be exported.
    """
    config = open_config(model)
    task_name = task_of(config, model) or DEFAULT
    kind = task_class(task_name)
    for row in rows:  # the column that was named holds paths, if it is no column of texts
        row.setdefault(kind.modality, row.get("text"))
    if is_transcriber(config):
        written: Any = Transcriber.from_pretrained(model, dtype=torch.float32).eval()
        choose_language(written, model, language, rows, task=task_name, key="--language")
        save_writer(written, model, out, audio_of(config), task_name, 1, _LONGEST_S)
        if vocabulary == "corpus":
            with bar("vocabulary", len(rows)) as advance:
                kept = trim_writer(written, out, logits_of(written, load_task(out), rows, advance=advance))
            of = f"those that it writes for {counted(len(rows), 'recording')} of --data"
            say(f"vocabulary: {kept:,} of {config.vocab_size:,} tokens, {of}")
        _write(ModelAndProcessor(written, None), rows, out, model)
        return
    for flag, value in {"language": language, "vocabulary": vocabulary}.items():
        if value:
            raise SpecError(f"--{flag} has no effect: {model} is no Whisper", "Leave it out")
    opened = open_classifier(model, config, task_name)
    labels = own_labels(config) if kind.has_labels else []
    if kind.transcribes:
        labels = alphabet_of(model, getattr(config, "vocab_size", len(labels)))
    if len(set(labels)) < len(labels):
        raise ModelError(f"model {model!r} has labels of the same name", "Tell them apart: id2label in config.json")
    if 4 * opened.model.num_parameters() >= _LARGEST_BYTES:
        raise ModelError(f"model {model!r} has more than 2 GB of weights", "Distil it: kdexport run --teacher …")
    function: Function = kind.function
    if len({other.function for other in kind.kinds().values()}) > 1:
        function = function_of(len(labels), config.problem_type)
    save_task(opened, max_length, labels, out, task=task_name, function=function, at_most=_AT_MOST, rows=rows)
    _write(opened, rows, out, model)


def _write(opened: ModelAndProcessor, rows: Sequence[dict[str, Any]], out: Path, name: str) -> None:
    save_model(opened, out)
    task = load_task(out)
    everything = [*rows, *task.probes(), *task.examples()]
    with bar("PyTorch reference", len(everything)) as advance:
        reference = logits_of(opened.model, task, everything, advance=advance)
    if not np.isfinite(reference).all():
        raise ModelError(f"model {name!r} gives logits that are not finite")
    np.save(out / "reference.npy", reference)
