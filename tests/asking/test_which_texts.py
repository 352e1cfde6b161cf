"""The texts that are asked next: unsure ones teach more than random ones, and rounds stop when nothing is gained."""

import numpy as np
import pytest

from kdexport.asking.choose import FirstStudent, agreement, first_and_step, is_flat, next_places, sure_from, vectors

CLASSES, WIDTH = 12, 24


@pytest.fixture(scope="module")
def cloud():
    """Points about the centres of classes, as texts of a pool and of validation, and a teacher's logits for them."""
    draw = np.random.default_rng(5)
    centres = draw.normal(0, 1, (CLASSES, WIDTH))

    def some(n):
        x = centres[draw.integers(0, CLASSES, n)] + draw.normal(0, 1.1, (n, WIDTH))
        return x.astype(np.float32), (-0.5 * ((x[:, None] - centres) ** 2).sum(axis=2)).astype(np.float32)

    return some(2_000), some(1_000)


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def test_chosen_texts_teach_more_than_random_ones(cloud):
    (pool, logits), (validation, answers) = cloud

    def after(random_share, seed):
        draw = np.random.default_rng(seed)
        asked = draw.permutation(len(pool))[:100]
        for _ in range(4):
            left = np.setdiff1d(np.arange(len(pool)), asked)
            student = FirstStudent().fit(pool[asked], softmax(logits[asked]))
            chosen, by_chance = next_places(student, pool[left], 50, random_share, draw)
            asked = np.concatenate([asked, left[chosen], left[by_chance]])
        assert len(set(asked)) == 300
        return agreement(FirstStudent().fit(pool[asked], softmax(logits[asked])), validation, answers)

    assert np.mean([after(0.0, seed) for seed in range(3)]) > np.mean([after(1.0, seed) for seed in range(3)])


def test_the_same_seed_chooses_the_same_texts(cloud):
    (pool, logits), _ = cloud
    students = [FirstStudent().fit(pool[:200], softmax(logits[:200])) for _ in range(2)]
    first, second = (next_places(one, pool[200:], 40, 0.25, np.random.default_rng(1)) for one in students)
    assert np.array_equal(first.chosen, second.chosen)
    assert np.array_equal(first.random, second.random)
    assert (len(first.chosen), len(first.random)) == (30, 10)
    assert not {*first.chosen} & {*first.random}


def test_a_pool_that_is_nearly_asked_gives_what_is_left(cloud):
    (pool, logits), _ = cloud
    student = FirstStudent().fit(pool[:50], softmax(logits[:50]))
    chosen, by_chance = next_places(student, pool[50:57], 40, 0.2, np.random.default_rng(1))
    assert sorted([*chosen, *by_chance]) == [*range(7)]


def test_several_labels_a_text_are_unsure_near_one_half(cloud):
    (pool, _), _ = cloud
    targets = (pool[:, :3] > 0).astype(np.float32)
    student = FirstStudent("sigmoid").fit(pool[:400], targets[:400])
    found = student.probabilities(pool[400:])
    assert found.shape == (1_600, 3)
    assert agreement(student, pool[400:], targets[400:] - 0.5) > 0.8
    chosen, _ = next_places(student, pool[400:], 50, 0.0, np.random.default_rng(1))
    near = np.abs(pool[400:, :3]).min(axis=1)
    assert near[chosen].mean() < 0.5 * near.mean()


def test_a_label_that_nobody_has_given_yet_does_no_harm(cloud):
    (pool, logits), _ = cloud
    some = logits[:60].argmax(axis=1) < 3
    student = FirstStudent().fit(pool[:60][some], softmax(logits[:60][some]))
    assert np.isfinite(student.probabilities(pool[60:])).all()


@pytest.mark.parametrize(
    ("budget", "texts", "first", "step"),
    [(3_000, 15_000, 1_000, 250), (900, 15_000, 300, 75), (10_000, 15_000, 1_000, 1_125), (9_000, 90, 30, 16)],
)
def test_a_third_is_asked_at_random_then_eight_rounds(budget, texts, first, step):
    assert first_and_step(budget, texts) == (first, step)


def test_rounds_stop_only_when_the_curve_is_surely_flat():
    rising = [0.80, 0.85, 0.88, 0.90, 0.915, 0.925, 0.93, 0.934, 0.9375]
    assert not any(is_flat(rising[:n], 3_000) for n in range(1, len(rising)))
    flat = [0.90, 0.95, 0.97, 0.971, 0.970, 0.971, 0.9705]
    assert is_flat(flat, 3_000)
    assert not is_flat(flat[:5], 3_000)
    assert not is_flat(flat, 40)


def test_vectors_are_near_for_texts_of_one_meaning(base_model, tmp_path):
    texts = [
        {"text": "the match ended two nil"},
        {"text": "shares fell in early trade"},
        {"text": "the match ended two nil"},
    ]
    found = vectors(str(base_model), texts, 32, tmp_path / "base")
    assert found.dtype == np.float32
    assert np.array_equal(found[0], found[2])
    assert not np.allclose(found[0], found[1])


def test_a_pair_has_both_texts_with_their_difference_and_product(base_model, tmp_path):
    pairs = [{"text": "one", "text_pair": "two words"}, {"text": "two words", "text_pair": "one"}]
    found = vectors(str(base_model), pairs, 32, tmp_path / "base")
    width = found.shape[1] // 4
    assert np.array_equal(found[0, :width], found[1, width : 2 * width])
    assert np.array_equal(found[0, 2 * width :], found[1, 2 * width :])


def test_the_first_student_is_sure_where_it_agrees_with_the_teacher_nearly_always():
    """The margin comes from validation rows: below it the answers are worse, and without enough rows there is none."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(600, 8)).astype(np.float32)
    clear = np.abs(x[:, 0]) > 0.5
    label = np.where(clear, x[:, 0] > 0, draw.random(600) > 0.5).astype(int)
    student = FirstStudent().fit(x[:300], np.eye(2)[label[:300]])
    logits = np.eye(2, dtype=np.float32)[label[300:]]
    least = sure_from(student, x[300:], logits)
    sure = 1 - student.doubt(x[300:]) >= least
    assert 0.3 < sure.mean() < 0.95
    right = student.agrees(x[300:], logits)
    assert right[sure].mean() >= 0.97 > right[~sure].mean()
    assert sure_from(student, x[300:310], logits[:10]) == np.inf
    assert sure_from(student, x[300:], logits[:, ::-1]) == np.inf
