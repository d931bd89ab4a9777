"""The objective of fine-tuning: logits and labels of whole sequences."""

import math

import pytest
import torch
from torch import Tensor

from kncompress.config import ObjectiveConfig
from kncompress.distill import Outputs, SequenceObjective

LABELS = torch.tensor([0, 1, 1])


def config(**weights: float) -> ObjectiveConfig:
    return ObjectiveConfig(**({"cross_entropy": 0.0} | weights))


def logits(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, requires_grad=True)


def test_labels_are_cross_entropy_in_nats() -> None:
    student = logits((0.0, 0.0), (0.0, math.log(3)), (math.log(3), 0.0))
    loss = SequenceObjective(config(cross_entropy=2.0))(Outputs(student), labels=LABELS)
    by_hand = -(math.log(1 / 2) + math.log(3 / 4) + math.log(1 / 4)) / 3
    assert loss.terms["cross_entropy"].item() == pytest.approx(by_hand)
    assert loss.total.item() == pytest.approx(2 * by_hand)


def test_a_score_is_squared_error() -> None:
    objective = SequenceObjective(config(cross_entropy=1.0, logits=0.5), regression=True)
    student, teacher = logits((1.0,), (2.0,), (4.0,)), logits((1.0,), (1.0,), (1.0,))
    loss = objective(Outputs(student), Outputs(teacher), torch.tensor([1.0, 4.0, 4.0]))
    assert loss.terms["cross_entropy"].item() == pytest.approx(4 / 3)
    assert loss.terms["logits"].item() == pytest.approx((1 + 9) / 3)
    loss.total.backward()
    assert student.grad is not None and teacher.grad is None


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_logits_are_kl_times_temperature_squared(temperature: float) -> None:
    student, teacher = logits((0.3, -1.0, 2.0), (1.0, 0.0, 0.0)), logits((1.0, 0.5, 0.0), (0.0, 2.0, 0.0))
    objective = SequenceObjective(ObjectiveConfig(cross_entropy=0.0, logits=1.0, temperature=temperature))
    loss = objective(Outputs(student), Outputs(teacher), mask=torch.ones(2, 7))
    p, q = (torch.log_softmax(t.detach() / temperature, -1) for t in (teacher, student))
    assert loss.total.item() == pytest.approx(float((p.exp() * (p - q)).sum() / 2 * temperature**2), rel=1e-5)
    loss.total.backward()
    assert student.grad is not None and student.grad.abs().sum() > 0 and teacher.grad is None


def test_shapes_that_do_not_fit() -> None:
    objective = SequenceObjective(config(cross_entropy=1.0, logits=1.0))
    with pytest.raises(ValueError, match=r"objective.cross_entropy: labels \(3,\) do not fit logits \(2, 2\)"):
        SequenceObjective(config(cross_entropy=1.0))(Outputs(torch.zeros(2, 2)), labels=LABELS)
    with pytest.raises(ValueError, match=r"objective.logits: student \(3, 2\) and teacher \(3, 3\) differ"):
        objective(Outputs(torch.zeros(3, 2)), Outputs(torch.zeros(3, 3)), LABELS)
