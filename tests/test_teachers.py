"""Teachers of every kind, several at once, several passes, and rows without labels: what the targets are made of."""

import json
import shutil
import sys

import msgspec
import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from kdexport import artifact, spec
from kdexport.data import prepare, read_rows, read_summary
from kdexport.data.sources import Source, local_files, read_unlabelled, rows_of_sources, to_rows
from kdexport.distill import teachers
from kdexport.distill.augment import changer
from kdexport.distill.combine import columns_of, combine
from kdexport.distill.store import Store
from kdexport.distill.targets import write_targets
from kdexport.distill.teacher import Opened, prepare_teacher, save_task
from kdexport.distill.train import logits_of
from kdexport.errors import DataError, KdexportError, ModelError, SpecError
from kdexport.rundir import Run
from kdexport.tasks import load_task
from kdexport.tasks.metrics import softmax

LABELS = ["business", "entertainment", "politics", "sports", "tech"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KDEXPORT_CACHE", str(tmp_path / "cache"))


# --- what the tests stand on: a data stage, and classifiers whose heads were fitted to different rows


@pytest.fixture(scope="module")
def data(articles_file, tmp_path_factory):
    """The beginnings of 120 articles, of which kdexport splits off validation and test."""
    folder = tmp_path_factory.mktemp("small")
    file = folder / "news.jsonl"
    rows = [json.loads(line) for line in articles_file.read_bytes().splitlines()[:120]]
    file.write_bytes(b"\n".join(msgspec.json.encode(row | {"text": row["text"][:160]}) for row in rows))
    return data_stage(folder / "run", spec.Data(train=str(file)))


def data_stage(run, settings, change=lambda work: None):
    def build(work):
        prepare(settings, "text-classification", 0, work)
        change(work)

    with Run(run) as folder:
        return folder.stage("data", version=1, settings=settings, reads=[], build=build)


@pytest.fixture(scope="module")
def news(data):
    return str(data.parent.parent / "news.jsonl")


@pytest.fixture(scope="module")
def classify(data, base_model, tmp_path_factory):
    """Someone's classifier of the articles: the base model with a head fitted to some of the rows."""
    from sklearn.linear_model import LogisticRegression

    task_folder = tmp_path_factory.mktemp("task")
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    encoder = AutoModel.from_pretrained(base_model).eval()
    save_task(Opened(encoder, tokenizer), 32, LABELS, task_folder)
    task = load_task(task_folder)
    rows = [row for split in ("train", "validation", "test") for row in read_rows(data, split)]
    inputs = {k: torch.from_numpy(v) for k, v in task.encode(rows).items()}
    with torch.inference_mode():
        features = encoder(**inputs).pooler_output.numpy()

    def make(seed=0, labels=LABELS, words=None, keep=tokenizer):
        folder = tmp_path_factory.mktemp("classifier")
        chosen = np.random.default_rng(seed).permutation(len(rows))[:80]
        index = np.array([labels.index(rows[i]["label"]) for i in chosen])
        mean, scale = features[chosen].mean(axis=0), features[chosen].std(axis=0)
        fitted = LogisticRegression(max_iter=300).fit((features[chosen] - mean) / scale, index)
        model = AutoModelForSequenceClassification.from_pretrained(base_model, num_labels=5)
        with torch.no_grad():
            weight = fitted.coef_ / scale
            model.classifier.weight.copy_(torch.from_numpy(weight))
            model.classifier.bias.copy_(torch.from_numpy(fitted.intercept_ - weight @ mean))
        model.config.id2label = dict(enumerate(words or labels))
        model.config.label2id = {name: i for i, name in model.config.id2label.items()}
        model.save_pretrained(folder)
        if keep:
            keep.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def first(classify):
    return classify(0)


@pytest.fixture(scope="module")
def second(classify):
    """Another one, whose labels come in another order."""
    return classify(1, LABELS[::-1])


def settings(news, model, **changes):
    return spec.load(None, {"data.train": news, "data.max_length": 32, "teacher.model": model} | changes)


def stage(run, data, given):
    """The teacher stage and the targets as the pipeline makes them."""
    teachers.check(given)
    with Run(run) as folder:
        teacher = folder.stage(
            "teacher",
            version=2,
            settings=teachers.settings_of(given),
            reads=[data, *teachers.files(given)],
            build=lambda work: teachers.prepare_teachers(given, data, work),
        )
        return teacher, folder.stage(
            "targets",
            version=2,
            settings=[given.teacher, given.distill.augment],
            reads=[data, teacher],
            build=lambda work: write_targets(
                data, teacher, work, how=given.teacher, augment=given.distill.augment, seed=given.seed
            ),
        )


def torch_logits(folder, data, split, max_length=32):
    """The logits of a Hugging Face folder by its own tokenizer and transformers alone."""
    rows = read_rows(data, split)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    texts = tokenizer(
        [r["text"] for r in rows], truncation=True, max_length=max_length, padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        return model.eval()(**texts).logits.numpy()


def targets_of(folder):
    return {split: np.load(folder / f"{split}.npy") for split in ("train", "validation", "test")}


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# --- combining


def test_both_means_are_those_of_the_textbook():
    a, b = np.log([[0.9, 0.1]]), np.log([[0.5, 0.5]])
    assert softmax(combine([a, b], None, "mean")) == pytest.approx(np.array([[0.7, 0.3]]), abs=1e-6)
    assert softmax(combine([a, b], None, "log-mean")) == pytest.approx(np.array([[0.75, 0.25]]), abs=1e-6)
    assert softmax(combine([a, b], [3, 1], "mean")) == pytest.approx(np.array([[0.8, 0.2]]), abs=1e-6)


def test_a_combination_is_logits_again_whatever_offset_the_answers_had():
    random = np.random.default_rng(0)
    z, weights = random.normal(size=(3, 50, 7)) * 4, [0.2, 0.5, 0.3]
    shifted = [logits + random.normal(size=(50, 1)) * 100 for logits in z]
    arithmetic = sum(w * softmax(logits) for w, logits in zip(weights, z, strict=True))
    assert softmax(combine(shifted, weights, "mean")) == pytest.approx(arithmetic, abs=1e-5)
    geometric = np.prod([softmax(logits) ** w for w, logits in zip(weights, z, strict=True)], axis=0)
    geometric /= geometric.sum(axis=1, keepdims=True)
    assert softmax(combine(shifted, [2, 5, 3], "log-mean")) == pytest.approx(geometric, abs=1e-5)
    for how in ("mean", "log-mean"):
        assert np.exp(combine(shifted, weights, how)).sum(axis=1) == pytest.approx(np.ones(50), abs=1e-5)
    softened = softmax(np.tensordot(weights, [np.log(softmax(logits / 4)) for logits in z], 1))
    assert softmax(combine(z, weights, "log-mean") / 4) == pytest.approx(softened, abs=1e-5)


def test_answers_that_are_sure_beyond_any_float_stay_finite_and_a_single_one_is_kept():
    sure = np.array([[1e4, -1e4, 0.0]])
    for how in ("mean", "log-mean"):
        found = combine([sure, sure[:, ::-1]], None, how)
        assert np.isfinite(found).all()
        assert found.dtype == np.float32
    assert combine([sure], [7.0], "mean") == pytest.approx(sure)


def test_columns_are_brought_together_by_name_and_differing_labels_are_named():
    assert columns_of(["a", "b", "c"], ["c", "a", "b"], "one", "two") == [1, 2, 0]
    with pytest.raises(ModelError) as error:
        columns_of(["a", "b"], ["b", "x"], "one", "two")
    assert "only one has 'a', only two has 'x'" in one_line(error)


# --- kinds


def test_a_hugging_face_teacher_is_as_ever(tmp_path, data, news, first):
    teacher, targets = stage(tmp_path / "run", data, settings(news, str(first)))
    assert teachers.kind_of_first(teacher) == "torch"
    for split, logits in targets_of(targets).items():
        assert np.abs(logits - torch_logits(first, data, split)).max() < 1e-4
    assert not (targets / "transfer.npy").exists()


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
    assert np.abs(np.load(targets / "test.npy") - theirs).max() < 1e-3
    assert np.abs(torch_logits(first, data, "test") - theirs).max() > 0.1  # the adapter does something


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
        assert teachers.base_of(tmp_path) == expected


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
    save_task(Opened(model, AutoTokenizer.from_pretrained(first)), 32, LABELS, source)
    export_onnx(source, source / "model.onnx")
    artifact.pack(source, {"fp32": (source / "model.onnx", "plain")}, "fp32", {}, ours)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(source / name, theirs / name)
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
        assert np.abs(logits - torch_logits(first, data, split)).max() < 1e-3
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
        teachers.prepare_teachers(settings(news, str(folder)), data, tmp_path)
    assert "is not the file that was packed" in one_line(error)


# --- stored logits


@pytest.fixture(scope="module")
def messy(tmp_path_factory, base_model):
    """Rows of which some are bad and some stand in the test file too; their logits say which row they are of."""
    folder = tmp_path_factory.mktemp("messy")
    rows = [(f"text number {i} of {'xyz'[i % 3]}", "xyz"[i % 3]) for i in range(60)]
    rows[7] = ("", "x")
    rows[20] = rows[5]
    test = [(f"test text {i} of {'xyz'[i % 3]}", "xyz"[i % 3]) for i in range(12)] + [rows[40]]
    for name, some in (("train", rows), ("test", test)):
        pd.DataFrame(some, columns=["text", "label"]).to_csv(folder / f"{name}.csv", index=False)
    given = spec.load(
        None,
        {
            "data.train": str(folder / "train.csv"),
            "data.test": str(folder / "test.csv"),
            "data.skip_bad_rows": True,
            "teacher.model": str(folder / "logits.npz"),
            "student.model": str(base_model),
        },
    )

    def logits(some, labels="xyz", shift=0):
        """Right, and unlike for each row."""
        found = np.zeros((len(some), len(labels)))
        for i, (_, label) in enumerate(some):
            found[i, labels.index(label)] = 1 + (i + shift) / 100
        return found

    arrays = {"train": logits(rows), "test": logits(test, shift=500)}
    return folder, given, data_stage(folder / "run", given.data), rows, test, arrays


def take(tmp_path, given, data):
    return stage(tmp_path / "run", data, given)


def by_row(data, split, arrays):
    """What the logits of a split must be, by the number that each row's id ends with; the text of 20 is that of 5."""
    names = {"train.csv": "train", "test.csv": "test"}
    ids = [row["id"].split(":") for row in read_rows(data, split)]
    places = [(names[name], int(number) - 1) for name, number in ids]
    return np.array([arrays[name][5 if i == 20 else i] for name, i in places], dtype=np.float32)


def test_stored_logits_find_their_rows_whatever_was_dropped_or_split_off(tmp_path, messy):
    folder, given, data, _, _, arrays = messy
    np.savez(folder / "logits.npz", **arrays)
    teacher, targets = take(tmp_path, given, data)
    assert len(read_rows(data, "train")) + len(read_rows(data, "validation")) == 58  # one bad, one stands in test
    for split, logits in targets_of(targets).items():
        assert np.array_equal(logits, by_row(data, split, arrays)), split
    assert teachers.kind_of_first(teacher) == "stored"
    assert load_task(teacher).labels == ["x", "y", "z"]
    assert load_task(teacher).encode([{"text": "some text"}])["input_ids"].shape == (1, 4)  # the student's tokenizer
    assert not list(teacher.glob("*.safetensors"))


@pytest.mark.parametrize("form", ["named", "ids", "parquet-id", "parquet-text", "parquet-lists"])
def test_stored_logits_may_name_their_classes_and_rows_in_any_order(tmp_path, messy, form):
    folder, given, data, rows, test, arrays = messy
    expected = {split: by_row(data, split, arrays) for split in ("train", "validation", "test")}
    both, texts = np.concatenate([arrays["train"], arrays["test"]]), [text for text, _ in rows + test]
    ids = [f"train.csv:{i}" for i in range(1, 61)] + [f"test.csv:{i}" for i in range(1, 14)]
    order = np.random.default_rng(0).permutation(len(both))
    path = folder / ("logits.npz" if form in ("named", "ids") else "logits.parquet")
    if form == "named":
        np.savez(path, labels=["z", "X", "y"], **{split: array[:, [2, 0, 1]] for split, array in arrays.items()})
    elif form == "ids":
        np.savez(path, train=both[order], ids_train=np.array(ids)[order])
    else:
        table = pd.DataFrame(both[:, [1, 2, 0]], columns=["y", "z", "x"])
        if form == "parquet-lists":
            table = pd.DataFrame({"logits": list(both)})
        if form == "parquet-text":
            kept = pd.Series(texts).drop_duplicates().index  # one text, one answer
            table = table.assign(text=texts).loc[kept]
        else:
            table = table.assign(id=ids).iloc[order]
        table.to_parquet(path)
    given = msgspec.structs.replace(given, teacher=spec.Teacher(model=str(path)))
    teacher, targets = take(tmp_path, given, data)
    columns = [load_task(teacher).labels.index(label) for label in "xyz"]
    for split, logits in targets_of(targets).items():
        if form == "parquet-text":  # rows of one text have the first one's answer
            assert np.array_equal(logits.argmax(axis=1), np.array(columns)[expected[split].argmax(axis=1)])
        else:
            assert np.array_equal(logits[:, columns], expected[split]), split


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a: a | {"train": a["train"][:-1]}, "59 rows of logits for train, whose file has 60. Give one for each"),
        (lambda a: a | {"train": a["train"][:, :2], "test": a["test"][:, :2]}, "of 2 classes, the data have 3 labels"),
        (lambda a: a | {"test": a["test"][:, :2]}, "arrays of different numbers of classes: 2, 3"),
        (lambda a: a | {"labels": ["x", "y"]}, "names 2 labels for logits of 3 classes"),
        (lambda a: a | {"labels": ["x", "y", "w"]}, "does not know the data's label 'z'"),
        (lambda a: {"train": a["train"]}, "has no logits for test. It has: train"),
        (lambda a: a | {"train": a["train"][:, 0]}, "train is float64 [60], not numbers [rows, classes]"),
        (lambda a: a | {"trian": a["train"]}, "holds train, test, trian. Name its arrays train, validation"),
        (lambda a: a | {"train": nan_at(a["train"], 11)}, "the logits for train.csv, row 12 are not finite"),
        (lambda a: a | {"ids_train": ["x"] * 59}, "has 59 ids for 60 rows of logits"),
        (lambda a: a | {"ids_train": [f"a-{i // 2}" for i in range(60)]}, "has logits for 'a-0' twice"),
        (
            lambda a: a | {"ids_train": [f"a-{i}" for i in range(60)]},
            "has no logits for train.csv, row 1 (nor 51 others): its ids are like 'a-0', this one is 'train.csv:1'",
        ),
        (lambda a: a | {"labels": np.array(["x", None, 3], dtype=object)}, "can't be read"),
        (lambda a: a | {"train": np.roll(a["train"], 1, axis=1)}, "read as z, x, y it answers 100.0%"),
    ],
)
def test_stored_logits_that_do_not_fit_are_one_line(tmp_path, messy, change, says):
    folder, given, data, _, _, arrays = messy
    np.savez(folder / "logits.npz", **change(arrays))
    with pytest.raises(ModelError) as error:
        take(tmp_path, given, data)
    assert says in one_line(error)


