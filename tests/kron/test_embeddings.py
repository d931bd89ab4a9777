"""Embeddings fitted to token frequencies and the head, against dense least squares."""

from itertools import pairwise

import pytest
import torch
from kron_inputs import correlated, moment_of

from kncompress.kron import (
    KroneckerShape,
    PreparedMoment,
    ShapeError,
    calibrated_embedding,
    kronecker_weight,
    nearest_factors,
)

TEXTS = ["30x3(x)1x2", "30x1(x)1x6*2", "10x3(x)3x2*2", "10x3(x)3x2", "15x2(x)2x3*3", "1x6(x)30x1*2"]


def metrics(weight, counts, moment, felt):
    """(V, D, D): p_v (S / s + C / c) by their definitions."""
    p = 0.9 * counts / counts.mean() + 0.1
    parts = [torch.eye(weight.shape[1]).double() if felt is None else felt.matrix]
    parts += [] if moment is None else [moment.matrix]
    metric = sum(part / torch.einsum("v,vi,ij,vj->", p, weight, part, weight) for part in parts)
    return p[:, None, None] * metric


def value(weight, formed, metric):
    difference = weight - formed
    return float(torch.einsum("vi,vij,vj->", difference, metric, difference))


def best_side(weight, fixed, metric, shape, free):
    root = torch.linalg.cholesky(metric)
    sides = shape.left if free == "left" else shape.right
    columns = []
    for term in range(shape.terms):
        for entry in range(sides[0] * sides[1]):
            one = torch.zeros(sides, dtype=torch.float64)
            one.view(-1)[entry] = 1.0
            formed = torch.kron(one, fixed[term]) if free == "left" else torch.kron(fixed[term], one)
            columns.append(torch.einsum("vi,vij->vj", formed, root).flatten())
    design, target = torch.stack(columns, dim=1), torch.einsum("vi,vij->vj", weight, root).flatten()
    solution = torch.linalg.lstsq(design, target, driver="gelsd").solution
    return float((target - design @ solution).square().sum())


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("text", TEXTS)
def test_ends_where_dense_least_squares_gains_nothing(text, head, both):
    shape = KroneckerShape.parse(text)
    weight, counts = torch.randn(30, 6).double(), torch.randint(0, 50, (30,)).double() ** 2
    moment = PreparedMoment(moment_of(correlated(6, 100))) if head else None
    felt = PreparedMoment(moment_of(correlated(6, 50))) if both else None
    history = []
    factors = calibrated_embedding(weight, shape, counts, moment, felt, sweeps=3000, tolerance=1e-13, history=history)
    metric = metrics(weight, counts, moment, felt)
    got = value(weight, kronecker_weight(*factors), metric)
    assert got == pytest.approx(best_side(weight, factors.right, metric, shape, "left"), rel=1e-4)
    assert got == pytest.approx(best_side(weight, factors.left, metric, shape, "right"), rel=1e-4)
    total = value(weight, torch.zeros_like(weight), metric)
    nearest = value(weight, kronecker_weight(*nearest_factors(weight, shape)), metric)
    assert history[-1] == pytest.approx((got / total) ** 0.5, rel=1e-4)
    assert got < 0.995 * nearest
    assert all(after <= before for before, after in pairwise(history))


def test_what_the_loss_feels_is_kept_better():
    shape, weight = KroneckerShape((60, 1), (1, 8), 3), torch.randn(60, 8)
    along = torch.randn(8)
    felt = moment_of(torch.randn(500, 1) * along + 0.05 * torch.randn(500, 8))

    def error(factors):
        return float(((weight - kronecker_weight(*factors)) @ along).norm())

    counts = torch.ones(60)
    assert error(calibrated_embedding(weight, shape, counts, felt=felt)) < 0.2 * error(
        calibrated_embedding(weight, shape, counts)
    )


def test_frequent_tokens_are_kept_better():
    shape = KroneckerShape((60, 1), (1, 8), 3)
    weight, counts = torch.randn(60, 8), torch.ones(60)
    counts[:5] = 10000.0

    def error(factors):
        return float((weight - kronecker_weight(*factors))[:5].norm())

    assert error(calibrated_embedding(weight, shape, counts)) < 0.5 * error(nearest_factors(weight, shape))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["null", "no counts", "one token"])
def test_finite_always(text, dtype, case):
    shape = KroneckerShape.parse(text)
    weight = torch.zeros(30, 6, dtype=dtype) if case == "null" else torch.randn(30, 6).to(dtype)
    counts = torch.zeros(30)
    counts[3] = float(case == "one token")
    moment, felt = (moment_of(correlated(6, 1, dtype=torch.float32)) for _ in range(2))
    factors = calibrated_embedding(weight, shape, counts, moment, felt)
    assert all(f.dtype == dtype and f.isfinite().all() for f in factors)


def test_errors_are_named():
    shape, weight = KroneckerShape((30, 3), (1, 2)), torch.randn(30, 6)
    with pytest.raises(ShapeError, match=r"frequencies=\[29\]: must be \[30\]"):
        calibrated_embedding(weight, shape, torch.ones(29))
    with pytest.raises(ShapeError, match="second="):
        calibrated_embedding(weight, shape, torch.ones(30), felt=moment_of(correlated(5, 10)))
    with pytest.raises(ValueError, match="frequencies: holds values that are negative"):
        calibrated_embedding(weight, shape, -torch.ones(30))
