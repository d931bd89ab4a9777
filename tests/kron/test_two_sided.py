"""Fits to inputs and outputs at once, against dense least squares and the singular value decomposition."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kron_inputs import correlated, moment_of

from kncompress.kron import (
    Factors,
    KroneckerShape,
    Moment,
    PreparedMoment,
    calibrated_factors,
    kronecker_weight,
    prepare_outputs,
    row_weights,
    two_sided_error,
    two_sided_factors,
    weighted_error,
)
from kncompress.kron.half_steps import TwoSidedProblem

SHAPES = (
    "6x1(x)1x8*2", "6x2(x)1x4*1", "3x8(x)2x1*1", "3x1(x)2x8*1", "1x8(x)6x1*2",
    "3x4(x)2x2*2", "2x2(x)3x4*3", "1x2(x)6x4*1",
)  # fmt: skip


def problem(seed=0, outputs=6, inputs=8, tokens=400):
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gradient = correlated(outputs, tokens, seed + 1)
    second = gradient.T @ gradient / tokens
    return weight, PreparedMoment(moment_of(correlated(inputs, tokens, seed)), ridge=1e-3), second


def squared(difference, outputs, inputs):
    return float(((outputs.matrix @ difference @ inputs.matrix) * difference).sum())


def best_side(weight, factors, free, outputs, inputs):
    """Least f over one side for the other one's factors: dense least squares of K^T W L."""
    upper, lower = outputs.cholesky.T, inputs.cholesky
    columns = []
    own = factors.left if free == "left" else factors.right
    for term in range(len(own)):
        for entry in range(own[term].numel()):
            one = torch.zeros_like(own[term])
            one.view(-1)[entry] = 1.0
            pair = (one, factors.right[term]) if free == "left" else (factors.left[term], one)
            columns.append((upper @ torch.kron(*pair) @ lower).flatten())
    design, target = torch.stack(columns, dim=1), (upper @ weight @ lower).flatten()
    rest = target - design @ torch.linalg.lstsq(design, target, driver="gelsd").solution
    return float(rest.square().sum())


@pytest.mark.parametrize("text", SHAPES)
def test_neither_side_can_be_improved(text):
    """At the end each side is the best for the other one, under both metrics."""
    weight, inputs, second = problem()
    outputs = prepare_outputs(second, 400)
    found = two_sided_factors(weight, KroneckerShape.parse(text), inputs, outputs, sweeps=400, tolerance=1e-12)
    reached = squared(weight - kronecker_weight(*found), outputs, inputs)
    for side in ("left", "right"):
        assert reached <= best_side(weight, found, side, outputs, inputs) * (1 + 1e-5), side


def test_low_rank_is_the_truncated_decomposition_between_the_metrics():
    weight, inputs, second = problem(outputs=10, inputs=7)
    outputs = prepare_outputs(second, 400)
    found = two_sided_factors(weight, KroneckerShape((10, 1), (1, 7), 3), inputs, outputs)
    values = torch.linalg.svdvals(outputs.cholesky.T @ weight @ inputs.cholesky)
    reached = squared(weight - kronecker_weight(*found), outputs, inputs)
    assert reached == pytest.approx(float(values[3:].square().sum()), rel=1e-9)


@pytest.mark.parametrize("text", SHAPES)
@given(seed=st.integers(0, 1000))
def test_the_error_never_rises_and_is_no_larger_than_that_of_a_fit_to_the_inputs(text, seed):
    weight, inputs, second = problem(seed)
    outputs, shape, history = prepare_outputs(second, 400), KroneckerShape.parse(text), []
    found = two_sided_factors(weight, shape, inputs, outputs, history=history)
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(history))
    total = squared(weight, outputs, inputs)
    reached = squared(weight - kronecker_weight(*found), outputs, inputs)
    assert history[-1] == pytest.approx((reached / total) ** 0.5, rel=1e-6)
    one_sided = calibrated_factors(weight, shape, inputs)
    assert reached <= squared(weight - kronecker_weight(*one_sided), outputs, inputs) * (1 + 1e-9)


def test_it_is_worse_on_the_inputs_alone_and_better_where_the_loss_feels_it():
    weight, inputs, second = problem(outputs=12, inputs=9)
    outputs, shape = prepare_outputs(second, 400), KroneckerShape((12, 1), (1, 9), 3)
    both, one = two_sided_factors(weight, shape, inputs, outputs), calibrated_factors(weight, shape, inputs)
    assert two_sided_error(weight, both, inputs, outputs) < 0.98 * two_sided_error(weight, one, inputs, outputs)
    assert weighted_error(weight, both, inputs) > 1.01 * weighted_error(weight, one, inputs)