def nan_at(array, row):
    array = array.copy()
    array[row, 1] = np.nan
    return array


def test_a_file_that_is_no_npz_or_parquet_is_one_line(tmp_path, messy):
    folder, given, data, *_ = messy
    for name in ("logits.npz", "logits.parquet"):
        (folder / name).write_bytes(b"no such thing")
        with pytest.raises(ModelError, match="can't be read"):
            take(tmp_path, msgspec.structs.replace(given, teacher=spec.Teacher(model=str(folder / name))), data)


# --- what a spec may ask of its teachers


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"teacher.model": ["a", "b"], "teacher.weights": [1.0]}, "teacher.weights has 1 numbers for 2 teachers"),
        ({"teacher.model": "none.npz"}, "teacher none.npz does not exist"),
        ({"teacher.model": "npz", "teacher.train.epochs": 1}, "teacher.train: a file of logits can't be fine-tuned"),
        ({"teacher.model": "npz", "teacher.passes": 2}, "teacher.passes: a file of logits has no dropout"),
        ({"teacher.model": "npz", "distill.augment.views": 2}, "distill.augment: a file of logits holds"),
        ({"teacher.model": "npz"}, "student.model: 'tiny' is built from the teacher's weights, and a file of logits"),
        ({"teacher.model": "npz", "student.model": ["layers:2", "me/x"]}, "student.model: 'layers:2' is built from"),
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
    with pytest.raises((SpecError, ModelError)) as error:
        teachers.check(spec.load(None, changes))
    assert says in one_line(error)
    teachers.check(spec.load(None, {"data.train": "t.csv", "teacher.model": names["npz"], "student.model": "me/x"}))
    teachers.check(spec.load(None, {"data.train": "t.csv", "teacher.model": ["a", names["npz"]]}))


