"""Rehearse a run of a family that is not known to work: build and export a student with random weights."""

import tempfile
from pathlib import Path
from typing import Any

from kdexport import spec
from kdexport.data import demo
from kdexport.errors import ModelError, first_line
from kdexport.progress import say
from kdexport.spec import derive
from kdexport.spec.teachers import base_of, is_adapter, kind_of, origin
from kdexport.tasks import load_task, task_class

# Families whose students are built and exported by tests.
KNOWN = {
    "albert", "bert", "camembert", "deberta-v2", "distilbert", "electra", "modernbert", "mpnet", "roberta",
    "xlm-roberta", "gpt2", "llama", "vit", "resnet", "convnext", "audio-spectrogram-transformer", "wav2vec2",
}  # fmt: skip
_LAYERS, _TOKENS = 2, 32


def rehearse(settings: spec.Spec) -> None:
    """Build a student of each shape from a few random layers of the teacher's family, and export it.

    Raises:
        ModelError: the family has no such students, or no ONNX graph: before hours of training, not after.
    """
    from kdexport.models.loading import open_config

    teacher = demo.located(origin(settings))
    if task_class(settings.task).modality == "audio":  # its inputs follow from the data
        return
    for name in derive.students(settings):
        shape = derive.shape_of(name)
        if shape.kind in ("network", "conv") or derive.pools(settings.student, name):
            continue
        model = name if shape.kind == "model" else teacher
        if shape.kind != "model" and kind_of(model) != "torch":
            continue
        config = open_config(base_of(Path(model)) if is_adapter(Path(model)) else model)
        if config.model_type in KNOWN:
            continue
        say(f"student: {config.model_type} is new here: a small {name} with random weights is exported first")
        try:
            _build_and_export(settings, name, model, config)
        except Exception as error:  # whatever a model's own code raises on sizes that it was not made for
            what = error.what if isinstance(error, ModelError) else first_line(error)
            raise ModelError(
                f"a student {name} of {model} ({config.model_type}) can't be made: {what}",
                "Take a bag, cnn, gru or encoder as student, or another teacher",
            ) from None


def _build_and_export(settings: spec.Spec, name: str, model: str, config: Any) -> None:
    from kdexport.distill.student import build_student
    from kdexport.export.onnx import export_onnx
    from kdexport.models.loading import ModelAndProcessor, open_processor
    from kdexport.models.registry import random_model
    from kdexport.models.saving import save_model, save_task
    from kdexport.models.shrink import with_layers

    def write(opened: ModelAndProcessor, folder: Path) -> None:
        folder.mkdir()
        save_task(opened, _TOKENS, labels, folder, task=settings.task)
        save_model(opened, folder)

    shape, task = derive.shape_of(name), task_class(settings.task)
    labels = ["a", "b"] if task.has_labels else []
    if labels:
        config.id2label = dict(enumerate(labels))
    if shape.kind != "model":
        config = with_layers(config, range(min(_LAYERS, config.num_hidden_layers)))
        name = f"{min(_LAYERS, shape.layers)}x{shape.width}" if shape.kind == "narrow" else "layers:1"
    with tempfile.TemporaryDirectory() as work:
        teacher, student = Path(work, "teacher"), Path(work, "student")
        opened = ModelAndProcessor(random_model(config, settings.task), open_processor(model, settings.task))
        write(opened, teacher)
        if shape.kind != "model":
            texts = [row["text"] for row in load_task(teacher).examples()]
            write(build_student(settings.student, name, teacher, texts).opened, student)
        export_onnx(teacher if shape.kind == "model" else student, Path(work, "model.onnx"))
