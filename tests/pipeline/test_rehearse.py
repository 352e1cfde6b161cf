"""A family that no release of kdexport was tried with works, or is refused before the teacher is trained."""

import families
import pytest
from transformers import AutoConfig

from kdexport import spec
from kdexport.errors import ModelError
from kdexport.export.onnx import export_onnx
from kdexport.models import LINE_5
from kdexport.models.inference import logits_of
from kdexport.models.registry import open_trained
from kdexport.pipeline.rehearse import KNOWN, rehearse
from kdexport.runtime.predictor import Predictor
from kdexport.tasks import load_task

pytestmark = pytest.mark.skipif(not LINE_5, reason="transformers 4.57 knows no family of 2026")


def settings(folder, student, task="text-classification", train=None):
    rows = folder.parent / "rows.jsonl"
    rows.write_text('{"text": "a", "label": "b"}\n')
    flags = {"task": task, "teacher.model": str(folder), "data.train": str(rows), "student.model": student}
    if task == "causal-lm":
        flags |= {"distill.augment": None}
    return spec.load(None, flags)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*families.NEW_TEXTS, *families.NEW_WRITERS])
def test_families_of_2026_are_exported_and_make_students(tmp_path, name):
    folder, file = tmp_path / name, tmp_path / "model.onnx"
    families.write(name, folder)
    export_onnx(folder, file)
    task, model = load_task(folder), open_trained(folder)
    rows = [*task.examples(), *task.probes()]
    assert task.difference(Predictor(task, file).logits(rows), logits_of(model, task, rows)) < 1e-4
    assert name not in KNOWN
    for student in ("layers:2", "2x64"):
        rehearse(settings(folder, student, task.name))


def test_a_family_without_an_onnx_graph_is_refused_before_any_training(tmp_path, capfd):
    sizes = families.SIZES | {"num_key_value_heads": 2, "pad_token_id": 0}
    families.NEW_TEXTS["qwen3_5_text"] = sizes
    folder = tmp_path / "qwen"
    try:
        families.write("qwen3_5_text", folder)
    finally:
        del families.NEW_TEXTS["qwen3_5_text"]
    with pytest.raises(
        ModelError, match=r"a student layers:1 of .* \(qwen3_5_text\) can't be made: .* Take a bag, cnn"
    ):
        rehearse(settings(folder, "layers:1"))
    rehearse(settings(folder, "bag"))
    seen = capfd.readouterr()
    assert "qwen3_5_text is new here" in seen.err
    assert "graph(%" not in seen.out + seen.err


def test_families_that_tests_export_are_not_rehearsed(tmp_path, capfd):
    families.write("bert", tmp_path / "bert")
    rehearse(settings(tmp_path / "bert", "tiny"))
    assert capfd.readouterr().err == ""
    assert AutoConfig.from_pretrained(tmp_path / "bert").model_type in KNOWN


def test_every_family_that_needs_no_rehearsal_is_exported_by_a_test():
    shown = {*families.TEXTS, *families.WRITERS, *families.IMAGES, *families.SOUNDS}
    assert shown <= KNOWN
    assert KNOWN - shown == {"albert", "camembert", "mpnet", "xlm-roberta"}  # tests/models/test_shrink.py has these