def test_how_teachers_are_asked_does_not_decide_what_they_are(news, first):
    one = settings(news, str(first))
    other = settings(news, str(first), **{"teacher.passes": 3, "teacher.noise": "augment"})
    assert teachers.settings_of(one) == teachers.settings_of(other)
    assert teachers.settings_of(one) != teachers.settings_of(settings(news, str(first), seed=1))


def test_the_files_that_decide_are_named(adapter, base_model, messy):
    folder, given, *_ = messy
    (folder / "logits.npz").touch()
    assert teachers.files(given) == [folder / "logits.npz", base_model]
    assert teachers.files(spec.load(None, {"data.train": "t", "teacher.model": [str(adapter[0]), "me/hub"]})) == [
        adapter[0],
        base_model,
    ]


# --- several teachers


def permuted(folder, out):
    """The same classifier with another tokenizer: token ids are exchanged, and the embeddings' rows with them."""
    model, raw = (
        AutoModelForSequenceClassification.from_pretrained(folder),
        json.loads((folder / "tokenizer.json").read_text()),
    )
    place = np.arange(len(raw["model"]["vocab"]))
    place[1000:] = np.random.default_rng(0).permutation(place[1000:])
    raw["model"]["vocab"] = {token: int(place[i]) for token, i in raw["model"]["vocab"].items()}
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table[torch.from_numpy(place)] = table.clone()
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    (out / "vocab.txt").unlink(missing_ok=True)
    (out / "tokenizer.json").write_text(json.dumps(raw))
    return out


