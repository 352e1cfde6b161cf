"""Students made from a teacher's weights: some of its layers, or narrower ones."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from kdexport.data import demo
from kdexport.errors import ModelError
from kdexport.models.shrink import keep_layers, layers_of, narrow

FAMILIES = ["bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra"]
OTHERS = ["deberta-v2", "modernbert", "mpnet", "albert", "convbert"]
EXTRA = {
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pooler_hidden_size": 48},
    "modernbert": {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 3},
    "electra": {"embedding_size": 48},
    "albert": {"embedding_size": 24},
}
IDS = torch.randint(5, 200, (4, 11), generator=torch.Generator().manual_seed(0))


def teacher_of(family: str, *, layers=6, width=48, heads=6, **changes):
    """A small classifier, every weight of it random, its norms too."""
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    feed_forward = {"hidden_dim" if family == "distilbert" else "intermediate_size": 4 * width}
    others = {"vocab_size": 200, "max_position_embeddings": 40, "num_labels": 3, **EXTRA.get(family, {})}
    config = AutoConfig.for_model(family, **(sizes | feed_forward | others | changes))
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            around = 1 if "norm" in name.lower() and name.endswith("weight") else 0
            weight.copy_(around + torch.randn_like(weight) * 0.2)
    return model


def layer_list(model) -> nn.ModuleList:
    lists = (part for part in model.modules() if isinstance(part, nn.ModuleList))
    return next(part for part in lists if len(part) == model.config.num_hidden_layers)


@torch.no_grad()
def logits_of(model):
    return model(input_ids=IDS).logits


@torch.no_grad()
def stream_of(model):
    """The hidden states of all layers, [L + 1, B, T, H]."""
    return torch.stack(model.base_model(input_ids=IDS, output_hidden_states=True).hidden_states)


# --- some of the layers


def test_layers_are_the_lowest_or_spread_or_those_named():
    assert layers_of(6, 2) == [0, 1]
    assert layers_of(6, 2, spread=True) == [0, 5]
    assert layers_of(6, 3, spread=True) == [0, 2, 5]
    assert layers_of(12, 4, spread=True) == [0, 4, 7, 11]
    assert layers_of(6, 1, spread=True) == [0]
    assert layers_of(6, (0, 2, 5)) == [0, 2, 5]
    for total in range(1, 25):
        for count in range(2, total + 1):
            found = layers_of(total, count, spread=True)
            assert layers_of(total, found) == found
            assert (len(found), found[0], found[-1]) == (count, 0, total - 1)


@pytest.mark.parametrize("wanted", [[], [0, 0], [2, 1], [-1, 3], [0, 6]])
def test_layers_that_are_not_the_teachers_are_refused(wanted):
    with pytest.raises(ModelError, match=r"layers are 0 to 5; .* Name them like \[0, 2, 5\]"):
        layers_of(6, wanted)


@pytest.mark.parametrize("wanted", [0, 7])
def test_more_layers_than_there_are_are_refused(wanted):
    with pytest.raises(ModelError, match=rf"the teacher has 6 layers, not {wanted}"):
        layers_of(6, wanted)


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
@pytest.mark.parametrize("kept", [[0, 1], [0, 1, 2, 3, 4, 5], [0, 2, 5]])
def test_a_student_of_some_layers_is_the_teacher_without_the_others(family, kept, tmp_path):
    if (family, kept) == ("modernbert", [0, 2, 5]):
        kept = [0, 1, 5]
    teacher = teacher_of(family)
    before = copy.deepcopy(teacher.state_dict())
    student = keep_layers(teacher, kept)
    assert student.config.num_hidden_layers == len(kept)
    assert teacher.config.num_hidden_layers == 6
    assert all(torch.equal(before[name], weight) for name, weight in teacher.state_dict().items())
    if family == "albert":  # its layers are one
        teacher.config.num_hidden_layers = teacher.albert.encoder.config.num_hidden_layers = len(kept)
    else:
        layers = layer_list(teacher)
        for i in reversed(range(6)):
            if i not in kept:
                del layers[i]
    assert torch.allclose(logits_of(student), logits_of(teacher), atol=1e-6)
    student.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits_of(again), logits_of(student))


@pytest.mark.parametrize("kept", [[1, 2], [0, 3], [0, 1, 2, 4]])
def test_a_layer_that_would_become_of_another_kind_is_refused(kept):
    with pytest.raises(ModelError, match=r"layer \d of a modernbert teacher can't be layer \d: .* Keep the lowest"):
        keep_layers(teacher_of("modernbert"), kept)


def test_layers_that_can_not_be_told_are_refused():
    config = AutoConfig.for_model("bart", vocab_size=200, d_model=16, encoder_layers=2, decoder_layers=2)
    with pytest.raises(ModelError, match="of a bart model the layers can't be told"):
        keep_layers(AutoModelForSequenceClassification.from_config(config), [0])


# --- narrower ones


@pytest.mark.parametrize("family", FAMILIES)
def test_at_the_teachers_own_width_what_is_projected_is_exact(family):
    teacher = teacher_of(family)
    student, kept, projected, _ = narrow(teacher, 4, 48)
    assert (kept, projected) == (1.0, 4)
    assert torch.allclose(stream_of(student), stream_of(teacher)[:5], atol=1e-4)


def test_neurons_beyond_the_teachers_write_nothing():
    teacher = teacher_of("bert", intermediate_size=96)
    student = narrow(teacher, 6, 48).model
    assert student.config.intermediate_size == 192
    assert torch.allclose(stream_of(student), stream_of(teacher), atol=1e-4)


def test_a_few_words_are_kept_whole():
    """They vary along fewer axes than there is room for; the rest of the axes still are at right angles."""
    assert narrow(teacher_of("bert", vocab_size=20), 2, 40).kept_variance == pytest.approx(1, abs=1e-5)


def lifted(slim, wide: int):
    """A wide BERT that does within some directions, heads and neurons what a slim one does, and nothing beyond."""
    width = slim.config.hidden_size
    turned, axes = (torch.linalg.qr(torch.randn(n, width).index_fill(1, torch.tensor(0), 1)).Q for n in (width, wide))
    turned[:, 0], axes[:, 0] = turned[:, 0].abs(), axes[:, 0].abs()
    axes = axes @ turned.T  # [wide, width], from 1 to 1, as norms take that out
    teacher = teacher_of("bert", layers=slim.config.num_hidden_layers, width=wide, heads=wide // 8)
    heads = torch.cat([torch.arange(8) + 8 * head for head in (1, wide // 8 - 1)])
    neurons = torch.randperm(4 * wide)[: 4 * width].sort().values
    with torch.no_grad():
        old = dict(slim.base_model.named_parameters())
        for name, weight in teacher.base_model.named_parameters():
            units = heads if "attention" in name else neurons
            if "LayerNorm.weight" in name:  # vectors of √wide, not √width
                weight.fill_(float(old[name][0]) * (width / wide) ** 0.5)
            elif "embeddings" in name and "LayerNorm" not in name:
                weight.copy_(old[name] @ axes.T)
            elif "output" in name or "LayerNorm" in name:  # into the stream
                if weight.ndim == 2:
                    weight.zero_()[:, units] = axes @ old[name]
                else:
                    weight.copy_(axes @ old[name])
            elif "pooler" not in name:
                weight.zero_()[units] = old[name] @ axes.T if weight.ndim == 2 else old[name]
    return teacher


def test_what_happens_within_the_kept_directions_is_kept():
    slim = teacher_of("bert", layers=3, width=16, heads=2)
    with torch.no_grad():
        for name, weight in slim.named_parameters():
            if "LayerNorm.weight" in name:
                weight.fill_(1.2)  # a gain that differs by coordinate can't be turned
    teacher = lifted(slim, 48)
    assert torch.allclose(stream_of(teacher).norm(dim=-1), stream_of(slim).norm(dim=-1), atol=1e-4)
    student, kept, projected, _ = narrow(teacher, 3, 16)
    assert kept == pytest.approx(1, abs=1e-5)
    assert projected == 3
    ours, theirs = (stream_of(model).flatten(1, 2) for model in (student, teacher))
    assert torch.allclose(ours @ ours.mT, theirs @ theirs.mT, atol=1e-2)
    assert theirs.std() > 0.5


def test_products_of_words_are_kept_as_the_kept_variance_says():
    teacher = AutoModelForSequenceClassification.from_pretrained(demo.teacher(), num_hidden_layers=2)
    teacher.resize_token_embeddings(5000)
    words = teacher.get_input_embeddings().weight.detach()
    words = words - words.mean(dim=0)
    shares = []
    for width in (64, 192, 384):
        student, kept, projected, _ = narrow(teacher, 2, width, project_layers=False)
        assert projected == 0
        ours = student.get_input_embeddings().weight.detach()
        assert float(ours.square().sum() / words.square().sum()) == pytest.approx(kept, abs=1e-4)
        # the principal axes keep the most; ours give one up for the direction that norms take out
        most = torch.linalg.svdvals(words.T @ words)
        assert float(most[: width - 1].sum() / most.sum()) - 1e-4 < kept < float(most[:width].sum() / most.sum()) + 1e-4
        products = torch.stack([(table[2000:2500] @ table[2500:3000].T).flatten() for table in (ours, words)])
        shares.append(float(torch.corrcoef(products)[0, 1]))
    assert shares == sorted(shares)
    assert shares[0] > 0.8
    assert shares[-1] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_a_narrow_student_has_the_shape_that_was_asked_for(family, tmp_path):
    teacher = teacher_of(family)
    student, kept, projected, _ = narrow(teacher, 2, 16)
    config = student.config
    assert projected == (2 if family in FAMILIES else 0)
    assert 0 < kept < 1
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (2, 16, 2)
    assert getattr(config, "intermediate_size", None) or config.hidden_dim == 64
    assert not any(value for name, value in vars(config).items() if "dropout" in name)
    assert all(module.p == 0 for module in student.modules() if isinstance(module, nn.Dropout))
    assert all(weight.isfinite().all() for weight in student.parameters())
    assert logits_of(student).shape == (4, 3)
    student.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits_of(again), logits_of(student))


@pytest.mark.parametrize("family", FAMILIES)
def test_projected_layers_follow_the_teachers(family):
    """Random teachers have no structure to keep, so all that can be seen is that it is far from random."""
    teacher = teacher_of(family)
    share = {}
    for project in (True, False):
        student = narrow(teacher, 3, 40, project_layers=project).model
        ours, theirs = (torch.pdist(stream_of(model)[3].flatten(0, 1)) for model in (student, teacher))
        share[project] = float(torch.corrcoef(torch.stack([ours, theirs]))[0, 1])
    assert share[True] > max(0.5, share[False] + 0.2)


def test_layers_beyond_the_teachers_and_heads_of_another_size_are_random():
    assert narrow(teacher_of("bert", layers=2), 4, 16).projected_layers == 2
    assert narrow(teacher_of("bert", heads=4), 2, 16).projected_layers == 0  # heads of 12
    for width, heads in ((24, 2), (64, 1), (48, 4), (20, 1)):
        config = narrow(teacher_of("bert", heads=8, width=96), 2, width).model.config
        assert (config.num_attention_heads, config.hidden_size) == (heads, width)


@pytest.mark.parametrize("family", ["electra", "albert"])
def test_a_teacher_whose_table_is_narrow_keeps_it_at_its_own_width(family):
    teacher = teacher_of(family, embedding_size=16)
    student, kept, _, _ = narrow(teacher, 6, 48)
    assert kept == pytest.approx(1, abs=1e-6)
    if family == "electra":
        assert torch.allclose(stream_of(student), stream_of(teacher), atol=1e-4)
    narrower = narrow(teacher, 2, 32)
    assert narrower.model.get_input_embeddings().weight.shape == (200, 16)
    assert 0.3 < narrower.kept_variance < 1
    assert narrow(teacher_of(family, embedding_size=32), 2, 16).model.config.embedding_size == 16


def test_what_can_not_be_narrowed_is_refused():
    teacher = teacher_of("bert")
    with pytest.raises(ModelError, match="the student is 64 wide, the teacher 48"):
        narrow(teacher, 2, 64)
    with pytest.raises(ModelError, match="a mobilebert model's embeddings can't be narrowed"):
        narrow(teacher_of("mobilebert", width=32, heads=4, embedding_size=16), 2, 16)
