from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kncompress.config import ObjectiveConfig
from kncompress.distill import (
    Objective,
    Outputs,
    attention_kl,
    attention_score_mse,
    cross_entropy,
    logits_kl,
    mse,
)

B, T, D, V, H = 2, 6, 8, 11, 2
LAYERED = ("attention", "hidden", "feed_forward")
COMPARED = ("embedding", *LAYERED, "logits")


class Attention(NamedTuple):
    query: Tensor
    key: Tensor
    scaling: float


def outputs(seed, layers=3, grad=False):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).requires_grad_(grad)

    return Outputs(
        logits=normal(B, T, V),
        embedding=normal(B, T, D),
        attention=[Attention(normal(B, H, T, 4), normal(B, H, T, 4), 0.5) for _ in range(layers)],
        hidden=[normal(B, T, D) for _ in range(layers)],
        feed_forward=[normal(B, T, D) for _ in range(layers)],
    )


def only(name, weight=1.0, **fields):
    return ObjectiveConfig(**{"cross_entropy": 0.0, name: weight, **fields})


def replaced(side, **fields):
    return Outputs(**{**side.__dict__, **fields})


LABELS = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(9))
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])


def expected(name, student, teacher, config, mask=None):
    if name == "cross_entropy":
        return cross_entropy(student.logits, LABELS)
    if name == "logits":
        return logits_kl(student.logits, teacher.logits, config.temperature, mask)
    if name == "embedding":
        return mse(student.embedding, teacher.embedding, mask)
    form = {"kl": attention_kl, "mse": attention_score_mse}[config.attention_form]
    loss = form if name == "attention" else mse
    ours, theirs = getattr(student, name), getattr(teacher, name)
    return sum(loss(a, b, mask) for a, b in zip(ours, theirs, strict=True)) / len(ours)


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("form", ["kl", "mse"])
@pytest.mark.parametrize("name", ObjectiveConfig.TERMS)
def test_each_term_alone(name, form, mask):
    student, teacher = outputs(0), outputs(1)
    config = only(name, 3.0, attention_form=form, temperature=2.0)
    loss = Objective(config)(student, teacher, LABELS, mask)
    value = expected(name, student, teacher, config, mask)
    assert set(loss.terms) == {name}
    assert loss.terms[name].item() == pytest.approx(value.item(), rel=1e-6)
    assert loss.total.item() == pytest.approx(3 * value.item(), rel=1e-6)


@pytest.mark.parametrize("mask", [None, MASK])
def test_both_terms_on_the_logits_keep_to_the_mask(mask):
    """Computed together or not."""
    student, teacher = outputs(0), outputs(1)
    config = ObjectiveConfig(logits=2.0, cross_entropy=0.5, temperature=2.0)
    loss = Objective(config)(student, teacher, LABELS, mask)
    for name in ("logits", "cross_entropy"):
        assert loss.terms[name].item() == pytest.approx(expected(name, student, teacher, config, mask).item(), rel=1e-6)


def test_total_is_the_weighted_sum_and_terms_are_detached():
    weights = {name: 0.5 + i for i, name in enumerate(ObjectiveConfig.TERMS)}
    loss = Objective(ObjectiveConfig(**weights))(outputs(0, grad=True), outputs(1), LABELS)
    assert list(loss.terms) == list(ObjectiveConfig.TERMS)
    assert loss.total.item() == pytest.approx(sum(weights[n] * v.item() for n, v in loss.terms.items()), rel=1e-6)
    assert loss.total.requires_grad and not any(value.requires_grad for value in loss.terms.values())


def test_gradients_reach_every_student_tensor_and_no_teacher_tensor():
    student, teacher = outputs(0, grad=True), outputs(1, grad=True)
    config = ObjectiveConfig(**dict.fromkeys(ObjectiveConfig.TERMS, 1.0))
    Objective(config)(student, teacher, LABELS).total.backward()

    def tensors(side):
        attention = [tensor for layer in side.attention for tensor in (layer.query, layer.key)]
        return [side.logits, side.embedding, *attention, *side.hidden, *side.feed_forward]

    assert all(tensor.grad.any() for tensor in tensors(student))
    assert all(tensor.grad is None for tensor in tensors(teacher))


def test_a_student_equal_to_its_teacher_has_no_loss():
    config = ObjectiveConfig(**{**dict.fromkeys(ObjectiveConfig.TERMS, 1.0), "cross_entropy": 0.0})
    assert Objective(config)(outputs(0), outputs(0)).total.item() == 0


