"""Every family is exported by torch's own exporters: the same logits, known names, and attention that fuses."""

import importlib

import families
import numpy as np
import onnx
import pytest
import torch
from transformers import AutoConfig

from kdexport.errors import ModelError
from kdexport.export.fuse import fuse
from kdexport.export.onnx import export_onnx, fusable
from kdexport.models import LINE_5
from kdexport.models.inference import logits_of
from kdexport.models.registry import open_trained
from kdexport.runtime.predictor import Predictor
from kdexport.tasks import load_task

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def family(once):
    """A model folder with its graph, made once: the 20 of them take a minute."""

    def get(name: str):
        def make(folder):
            families.write(name, folder)
            assert export_onnx(folder, folder / "model.onnx") == "torchscript"

        return once(f"family-{name}", make)

    return get


def differences(folder, file):
    """max |Δlogit| of whole batches and of single rows."""
    task, model = load_task(folder), open_trained(folder)
    rows = [*task.examples(), *task.probes()]
    logits, predictor = logits_of(model, task, rows), Predictor(task, file)
    single = np.concatenate([predictor.run(task.encode([row])) for row in rows])
    return [task.difference(found, logits) for found in (predictor.logits(rows), predictor.logits(rows, 3), single)]


@pytest.mark.parametrize("name", families.EVERY)
def test_a_graph_answers_as_the_model_in_all_shapes(family, name):
    folder = family(name)
    assert max(differences(folder, folder / "model.onnx")) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", families.EVERY)
def test_dynamos_graph_answers_the_same(family, name, tmp_path):
    file = tmp_path / "model.onnx"
    assert export_onnx(family(name), file, ["dynamo"]) == "dynamo"
    assert max(differences(family(name), file)) < TOLERANCE


@pytest.mark.parametrize("name", families.EVERY)
def test_attention_fuses_in_every_layer_of_the_known_families(family, name, tmp_path):
    folder, fused = family(name), tmp_path / "fused.onnx"
    size = fusable(folder)
    assert (size.layers if size else None) == families.FUSED.get(name)
    if size:
        assert fuse(folder / "model.onnx", fused, *size)
        operators = [node.op_type for node in onnx.load(fused).graph.node]
        assert operators.count("Attention") == size.layers
        plain = [node.op_type for node in onnx.load(folder / "model.onnx").graph.node]
        assert operators.count("ReduceMax") == plain.count("ReduceMax")
        assert max(differences(folder, fused)) < 10 * TOLERANCE


@pytest.mark.parametrize("name", families.WRITERS)
def test_caches_have_the_names_that_other_runtimes_read(family, name):
    graph = onnx.load(family(name) / "model.onnx").graph
    axes = {
        tensor.name: [d.dim_param or d.dim_value for d in tensor.type.tensor_type.shape.dim]
        for tensor in (*graph.input, *graph.output)
    }
    heads, size = (4, 16) if name == "gpt2" else (2, 16)
    total = "past_sequence_length + sequence_length"
    assert axes.pop("position_ids") == axes.pop("input_ids") == ["batch_size", "sequence_length"]
    assert axes.pop("attention_mask") == ["batch_size", total]
    assert axes.pop("logits")[:2] == ["batch_size", "sequence_length"]
    expected = {}
    for i in range(4):
        for kind in ("key", "value"):
            expected[f"past_key_values.{i}.{kind}"] = ["batch_size", heads, "past_sequence_length", size]
            expected[f"present.{i}.{kind}"] = ["batch_size", heads, total, size]
    assert axes == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", families.WRITERS)
def test_dynamo_stores_tied_embeddings_once(family, name, tmp_path):
    folder, file = family(name), tmp_path / "model.onnx"
    config = AutoConfig.from_pretrained(folder)
    if not config.tie_word_embeddings:
        pytest.skip(f"{name} has a head of its own here")
    export_onnx(folder, file, ["dynamo"])
    table = 4 * config.vocab_size * 64
    assert (folder / "model.onnx").stat().st_size - file.stat().st_size > 0.9 * table
    assert b"site-packages" not in file.read_bytes()


def test_what_can_not_be_traced_is_written_by_dynamo_and_what_neither_writes_is_refused(family, monkeypatch, tmp_path):
    folder, file = family("tiny"), tmp_path / "model.onnx"

    def fail(*args, **kwargs):
        raise RuntimeError("tracing failed for this test:\nsee above")

    monkeypatch.setattr(torch.onnx.utils, "export", fail)
    assert export_onnx(folder, file) == "dynamo"
    assert max(differences(folder, file)) < TOLERANCE
    with pytest.raises(ModelError, match="bert models can't be exported to ONNX: tracing failed for this test: see"):
        export_onnx(folder, file, ["torchscript"])


@pytest.mark.skipif(LINE_5, reason="Optimum's exporter holds transformers at 4.57")
@pytest.mark.filterwarnings("ignore")  # Optimum's, of TorchScript
@pytest.mark.parametrize("name", families.EVERY)
def test_the_graph_is_optimums_operator_by_operator(family, name, tmp_path):
    exporters = pytest.importorskip("optimum.exporters.onnx")
    importlib.import_module("optimum.exporters.onnx.model_configs")  # which registers families
    if name == "roberta":
        pytest.skip("Optimum knows that RoBERTa reads no token types; here a tokenizer gives them")
    if name in families.OURS:
        pytest.skip("Optimum knows nothing of our networks")
    from optimum.exporters.tasks import TasksManager

    folder, file = family(name), tmp_path / "model.onnx"
    model, task = open_trained(folder).eval(), load_task(folder)
    past = {"use_past": True, "use_past_in_inputs": True} if task.generates else {}
    of_task = "text-generation-with-past" if task.generates else task.name
    config = TasksManager.get_exporter_config_constructor("onnx", model, of_task, library_name="transformers")(
        model.config, **past
    )
    exporters.export(model=model, config=config, output=file, opset=18)
    theirs, ours = onnx.load(file).graph, onnx.load(folder / "model.onnx").graph
    if task.generates:  # the masks of 4.57 are built by broadcasting, in fewer nodes
        assert len(ours.node) < len(theirs.node)
    else:
        assert [node.op_type for node in ours.node] == [node.op_type for node in theirs.node]
    for mine, other in ((ours.input, theirs.input), (ours.output, theirs.output)):
        assert {t.name: t.type.SerializeToString() for t in mine} == {t.name: t.type.SerializeToString() for t in other}
