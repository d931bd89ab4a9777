"""Sums that mix shapes (hKoPA: Cai, Chen & Xiao 2019), fitted by back-fitting: each part on what the others leave."""

import torch
from torch import Tensor

from kncompress.kron.calibrated import calibrated_factors
from kncompress.kron.compound import HybridShape
from kncompress.kron.dense_product import without_autocast
from kncompress.kron.moments import Moment, PreparedMoment, formed_rows, prepare, weighted_error
from kncompress.kron.nearest import Factors, nearest_factors
from kncompress.kron.outputs import OutputMoment
from kncompress.kron.two_sided import two_sided_error, two_sided_factors

ROUNDS = 4
_GAIN = 1e-3


@torch.no_grad()
def nearest_hybrid(weight: Tensor, shape: HybridShape, rounds: int = ROUNDS) -> list[Factors]:
    """Factors of each part of ``shape``, back-fitted in the Frobenius norm.

    The error never rises from part to part. It ends in a local optimum, or after ``rounds`` over all parts, or
    where a round lowers the squared error by less than a thousandth.

    Args:
        weight: (M, N), out x in.
        shape: the parts, fitted in their order.
        rounds: most rounds over the parts, 1 or more.

    Returns:
        Factors of the weight's type and device, in the order of the parts.

    Raises:
        ShapeError: ``weight`` is not (M, N).
        ValueError: ``weight`` holds a value that is not finite, or ``rounds`` is below 1.
    """
    return _back_fitted(weight, shape, None, rounds, [])


@torch.no_grad()
def calibrated_hybrid(
    weight: Tensor,
    shape: HybridShape,
    moment: Moment | PreparedMoment,
    rounds: int = ROUNDS,
    history: list[float] | None = None,
    outputs: OutputMoment | None = None,
) -> list[Factors]:
    """Factors of each part of ``shape``, back-fitted to the inputs that ``moment`` describes.

    Never worse on them than the nearest hybrid is.

    Args:
        weight: (M, N), out x in.
        shape: the parts, fitted in their order.
        moment: of the inputs, (N, N).
        rounds: most rounds over the parts, 1 or more; fewer where a round gains little.
        history: gets the weighted error by the ridged moment, relative to the weight's, after each part's fit;
            it never rises.
        outputs: of the loss's gradients at the outputs, (M, M), of ``prepare_outputs``; None: errors of all outputs
            count alike.

    Returns:
        Factors of the weight's type and device, in the order of the parts.

    Raises:
        ShapeError: ``weight`` is not (M, N), or the moment not (N, N).
        ValueError: a value is not finite, or ``rounds`` is below 1.
    """
    prepared = prepare(moment)
    errors: list[float] = []
    fitted = _back_fitted(weight, shape, prepared, rounds, errors, outputs)
    if history is not None:
        history.extend(errors)
    nearest = nearest_hybrid(weight, shape, rounds)

    def error(factors: list[Factors]) -> float:
        if outputs is not None:
            return two_sided_error(weight, factors, prepared, outputs)
        return weighted_error(weight, factors, prepared)

    return nearest if error(nearest) < error(fitted) else fitted


def _back_fitted(
    weight: Tensor,
    shape: HybridShape,
    moment: PreparedMoment | None,
    rounds: int,
    history: list[float],
    outputs: OutputMoment | None = None,
) -> list[Factors]:
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: must be 1 or more")
    target = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    metric = None if moment is None else moment.matrix.to(target)
    fitted: list[Factors | None] = [None] * len(shape.parts)
    feels = None if outputs is None else outputs.unit.to(target)
    total = _squared(target, metric, feels)
    residual = target.clone()
    with without_autocast(weight.device):
        error = total
        for _ in range(rounds):
            before = error
            for i, part in enumerate(shape.parts):
                old = fitted[i]
                if old is not None:
                    _add(residual, old, 1)
                if moment is None:
                    new = nearest_factors(residual, part)
                elif outputs is not None:
                    new = two_sided_factors(residual, part, moment, outputs)
                else:
                    new = calibrated_factors(residual, part, moment, start=old)
                _add(residual, new, -1)
                left = _squared(residual, metric, feels)
                if left > error and old is not None:  # rounding
                    _add(residual, new, 1)
                    _add(residual, old, -1)
                    new = old
                else:
                    error = left
                fitted[i] = new
                history.append((error / total) ** 0.5 if total > 0 else 0.0)
            if before - error <= _GAIN * error:
                break
    return [Factors(f.left.to(weight.dtype), f.right.to(weight.dtype)) for f in fitted if f is not None]


def _add(matrix: Tensor, factors: Factors, sign: int) -> None:
    for rows, formed in formed_rows(matrix, factors):
        matrix[rows].add_(formed, alpha=sign)


def _squared(matrix: Tensor, metric: Tensor | None, feels: Tensor | None = None) -> float:
    """tr(feels X metric X^T); the squared Frobenius norm without either."""
    if metric is None:
        return float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
    product = matrix @ metric
    if feels is not None:
        product = feels @ product
    return float((product * matrix).sum(dim=1).double().sum())
