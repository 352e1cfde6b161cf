"""What the tests of teachers stand on: a data stage, and classifiers whose heads were fitted to different rows."""

import json

import msgspec
import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from kdexport import spec
from kdexport.data import prepare, read_rows
from kdexport.distill import teachers
from kdexport.distill.soft_targets import write_targets
from kdexport.models.loading import ModelAndProcessor
from kdexport.models.saving import save_task
from kdexport.stages import Run
from kdexport.tasks import load_task

LABELS = ["business", "entertainment", "politics", "sports", "tech"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KDEXPORT_CACHE", str(tmp_path / "cache"))


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
    headed = AutoModelForSequenceClassification.from_pretrained(base_model, num_labels=len(LABELS))
    save_task(ModelAndProcessor(headed, tokenizer), 32, LABELS, task_folder)
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