def test_teachers_are_aligned_by_name_and_each_reads_by_its_own_tokenizer(tmp_path, data, news, first, second):
    other = permuted(second, tmp_path)
    rows = read_rows(data, "test")[:2]
    assert (load_task_ids(first, rows) != load_task_ids(other, rows)).any()
    given = settings(news, [str(first), str(other)], **{"teacher.weights": [1, 3], "teacher.combine": "mean"})
    _, targets = stage(tmp_path / "run", data, given)
    for split, logits in targets_of(targets).items():
        a, b = softmax(torch_logits(first, data, split)), softmax(torch_logits(second, data, split))[:, ::-1]
        assert softmax(logits) == pytest.approx((a + 3 * b) / 4, abs=1e-4)
    record = json.loads((targets / "targets.json").read_text())
    assert [one["model"] for one in record["teachers"]] == [str(first), str(other)]
    right = [LABELS.index(row["label"]) for row in read_rows(data, "test")]
    for one, folder, order in zip(record["teachers"], (first, second), (1, -1), strict=True):
        answers = torch_logits(folder, data, "test")[:, ::order].argmax(axis=1)
        assert one["test"] == pytest.approx(np.mean(answers == right))


def load_task_ids(folder, rows):
    return AutoTokenizer.from_pretrained(folder)([r["text"][:60] for r in rows], return_tensors="np", padding=True)[
        "input_ids"
    ]


