"""Every kind of classifier answers through the server, in every protocol, as transformers' pipeline does."""

from __future__ import annotations

import pytest
from load_client import ask
from serve_process import served

from kdexport.pipeline.export_model import export

pytestmark = pytest.mark.slow

# Labels and problem type; the first kind is what /predict answers from.
KINDS = {
    "multi-label": (3, "multi_label_classification"),
    "single-label": (5, None),
    "one-label": (1, None),
    "regression": (1, "regression"),
}
PAIRS = [
    {"text": "shares rose after it", "text_pair": "the market fell"},
    {"text": "one text", "text_pair": ""},
    {"text": "both are longer " * 20, "text_pair": "than what is read " * 30},
]


@pytest.fixture(scope="module")
def texts(articles):
    return ["", "a", "über 5 € – 你好", *(row["text"] for row in articles[:9])]


@pytest.fixture(scope="module")
def models(finished, tmp_path_factory):
    """Kind → a folder as `save_pretrained` writes it: a trained classifier, of which some labels are left."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    found = {}
    for kind, (labels, problem_type) in KINDS.items():
        found[kind] = tmp_path_factory.mktemp(kind)
        model = AutoModelForSequenceClassification.from_pretrained(finished / "teacher")
        for parameter in model.classifier.parameters():
            parameter.data = parameter.data[:labels].clone()
        model.config.num_labels, model.config.problem_type = labels, problem_type
        model.save_pretrained(found[kind])
        AutoTokenizer.from_pretrained(finished / "teacher").save_pretrained(found[kind])
    return found


@pytest.fixture(scope="module")
def server(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("artifacts")
    for kind, folder in models.items():
        export(str(folder), out / kind, variants=("fp32",), max_length=32)
    with served(*(out / kind for kind in KINDS)) as found:
        yield found


def by_label(classes: list[dict]) -> dict[str, float]:
    return {one["label"]: one["score"] for one in classes}


def same(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == {label: pytest.approx(score, abs=1e-4) for label, score in theirs.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_transformers(server, models, texts, kind):
    from transformers import pipeline

    theirs = pipeline("text-classification", model=str(models[kind]), top_k=None)
    cut = {"truncation": True, "max_length": 32}
    of_texts = [by_label(classes) for classes in theirs(texts, **cut)]
    of_pairs = [by_label(theirs(pair, **cut)) for pair in PAIRS]
    best = [max(scores.values()) for scores in of_texts]
    assert max(best) - min(best) > 0.1  # the model tells the texts apart

    url = f"{server.url}/models/{kind}"
    same([by_label(row) for row in ask(url, {"inputs": [*texts, *PAIRS]})[1]], of_texts + of_pairs)
    for function in ("sigmoid", "softmax", "none"):
        found = ask(url, {"inputs": texts, "parameters": {"function_to_apply": function}})[1]
        expected = [by_label(classes) for classes in theirs(texts, function_to_apply=function, **cut)]
        same([by_label(row) for row in found], expected)

    pairs = {name: [pair[name] for pair in PAIRS] for name in ("text", "text_pair")}
    for columns, expected in (({"text": texts}, of_texts), (pairs, of_pairs)):
        inputs = [{"name": k, "shape": [len(v)], "datatype": "BYTES", "data": v} for k, v in columns.items()]
        found = ask(f"{server.url}/v2/models/{kind}/infer", {"inputs": inputs})[1]["outputs"]
        outputs = {one["name"]: one for one in found}
        labels = [theirs.model.config.id2label[i] for i in range(KINDS[kind][0])]
        assert outputs["scores"]["shape"] == [len(expected), len(labels)]
        scores = iter(outputs["scores"]["data"])
        same([{label: next(scores) for label in labels} for _ in expected], expected)
        assert outputs["label"]["data"] == [max(row, key=row.get) for row in expected]

    if kind == next(iter(KINDS)):
        batch = [[text] for text in texts] + [[pair["text"], pair["text_pair"]] for pair in PAIRS]
        same([by_label(row) for row in ask(f"{server.url}/predict", {"inputs": batch})[1]], of_texts + of_pairs)
