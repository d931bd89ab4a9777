"""Nearest factors: optimal, exact where they can be, finite always."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kncompress.kron import KroneckerShape, ShapeError, kronecker_weight, nearest_factors, relative_error

TEXTS = [
    "12x7(x)1x2",
    "12x7(x)4x1*2",
    "9x6(x)3x5*3",
    "2x2(x)9x8*2",
    "17x1(x)1x13*5",
    "1x17(x)13x1*5",
    "6x6(x)6x6*9",
]
FEW = ["12x7(x)1x2", "12x8(x)1x3", "9x6(x)2x1", "11x5(x)4x1", "2x1(x)9x8", "1x3(x)9x8", "1x4(x)7x5"]
"""One term, one of its factors a row or a column of a few numbers: fitted in their own way."""
TEXTS += FEW[1:]


def best_possible(weight: torch.Tensor, shape: KroneckerShape) -> float:
    """Relative error of the optimum: the tail of the rearrangement's singular values (Eckart-Young)."""
    (m1, n1), (m2, n2) = shape.left, shape.right
    blocks = [weight[i * m2 : (i + 1) * m2, j * n2 : (j + 1) * n2] for i in range(m1) for j in range(n1)]
    singular = torch.linalg.svdvals(torch.stack([block.flatten() for block in blocks]).double())
    return float(singular[shape.terms :].norm() / singular.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("text", TEXTS)
def test_error_is_the_optimum(text, dtype):
    shape = KroneckerShape.parse(text)
    weight = torch.randn(shape.out_features, shape.in_features, dtype=dtype)
    factors = nearest_factors(weight, shape)
    assert factors.left.shape == (shape.terms, *shape.left)
    assert factors.right.shape == (shape.terms, *shape.right)
    assert relative_error(weight, *factors) == pytest.approx(best_possible(weight, shape), abs=1e-6)


@given(st.tuples(*[st.integers(1, 6)] * 4), st.integers(1, 5), st.sampled_from([torch.float32, torch.float64]))
def test_a_kronecker_sum_is_found_again(sides, terms, dtype):
    m1, n1, m2, n2 = sides
    shape = KroneckerShape((m1, n1), (m2, n2), min(terms, m1 * n1, m2 * n2))
    weight = kronecker_weight(
        torch.randn(shape.terms, m1, n1, dtype=dtype), torch.randn(shape.terms, m2, n2, dtype=dtype)
    )
    tolerance = 2e-6 if dtype == torch.float32 else 1e-13
    assert relative_error(weight, *nearest_factors(weight, shape)) < tolerance


@pytest.mark.parametrize("text", TEXTS)
def test_gauge(text):
    shape = KroneckerShape.parse(text)
    weight = torch.randn(shape.out_features, shape.in_features)
    left, right = nearest_factors(weight, shape)
    norms = left.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, right.flatten(1).norm(dim=1))
    assert (norms.diff() <= 1e-5).all()  # largest term first
    largest = right.flatten(1).abs().argmax(dim=1, keepdim=True)
    assert (right.flatten(1).gather(1, largest) > 0).all()
    again = nearest_factors(-weight, shape)  # the sign of the weight goes to the left factor
    torch.testing.assert_close(again.right, right, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again.left, -left, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_deficient_weight_leaves_terms_that_can_learn(dtype):
    shape = KroneckerShape((6, 5), (2, 2), 4)
    weight = torch.kron(torch.randn(6, 5, dtype=dtype), torch.randn(2, 2, dtype=dtype))
    left, right = nearest_factors(weight, shape)
    assert left.isfinite().all() and right.isfinite().all()
    assert relative_error(weight, left, right) < 1e-6
    assert (right.flatten(1).norm(dim=1) > 0.1).all()


@pytest.mark.parametrize("shape", [KroneckerShape((6, 5), (2, 2), 3), KroneckerShape((2, 2), (6, 5), 3)], ids=str)
def test_null_weight_has_one_null_factor(shape):
    factors = nearest_factors(torch.zeros(12, 10), shape)
    large, small = sorted(factors, key=torch.numel, reverse=True)
    assert not large.any()
    torch.testing.assert_close(small.flatten(1).norm(dim=1), torch.ones(3))
    assert relative_error(torch.zeros(12, 10), *factors) == 0.0


@pytest.mark.parametrize("text", FEW)
def test_factors_of_a_few_numbers_are_those_of_any_other(text, monkeypatch):
    shape = KroneckerShape.parse(text)
    weight = torch.randn(shape.out_features, shape.in_features)
    found = nearest_factors(weight, shape)
    monkeypatch.setattr("kncompress.kron.nearest._one_term", lambda *_: None)
    torch.testing.assert_close(found, nearest_factors(weight, shape), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("text", FEW)
def test_factors_of_a_few_numbers_of_any_size(text, scale):
    shape = KroneckerShape.parse(text)
    weight = torch.randn(shape.out_features, shape.in_features, dtype=torch.float64)
    left, right = nearest_factors((weight * scale).float(), shape)
    error = relative_error(weight, left.double() / scale, right.double())
    assert error == pytest.approx(best_possible(weight, shape), abs=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("text", FEW)
def test_factors_of_a_few_numbers_that_are_not_finite(text, bad):
    shape = KroneckerShape.parse(text)
    weight = torch.randn(shape.out_features, shape.in_features)
    weight[-1, -1] = bad
    with pytest.raises(ValueError, match="not finite"):
        nearest_factors(weight, shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_fitted_in_float32(dtype):
    shape = KroneckerShape((16, 12), (2, 2), 2)
    weight = torch.randn(32, 24).to(dtype)
    factors = nearest_factors(weight, shape)
    exact = nearest_factors(weight.float(), shape)
    assert factors.left.dtype == factors.right.dtype == dtype
    assert torch.equal(factors.left, exact.left.to(dtype)) and torch.equal(factors.right, exact.right.to(dtype))


def test_scale_does_not_matter():
    shape = KroneckerShape((8, 6), (2, 2), 2)
    weight = torch.randn(16, 12)
    for scale in (1e-12, 1e12):
        error = relative_error(weight * scale, *nearest_factors(weight * scale, shape))
        assert error == pytest.approx(best_possible(weight, shape), abs=1e-6)


def test_bad_weights_are_named():
    shape = KroneckerShape((2, 3), (1, 2))
    with pytest.raises(ShapeError, match=r"weight=\[6, 2\]: 2x3\(x\)1x2 needs \[2, 6\]"):
        nearest_factors(torch.randn(6, 2), shape)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not finite"):
            nearest_factors(torch.full((2, 6), value), shape)


def test_relative_error_in_pieces(monkeypatch):
    shape = KroneckerShape((7, 5), (3, 2), 2)
    weight, left, right = torch.randn(21, 10), torch.randn(2, 7, 5), torch.randn(2, 3, 2)
    want = float((weight - kronecker_weight(left, right)).norm() / weight.norm())
    factors = nearest_factors(weight, shape)
    for chunk in (1, 60, 1 << 22):
        monkeypatch.setattr("kncompress.kron.nearest._CHUNK", chunk)
        assert relative_error(weight, left, right) == pytest.approx(want, rel=1e-5)
        pieces = nearest_factors(weight, shape)
        torch.testing.assert_close(pieces.left, factors.left)
    assert relative_error(torch.zeros(21, 10), left, right) == float("inf")