@pytest.mark.parametrize("text", SHAPES)
def test_null_gradients_leave_the_fit_to_the_inputs(text):
    weight, inputs, _ = problem()
    outputs, shape = prepare_outputs(torch.zeros(6, 6), 400), KroneckerShape.parse(text)
    found, known = two_sided_factors(weight, shape, inputs, outputs), calibrated_factors(weight, shape, inputs)
    identity = PreparedMoment(Moment(torch.eye(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64), 1))
    reached, least = (squared(weight - kronecker_weight(*f), identity, inputs) for f in (found, known))
    assert reached <= least * (1 + 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", SHAPES)
def test_moments_of_low_rank_and_tiny_gradients_do_no_harm(text, dtype):
    """One token; a dead input; gradients of 1e-12, whose squares leave float32."""
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    x, g = torch.randn(1, 8), 1e-12 * torch.randn(1, 6)
    x[:, 3] = 0
    inputs = PreparedMoment(moment_of(x))
    for second in (g.double().T @ g.double(), torch.zeros(6, 6)):
        found = two_sided_factors(weight, KroneckerShape.parse(text), inputs, prepare_outputs(second, 1))
        assert all(torch.isfinite(part).all() and part.dtype == dtype for part in found)


def test_a_null_weight_and_the_scale_of_a_weight():
    weight, inputs, second = problem()
    outputs = prepare_outputs(second, 400)
    for text in SHAPES:
        shape = KroneckerShape.parse(text)
        null = two_sided_factors(torch.zeros_like(weight), shape, inputs, outputs)
        assert not kronecker_weight(*null).any()
        small, large = (two_sided_factors(scale * weight, shape, inputs, outputs) for scale in (1.0, 1e4))
        torch.testing.assert_close(1e4 * kronecker_weight(*small), kronecker_weight(*large), rtol=1e-4, atol=1e-2)


def test_the_error_by_hand():
    weight, inputs, second = problem()
    outputs = prepare_outputs(second, 400)
    found = Factors(*(part[:1] for part in two_sided_factors(weight, KroneckerShape.parse(SHAPES[0]), inputs, outputs)))
    rest = weight - kronecker_weight(*found)
    plain = [((second @ d @ inputs.plain.double()) * d).sum() for d in (rest, weight)]
    assert two_sided_error(weight, found, inputs, outputs) == pytest.approx(
        float((plain[0] / plain[1]).sqrt()), rel=1e-9
    )


@pytest.mark.parametrize("kind", ["gradients", "rows"])
@pytest.mark.parametrize("text", ["6x4(x)2x3*2", "2x3(x)6x4*3", "4x3(x)3x4*1", "12x2(x)1x6*2"])
def test_half_steps_through_the_factors_are_those_with_the_weight(text, kind):
    """Products with both metrics, and the normal matrix of the small side."""
    weight, inputs, second = problem(outputs=12, inputs=12)
    outputs = prepare_outputs(second, 400) if kind == "gradients" else row_weights(torch.rand(12))
    shape = KroneckerShape.parse(text)
    own = TwoSidedProblem(weight, shape, inputs, outputs)
    large, small = (
        torch.randn(shape.terms, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        for size in (own.large, own.small)
    )
    (m1, n1), (m2, n2) = own.large, own.small
    gradient = own._applied(kronecker_weight(large, small)).view(m1, m2, n1, n2)
    torch.testing.assert_close(own._through_factors(small)(large), torch.einsum("ambn,rmn->rab", gradient, small))
    pulled = own._small_matrix(large) @ small.flatten()
    torch.testing.assert_close(pulled.view_as(small), torch.einsum("ambn,rab->rmn", gradient, large))
    factors = own.factors(large, small)
    g = torch.diag(outputs.rows) if kind == "rows" else outputs.unit
    rest = weight - kronecker_weight(*factors)
    assert own.error(factors) == pytest.approx(float(((g @ rest @ inputs.unit) * rest).sum()), rel=1e-9)
    for moved, value in ((s[:2], s[2]) for s in (own.large_step(large, small), own.small_step(large, small))):
        assert value == pytest.approx(own.error(own.factors(*moved)), rel=1e-6) and value < own.error(factors)
