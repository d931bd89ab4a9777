"""Hybrids: the layer by the contract; back-fitting that never rises and never loses to uncalibrated fits."""

from itertools import pairwise

import pytest
import torch
from contracts.factorisation import FactorisationContract
from kron_inputs import correlated, moment_of, squared

from kncompress.kron import (
    HybridLinear,
    HybridShape,
    PreparedMoment,
    ShapeError,
    calibrated_factors,
    calibrated_hybrid,
    kronecker_weight,
    nearest_factors,
    nearest_hybrid,
    weighted_error,
)

TEXTS = (
    "12x1(x)1x8*3 + 6x8(x)2x1",
    "12x4(x)1x2 + 6x8(x)2x1 + 12x1(x)1x8",
    "6x4(x)2x2 + 3x2(x)4x4*2",
    "s*12x1(x)1x8*3 + 6x8(x)2x1",
)
SHAPES = tuple(map(HybridShape.parse, TEXTS))


class TestHybridLinear(FactorisationContract):
    shapes = SHAPES
    refit_error = 0.7  # back-fitting ends in a local optimum

    def make(self, shape, bias=True, dtype=None, device=None):
        return HybridLinear(shape, bias=bias, dtype=dtype, device=device)

    def from_dense(self, weight, bias, shape):
        return HybridLinear.from_dense(weight, bias, shape)


def formed(parts):
    return sum(kronecker_weight(*part) for part in parts)


def test_state_dict_and_repr():
    layer = HybridLinear(SHAPES[0])
    assert list(layer.state_dict()) == ["bias", "parts.0.left", "parts.0.right", "parts.1.left", "parts.1.right"]
    assert list(HybridLinear(SHAPES[3]).state_dict()) == [
        *list(layer.state_dict())[:3],
        "parts.0.scale",
        "parts.1.left",
        "parts.1.right",
    ]
    assert repr(layer).startswith(f"HybridLinear(\n  {TEXTS[0]}, parameters=110 of 96, multiply_adds=")


@pytest.mark.parametrize("std", [0.02, 0.5])
def test_reset_gives_the_std_asked_for(std):
    layer = HybridLinear(HybridShape.parse("96x1(x)1x192*20 + 48x96(x)2x2*2"))
    layer.reset_parameters(std)
    assert float(layer.weight.detach().std()) == pytest.approx(std, rel=0.05)
    assert not layer.bias.any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nearest_hybrid_beats_its_first_part_and_gains_by_rounds(shape):
    weight = torch.randn(12, 8).double()
    errors = [float((weight - formed(nearest_hybrid(weight, shape, rounds))).norm()) for rounds in (1, 2, 30)]
    alone = float((weight - kronecker_weight(*nearest_factors(weight, shape.parts[0]))).norm())
    assert alone > errors[0] >= errors[1] >= errors[2]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 100])
def test_calibrated_hybrid(shape, tokens):
    weight = torch.randn(12, 8).double()
    moment = PreparedMoment(moment_of(correlated(8, tokens)))
    history = []
    parts = calibrated_hybrid(weight, shape, moment, 6, history)
    assert all(after <= before for before, after in pairwise(history))
    assert all(f.isfinite().all() for part in parts for f in part)
    assert [tuple(part.left.shape[1:]) for part in parts] == [part.left for part in shape.parts]
    error = weighted_error(weight, parts, moment)
    assert error <= weighted_error(weight, nearest_hybrid(weight, shape, 6), moment)
    assert error <= weighted_error(weight, calibrated_factors(weight, shape.parts[0], moment), moment) + 1e-3
    if tokens == 100:
        total = squared(weight, torch.zeros(12, 8), moment.matrix)
        value = squared(weight, formed(parts), moment.matrix)
        assert value / total == pytest.approx(history[-1] ** 2, rel=1e-6)


def test_types_and_errors():
    weight = torch.randn(12, 8).bfloat16()
    moment = moment_of(correlated(8, 50, dtype=torch.float32))
    for parts in (nearest_hybrid(weight, SHAPES[0]), calibrated_hybrid(weight, SHAPES[0], moment)):
        assert all(f.dtype == torch.bfloat16 for part in parts for f in part)
    with pytest.raises(ShapeError, match="weight="):
        nearest_hybrid(weight.T, SHAPES[0])
    with pytest.raises(ValueError, match="rounds=0"):
        nearest_hybrid(weight, SHAPES[0], 0)