def test_a_teachers_answers_are_kept_for_itself_whoever_stands_beside_it(tmp_path, data, news, first, second):
    stage(tmp_path / "one", data, settings(news, str(first)))
    _, targets = stage(tmp_path / "two", data, settings(news, [str(second), str(first)]))
    assert json.loads((targets / "targets.json").read_text())["computed"] == 120  # the second's alone
    _, again = stage(tmp_path / "three", data, settings(news, [str(second), str(first)], **{"teacher.weights": [2, 1]}))
    assert json.loads((again / "targets.json").read_text())["computed"] == 0


def test_stored_logits_can_stand_beside_a_model(tmp_path, data, news, first, second):
    whole = {split: torch_logits(second, data, split) for split in ("train", "validation", "test")}
    ids = {f"ids_{split}": [row["id"] for row in read_rows(data, split)] for split in whole}
    np.savez(tmp_path / "second.npz", labels=LABELS[::-1], **whole, **ids)
    _, targets = stage(tmp_path / "run", data, settings(news, [str(first), str(tmp_path / "second.npz")]))
    expected = combine([torch_logits(first, data, "test"), whole["test"][:, ::-1]], None, "log-mean")
    assert np.load(targets / "test.npy") == pytest.approx(expected, abs=1e-4)


def test_teachers_of_different_labels_are_refused_and_the_labels_named(tmp_path, data, news, first):
    model = AutoModelForSequenceClassification.from_pretrained(first, num_labels=6, ignore_mismatched_sizes=True)
    model.config.id2label = dict(enumerate([*LABELS, "weather"]))
    model.save_pretrained(tmp_path / "more")
    AutoTokenizer.from_pretrained(first).save_pretrained(tmp_path / "more")
    with pytest.raises(ModelError) as error:
        stage(tmp_path / "run", data, settings(news, [str(first), str(tmp_path / "more")]))
    assert f"teachers of different labels can't be combined: only {tmp_path / 'more'} has 'weather'" in one_line(error)