def test_terms_do_not_depend_on_the_depth():
    """The mean over layers: repeating every layer changes nothing."""
    student, teacher = outputs(0), outputs(1)
    config = ObjectiveConfig(attention=1.0, hidden=1.0, feed_forward=1.0)
    twice = [replaced(side, **{n: list(getattr(side, n)) * 2 for n in LAYERED}) for side in (student, teacher)]
    once, doubled = Objective(config)(student, teacher, LABELS), Objective(config)(*twice, LABELS)
    assert once.total.item() == pytest.approx(doubled.total.item(), rel=1e-6)


def test_taps_are_those_of_the_weights():
    assert Objective(ObjectiveConfig()).taps == set()
    assert Objective(ObjectiveConfig(logits=1.0, hidden=0.1, attention=2.0)).taps == {"hidden", "attention"}
    assert Objective(ObjectiveConfig(embedding=1.0, feed_forward=1.0)).taps == {"embedding", "feed_forward"}


def test_terms_of_weight_zero_are_not_computed():
    """Only the logits are there, and they are of another vocabulary than the teacher's."""
    loss = Objective(ObjectiveConfig())(Outputs(torch.zeros(B, T, V)), Outputs(torch.zeros(B, T, V + 1)), LABELS)
    assert set(loss.terms) == {"cross_entropy"}


@pytest.mark.parametrize("nothing", [[], (), None])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("name", COMPARED)
def test_a_term_with_nothing_to_compare_is_an_error(name, side, nothing):
    """Fused attention returns an empty tuple where maps were asked for: the loss must not become 0."""
    sides = {"student": outputs(0), "teacher": outputs(1)}
    sides[side] = replaced(sides[side], **{name: nothing})
    with pytest.raises(ValueError, match=rf"objective\.{name}: .* {side}\.{name} is missing or empty"):
        Objective(only(name))(**sides)


@pytest.mark.parametrize("name", LAYERED)
def test_a_layer_without_its_tap_is_an_error(name):
    student = replaced(outputs(0), **{name: [*getattr(outputs(0), name)[:2], None]})
    with pytest.raises(ValueError, match=rf"objective\.{name}: .* student\.{name} is missing"):
        Objective(only(name))(student, outputs(1))


@pytest.mark.parametrize("name", COMPARED)
def test_a_missing_teacher_is_an_error(name):
    with pytest.raises(ValueError, match=rf"objective\.{name}: .* teacher\.{name} is missing"):
        Objective(only(name))(outputs(0))


def test_missing_labels_or_logits_are_an_error():
    objective = Objective(ObjectiveConfig())
    with pytest.raises(ValueError, match=r"objective\.cross_entropy: .* labels is missing"):
        objective(outputs(0))
    with pytest.raises(ValueError, match=r"objective\.cross_entropy: .* student\.logits is missing"):
        objective(Outputs(None), labels=LABELS)


@pytest.mark.parametrize("name", LAYERED)
def test_different_depths_need_a_mapping(name):
    student, teacher = outputs(0, layers=2), outputs(1, layers=4)
    with pytest.raises(ValueError, match=rf"objective\.{name}: 2 layers in the student, 4 in the teacher"):
        Objective(only(name))(student, teacher)
    mapped = Objective(only(name), layers=(0, 3))(student, teacher)
    chosen = replaced(teacher, **{name: [getattr(teacher, name)[0], getattr(teacher, name)[3]]})
    assert mapped.total.item() == Objective(only(name))(student, chosen).total.item()


def test_mappings_that_do_not_fit():
    with pytest.raises(ValueError, match=r"objective\.hidden: 2 layers in the student, 3 in the layer mapping"):
        Objective(only("hidden"), layers=(0, 1, 2))(outputs(0, layers=2), outputs(1, layers=4))
    with pytest.raises(ValueError, match=r"mapping \[0, 4\] exceeds the teacher's 4 layers"):
        Objective(only("hidden"), layers=(0, 4))(outputs(0, layers=2), outputs(1, layers=4))


def test_shape_errors_name_the_term_and_the_layer():
    teacher = outputs(1)
    teacher.hidden[1] = torch.zeros(B, T, D + 1)
    with pytest.raises(ValueError, match=r"objective\.hidden, layer 1: student \(2, 6, 8\) and teacher"):
        Objective(only("hidden"))(outputs(0), teacher)
