"""Draws in the place of logits: right in the mean, value and gradient, and better with more of them."""

import pytest
import torch

from kncompress.config import ObjectiveConfig
from kncompress.distill import Objective, Outputs, logits_kl
from kncompress.distill.sampled import Draws, draw, sampled_kl


def logits(scale: float, seed: int) -> torch.Tensor:
    return scale * torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def estimate(student: torch.Tensor, teacher: torch.Tensor, count: int, seed: int, temperature: float):
    student = student.clone().requires_grad_()
    draws = draw(teacher, count, temperature, torch.Generator().manual_seed(seed))
    value = sampled_kl(student, draws, temperature)
    value.backward()
    assert student.grad is not None
    return value.detach(), student.grad


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_mean_of_many_is_the_kl_and_its_gradient(temperature: float) -> None:
    student, teacher = logits(1.0, 0), logits(2.0, 1)
    exact = student.clone().requires_grad_()
    kl = logits_kl(exact, teacher, temperature)
    kl.backward()
    assert exact.grad is not None
    found = [estimate(student, teacher, 12, seed, temperature) for seed in range(400)]
    values, gradients = torch.stack([value for value, _ in found]), torch.stack([slope for _, slope in found])
    assert abs(values.mean() - kl) < 4 * values.std() / 20
    error = gradients.std(0) / 20
    rare = 5e-4  # what may never be drawn has no spread
    assert ((gradients.mean(0) - exact.grad).abs() < 5 * error + rare).all()
    # The K most likely tokens are no draws: their mean error does not vanish with many batches.
    top = teacher.topk(3).indices
    biased = student.clone().requires_grad_()
    sampled_kl(biased, Draws(top, torch.zeros(2, 5, dtype=torch.float64)), temperature).backward()
    assert biased.grad is not None and ((biased.grad - exact.grad).abs() > 5 * error + rare).any()


def test_more_draws_are_nearer() -> None:
    student, teacher = logits(1.0, 0), logits(2.0, 1)
    spread = [
        torch.stack([estimate(student, teacher, count, seed, 1.0)[0] for seed in range(60)]).std() for count in (2, 50)
    ]
    assert spread[1] < spread[0] / 3


def test_the_objective_takes_draws_and_adds_the_text() -> None:
    student, teacher = logits(1.0, 0).requires_grad_(), logits(2.0, 1)
    draws = draw(teacher, 12, 1.0, torch.Generator().manual_seed(0))
    labels = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(2))
    objective = Objective(ObjectiveConfig(logits=0.5, cross_entropy=2.0))
    loss = objective(Outputs(student), Outputs(None, draws=draws), labels)
    assert loss.terms["logits"] == sampled_kl(student, draws).detach()
    assert loss.total.detach() == pytest.approx(0.5 * loss.terms["logits"] + 2.0 * loss.terms["cross_entropy"])


def test_draws_of_other_tokens_are_refused() -> None:
    draws = draw(logits(2.0, 1), 3, 1.0, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="do not fit logits"):
        sampled_kl(torch.zeros(2, 4, 11), draws)
