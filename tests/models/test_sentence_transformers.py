"""Folders of students, and artifacts, give our vectors in Sentence-Transformers and in fastembed, where these are."""

# Fixtures come by import.
# ruff: noqa: F401

import numpy as np
import pytest
from embedders import PROMPTS, write_embedder
from embedding import SENTENCES, TASK, given, stages, train, write_texts
from teaching import own_cache

import kdexport
from kdexport.distill.student import build_student
from kdexport.export import export_student
from kdexport.models.saving import save_model, save_task
from kdexport.runtime import artifact
from kdexport.runtime.predictor import Predictor, golden_answers
from kdexport.spec import Export, Student
from kdexport.tasks import load_task

LONG = "one text of far more tokens than the others of its batch have, and cut behind some of them "
TEXTS = [*SENTENCES[:6], "a", LONG * 6]
CPU = {"device": "cpu", "local_files_only": True}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    return {dense: write_embedder(folder / str(dense), normalize=not dense, dense=dense) for dense in (0, 24)}


@pytest.fixture(scope="module", params=["layers:1", "2x16", "bag", "a dense teacher"])
def student(request, teachers, tmp_path_factory):
    """An untrained student as a folder and as an artifact, and our vectors of its file."""
    kind, folder = request.param, tmp_path_factory.mktemp("student")
    stage, out, graphs, packed = (folder / name for name in ("teacher", "student", "graphs", "artifact"))
    for place in (stage, out, graphs, packed):
        place.mkdir()
    from kdexport.models.trained import take_trained

    take_trained(str(teachers[24 if "dense" in kind else 0]), 32, [], stage)
    name = "layers:1" if "dense" in kind else kind
    built = build_student(Student(), name, stage, [*SENTENCES, *TEXTS])
    save_task(built.opened, 32, [], out, task=TASK, function="none")
    save_model(built.opened, out)
    export_student(Export(variants=("fp32",)), out, graphs, [])
    task, file = load_task(out), graphs / "model.onnx"
    models = {"fp32": (file, "plain")}
    artifact.pack(out, models, "fp32", {}, packed, golden_answers(task, {"fp32": file}), {})
    vectors = Predictor(task, file).logits([{"text": text} for text in TEXTS])
    return kind, out, packed, vectors


def test_sentence_transformers_reads_the_folder(student):
    theirs = pytest.importorskip("sentence_transformers")
    kind, out, _, vectors = student
    if kind == "bag":
        pytest.skip("a table is an architecture of ours, which Sentence-Transformers reads as ONNX alone")
    model = theirs.SentenceTransformer(str(out), **CPU)
    assert model.max_seq_length == 32
    assert model.prompts.items() >= PROMPTS.items()
    assert np.abs(model.encode(TEXTS) - vectors).max() < 1e-5
    prompted = [{"text": text, "prompt": "query"} for text in TEXTS]
    ours = Predictor(load_task(out), student[2] / "onnx" / "model.onnx").logits(prompted)
    assert np.abs(model.encode(TEXTS, prompt_name="query") - ours).max() < 1e-5


def test_sentence_transformers_reads_the_artifact(student):
    theirs = pytest.importorskip("sentence_transformers")
    pytest.importorskip("optimum.onnxruntime")
    _, _, packed, vectors = student
    how = {"file_name": "onnx/model.onnx", "provider": "CPUExecutionProvider"}
    model = theirs.SentenceTransformer(str(packed), backend="onnx", model_kwargs=how, **CPU)
    assert np.abs(model.encode(TEXTS) - vectors).max() < 1e-5


def test_fastembed_reads_the_artifact(student):
    fastembed = pytest.importorskip("fastembed")
    from fastembed.common.model_description import ModelSource, PoolingType

    kind, _, packed, vectors = student
    fastembed.TextEmbedding.add_custom_model(
        model=f"ours/{kind}", pooling=PoolingType.DISABLED, normalization=False, dim=vectors.shape[1],
        sources=ModelSource(url="https://localhost/none"), model_file="onnx/model.onnx",
        output_name="sentence_embedding",
    )  # fmt: skip
    model = fastembed.TextEmbedding(f"ours/{kind}", specific_model_path=str(packed))
    assert np.abs(np.stack(list(model.embed(TEXTS))) - vectors).max() < 1e-5
