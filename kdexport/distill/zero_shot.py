"""A model of natural language inference as teacher: how true is a sentence about each label, given the text?

Yin, Hay and Roth 2019 (https://arxiv.org/abs/1909.00161), and transformers' pipeline `zero-shot-classification`, whose
scores are those of these logits: the entailment of each label, or its lead over contradiction where a text may have
several.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from kdexport import spec
from kdexport.data import demo, read_summary
from kdexport.errors import ModelError
from kdexport.files import write_json
from kdexport.models.inference import logits_of
from kdexport.models.loading import open_classifier, open_config, own_labels
from kdexport.models.registry import open_to_read
from kdexport.models.saving import longest_input, save_model, save_task
from kdexport.spec.teachers import ZERO_SHOT
from kdexport.tasks import DEFAULT, load_task, task_class
from kdexport.tasks.metrics import Array

NLI = "nli"  # within a teacher's folder
_RECORD = "hypotheses.json"
_PAIRS = 1024  # of a text and a hypothesis, read before progress is shown


class _Hypotheses(msgspec.Struct, frozen=True):
    """One sentence a label, and the places of two outputs of the model; `contradiction` where labels are several."""

    sentences: list[str]
    entailment: int
    contradiction: int | None


def take_zero_shot(settings: spec.Spec, teacher: str, data: Path, out: Path) -> list[str]:
    """Write the model, with a sentence for each label, as `nli/`; return the labels in the order of its logits.

    Raises:
        ModelError: it is no model of language inference, or the rows are pairs of texts.
    """
    summary, model = read_summary(data), demo.located(teacher.removeprefix(ZERO_SHOT))
    if "text_pair" in summary.columns:
        what = f"teacher {teacher} reads a text beside a sentence about its label, and these rows are pairs of texts"
        raise ModelError(what, "Name another teacher")
    labels = summary.labels or list(settings.data.labels or ())
    descriptions = settings.data.labels if isinstance(settings.data.labels, dict) else {}
    sentences = [settings.teacher.hypothesis.replace("{}", descriptions.get(label, label)) for label in labels]
    config = open_config(model)
    names = [name.lower() for name in own_labels(config)]
    entailment = next((i for i, name in enumerate(names) if name.startswith("entail")), None)
    if entailment is None or len(names) < 2:
        what = f"teacher {teacher} is no model of language inference: its labels are {', '.join(names[:4])}"
        raise ModelError(what, "Name one with a label entailment, or set id2label in its config.json")
    opened = open_classifier(model, config, DEFAULT)
    folder = out / NLI
    folder.mkdir(exist_ok=True)
    # A text may have as many tokens as anywhere else, beside the sentence.
    room = max(len(opened.processor(sentence)["input_ids"]) for sentence in sentences)
    usual = (settings.data.max_length or task_class(DEFAULT).usual_length) + room
    if longest_input(opened.model, opened.processor) <= room:
        raise ModelError(f"teacher {teacher} can't read a sentence of {room} tokens", "Shorten descriptions")
    save_task(opened, None, own_labels(config), folder, at_most=usual)
    save_model(opened, folder)
    several = not task_class(settings.task, settings.data.problem).one_label
    # As the pipeline has it: the first label is contradiction, unless that is entailment.
    contradiction = (len(names) - 1 if entailment == 0 else 0) if several else None
    write_json(folder / _RECORD, _Hypotheses(sentences, entailment, contradiction))
    return labels


class ZeroShot:
    """An opened model of language inference as a function of rows."""

    def __init__(self, teacher: Path, dtype: str, *, all_devices: bool) -> None:
        folder = teacher / NLI
        self._model, self._task = open_to_read(folder, dtype, all_devices=all_devices), load_task(folder)
        self._asked = msgspec.json.decode((folder / _RECORD).read_bytes(), type=_Hypotheses)

    def logits(self, rows: Sequence[dict[str, Any]], advance: Callable[[int], None]) -> Array:
        """Return the logits float32 [N, C] of texts for all labels."""
        asked, found = self._asked, list[Array]()
        step = max(1, _PAIRS // len(asked.sentences))
        for start in range(0, len(rows), step):
            some = rows[start : start + step]
            pairs = [{"text": row["text"], "text_pair": sentence} for row in some for sentence in asked.sentences]
            outputs = logits_of(self._model, self._task, pairs).reshape(len(some), len(asked.sentences), -1)
            entailed = outputs[..., asked.entailment]
            against = 0.0 if asked.contradiction is None else outputs[..., asked.contradiction]
            found.append(np.asarray(entailed - against, np.float32))
            advance(len(some))
        return np.concatenate(found)
