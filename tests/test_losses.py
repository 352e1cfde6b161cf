import math

import pytest
import torch

from kdexport.distill.losses import kl, objective, total

TEACHER = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
STUDENT = torch.tensor([[0.0, 0.0], [1.0, 0.0]])


def test_kl_is_the_value_computed_by_hand():
    # T = 2. Row 1: teacher softmax([1, 0]) = (e, 1) / (1 + e), student (1/2, 1/2).
    p = math.e / (1 + math.e)
    first = p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5)
    # Row 2: teacher softmax([0, .5]), student softmax([.5, 0]): mirror images, log ratio ∓ 0.5.
    q = 1 / (1 + math.exp(0.5))
    second = q * -0.5 + (1 - q) * 0.5
    assert kl(STUDENT, TEACHER, None, 2.0).item() == pytest.approx(4 * (first + second) / 2, rel=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 8.0])
def test_kl_agrees_with_torch(temperature):
    student, teacher = torch.randn(16, 7, generator=torch.manual_seed(0)), torch.randn(16, 7)
    expected = torch.nn.KLDivLoss(reduction="batchmean", log_target=True)(
        (student / temperature).log_softmax(1), (teacher / temperature).log_softmax(1)
    )
    assert torch.allclose(kl(student, teacher, None, temperature), temperature**2 * expected, rtol=1e-5)


def test_kl_of_equal_logits_is_zero_whatever_constant_is_added():
    assert kl(TEACHER + 5.0, TEACHER, None, 3.0).item() == pytest.approx(0.0, abs=1e-7)


def test_t_squared_keeps_the_gradient_when_the_temperature_rises():
    def gradient(temperature):
        student = (torch.randn(64, 5, generator=torch.manual_seed(1)) * 0.1).requires_grad_()
        teacher = torch.randn(64, 5, generator=torch.manual_seed(2)) * 0.1
        kl(student, teacher, None, temperature).backward()
        return student.grad.norm().item()

    assert gradient(20.0) == pytest.approx(gradient(5.0), rel=0.05)


def test_alpha_weighs_the_two_terms():
    labels = torch.tensor([0, 1])
    soft = kl(STUDENT, TEACHER, None, 2.0)
    hard = torch.nn.functional.cross_entropy(STUDENT, labels)
    for alpha in (0.0, 0.25, 0.9, 1.0):
        found = total(objective(STUDENT, labels, TEACHER, {"kl": 1.0}, temperature=2.0, alpha=alpha))
        assert torch.allclose(found, alpha * soft + (1 - alpha) * hard)
    without = total(objective(STUDENT, labels, None, {"kl": 1.0}, temperature=2.0, alpha=0.9))
    assert torch.allclose(without, hard)


def test_extreme_logits_stay_finite():
    student = torch.tensor([[1e4, -1e4]], requires_grad=True)
    loss = kl(student, torch.tensor([[-1e4, 1e4]]), None, 1.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()
