"""Training: labels and no labels, schedules, patience, the log of terms, kills; a tiny model on made-up sentences."""

import msgspec
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification

from kdexport.distill.losses import UNLABELLED
from kdexport.distill.train import Recipe, fit, labels_of, logits_of
from kdexport.tasks.text_classification import TaskConfig, TextClassification

WORDS = ["good", "fine", "great", "bad", "poor", "awful", "the", "film", "was", "and", "a", "story"]
HOW = Recipe(epochs=3, learning_rate=2e-3, batch_size=8, seed=0, temperature=2.0, alpha=0.5)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def task() -> TextClassification:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    config = TaskConfig(
        task="text-classification", labels=["bad", "good"], inputs=["input_ids", "attention_mask"], max_length=16
    )
    return TextClassification(config, tokenizer)


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    random = np.random.default_rng(0)
    found = []
    for i in range(96):
        label = i % 2
        words = [*random.choice(WORDS[6:], random.integers(2, 8)), WORDS[random.integers(3) + 3 * (1 - label)]]
        found.append({"text": " ".join(random.permutation(words)), "label": ["bad", "good"][label]})
    return found


@pytest.fixture(scope="module")
def soft(rows) -> np.ndarray:
    """Logits of a teacher that is sure and right."""
    truth = np.array([row["label"] == "good" for row in rows])
    return np.stack([-3.0 * (2 * truth - 1), 3.0 * (2 * truth - 1)], axis=1).astype(np.float32)


def student(seed=0, **config) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForSequenceClassification(
        BertConfig(vocab_size=len(WORDS) + 2, max_position_embeddings=16, num_labels=2, **(sizes | config))
    )


def test_a_student_learns_from_the_teacher_what_the_labels_do_not_say(task, rows, soft, tmp_path):
    model = student()
    unlabelled = [row | {"label": None} for row in rows]
    assert (labels_of(task, unlabelled) == UNLABELLED).all()
    how = msgspec.structs.replace(HOW, epochs=8, alpha=0.5)
    curve = fit(model, task, unlabelled, soft, how, validation=rows[:32], work=tmp_path, title="t")
    assert (task.hits(logits_of(model, task, rows), rows)).mean() > 0.95
    assert [point["epoch"] for point in curve] == list(range(1, 9))