def test_the_one_of_several_that_guesses_is_named(tmp_path, data, news, first, classify):
    wrong = classify(0, LABELS, words=[*LABELS[1:], LABELS[0]])
    with pytest.raises(ModelError) as error:
        stage(tmp_path / "run", data, settings(news, [str(first), str(wrong)]))
    assert f"teacher {wrong} answers" in one_line(error)
    assert "Its label order is not the data's" in one_line(error)


def test_each_of_several_is_fine_tuned_with_a_seed_of_its_own_and_kept_when_interrupted(
    tmp_path, data, news, base_model
):
    quick = {"teacher.train.epochs": 1, "teacher.train.batch_size": 43, "data.max_length": 8}
    given = settings(news, [str(base_model)] * 2, **quick)
    teachers.prepare_teachers(given, data, tmp_path)
    made = [named.folder for named in teachers.teachers_of(tmp_path)]
    assert made == [tmp_path, tmp_path / "1"]
    assert [json.loads((f / "training.json").read_text())["recipe"]["seed"] for f in made] == [0, 1]
    weights = [(folder / "model.safetensors").read_bytes() for folder in made]
    assert weights[0] != weights[1]
    shutil.rmtree(tmp_path / "1")
    before = (tmp_path / "model.safetensors").stat().st_mtime_ns
    teachers.prepare_teachers(given, data, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == before
    assert (tmp_path / "1/model.safetensors").read_bytes() == weights[1]


# --- several passes


def with_dropout(folder, out, rate):
    """The heads of these tests are fitted to differences that a usual rate would bury."""
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    config |= {"hidden_dropout_prob": rate, "attention_probs_dropout_prob": rate}
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_passes_with_dropout_differ_are_combined_and_kept(tmp_path, data, news, first, monkeypatch):
    model = with_dropout(first, tmp_path / "noisy", 0.003)
    given = settings(news, str(model), **{"teacher.passes": 3, "teacher.combine": "mean"})
    _, targets = stage(tmp_path / "run", data, given)
    plain = torch_logits(first, data, "test")
    noisy = softmax(np.load(targets / "test.npy"))
    assert np.abs(noisy - softmax(plain)).max() > 0.001
    passes = [Store(folder) for folder in (tmp_path / "cache/targets").iterdir()]
    contents = [row["text"] for row in read_rows(data, "test")]
    each = [softmax(store.look_up(contents)) for store in passes]
    assert len(each) == 3
    assert noisy == pytest.approx(np.mean(each, axis=0), abs=1e-5)
    assert np.abs(each[0] - each[1]).max() > 0.01
    assert json.loads((targets / "targets.json").read_text())["computed"] == 360
    _, again = stage(tmp_path / "again", data, given)
    assert json.loads((again / "targets.json").read_text())["computed"] == 0
    monkeypatch.setenv("KDEXPORT_CACHE", str(tmp_path / "other"))
    _, anew = stage(tmp_path / "anew", data, given)
    assert np.array_equal(np.load(anew / "test.npy"), np.load(targets / "test.npy"))  # seeded


def test_a_teacher_without_dropout_has_no_passes(tmp_path, data, news, first):
    folder = with_dropout(first, tmp_path / "still", 0.0)
    with pytest.raises(ModelError, match=r"no dropout that could tell its passes apart\. Take teacher.noise: augment"):
        stage(tmp_path / "run", data, settings(news, str(folder), **{"teacher.passes": 2}))


def test_passes_over_changed_words_are_of_the_text_and_its_copies(tmp_path, data, news, first):
    given = settings(news, str(first), **{"teacher.passes": 3, "teacher.noise": "augment"})
    teacher, targets = stage(tmp_path / "run", data, given)
    task, model = load_task(teacher), AutoModelForSequenceClassification.from_pretrained(teacher)
    rows = read_rows(data, "test")
    copies = changer(teacher, spec.Augment(views=2), 0)([row["text"] for row in rows])
    texts = [[row["text"] for row in rows], [c[0] for c in copies], [c[1] for c in copies]]
    expected = combine([logits_of(model, task, [{"text": t} for t in some]) for some in texts], None, "log-mean")
    assert np.load(targets / "test.npy") == pytest.approx(expected, abs=1e-3)


# --- rows without labels


@pytest.fixture(scope="module")
def unlabelled(news, tmp_path_factory):
    """The same articles with labels in test alone, and texts that no split has, some of which stand in test."""

    def strip(work):
        for split in ("train", "validation"):
            rows = [row | {"label": None} for row in read_rows(work, split)]
            (work / f"{split}.jsonl").write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
        known = read_rows(work, "test")[0] | {"id": "u:2", "label": None}
        new = {"id": "u:1", "text": "Shares in the airline rose after it beat forecasts.", "label": None}
        (work / "unlabelled.jsonl").write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in (new, known)))

    return data_stage(tmp_path_factory.mktemp("unlabelled") / "run", spec.Data(train=news), strip)


