"""The language that a Whisper writes: as asked for, as set in its generation_config.json, or as detected."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kdexport.analysis import sampled
from kdexport.errors import counted
from kdexport.models.transcriber import Transcriber, writer_of
from kdexport.progress import say, warn
from kdexport.tasks.inputs.languages import known_language, shown

_RECORDINGS, _SURE = 8, 0.5


def choose_language(
    model: Transcriber, source: str, asked: str | None, rows: Sequence[dict[str, Any]], *, task: str, key: str
) -> str:
    """Set the language that a Whisper writes, and return its code; empty where its files name no languages.

    Args:
        source: its folder or hub id.
        asked: a code or English name; when None that of its generation_config.json, else what it hears in some rows.
        key: what names a language, for messages.

    Raises:
        SpecError: it does not know the language.
    """
    known = model.languages
    if wanted := asked or model.language:
        language = known_language(wanted, source, known)
    elif len(known) < 2:
        return ""
    elif rows:
        language = _heard(model, source, rows, task, key)
    else:
        language = "en" if "en" in known else known[0]
        warn(f"{source} knows {len(known)} languages, and writes {shown(language)}; {key} names another")
    if len(known) > 1:
        model.generation_config.language = language
    return language


def _heard(model: Transcriber, source: str, rows: Sequence[dict[str, Any]], task: str, key: str) -> str:
    """Return the language that is most probable on the average of some recordings, as Whisper detects it."""
    writer = writer_of(source, model, task)
    chosen = [rows[i] for i in sampled(len(rows), _RECORDINGS)]
    bands = (torch.from_numpy(writer.encode([row])["input_features"][:1]) for row in chosen)
    mean = np.mean([model.language_of(one.to(model.device))[0] for one in bands], axis=0)
    best = int(mean.argmax())
    heard = f"{shown(model.languages[best])} in {counted(len(chosen), 'recording')}, {mean[best]:.0%} sure"
    (say if mean[best] >= _SURE else warn)(f"language: {source} hears {heard}; {key} names another")
    return model.languages[best]
