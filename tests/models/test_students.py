"""What a student starts with: the teacher's embeddings and labels, a vocabulary of the corpus, the named shape."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from kdexport import spec
from kdexport.distill.student import build_student
from kdexport.errors import ModelError
from kdexport.models.textnet import TextNet
from kdexport.spec import derive
from kdexport.tasks.menus import SPEECH

TEXTS = ["how do i freeze my bank account", "what is the weather in paris", "play something quiet"]


@pytest.fixture(scope="module")
def teacher(classifier):
    return classifier("single-label")


@pytest.fixture(scope="module")
def words(teacher):
    return AutoModelForSequenceClassification.from_pretrained(teacher).get_input_embeddings().weight.detach()


def encoded(built):
    return built.opened.processor(TEXTS, return_tensors="pt", padding=True, return_token_type_ids=False)


@pytest.mark.parametrize("name", ["bag", "cnn", "gru", "cnn:64"])
def test_a_network_reads_the_teachers_embeddings_of_the_corpus(teacher, words, name):
    built = build_student(spec.Student(), name, teacher, TEXTS)
    model = built.opened.model
    assert isinstance(model, TextNet)
    assert len(built.token_ids) == model.config.vocab_size < len(words)
    table = model.embeddings.weight.detach()
    differences = words[built.token_ids] - table
    centre = differences[1]
    assert torch.allclose(differences[1:], centre.expand_as(differences[1:]), atol=1e-5)  # all but padding, less a mean
    assert not table[model.config.pad_token_id].any()
    assert model.config.id2label == {0: "good", 1: "bad", 2: "neither"}
    assert model(**encoded(built)).logits.shape == (3, 3)
    assert model.config.hidden_size == (64 if name == "cnn:64" else 256)
    assert f"a vocabulary of {len(built.token_ids):,}" in built.origin


def test_the_tokens_of_the_corpus_are_the_teachers(teacher, words):
    whole = build_student(spec.Student(vocabulary="whole"), "bag", teacher, TEXTS)
    assert whole.token_ids is None
    assert whole.opened.model.config.vocab_size == len(words)
    trimmed = build_student(spec.Student(), "bag", teacher, TEXTS)
    assert torch.equal(torch.from_numpy(trimmed.token_ids)[encoded(trimmed)["input_ids"]], encoded(whole)["input_ids"])


def test_narrower_embeddings_are_the_main_axes_of_the_teachers(teacher, words):
    built = build_student(spec.Student(embedding=64, vocabulary="whole"), "bag", teacher)
    table = built.opened.model.embeddings.weight.detach()
    assert table.shape == (len(words), 64)
    kept = table.var(dim=0).sum() / words.var(dim=0).sum()
    assert 0.3 < kept < 0.9
    assert f"by PCA ({kept:.0%} of their variance)" in built.origin


def test_embeddings_wider_than_the_teachers_are_refused(teacher):
    with pytest.raises(ModelError, match=r"student\.embedding is 512, the teacher's embeddings are 384 wide"):
        build_student(spec.Student(embedding=512), "bag", teacher, TEXTS)


def test_a_narrow_student_with_a_width_of_embeddings_is_an_encoder_that_starts_as_their_mean(teacher, words):
    built = build_student(spec.Student(embedding=384), "tiny", teacher, TEXTS)
    model = built.opened.model.eval()
    assert (model.config.kind, model.config.num_hidden_layers, model.config.hidden_size) == ("encoder", 2, 128)
    assert torch.equal(model.embeddings.weight[1:], words[built.token_ids][1:])
    with torch.no_grad():
        attentions = model.encoder(
            inputs_embeds=model.embeddings(encoded(built)["input_ids"][:1]), output_attentions=True
        ).attentions
    assert all((a * a.shape[-1] - 1).abs().max() < 0.2 for a in attentions)  # all tokens count nearly alike


@pytest.mark.parametrize(("name", "family"), [("tiny", "bert"), ("layers:1", "bert"), ("spread:2", "bert")])
def test_other_students_stay_in_the_teachers_family(teacher, name, family):
    built = build_student(spec.Student(), name, teacher, TEXTS)
    assert built.opened.model.config.model_type == family
    assert built.opened.model(**encoded(built)).logits.shape == (3, 3)


@pytest.mark.parametrize(
    ("name", "settings", "rate"),
    [
        ("bag", {}, 1e-3),
        ("tiny", {}, 5e-4),
        ("tiny", {"embedding": 384}, 1e-3),
        ("layers:2", {}, 8.3e-5),
    ],
)
def test_the_learning_rate_follows_the_student(name, settings, rate):
    width = {"tiny": 128}.get(name, 384)
    assert derive.learning_rate(spec.Distill(), spec.Student(**settings), name, width).value == rate


def test_recognisers_from_random_weights_take_thousands_of_small_steps():
    conv, given = spec.Student(), spec.Distill()
    of_rows = {rows: derive.batch_size(given, rows, "random", SPEECH).value for rows in (444, 2_400)}
    assert of_rows == {444: 8, 2_400: 16}
    assert derive.batch_size(given, 444, "random").value == derive.batch_size(given, 444, menu=SPEECH).value == 32
    assert derive.batch_size(spec.Distill(batch_size=5), 444, "random", SPEECH).value == 5
    assert derive.learning_rate(given, conv, "conv:96", 0, SPEECH).value == 5e-3
    assert derive.learning_rate(given, conv, "conv:96", 0, SPEECH, 8).value == 2.5e-3
    assert derive.learning_rate(given, conv, "conv", 0).value == 2e-3
    assert derive.epochs(given, 2_400, start="random", menu=SPEECH).value == 60
    assert derive.epochs(given, 444, start="random", menu=SPEECH).value == 145
    assert derive.epochs(given, 100, start="random", menu=SPEECH).value == 200
    assert derive.epochs(given, 1_000, start="random").value == 60
    for width, *found in ((0, 54, 5e-3, 16), (384, 20, 1e-3, 32)):
        how = derive.training(spec.TeacherTraining(), 2_400, 100, 17, width, trained=False, menu=SPEECH)
        assert [how.epochs.value, how.learning_rate.value, how.batch_size.value] == found


def test_changed_copies_are_gone_over_patiently():
    assert derive.epochs(spec.Distill(), 15_000).value == 15
    assert derive.epochs(spec.Distill(), 15_000, start="pools").value == 8
    assert derive.epochs(spec.Distill(), 15_000, 115_000).value == 5
    assert derive.epochs(spec.Distill(epochs=2), 15_000, 115_000).value == 2