def test_the_teacher_labels_unlabelled_texts_and_changed_copies(tmp_path, unlabelled, news, first):
    given = settings(news, str(first), **{"distill.augment.views": 2})
    teacher, targets = stage(tmp_path / "run", unlabelled, given)
    rows, logits = read_rows(targets, "transfer"), np.load(targets / "transfer.npy")
    assert len(rows) == len(logits) > 150
    assert rows[0]["id"] == "u:1"
    assert {row["label"] for row in rows} == {None}
    ids = {row["id"] for row in rows}
    assert "u:1~2" in ids
    assert "u:2" not in ids  # it stands in test
    task, model = load_task(teacher), AutoModelForSequenceClassification.from_pretrained(teacher)
    assert logits_of(model, task, rows[::20]) == pytest.approx(logits[::20], abs=1e-3)
    record = json.loads((targets / "targets.json").read_text())
    assert set(record["teacher"]) == {"test"}
    assert record["texts"] == 120 + len(rows)


def test_the_preflight_takes_the_rows_that_have_labels(tmp_path, unlabelled, news, classify):
    wrong = classify(0, LABELS, words=[*LABELS[1:], LABELS[0]])
    with pytest.raises(ModelError, match=r"of 24 labelled rows rightly, which is near chance. Its label order"):
        stage(tmp_path / "run", unlabelled, settings(news, str(wrong)))


def test_there_is_no_fine_tuning_without_labels(tmp_path, unlabelled, base_model):
    wanted = spec.Teacher(model=str(base_model), train=spec.TeacherTraining(epochs=1))
    with pytest.raises(ModelError, match=r"the train rows have no labels to fine-tune the teacher on\. Leave out"):
        prepare_teacher(wanted, unlabelled, 32, 0, tmp_path)


def test_rows_without_labels_have_the_target_that_losses_pass_over(first, tmp_path):
    save_task(
        Opened(AutoModelForSequenceClassification.from_pretrained(first), AutoTokenizer.from_pretrained(first)),
        32,
        LABELS,
        tmp_path,
    )
    task = load_task(tmp_path)
    assert task.targets([{"label": "sports"}, {"label": None}, {"label": "4"}]).tolist() == [3, -100, 4]


def test_a_file_may_have_no_labels_where_none_are_needed():
    data = spec.Data(train="t.csv")
    source = Source("t.csv", ["text", "more"], [{"text": "a", "more": 1}, {"text": "b", "more": 2}])
    with pytest.raises(DataError, match="which column is the label"):
        to_rows(source, data, "text-classification")
    rows, bad = to_rows(source, data, "text-classification", needs_labels=False)
    assert (rows, bad) == (
        [{"id": "t.csv:1", "text": "a", "label": None}, {"id": "t.csv:2", "text": "b", "label": None}],
        0,
    )
    named = spec.Data(train="t.csv", label="kind")
    with pytest.raises(DataError, match="has no column 'kind'"):
        to_rows(source, named, "text-classification", needs_labels=False)
    half = Source("t.csv", ["text", "label"], [{"text": "a", "label": "x"}, {"text": "b", "label": ""}])
    with pytest.raises(DataError, match=r"t.csv, row 2: label is empty"):
        to_rows(half, data, "text-classification", needs_labels=False)


