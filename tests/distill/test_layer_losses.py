"""Losses of layers: against values computed in numpy, and on tiny models of every family that is known."""

import copy

import numpy as np
import pytest
import torch
from transformers import (
    AlbertConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    CamembertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    MPNetConfig,
    RobertaConfig,
    XLMRobertaConfig,
    XLNetConfig,
)

from kdexport.distill.layer_losses import (
    Matching,
    _attend,
    attention_loss,
    hidden_loss,
    layer_pairs,
    matched,
    relation_heads,
    relation_loss,
)
from kdexport.errors import ModelError
from kdexport.models.textnet import TextNet, TextNetConfig
from kdexport.tasks.menus import OF_LAYERS

VOCABULARY = 40
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 20,
}
BERT_LIKE = {
    "bert": BertConfig(**SIZES),
    "roberta": RobertaConfig(**SIZES, pad_token_id=0),
    "xlm-roberta": XLMRobertaConfig(**SIZES, pad_token_id=0),
    "camembert": CamembertConfig(**SIZES, pad_token_id=0),
    "electra": ElectraConfig(**SIZES, embedding_size=8),
}
FAMILIES = BERT_LIKE | {
    "albert": AlbertConfig(**SIZES, embedding_size=8),
    "distilbert": DistilBertConfig(vocab_size=VOCABULARY, dim=24, n_layers=3, n_heads=2, hidden_dim=32),
    "deberta-v2": DebertaV2Config(
        **SIZES, relative_attention=True, position_buckets=4, pos_att_type=["p2c", "c2p"], share_att_key=True
    ),
    "mpnet": MPNetConfig(**SIZES, pad_token_id=0),
    "modernbert": ModernBertConfig(**SIZES, pad_token_id=0, reference_compile=False),
}


def build(config, seed=0, **changes):
    torch.manual_seed(seed)
    config = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForSequenceClassification.from_config(config)
    _attend(model, "eager")  # as `matched` does
    with torch.no_grad():  # random weights of usual size make all attention uniform
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    return model.eval()


def batch(lengths=(7, 4, 2)) -> dict[str, torch.Tensor]:
    """Sentences of these lengths, padded on the right."""
    random = torch.Generator().manual_seed(3)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(3, VOCABULARY, mask.shape, generator=random) * mask
    return {"input_ids": ids, "attention_mask": mask.long()}


def losses(student, teacher, inputs, names=OF_LAYERS, token_ids=None) -> dict[str, float]:
    for model in (student, teacher):
        _attend(model, "eager")
    matching = Matching(student, teacher, names, token_ids)
    found = matching(inputs, student(**inputs, **matching.flags))
    matching.release()
    return {name: loss.item() for name, loss in found.items()}


# --- the formulas


@pytest.fixture
def mask() -> torch.Tensor:
    return torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)


