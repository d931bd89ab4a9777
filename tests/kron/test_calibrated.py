"""Calibrated factors: held against dense least squares, never worse than nearest, finite always."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kron_inputs import best_side, correlated, moment_of, squared

from kncompress.kron import (
    Factors,
    KroneckerShape,
    Moment,
    PreparedMoment,
    ShapeError,
    calibrated_factors,
    kronecker_weight,
    nearest_factors,
    weighted_error,
)

ITERATED = ["6x4(x)2x2*2", "5x6(x)1x2", "4x3(x)3x4*3", "3x2(x)4x5*4", "2x2(x)1x6*2"]
CLOSED = ["8x6(x)2x1", "8x1(x)1x6*3", "1x8(x)6x1*3", "4x1(x)2x7*2", "3x5(x)4x1*4", "7x6(x)1x1"]


def problem(text, tokens=200, dtype=torch.float64):
    shape = KroneckerShape.parse(text)
    weight = torch.randn(shape.out_features, shape.in_features, dtype=dtype)
    return shape, weight, PreparedMoment(moment_of(correlated(shape.in_features, tokens, dtype=dtype)))


@st.composite
def shapes(draw):
    m1, n1, m2, n2 = draw(st.tuples(*[st.integers(1, 5)] * 4))
    return KroneckerShape((m1, n1), (m2, n2), min(draw(st.integers(1, 5)), m1 * n1, m2 * n2))


@pytest.mark.parametrize("text", ITERATED)
def test_ends_where_dense_least_squares_gains_nothing_on_either_side(text):
    shape, weight, moment = problem(text)
    left, right = calibrated_factors(weight, shape, moment, sweeps=3000, tolerance=1e-13)
    value = squared(weight, kronecker_weight(left, right), moment.matrix)
    for fixed, free in ((right, "left"), (left, "right")):
        assert value == pytest.approx(best_side(weight, fixed, moment.matrix, shape, free), rel=1e-6)


@pytest.mark.parametrize("text", ITERATED)
def test_a_sweep_is_dense_least_squares(text):
    shape, weight, moment = problem(text)
    start, history = nearest_factors(weight, shape), []
    calibrated_factors(weight, shape, moment, sweeps=0, history=history)
    total = squared(weight, torch.zeros_like(weight), moment.matrix)
    small = "left" if shape.left[1] < shape.right[1] else "right"
    fixed = start.right if small == "left" else start.left
    want = [squared(weight, kronecker_weight(*start), moment.matrix)]
    want.append(best_side(weight, fixed, moment.matrix, shape, small))
    assert history == pytest.approx([(value / total) ** 0.5 for value in want], rel=1e-8)


@pytest.mark.parametrize("text", CLOSED)
def test_closed_form_is_the_optimum(text):
    """Against the singular values of the whitened rearrangement (Eckart-Young), with the symmetric root of C."""
    shape, weight, moment = problem(text)
    history = []
    factors = calibrated_factors(weight, shape, moment, history=history)
    values, vectors = torch.linalg.eigh(moment.matrix)
    whitened = weight @ (vectors * values.sqrt()) @ vectors.T
    (m1, n1), (m2, n2) = shape.left, shape.right
    blocks = [whitened[i * m2 : (i + 1) * m2, j * n2 : (j + 1) * n2] for i in range(m1) for j in range(n1)]
    singular = torch.linalg.svdvals(torch.stack([block.flatten() for block in blocks]))
    best = float(singular[shape.terms :].square().sum())
    value = squared(weight, kronecker_weight(*factors), moment.matrix)
    assert value == pytest.approx(best, rel=1e-9, abs=1e-12 * float(whitened.square().sum()))
    assert history == pytest.approx([float(singular[shape.terms :].norm() / singular.norm())], rel=1e-6, abs=1e-7)


@given(shapes(), st.integers(1, 60), st.integers(0, 99))
def test_error_never_rises_and_is_the_history_s(shape, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape.out_features, shape.in_features, generator=generator, dtype=torch.float64)
    moment = PreparedMoment(moment_of(correlated(shape.in_features, tokens, seed)))
    history = []
    factors = calibrated_factors(weight, shape, moment, history=history)
    assert all(after <= before for before, after in pairwise(history))
    total = squared(weight, torch.zeros_like(weight), moment.matrix)
    value = squared(weight, kronecker_weight(*factors), moment.matrix) / total
    assert value == pytest.approx(history[-1] ** 2, rel=1e-5, abs=1e-9)
    nearest = nearest_factors(weight, shape)
    assert weighted_error(weight, factors, moment) <= weighted_error(weight, nearest, moment) + 1e-7


@given(shapes(), st.sampled_from([torch.float32, torch.float64]))
def test_a_kronecker_sum_is_found_again(shape, dtype):
    weight = kronecker_weight(
        torch.randn(shape.terms, *shape.left, dtype=dtype), torch.randn(shape.terms, *shape.right, dtype=dtype)
    )
    moment = moment_of(correlated(shape.in_features, 50, dtype=dtype))
    error = weighted_error(weight, calibrated_factors(weight, shape, moment), moment)
    assert error < (1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("text", [*ITERATED, *CLOSED])
def test_a_start_that_rounding_would_worsen_is_kept(text):
    """The nearest sum of a Kronecker sum is exact; under a skewed moment a fit in float32 gets worse than it."""
    shape = KroneckerShape.parse(text)
    for seed in range(5):
        weight = kronecker_weight(torch.randn(shape.terms, *shape.left), torch.randn(shape.terms, *shape.right))
        x = correlated(shape.in_features, 50, seed, dtype=torch.float32)
        x[:, 2] *= 1e3
        moment = PreparedMoment(moment_of(x))
        fitted, nearest = calibrated_factors(weight, shape, moment), nearest_factors(weight, shape)
        assert weighted_error(weight, fitted, moment) <= weighted_error(weight, nearest, moment)


@pytest.mark.parametrize("text", ["48x24(x)1x2", "12x12(x)4x4*8", "48x1(x)1x48*12", "24x6(x)2x8*6"])
def test_far_better_than_nearest_on_new_text(text):
    shape = KroneckerShape.parse(text)
    weight = torch.randn(shape.out_features, shape.in_features)
    moment = moment_of(correlated(shape.in_features, 2000, dtype=torch.float32))
    unseen = moment_of(correlated(shape.in_features, 2000, seed=1, dtype=torch.float32))
    nearest = weighted_error(weight, nearest_factors(weight, shape), unseen)
    assert weighted_error(weight, calibrated_factors(weight, shape, moment), unseen) < 0.4 * nearest


@pytest.mark.parametrize("text", [*ITERATED, *CLOSED])
def test_identity_moment_gives_the_nearest_sum(text):
    shape, weight, _ = problem(text)
    size = shape.in_features
    factors = calibrated_factors(weight, shape, Moment(torch.eye(size).double(), torch.zeros(size), 10**6))
    for got, want in zip(factors, nearest_factors(weight, shape), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("text", [*ITERATED, *CLOSED])
def test_gauge_sign_and_scale(text):
    shape, weight, moment = problem(text)
    left, right = calibrated_factors(weight, shape, moment)
    norms = left.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, right.flatten(1).norm(dim=1))
    assert (norms.diff() <= 1e-9).all()
    largest = right.flatten(1).abs().argmax(dim=1, keepdim=True)
    assert (right.flatten(1).gather(1, largest) > 0).all()
    again = calibrated_factors(weight, shape, moment)
    assert torch.equal(again.left, left) and torch.equal(again.right, right)
    turned = calibrated_factors(-weight, shape, moment)
    torch.testing.assert_close(turned.left, -left, rtol=1e-6, atol=1e-8)
    for unit in (1e-9, 1e9):
        scaled = calibrated_factors(weight * unit, shape, moment)
        torch.testing.assert_close(kronecker_weight(*scaled) / unit, kronecker_weight(left, right))


def moments(kind, size):
    x = correlated(size, 300, dtype=torch.float32)
    if kind == "one token":
        x = x[:1]
    elif kind == "fewer tokens than inputs":
        x = x[: size // 2]
    elif kind == "dead inputs":
        x[:, ::3] = 0.0
    elif kind == "null":
        x = torch.zeros(1, size)
    elif kind == "copies":
        x[:, 1::2] = x[:, ::2]
    elif kind == "outlier":
        x[:, 2] = 1e4
    return moment_of(x)


KINDS = ("one token", "fewer tokens than inputs", "dead inputs", "null", "copies", "outlier")


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text", ["6x4(x)2x2*2", "5x4(x)1x2", "8x1(x)1x8*3", "8x8(x)2x1", "4x2(x)3x4*4", "16x16(x)4x4*4"]
)
def test_singular_moments_are_harmless(text, kind, centred):
    shape = KroneckerShape.parse(text)
    weight = torch.randn(shape.out_features, shape.in_features)
    moment = PreparedMoment(moments(kind, shape.in_features), centred)
    factors = calibrated_factors(weight, shape, moment)
    assert factors.left.isfinite().all() and factors.right.isfinite().all()
    nearest = weighted_error(weight, nearest_factors(weight, shape), moment)
    assert weighted_error(weight, factors, moment) <= nearest * (1 + 1e-5) + 1e-6
    # What the text says nothing about stays near the weight's own size.
    assert float(kronecker_weight(*factors).norm()) < 10 * float(weight.norm())


def test_a_null_moment_leaves_the_nearest_sum():
    """Of a weight whose entries are all large: their squares times 1e38 are no float32."""
    shape = KroneckerShape.parse("4x4(x)4x4*4")
    weight, moment = torch.randn(16, 16).sign(), moments("null", 16)
    found, nearest = calibrated_factors(weight, shape, moment), nearest_factors(weight, shape)
    torch.testing.assert_close(kronecker_weight(*found), kronecker_weight(*nearest))


@pytest.mark.parametrize("text", [*ITERATED, *CLOSED])
@pytest.mark.parametrize("case", ["null", "one term", "null row"])
def test_weights_that_need_fewer_terms(text, case):
    shape, weight, moment = problem(text)
    if case == "null":
        weight.zero_()
    elif case == "one term":
        weight = torch.kron(torch.randn(shape.left).double(), torch.randn(shape.right).double())
    else:
        weight[0] = 0.0
    left, right = calibrated_factors(weight, shape, moment)
    assert left.isfinite().all() and right.isfinite().all()
    factors = Factors(left, right)
    error = weighted_error(weight, factors, moment)
    assert error <= weighted_error(weight, nearest_factors(weight, shape), moment) + 1e-7
    if case != "null row":
        assert error < 1e-6
    assert (torch.stack([f.flatten(1).norm(dim=1) for f in factors]).amax(dim=0) > 0).all()  # each can learn


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("text", ["6x4(x)2x2*2", "8x1(x)1x8*3"])
def test_half_precision_is_fitted_in_float32(text, dtype):
    shape, weight, moment = problem(text, dtype=torch.float32)
    weight = weight.to(dtype)
    got = calibrated_factors(weight, shape, moment)
    want = calibrated_factors(weight.float(), shape, moment)
    assert got.left.dtype == got.right.dtype == dtype
    assert torch.equal(got.left, want.left.to(dtype)) and torch.equal(got.right, want.right.to(dtype))


def test_large_systems_are_solved_in_groups_of_terms(monkeypatch):
    shape, weight, moment = problem("6x9(x)2x2*3")
    whole = []
    calibrated_factors(weight, shape, moment, sweeps=500, tolerance=1e-12, history=whole)
    monkeypatch.setattr("kncompress.kron.alternating._SYSTEM", 18)
    groups = []
    factors = calibrated_factors(weight, shape, moment, sweeps=500, tolerance=1e-12, history=groups)
    assert groups[2] > whole[2] * (1 + 1e-9)  # a group after the other is less than all at once
    value = squared(weight, kronecker_weight(*factors), moment.matrix)
    assert value == pytest.approx(best_side(weight, factors.right, moment.matrix, shape, "left"), rel=1e-5)


def test_autocast_does_not_round_the_fit():
    for text in ("6x4(x)2x2*2", "8x1(x)1x8*3"):
        shape, weight, moment = problem(text, dtype=torch.float32)
        plain = calibrated_factors(weight, shape, moment)
        with torch.autocast("cpu", torch.bfloat16):
            cast = calibrated_factors(weight, shape, PreparedMoment(moment.moment))
        assert torch.equal(plain.left, cast.left) and torch.equal(plain.right, cast.right)


def test_wrong_sizes_are_named():
    shape, weight, _ = problem("6x4(x)2x2*2")
    with pytest.raises(ShapeError, match=r"second=\[6, 6\]: 6x4\(x\)2x2\*2 needs \[8, 8\]"):
        calibrated_factors(weight, shape, moment_of(correlated(6, 9)))
    with pytest.raises(ShapeError, match="weight="):
        calibrated_factors(weight.T, shape, moment_of(correlated(8, 9)))
