"""Prepared moments, the weighted error and the corrected bias, against the inputs themselves."""

import pytest
import torch
from kron_inputs import correlated, moment_of

from kncompress.kron import (
    KroneckerShape,
    Moment,
    PreparedMoment,
    ShapeError,
    calibrated_factors,
    corrected_bias,
    kronecker_weight,
    nearest_factors,
    weighted_error,
)


@pytest.mark.parametrize("centred", [False, True])
def test_error_is_that_of_the_outputs(centred, monkeypatch):
    x, weight = correlated(8, 40), torch.randn(12, 8).double()
    factors = nearest_factors(weight, KroneckerShape((6, 4), (2, 2)))
    moment = PreparedMoment(moment_of(x), centred)
    seen = x - x.mean(0) if centred else x
    want = float(((weight - kronecker_weight(*factors)) @ seen.T).norm() / (weight @ seen.T).norm())
    assert weighted_error(weight, factors, moment) == pytest.approx(want, rel=1e-9)
    monkeypatch.setattr("kncompress.kron.moments._ROWS", 1)
    assert weighted_error(weight, factors, moment) == pytest.approx(want, rel=1e-9)


def test_error_of_a_hybrid_s_parts(monkeypatch):
    monkeypatch.setattr("kncompress.kron.moments._ROWS", 1)
    x, weight = correlated(8, 40), torch.randn(12, 8).double()
    parts = [nearest_factors(weight, KroneckerShape.fit(12, 8, right)) for right in ((4, 1), (6, 2), (1, 8))]
    formed = sum(kronecker_weight(*part) for part in parts)
    want = float(((weight - formed) @ x.T).norm() / (weight @ x.T).norm())
    assert weighted_error(weight, parts, moment_of(x)) == pytest.approx(want, rel=1e-9)


def test_error_of_null_maps():
    factors = nearest_factors(torch.zeros(4, 6), KroneckerShape((4, 3), (1, 2)))
    moment = moment_of(correlated(6, 20, dtype=torch.float32))
    assert weighted_error(torch.zeros(4, 6), factors, moment) == 0.0
    one = nearest_factors(torch.ones(4, 6), KroneckerShape((4, 3), (1, 2)))
    assert weighted_error(torch.zeros(4, 6), one, moment) == float("inf")


def test_prepared_moment():
    moment = moment_of(correlated(10, 500))
    for centred in (False, True):
        prepared = PreparedMoment(moment, centred)
        plain = moment.second - torch.outer(moment.mean, moment.mean) * centred
        torch.testing.assert_close(prepared.plain, plain)
        ridge = prepared.ridge * plain.diagonal().mean() * torch.eye(10)
        torch.testing.assert_close(prepared.matrix, plain + ridge)
        torch.testing.assert_close(prepared.cholesky @ prepared.cholesky.T, prepared.matrix)
    assert PreparedMoment(moment, ridge=0.25).ridge == 0.25


def test_ridge_falls_with_tokens_and_rises_for_inputs_that_fill_the_space():
    few, many, flood = (PreparedMoment(moment_of(correlated(32, tokens))).ridge for tokens in (20, 2000, 10**5))
    assert few > many > flood >= 1e-4
    even = torch.randn(2000, 32)
    assert PreparedMoment(moment_of(even)).ridge > 3 * many


def test_negative_directions_raise_the_ridge():
    second = torch.diag(torch.tensor([1.0, 1.0, -0.05]))
    prepared = PreparedMoment(Moment(second, torch.zeros(3), 10**6), ridge=1e-4)
    assert torch.linalg.eigvalsh(prepared.matrix)[0] > 0
    assert prepared.ridge == pytest.approx(1e-1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_corrected_bias_keeps_the_mean_output(bias, dtype):
    x = correlated(8, 100)
    weight, old = torch.randn(12, 8).to(dtype), torch.randn(12).to(dtype) if bias else None
    factors = nearest_factors(weight, KroneckerShape((6, 4), (2, 2)))
    new = corrected_bias(old, weight, factors, x.mean(0))
    assert new.dtype == dtype
    before = (x @ weight.double().T).mean(0) + (old.double() if bias else 0)
    after = (x @ kronecker_weight(factors.left.double(), factors.right.double()).T).mean(0) + new.double()
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12 if dtype == torch.float64 else 3e-2)


@pytest.mark.parametrize("text", ["6x4(x)2x2", "12x1(x)1x8*2"])
def test_centred_fit_with_its_bias_beats_the_uncentred_fit(text):
    shape = KroneckerShape.parse(text)
    x = correlated(8, 100) + 2.0
    weight = torch.randn(12, 8).double()

    def outputs(centred):
        factors = calibrated_factors(weight, shape, PreparedMoment(moment_of(x), centred, ridge=1e-6))
        bias = corrected_bias(None, weight, factors, x.mean(0)) if centred else 0.0
        return float((x @ kronecker_weight(*factors).T + bias - x @ weight.T).norm())

    assert outputs(True) < 0.95 * outputs(False)


@pytest.mark.parametrize(
    ("moment", "error", "message"),
    [
        (Moment(torch.ones(3, 2), torch.ones(3), 1), ShapeError, r"second=\[3, 2\]: must be square"),
        (Moment(torch.eye(3), torch.ones(2), 1), ShapeError, r"mean=\[2\]: must be \[3\]"),
        (Moment(torch.eye(3) * float("nan"), torch.ones(3), 1), ValueError, "not finite"),
    ],
)
def test_bad_moments_are_named(moment, error, message):
    with pytest.raises(error, match=message):
        PreparedMoment(moment)
    with pytest.raises(ValueError, match="ridge=0"):
        PreparedMoment(moment_of(correlated(3, 9)), ridge=0)