def random(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_hidden_is_the_mean_square_over_tokens_features_and_layers(mask):
    ours = [random(2, 4, 6, seed=i) for i in range(3)]
    theirs = [random(2, 4, 6, seed=10 + i) for i in range(3)]
    squares = [
        (ours[layer][b, t, f].item() - theirs[layer][b, t, f].item()) ** 2
        for layer in range(3)
        for b, t in mask.nonzero().tolist()
        for f in range(6)
    ]
    assert len(squares) == 3 * 5 * 6
    assert hidden_loss(ours, theirs, mask).item() == pytest.approx(np.mean(squares), rel=1e-5)


@pytest.mark.parametrize("heads", [(2, 2), (2, 3)])
def test_attention_is_the_mean_square_over_pairs_of_tokens_heads_averaged_where_counts_differ(mask, heads):
    ours, theirs = (random(2, n, 4, 4, seed=n + 7 * i).softmax(-1) for i, n in enumerate(heads))
    a, b = ours.numpy(), theirs.numpy()
    if heads[0] != heads[1]:
        a, b = a.mean(1, keepdims=True), b.mean(1, keepdims=True)
    squares = [
        (a[row, head, i, j] - b[row, head, i, j]) ** 2
        for row in range(2)
        for head in range(a.shape[1])
        for i in range(mask[row].sum())
        for j in range(mask[row].sum())
    ]
    assert attention_loss([ours], [theirs], mask).item() == pytest.approx(np.mean(squares), rel=1e-5)


def test_relation_is_minilms_divergence_of_scaled_dot_products(mask):
    """MiniLMv2, equations 3 to 5, head by head and token by token."""
    heads, ours, theirs = (
        2,
        [random(2, 4, 4, seed=i) for i in range(3)],
        [random(2, 4, 6, seed=5 + i) for i in range(3)],
    )

    def relation(vectors, row, head):
        width = vectors.shape[-1] // heads
        x = vectors[row, : mask[row].sum(), head * width : (head + 1) * width].double().numpy()
        scores = np.exp(x @ x.T / np.sqrt(width))
        return scores / scores.sum(axis=1, keepdims=True)

    expected = 0.0
    for student, teacher in zip(ours, theirs, strict=True):
        divergences = []
        for row in range(2):
            for head in range(heads):
                p, q = relation(teacher, row, head), relation(student, row, head)
                divergences += (p * np.log(p / q)).sum(axis=1).tolist()
        expected += np.mean(divergences)
    assert relation_loss(ours, theirs, mask, heads).item() == pytest.approx(expected, rel=1e-5)


def test_padding_has_no_part_and_no_gradient(mask):
    states = [random(2, 4, 6, seed=i).requires_grad_() for i in range(3)]
    others = [random(2, 4, 6, seed=5 + i) for i in range(3)]
    loss = hidden_loss(states, others, mask) + relation_loss(states, others, mask, 3)
    loss.backward()
    for state in states:
        assert state.grad[~mask].abs().max() == 0
        assert (state.grad[mask].abs().sum(dim=-1) > 0).all()


@pytest.mark.parametrize(
    ("student", "teacher", "pairs"),
    [
        (4, 12, [2, 5, 8, 11]),  # TinyBERT's g(m) = 3 m
        (2, 6, [2, 5]),
        (3, 3, [0, 1, 2]),
        (2, 3, [1, 2]),
        (1, 6, [5]),
        (4, 2, [0, 0, 1, 1]),
        (5, 1, [0, 0, 0, 0, 0]),
    ],
)
def test_layers_are_spread_evenly(student, teacher, pairs):
    assert layer_pairs(student, teacher) == pairs


def test_relation_heads_divide_both_widths():
    assert [relation_heads(*widths) for widths in ((128, 384), (312, 768), (7, 9), (24, 24))] == [8, 12, 1, 12]


# --- on models


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_its_own_perfect_student_and_another_is_none(family):
    config = FAMILIES[family]
    same = losses(build(config), build(config), batch())
    other = losses(build(config, seed=1), build(config), batch())
    assert same == pytest.approx(dict.fromkeys(OF_LAYERS, 0.0), abs=1e-6)
    assert all(other[name] > 1e-4 for name in OF_LAYERS), other


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_do_not_depend_on_how_sentences_are_padded(family):
    """The loss of a batch is the mean of its sentences' own, weighted by tokens (pairs of tokens, for attention)."""
    student, teacher, lengths = build(FAMILIES[family], seed=1), build(FAMILIES[family]), (7, 4, 2)
    inputs = batch(lengths)
    single = [losses(student, teacher, {k: v[i : i + 1, :n] for k, v in inputs.items()}) for i, n in enumerate(lengths)]
    together = losses(student, teacher, inputs)
    for name in OF_LAYERS:
        weights = np.square(lengths) if name == "attention" else lengths
        expected = np.average([found[name] for found in single], weights=weights)
        assert together[name] == pytest.approx(expected, rel=1e-3), name


# The weight that makes queries of the last layer, and what is before it: the layer's input, or that, normed.
QUERIES = {
    **{name: lambda m: m.base_model.encoder.layer[-1].attention.self.query for name in BERT_LIKE},
    "albert": lambda m: m.albert.encoder.albert_layer_groups[0].albert_layers[0].attention.query,
    "distilbert": lambda m: m.distilbert.transformer.layer[-1].attention.q_lin,
    "deberta-v2": lambda m: m.deberta.encoder.layer[-1].attention.self.query_proj,
    "mpnet": lambda m: m.mpnet.encoder.layer[-1].attention.attn.q,
    "modernbert": lambda m: torch.nn.Sequential(m.model.layers[-1].attn_norm, m.model.layers[-1].attn.Wqkv),
}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_those_of_the_last_layer_on_its_tokens(family):
    student, teacher, inputs = build(FAMILIES[family], seed=1), build(FAMILIES[family]), batch((7, 7, 7))
    matching = Matching(student, teacher, ["relation"])
    student(**inputs)
    queries, keys, values = matching._student.inside({}).vectors
    before = student(**inputs, output_hidden_states=True).hidden_states[-2]
    expected = QUERIES[family](student)(before)[..., :24]
    assert torch.allclose(queries, expected, atol=1e-5)
    assert not torch.allclose(keys, queries, atol=1e-2)
    assert not torch.allclose(values, queries, atol=1e-2)
    assert not torch.allclose(values, keys, atol=1e-2)


def test_a_narrower_student_of_another_family_learns_through_projections():
    teacher = build(BERT_LIKE["bert"])
    narrow = {"dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 32, "dropout": 0.0, "attention_dropout": 0.0}
    student = build(DistilBertConfig(vocab_size=VOCABULARY, **narrow)).train()
    matching = Matching(student, teacher, OF_LAYERS)
    student.matching = matching
    assert {tuple(p.shape) for p in matching.parameters()} == {(24, 16)}
    optimizer, inputs, first = torch.optim.Adam(student.parameters(), lr=5e-3), batch(), None
    for _ in range(60):
        found = matching(inputs, student(**inputs, **matching.flags))
        first = first or {name: loss.item() for name, loss in found.items()}
        (found["hidden"] + 300 * found["attention"] + found["relation"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(found[name].item() < 0.7 * first[name] for name in OF_LAYERS), (first, found)


def test_the_teacher_stays_as_it_is_and_out_of_the_students_state():
    teacher, student = build(BERT_LIKE["bert"]), build(BERT_LIKE["bert"], hidden_size=12, intermediate_size=16)
    teacher.config.hidden_dropout_prob = 0.5
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    own = set(student.state_dict())
    student.matching = matching = Matching(student, teacher.train(), ["hidden"])
    assert set(student.state_dict()) - own == {"matching.of_embeddings.weight", "matching.of_layers.weight"}
    student.train()
    inputs = batch()
    matching(inputs, student(**inputs, **matching.flags))["hidden"].backward()
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert matching.of_layers.weight.grad.abs().sum() > 0


def test_a_trimmed_vocabulary_is_read_back_as_the_teachers():
    teacher, kept = build(BERT_LIKE["bert"]), np.array([0, 3, 7, 8, 20, 39], dtype=np.int64)
    student = build(BERT_LIKE["bert"])
    student.resize_token_embeddings(len(kept))
    with torch.no_grad():
        student.get_input_embeddings().weight.copy_(teacher.get_input_embeddings().weight[torch.from_numpy(kept)])
    inputs = {"input_ids": torch.tensor([[1, 5, 2, 4, 3]]), "attention_mask": torch.ones(1, 5, dtype=torch.int64)}
    assert losses(student, teacher, inputs, token_ids=kept) == pytest.approx(dict.fromkeys(OF_LAYERS, 0.0), abs=1e-6)
    assert losses(student, teacher, inputs)["hidden"] > 1e-2


def test_what_the_teacher_does_not_read_is_left_out():
    student = build(BERT_LIKE["bert"])
    teacher = build(FAMILIES["distilbert"])
    inputs = batch() | {"token_type_ids": torch.ones(3, 7, dtype=torch.int64)}
    assert losses(student, teacher, inputs)["hidden"] > 0


# --- refusals


@pytest.mark.parametrize("kind", ["bag", "cnn", "gru"])
@pytest.mark.parametrize("name", OF_LAYERS)
def test_a_student_without_layers_is_refused(kind, name):
    student = TextNet(TextNetConfig(kind=kind, vocab_size=VOCABULARY))
    with pytest.raises(ModelError, match="the student has no layers to match: it is of the family 'kdexport-text'"):
        Matching(student, build(BERT_LIKE["bert"]), [name])


def test_a_family_whose_vectors_are_not_known_is_refused():
    strange = build(XLNetConfig(vocab_size=VOCABULARY, d_model=24, n_layer=2, n_head=2, d_inner=32))
    Matching(build(BERT_LIKE["bert"]), strange, ["hidden"])
    with pytest.raises(ModelError, match="'xlnet' of the teacher keeps queries, keys and values is not known"):
        Matching(build(BERT_LIKE["bert"]), strange, ["relation"])


# --- around a training


@pytest.fixture(scope="module")
def folder(base_model, tmp_path_factory):
    """The base model as a finished teacher stage."""
    from transformers import AutoTokenizer

    from kdexport.models.loading import ModelAndProcessor
    from kdexport.models.saving import save_model, save_task

    path = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    opened = ModelAndProcessor(
        AutoModelForSequenceClassification.from_pretrained(base_model, num_labels=2),
        AutoTokenizer.from_pretrained(base_model),
    )
    save_task(opened, 32, ["a", "b"], path)
    save_model(opened, path)
    return path


def test_a_student_is_left_as_it_was_found(folder):
    from kdexport.tasks import load_task

    student, task = AutoModelForSequenceClassification.from_pretrained(folder), load_task(folder)
    keys, attention = set(student.state_dict()), student.config._attn_implementation
    student(torch.ones(1, 2, dtype=torch.int64), output_hidden_states=True, output_attentions=True)
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in student.modules()]  # transformers' own
    with matched(student, folder, OF_LAYERS, None, task=task, rows=task.examples()) as matching:
        inputs = {name: torch.from_numpy(array) for name, array in task.encode(task.examples()).items()}
        found = matching(inputs, student.eval()(**inputs, **matching.flags))
        assert {name: loss.item() for name, loss in found.items()} == pytest.approx(dict.fromkeys(found, 0), abs=1e-6)
    assert set(student.state_dict()) == keys
    assert student.config._attn_implementation == attention
    assert not hasattr(student, "matching")
    assert hooks == [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in student.modules()]


def test_a_student_that_reads_other_tokens_is_refused(folder):
    from kdexport.tasks import load_task

    student, task = AutoModelForSequenceClassification.from_pretrained(folder), load_task(folder)
    kept = np.arange(30522)[::-1].copy()
    with pytest.raises(ModelError, match="the student's tokenizer is not the teacher's"):
        with matched(student, folder, ["hidden"], kept, task=task, rows=task.examples()):
            pass
