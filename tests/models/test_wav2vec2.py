"""Wav2Vec2 and its kin as teachers of CTC, with the characters of their own vocabularies."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from tones import say
from transformers import Wav2Vec2Config, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

from kdexport import spec
from kdexport.analysis.duplicates import Audit
from kdexport.data import Summary, read_rows, write_rows
from kdexport.distill.student import build_student
from kdexport.distill.teacher import prepare_teacher
from kdexport.errors import ModelError, SpecError
from kdexport.export.onnx import export_onnx
from kdexport.export.quantize import quantize_int8
from kdexport.files import write_json
from kdexport.models.inference import logits_of
from kdexport.models.loading import alphabet_of, open_config, open_model
from kdexport.models.registry import open_trained
from kdexport.models.saving import save_model, save_task
from kdexport.runtime.predictor import Predictor
from kdexport.tasks import load_task

TASK = "automatic-speech-recognition"


def wav2vec2(folder, norm="group", **vocab):
    config = Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, conv_dim=[32] * 7,
        feat_extract_norm=norm, do_stable_layer_norm=norm == "layer",
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, vocab_size=6,
    )  # fmt: skip
    torch.manual_seed(0)
    Wav2Vec2ForCTC(config).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({"<pad>": 0, "</s>": 1, "|": 2, "A": 3, "B": 4} | vocab))
    tokens = {"tokenizer_class": "Wav2Vec2CTCTokenizer", "pad_token": "<pad>", "word_delimiter_token": "|"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    Wav2Vec2FeatureExtractor().save_pretrained(folder)
    return folder


def test_a_ctc_model_writes_the_characters_of_its_vocabulary(tmp_path):
    assert alphabet_of(str(wav2vec2(tmp_path)), 6) == ["<pad>", "</s>", " ", "a", "b", "<5>"]
    with pytest.raises(ModelError, match=r"has its blank '<pad>' at 3"):
        alphabet_of(str(wav2vec2(tmp_path, **{"<pad>": 3, "A": 0})), 6)
    (tmp_path / "vocab.json").write_text(json.dumps({"eng": {"<pad>": 0}, "deu": {"<pad>": 0}}))
    with pytest.raises(ModelError, match=r"has no vocab\.json of characters\. Save the tokenizer of one language"):
        alphabet_of(str(tmp_path), 6)


def test_a_wav2vec2_teacher_reads_as_transformers_decodes(tmp_path):
    data, out, model = (tmp_path / name for name in ("data", "out", "model"))
    for folder in (data, out, model):
        folder.mkdir()
    wav2vec2(model)
    rows = [{"id": f"r:{i}", "audio": say("ab ba", i), "label": "ab ba", "sha256": str(i)} for i in range(3)]
    write_rows(data, "train", rows)
    audit = Audit(0, 0, 0, {}, {}, {})
    write_json(data / "data.json", Summary({"train": 3}, ["<pad>", " ", "a", "b"], 0, [], audit, 0, TASK))
    prepare_teacher(spec.Teacher(model=str(model)), data, None, 0, out)
    task = load_task(out)
    rows = read_rows(data, "train")
    logits = logits_of(open_trained(out), task, rows, batch_size=1)
    tokenizer = Wav2Vec2CTCTokenizer.from_pretrained(model)
    theirs = [tokenizer.decode(path) for path in logits.argmax(axis=2)]
    ours = [text.replace("<5>", "<s>") for text in task.texts(logits)]  # which transformers adds
    assert ours == [" ".join(text.lower().split()) for text in theirs]
    write_json(data / "data.json", Summary({"train": 3}, ["<pad>", "z"], 0, [], audit, 0, TASK))
    with pytest.raises(ModelError, match=r"does not write the data's character 'z'"):
        prepare_teacher(spec.Teacher(model=str(model)), data, None, 0, out)


@pytest.fixture(scope="module", params=["group", "layer"])
def some_layers(request, tmp_path_factory):
    """Recordings, and a student of two layers of a Wav2Vec2 with one of its two norms, in PyTorch and as ONNX."""
    folder = tmp_path_factory.mktemp("layers")
    teacher, student = folder / "teacher", folder / "student"
    for made in (teacher, student):
        made.mkdir()
    wav2vec2(teacher, request.param)
    rows = [{"audio": say(text, i), "label": text} for i, text in enumerate(["a", "ab ba", "abba ab ba", "ba ab"])]
    labels = alphabet_of(str(teacher), 6)
    opened = open_model(str(teacher), open_config(str(teacher)), TASK, labels, "none")
    save_task(opened, None, labels, teacher, task=TASK, function="none", rows=rows)
    built = build_student(spec.Student(), "layers:0+2", teacher)
    save_task(built.opened, None, labels, student, task=TASK, function="none", rows=rows)
    save_model(built.opened, student)
    export_onnx(student, folder / "model.onnx")
    return rows, load_task(student), opened.model, built.opened.model, folder / "model.onnx"


def test_a_student_has_some_layers_of_its_teacher(some_layers):
    _, _, teacher, student, _ = some_layers
    theirs, ours = teacher.wav2vec2.encoder.layers, student.wav2vec2.encoder.layers
    for i, kept in enumerate((0, 2)):
        for mine, his in zip(ours[i].parameters(), theirs[kept].parameters(), strict=True):
            assert torch.equal(mine, his)
    assert {name.split(".")[1] for name, each in student.named_parameters() if not each.requires_grad} == {
        "feature_extractor"
    }


def test_a_recording_is_heard_the_same_whatever_is_beside_it(some_layers):
    rows, task, _, student, file = some_layers
    rows = [*rows, *task.probes()]
    assert len({len(arrays["input_values"]) for arrays in task.tokenize(rows)}) > 4
    alone = np.concatenate([logits_of(student, task, [row]) for row in rows])
    predictor = Predictor(task, file, threads=1)
    for found in (logits_of(student, task, rows), *(predictor.logits(rows, size) for size in (1, 3, 32))):
        assert np.abs(found - alone).max() < 1e-4
    (one,) = task.tokenize(rows[1:2])
    same = {"input_values": np.stack([one["input_values"]] * 3)}
    assert np.abs(predictor.run(same) - alone[1]).max() < 1e-4


def test_int8_leaves_the_convolutions_alone(some_layers, tmp_path):
    *_, file = some_layers
    quantize_int8(file, tmp_path / "int8.onnx")
    kinds = {node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node}
    assert {"Conv", "MatMulInteger"} <= kinds
    assert "ConvInteger" not in kinds


REFUSED = [
    ({"student.model": ["layers:2", "gru:48"], "distill.loss": "kl"}, "kl compares step by step, and gru:48 has other"),
    ({"student.model": "conv:48", "distill.loss": "kl"}, "kl compares step by step, and conv:48 has other steps"),
    ({"student.model": "layers:4"}, r"the teacher has 3 layers, not 4\. Ask for fewer"),
    ({"student.model": "layers:0+3"}, "the teacher has 3 layers, not 4"),
    ({"student.model": "layers:2", "distill.loss": "mse"}, r"mse is not for .*\. Take ctc or kl"),
]


@pytest.mark.parametrize(("given", "wrong"), REFUSED, ids=[wrong for _, wrong in REFUSED])
def test_what_layers_of_a_wav2vec2_do_not_offer_is_refused(tmp_path, given, wrong):
    wav2vec2(tmp_path)
    asked = {"task": TASK, "data.train": "orders", "teacher.model": str(tmp_path)}
    with pytest.raises(SpecError, match=wrong):
        spec.load(None, asked | given)
    assert spec.load(None, asked | {"student.model": "layers:2", "distill.loss": "kl"}).distill.alpha == 0.5
