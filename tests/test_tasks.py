import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from kdexport.data import demo
from kdexport.tasks.text_classification import TaskConfig, TextClassification

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
