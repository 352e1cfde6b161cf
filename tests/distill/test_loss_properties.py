"""What must hold for any logits: minima, signs, limits of the temperature, and that rows don't touch one another."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import log_softmax, softmax
from scipy.stats import entropy

from kdexport.distill.layer_losses import attention_loss, hidden_loss, layer_pairs, relation_heads, relation_loss
from kdexport.distill.losses import (
    LABEL_LOSSES,
    LOGIT_LOSSES,
    bce,
    by_step,
    ctc,
    ctc_of_teacher,
    dist,
    jsd,
    kl,
    objective,
    soft_cross_entropy,
    total,
    with_rest,
)
from kdexport.tasks.config import NO_LABEL
from kdexport.tasks.packed import packed_lines

OF_ROWS = [name for name in LOGIT_LOSSES if name not in ("ctc", "margin-mse", "listwise-kl", "cosine", "similarity")]
# Those whose rows have a part of their own; `dist` compares columns too.
BY_ROW = [name for name in OF_ROWS if name != "dist"]
SOFTENED = ["kl", "reverse-kl", "jsd", "soft-ce", "dkd", "dist"]
TEMPERATURES = st.sampled_from([0.5, 1.0, 2.0, 4.0, 20.0])


def tables(rows, columns, most=12):
    number = st.floats(-most, most, width=32)
    return arrays(np.float32, (rows, columns), elements=number).map(torch.from_numpy)


@st.composite
def pairs(draw, least_rows=1, least_classes=2):
    """Logits of student and teacher, and labels, of which some may be missing."""
    rows, classes = draw(st.integers(least_rows, 5)), draw(st.integers(least_classes, 6))
    labels = draw(st.lists(st.sampled_from([NO_LABEL, *range(classes)]), min_size=rows, max_size=rows))
    return draw(tables(rows, classes)), draw(tables(rows, classes)), torch.tensor(labels)


def least_of(name, teacher, temperature):
    """The loss of a student that is the teacher, in float64."""
    z = teacher.double().numpy() / temperature
    if name == "soft-ce":
        return temperature**2 * entropy(softmax(z, axis=1), axis=1).mean()
    if name == "bce":
        both = np.stack([z, np.zeros_like(z)])
        return temperature**2 * entropy(softmax(both, axis=0), axis=0).mean()
    return 0.0


def near(value, temperature):
    """Within the precision of float32, which T² multiplies."""
    return pytest.approx(value, rel=1e-4, abs=2e-5 * max(1.0, temperature**2))


@pytest.mark.parametrize("name", OF_ROWS)
@given(pair=pairs(), temperature=TEMPERATURES)
def test_no_student_is_better_than_the_teacher_itself(name, pair, temperature):
    student, teacher, labels = pair
    loss = LOGIT_LOSSES[name]
    least = least_of(name, teacher, temperature)
    assert loss(student, teacher, labels, temperature).item() >= least - 2e-5 * max(1.0, temperature**2)
    if name == "dist":  # a constant row or column correlates with nothing
        probabilities = torch.softmax(teacher / temperature, dim=1)
        assume((probabilities.std(dim=1) > 0.01).all())
        assume(len(teacher) == 1 or (probabilities.std(dim=0) > 0.01).all())
        assert loss(teacher.clone(), teacher, labels, temperature).item() < 1e-3 * max(1.0, temperature**2)  # of 2
        return
    assert loss(teacher.clone(), teacher, labels, temperature).item() == near(least, temperature)


@given(pairs(), TEMPERATURES)
def test_divergences_have_their_upper_bounds(pair, temperature):
    student, teacher, _ = pair
    assert jsd(student, teacher, None, temperature).item() <= temperature**2 * np.log(2) * (1 + 1e-5)
    assert dist(student, teacher, None, 1.0).item() <= 4 + 1e-5


@given(pairs())
def test_at_temperature_one_kl_is_plain(pair):
    student, teacher, _ = (each.double() for each in pair)
    expected = entropy(softmax(teacher.numpy(), axis=1), softmax(student.numpy(), axis=1), axis=1).mean()
    assert kl(student, teacher, None, 1.0).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    cross = -(softmax(teacher.numpy(), axis=1) * log_softmax(student.numpy(), axis=1)).sum(axis=1).mean()
    assert soft_cross_entropy(student, teacher, None, 1.0).item() == pytest.approx(cross, rel=1e-9)


@given(pairs())
def test_hot_kl_is_the_squared_difference_of_centred_logits(pair):
    """Hinton, Vinyals and Dean 2015, section 2.1: half of it, the mean over classes."""
    student, teacher, _ = (each.double() for each in pair)
    differences = (student - student.mean(dim=1, keepdim=True)) - (teacher - teacher.mean(dim=1, keepdim=True))
    expected = 0.5 * differences.square().mean().item()
    found = kl(student, teacher, None, 1e5).item()
    assert found == pytest.approx(expected, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("name", SOFTENED)
@given(pair=pairs(), temperature=TEMPERATURES, constants=st.tuples(*[st.floats(-50, 50)] * 2))
def test_a_constant_added_to_all_classes_changes_nothing(name, pair, temperature, constants):
    student, teacher, labels = (each.double() if each.is_floating_point() else each for each in pair)
    assume((teacher.topk(2, dim=1).values.diff(dim=1) != 0).all())  # the teacher's choice is dkd's target
    before = LOGIT_LOSSES[name](student, teacher, labels, temperature).item()
    after = LOGIT_LOSSES[name](student + constants[0], teacher + constants[1], labels, temperature).item()
    assert after == pytest.approx(before, rel=1e-6, abs=1e-6 * max(1.0, temperature**2))


@pytest.mark.parametrize("name", OF_ROWS)
@given(pair=pairs(), temperature=TEMPERATURES, data=st.data())
def test_the_order_of_rows_and_of_classes_is_nothing(name, pair, temperature, data):
    student, teacher, labels = (each.double() if each.is_floating_point() else each for each in pair)
    rows = data.draw(st.permutations(range(len(student))))
    classes = data.draw(st.permutations(range(student.shape[1])))
    assume((teacher.topk(2, dim=1).values.diff(dim=1) != 0).all())
    place = torch.tensor(classes).argsort()
    moved = torch.where(labels == NO_LABEL, NO_LABEL, place[labels.clamp(min=0)])
    before = LOGIT_LOSSES[name](student, teacher, labels, temperature).item()
    after = LOGIT_LOSSES[name](student[rows][:, classes], teacher[rows][:, classes], moved[rows], temperature).item()
    assert after == pytest.approx(before, rel=1e-6, abs=1e-6 * max(1.0, temperature**2))


@pytest.mark.parametrize("name", BY_ROW)
@given(pair=pairs(), temperature=TEMPERATURES)
def test_a_rows_part_does_not_depend_on_its_company(name, pair, temperature):
    student, teacher, labels = pair
    loss = LOGIT_LOSSES[name]
    whole = loss(student, teacher, labels, temperature).item() * len(student)
    alone = [loss(student[[i]], teacher[[i]], labels[[i]], temperature).item() for i in range(len(student))]
    assert whole == near(sum(alone), temperature)


@given(pairs(), TEMPERATURES)
def test_a_rows_gradient_does_not_depend_on_its_company(pair, temperature):
    student, teacher, labels = pair

    def gradient(rows):
        given = student[rows].clone().requires_grad_()
        terms = objective(given, labels[rows], teacher[rows], {"kl": 1.0}, temperature=temperature, alpha=0.5)
        (total(terms) * len(rows)).backward()
        return given.grad

    together = gradient(list(range(len(student))))
    alone = torch.cat([gradient([i]) for i in range(len(student))])
    assert torch.allclose(together, alone, rtol=1e-4, atol=1e-5 * max(1.0, temperature))


@st.composite
def labelled(draw):
    """The name of a labels' term, logits and labels of 1 to 5 rows, some without a label."""
    name, rows, classes = draw(st.sampled_from(["ce", "bce", "mse", "ctc"])), draw(st.integers(1, 5)), 4
    unknown = torch.tensor(draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    logits = draw(tables(rows, classes))
    if name == "ctc":
        texts = draw(arrays(np.int64, (rows, 3), elements=st.integers(1, classes - 1)))
        lengths = draw(arrays(np.int64, rows, elements=st.integers(0, 3)))
        texts[np.arange(3) >= lengths[:, None]] = -1
        logits = draw(tables(rows * 7, classes)).view(rows, 7, classes)
        return name, logits, torch.where(unknown[:, None], NO_LABEL, torch.from_numpy(texts))
    if name == "ce":
        labels = torch.from_numpy(draw(arrays(np.int64, rows, elements=st.integers(0, classes - 1))))
        return name, logits, torch.where(unknown, NO_LABEL, labels)
    kind = st.sampled_from([0.0, 1.0]) if name == "bce" else st.floats(-9, 9, width=32)
    labels = torch.from_numpy(draw(arrays(np.float32, (rows, classes), elements=kind)))
    return name, logits, torch.where(unknown[:, None], torch.nan, labels)


@given(labelled())
def test_labels_count_by_row_and_rows_without_one_count_nothing(found):
    name, logits, labels = found
    loss = LABEL_LOSSES[name]
    alone = [loss(logits[[i]], labels[[i]]).item() for i in range(len(logits))]
    assert all(each >= -1e-6 for each in alone)
    assert loss(logits, labels).item() * len(logits) == pytest.approx(sum(alone), rel=1e-4, abs=1e-4)
    without = labels.isnan() if labels.is_floating_point() else labels == NO_LABEL
    for each, gone in zip(alone, without.view(len(labels), -1)[:, 0].tolist(), strict=True):
        assert not gone or each == 0.0


@given(pairs(), st.sampled_from([0.0, 0.3, 1.0]), TEMPERATURES)
def test_the_objective_is_the_sum_that_it_states(pair, alpha, temperature):
    student, teacher, labels = pair
    losses = {"kl": 1.0, "mse": 0.5}
    terms = objective(student, labels, teacher, losses, temperature=temperature, alpha=alpha)
    expected = (1 - alpha) * LABEL_LOSSES["ce"](student, labels).item()
    for name, weight in losses.items():
        expected += alpha * weight * LOGIT_LOSSES[name](student, teacher, labels, temperature).item()
    assert total(terms).item() == near(expected, temperature)
    alone = objective(student, labels, None, losses, temperature=temperature, alpha=alpha)
    assert total(alone).item() == pytest.approx(LABEL_LOSSES["ce"](student, labels).item(), rel=1e-5, abs=1e-6)


# --- packed outputs of language models


@given(st.data(), st.integers(2, 9))
def test_a_student_that_is_the_teacher_loses_nothing_on_packed_targets(data, vocabulary):
    teacher = data.draw(tables(3, vocabulary, most=4))
    student = data.draw(tables(3, vocabulary, most=4))
    k = data.draw(st.integers(1, vocabulary))
    logs = log_softmax(teacher.numpy(), axis=1)
    packed = torch.from_numpy(packed_lines(logs, np.zeros(3, np.int64), k, [1]))
    ours, theirs = with_rest(teacher, packed)
    assert torch.allclose(ours, theirs, atol=2e-3)  # a rest of almost no mass is bounded below
    found = kl(*with_rest(student, packed), None, 1.0).item()
    if k == vocabulary:
        assert found == pytest.approx(kl(student, teacher, None, 1.0).item(), rel=1e-4, abs=1e-5)


# --- speech


@given(st.data())
def test_ctc_of_the_teachers_text_is_least_for_the_teachers_path(data):
    teacher = data.draw(tables(8, 4)).view(2, 4, 4)
    student = data.draw(tables(8, 4)).view(2, 4, 4)
    assert ctc_of_teacher(student, teacher, None, 1.0).item() >= -1e-6
    path = teacher.argmax(dim=-1)
    sure = torch.full_like(teacher, -60.0).scatter(-1, path.unsqueeze(-1), 0.0)
    assert ctc_of_teacher(sure, teacher, None, 1.0).item() == pytest.approx(0.0, abs=1e-4)


@given(st.data())
def test_behind_a_recordings_end_nothing_is_compared(data):
    student, teacher = (data.draw(tables(8, 4)).view(2, 4, 4) + 0.5 for _ in range(2))
    ends = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    for i, end in enumerate(ends):
        teacher[i, end:] = torch.tensor([0.0, -30.0, -30.0, -30.0])
    teacher[:, 0] = 1.0
    ours, theirs = by_step(student, teacher)
    assert torch.equal(ours, torch.cat([student[i, : ends[i]] for i in range(2)]))
    assert torch.equal(theirs, torch.cat([teacher[i, : ends[i]] for i in range(2)]))


@given(labelled().filter(lambda found: found[0] == "ctc"))
def test_ctc_of_a_text_is_not_below_that_of_its_best_path(found):
    _, logits, labels = found
    assert torch.isfinite(ctc(logits, labels))


# --- losses of layers


@st.composite
def layers(draw, heads=2):
    """Two lists of states [B, T, W], two of attention [B, H, T, T], and a mask with at least one token a row."""
    rows, tokens, width = draw(st.integers(1, 3)), draw(st.integers(1, 4)), 2 * heads
    lengths = draw(st.lists(st.integers(1, tokens), min_size=rows, max_size=rows))
    mask = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    states = [[draw(tables(rows * tokens, width, 4)).view(rows, tokens, width) for _ in range(3)] for _ in range(2)]
    maps = [
        [draw(tables(rows * heads * tokens, tokens, 4)).view(rows, heads, tokens, tokens).softmax(-1) for _ in range(2)]
        for _ in range(2)
    ]
    return states, maps, mask


def of_layers(states, maps, mask):
    return {
        "hidden": hidden_loss(*states, mask).item(),
        "attention": attention_loss(*maps, mask).item(),
        "relation": relation_loss(*states, mask, 2).item(),
    }


@given(layers())
def test_layers_that_are_the_teachers_lose_nothing_and_no_others_less(found):
    states, maps, mask = found
    assert all(value >= -1e-5 for value in of_layers(states, maps, mask).values())
    same = of_layers([states[1]] * 2, [maps[1]] * 2, mask)
    assert same == {name: pytest.approx(0.0, abs=1e-6) for name in same}


@given(layers(), st.data())
def test_what_stands_at_padding_is_nothing_to_any_loss(found, data):
    states, maps, mask = found
    noise = data.draw(st.floats(-20, 20, width=32))
    before = of_layers(states, maps, mask)
    moved = [[torch.where(mask[..., None], layer, noise) for layer in side] for side in states]
    both = (mask[:, :, None] & mask[:, None, :])[:, None]
    maps = [[torch.where(both, layer, noise) for layer in side] for side in maps]
    after = of_layers(moved, maps, mask)
    assert after == {name: pytest.approx(value, rel=1e-4, abs=1e-5) for name, value in before.items()}


@given(layers())
def test_a_rows_tokens_weigh_the_same_in_any_company(found):
    states, maps, mask = found
    whole, tokens = of_layers(states, maps, mask), mask.sum(dim=1)
    weights = {"hidden": tokens, "attention": tokens**2, "relation": tokens}
    for name, by_row in weights.items():
        alone = [
            of_layers(*([[layer[[i]] for layer in side] for side in part] for part in (states, maps)), mask[[i]])[name]
            for i in range(len(mask))
        ]
        expected = sum(value * weight for value, weight in zip(alone, by_row.tolist(), strict=True))
        assert whole[name] * by_row.sum().item() == pytest.approx(expected, rel=1e-3, abs=1e-4)


@given(layers(), st.floats(0, 6.28))
def test_relations_do_not_see_a_turn_of_each_heads_vectors(found, angle):
    states, _, mask = found
    c, s = float(np.cos(angle)), float(np.sin(angle))
    turn = torch.block_diag(*[torch.tensor([[c, -s], [s, c]])] * 2)
    before = relation_loss(*states, mask, 2).item()
    assert relation_loss([each @ turn for each in states[0]], states[1], mask, 2).item() == pytest.approx(
        before, rel=1e-3, abs=1e-4
    )


@given(st.integers(1, 24), st.integers(1, 48))
def test_layers_are_paired_in_order_and_the_last_with_the_last(student, teacher):
    found = layer_pairs(student, teacher)
    assert found == sorted(found)
    assert len(found) == student
    assert found[0] >= 0
    assert found[-1] == teacher - 1
    if teacher >= student:
        assert len(set(found)) == student


@given(st.integers(1, 64), st.integers(1, 64))
def test_heads_of_relations_divide_both_widths(student, teacher):
    heads = relation_heads(student, teacher)
    assert 1 <= heads <= 12
    assert student % heads == teacher % heads == 0


@given(pairs())
def test_bce_takes_each_class_alone(pair):
    student, teacher, _ = pair
    columns = [bce(student[:, [i]], teacher[:, [i]], None, 2.0).item() for i in range(student.shape[1])]
    assert bce(student, teacher, None, 2.0).item() == pytest.approx(float(np.mean(columns)), rel=1e-4)
