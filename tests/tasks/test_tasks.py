import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from kdexport.data import demo
from kdexport.tasks.classes import function_of
from kdexport.tasks.config import TaskConfig
from kdexport.tasks.text_classification import TextClassification

NAMES = ["input_ids", "attention_mask", "token_type_ids"]


def make(max_length=32, **changes) -> TextClassification:
    config = TaskConfig(task="text-classification", labels=["a", "b", "c"], inputs=NAMES, max_length=max_length)
    tokenizer = Tokenizer.from_file(str(demo.teacher() / "tokenizer.json"))
    return TextClassification(
        TaskConfig(**{f: getattr(config, f) for f in config.__struct_fields__} | changes), tokenizer
    )


@pytest.fixture(scope="module")
def reference():
    return AutoTokenizer.from_pretrained(demo.teacher())


def same(task, reference, texts, pairs=None):
    ours = task.encode([{"text": t, "text_pair": p} for t, p in zip(texts, pairs or [None] * len(texts), strict=True)])
    arguments = [texts, pairs] if pairs else [texts]
    theirs = reference(
        *arguments, truncation=True, max_length=task.config.max_length, padding=True, return_tensors="np"
    )
    return all(np.array_equal(ours[name], theirs[name]) for name in NAMES)


def test_encode_is_what_transformers_does_on_real_texts(articles, reference):
    texts = [row["text"] for row in articles]
    for max_length in (16, 96, 512):  # texts are cut before they are tokenised; the tokens must not tell
        assert same(make(max_length), reference, texts)
    assert same(make(48), reference, texts[:50], texts[50:100])


@effort(max_examples=300, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=400), st.integers(8, 24))
def test_encode_is_what_transformers_does_on_any_text(reference, text, max_length):
    assert same(make(max_length), reference, [text])


def test_few_long_words_are_read_past_the_head(reference):
    assert same(make(16), reference, ["x" * 90 + " " + "y" * 90 + " and so on and on and on and on and on"])


def test_padding_goes_to_the_side_that_the_model_wants():
    task = make(padding_side="left", pad_id=7)
    ids = task.encode([{"text": "one two three"}, {"text": "one"}])["input_ids"]
    assert ids[1].tolist()[:2] == [7, 7]
    assert ids.dtype == np.int64


def test_decode_gives_the_most_probable_label_and_probabilities_that_sum_to_one():
    (answer,) = make().decode(np.array([[0.0, np.log(3.0), 0.0]], dtype=np.float32))
    assert answer.label == "b"
    assert answer.score == pytest.approx(0.6)
    assert sum(answer.scores.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("labels", "problem_type", "function"),
    [
        (3, None, "softmax"),
        (3, "single_label_classification", "softmax"),
        (3, "multi_label_classification", "sigmoid"),
        (1, None, "sigmoid"),
        (1, "single_label_classification", "sigmoid"),
        (1, "regression", "none"),
        (3, "regression", "none"),
    ],
)
def test_scores_are_those_of_transformers_pipeline(labels, problem_type, function):
    import torch
    from transformers import BertConfig, TextClassificationPipeline
    from transformers.modeling_outputs import SequenceClassifierOutput

    assert function_of(labels, problem_type) == function
    names = ["a", "b", "c"][:labels]
    logits = np.array([[2.5, -1.0, 0.3][:labels], [-800.0, 3.0, 900.0][:labels]])
    pipeline = TextClassificationPipeline.__new__(TextClassificationPipeline)
    pipeline.framework = "pt"
    pipeline.model = type("Model", (), {})()
    pipeline.model.config = BertConfig(id2label=dict(enumerate(names)))
    pipeline.model.config.problem_type = problem_type
    answers = make(labels=names, function=function).decode(logits)
    for row, answer in zip(logits, answers, strict=True):
        output = SequenceClassifierOutput(logits=torch.from_numpy(row[None]))
        with np.errstate(over="ignore"):
            theirs = pipeline.postprocess(output, top_k=None, _legacy=False)
        assert answer.scores == pytest.approx({one["label"]: one["score"] for one in theirs}, abs=1e-6)
        assert answer.label == theirs[0]["label"]
        assert answer.score == answer.scores[answer.label]


def test_a_request_may_ask_for_another_function():
    logits = np.array([[1.0, -1.0, 0.0]], dtype=np.float32)
    assert make().scores(logits, "none").tolist() == logits.tolist()
    assert make(function="none").scores(logits, "sigmoid").sum() == pytest.approx(1.5)
    assert make(function="sigmoid").scores(logits, "softmax").sum() == pytest.approx(1.0)


def test_the_cost_of_a_row_is_near_its_tokens_and_never_above_the_limit(articles):
    task = make(256)
    sentences = [part for row in articles for part in row["text"].split(". ") if part.strip()]
    for texts in (sentences, [row["text"] for row in articles]):
        rows = [{"text": text} for text in texts]
        tokens = np.array([len(arrays["input_ids"]) for arrays in task.tokenize(rows)])
        costs = np.array([task.cost(row) for row in rows])
        assert costs.min() >= 1
        assert costs.max() <= 256
        assert (np.abs(costs / tokens - 1) <= 0.4).mean() > 0.98
    assert task.cost({"text": "one two", "text_pair": "three four"}) == task.cost({"text": "one twothree four"})
    assert task.cost({"text": "\u4f60\u597d" * 10}) in range(15, 30)  # a token a character
    assert task.cost({"text": "\ud800"}) >= 1
