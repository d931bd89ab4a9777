"""Gauges: the same product, the norms promised, and step sizes that do what they say."""

import pytest
import torch

from kncompress.kron import KroneckerShape, kronecker_weight, nearest_factors, regauge
from kncompress.kron.gauge import GAUGES, canonical, factor_rates
from kncompress.kron.layers import KroneckerLinear

TEXTS = ["24x20(x)1x2", "10x8(x)4x4*8", "1x12(x)9x1*5", "2x2(x)9x8*3"]


def rms(x):
    return x.flatten(1).square().mean(dim=1).sqrt()


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("text", TEXTS)
def test_same_product_in_every_gauge(text, gauge):
    shape = KroneckerShape.parse(text)
    factors = nearest_factors(torch.randn(shape.out_features, shape.in_features).double(), shape)
    got = regauge(factors, gauge)
    torch.testing.assert_close(kronecker_weight(*got), kronecker_weight(*factors))
    if gauge == "equal":
        torch.testing.assert_close(got.left, factors.left)
    elif gauge == "unit_right":
        torch.testing.assert_close(got.right.flatten(1).norm(dim=1), torch.ones(shape.terms).double())
    else:
        torch.testing.assert_close(rms(got.left), rms(got.right))


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_null_terms_stay_finite(gauge, dtype):
    factors = nearest_factors(torch.zeros(12, 10, dtype=dtype), KroneckerShape((6, 5), (2, 2), 3))
    got = regauge(factors, gauge)
    assert not got.left.any() and got.right.isfinite().all() and got.right.any() and got.left.dtype == dtype


def test_unknown_gauge_is_named():
    shape = KroneckerShape((6, 5), (2, 2))
    with pytest.raises(ValueError, match="gauge=even: not one of equal, unit_right, equal_rms"):
        regauge(nearest_factors(torch.randn(12, 10), shape), "even")


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("text", TEXTS)
def test_a_step_of_one_moves_the_weight_by_one(text, gauge):
    """Signs of size one on either factor, times its scale, on factors whose terms have equal size."""
    shape, std = KroneckerShape.parse(text), 0.05
    left = torch.randn(shape.terms, *shape.left).double()
    right = torch.randn(shape.terms, *shape.right).double()
    size = std * (shape.dense_parameters / shape.terms) ** 0.5
    left *= size / (left.flatten(1).norm(dim=1) * right.flatten(1).norm(dim=1))[:, None, None]
    left, right = regauge((left.float(), right.float()), gauge)
    layer = KroneckerLinear(shape, bias=False)
    layer.set_factors(left, right)
    rates = factor_rates(layer)
    moves = {"left": [], "right": []}
    for _ in range(200):
        signs = (torch.randn_like(left).sign() * rates["left"], torch.randn_like(right).sign() * rates["right"])
        moves["left"].append(kronecker_weight(signs[0], right).square().mean())
        moves["right"].append(kronecker_weight(left, signs[1]).square().mean())
    for move in moves.values():
        assert float(torch.stack(move).mean().sqrt()) == pytest.approx(1.0, rel=0.05)


def test_canonical_form_is_that_of_nearest_factors():
    shape = KroneckerShape((6, 5), (2, 3), 4)
    left, right = nearest_factors(torch.randn(12, 15).double(), shape)
    mix = torch.randn(4, 4).double()
    mixed = (mix @ left.flatten(1), torch.linalg.inv(mix).T @ right.flatten(1))
    for got, want in zip(canonical(*mixed), (left, right), strict=True):
        torch.testing.assert_close(got, want.flatten(1))