def test_unlabelled_texts_are_a_text_a_line_or_a_column_whose_labels_are_not_read(tmp_path):
    (tmp_path / "t.csv").write_text("text,label\na,x\n")
    (tmp_path / "u.txt").write_text("\ufeffone\n\n  \ntwo\u2028 halves\r\n", encoding="utf-8")
    (tmp_path / "u.jsonl").write_text('{"text": "one", "label": "never seen"}\n{"text": "two"}\n')

    def given(name, **more):
        return spec.Data(train=str(tmp_path / "t.csv"), label="label", unlabelled=str(tmp_path / name), **more)

    lines, _ = read_unlabelled(given("u.txt"), "text-classification")
    assert [(row["id"], row["text"], row["label"]) for row in lines] == [
        ("u.txt:1", "one", None),
        ("u.txt:4", "two\u2028 halves", None),
    ]
    rows, _ = read_unlabelled(given("u.jsonl"), "text-classification")
    assert [(row["id"], row["text"], row["label"]) for row in rows] == [
        ("u.jsonl:1", "one", None),
        ("u.jsonl:2", "two", None),
    ]
    assert local_files(given("u.txt"))[-1] == tmp_path / "u.txt"
    assert rows_of_sources(given("u.jsonl")) == {"train": 1, "unlabelled": 2}
    assert rows_of_sources(given("u.txt"))["unlabelled"] == 4
    with pytest.raises(DataError, match=r"u.txt, row 4: text has 11 characters"):
        read_unlabelled(given("u.txt", max_chars=5), "text-classification")
    with pytest.raises(DataError, match="does not exist"):
        local_files(given("none.txt"))
    with pytest.raises(DataError, match="holds single texts, the data are pairs"):
        read_unlabelled(given("u.txt", text_pair="second"), "text-classification")


# --- the data stage


def csv(folder, name, rows, columns=("text", "label")):
    pd.DataFrame(rows, columns=list(columns)).to_csv(folder / name, index=False)
    return str(folder / name)


TEST = [(f"test text {i}", "ab"[i % 2]) for i in range(10)]
PLAIN = [(f"some text {i}",) for i in range(30)]


def test_training_texts_need_no_labels_where_the_test_has_them(tmp_path):
    given = spec.Data(train=csv(tmp_path, "t.csv", PLAIN, ["text"]), test=csv(tmp_path, "e.csv", TEST))
    folder = data_stage(tmp_path / "run", given)
    assert {row["label"] for split in ("train", "validation") for row in read_rows(folder, split)} == {None}
    assert len(read_rows(folder, "train")) == 27
    assert read_summary(folder).labels == ["a", "b"]
    assert read_summary(folder).duplicates.conflicting_labels == 0


def test_without_a_test_the_training_texts_need_labels(tmp_path):
    with pytest.raises(DataError, match=r"t\.csv: which column is the label\?"):
        data_stage(tmp_path / "run", spec.Data(train=csv(tmp_path, "t.csv", PLAIN, ["text"])))
    named = spec.Data(train=csv(tmp_path, "t.csv", PLAIN, ["text"]), test=csv(tmp_path, "e.csv", TEST), label="label")
    with pytest.raises(DataError, match=r"t\.csv has no column 'label'"):
        data_stage(tmp_path / "run", named)


def test_unlabelled_texts_of_the_splits_are_dropped_and_the_others_kept_once(tmp_path):
    train = csv(tmp_path, "t.csv", [(f"some text {i}", "ab"[i % 2]) for i in range(30)])
    (tmp_path / "more.txt").write_text("new\nsome text 3\ntest text 4\nnew\nother\n")
    given = spec.Data(train=train, test=csv(tmp_path, "e.csv", TEST), unlabelled=str(tmp_path / "more.txt"))
    folder = data_stage(tmp_path / "run", given)
    assert [(row["id"], row["text"]) for row in read_rows(folder, "unlabelled")] == [
        ("more.txt:1", "new"),
        ("more.txt:5", "other"),
    ]
    assert read_summary(folder).unlabelled == 2
    assert sum(read_summary(folder).rows.values()) == 40
    (tmp_path / "more.txt").write_text("some text 3\n")
    with pytest.raises(DataError, match="all unlabelled texts stand in train"):
        data_stage(tmp_path / "again", given)
