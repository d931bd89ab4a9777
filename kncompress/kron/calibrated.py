"""Factors fitted to what a map really sees: the least error on its inputs instead of on its entries.

Minimises f(A, B) = tr(D C D^T), D = W - sum_r A_r (x) B_r, with C the ridged second moment of the inputs. Given one
side, the other is a linear least squares problem, so f never rises in alternating least squares:

- A given B: sum_(s,k1) A_s[i1, k1] G[(s, k1), (r, j1)] = sum_(i2, j2) (W C)[(i1, i2), (j1, j2)] B_r[i2, j2]
  with G[(r, j1), (s, k1)] = sum_(j2, k2) (B_r^T B_s)[j2, k2] C[(j1, j2), (k1, k2)];
- B given A: the mirror image.

Where n1 or n2 is 1, C acts on one factor alone: with C = L L^T, f is the squared Frobenius distance of W_hat L from
W L, both Kronecker sums of the same shape, so the nearest sum of W L is the optimum. Outer products are of that kind
(whitened SVD: SVD-LLM, Wang et al. 2024).

Never worse than the nearest sum, on the moment without ridge too: f falls from there, and of all sums of the shape
the nearest has the least ridge part of f.
"""

from functools import cache

import torch
from torch import Tensor

from kncompress.kron.alternating import Problem, alternate
from kncompress.kron.dense_product import without_autocast
from kncompress.kron.gauge import in_gauge
from kncompress.kron.moments import Moment, PreparedMoment, prepare, weighted_error
from kncompress.kron.nearest import Factors, check_weight, nearest_factors
from kncompress.kron.shape import KroneckerShape, ShapeError

SWEEPS = 12
TOLERANCE = 3e-3

_CLOSE = 1e-4
"""If f or its gain is below this share, rounding may decide: both errors are computed again and the better fit is
kept."""


@torch.no_grad()
def calibrated_factors(
    weight: Tensor,
    shape: KroneckerShape,
    moment: Moment | PreparedMoment,
    *,
    sweeps: int = SWEEPS,
    tolerance: float = TOLERANCE,
    start: Factors | None = None,
    history: list[float] | None = None,
) -> Factors:
    """The Kronecker sum of ``shape`` with the least error on the inputs that ``moment`` describes.

    The optimum in closed form where n1 or n2 is 1, else alternating least squares, which ends in a local optimum.
    Gauge and sign are those of ``nearest_factors``. A term that is not needed has one null factor, as there. Weights in
    half precision are fitted in float32, float64 ones in float64.

    Args:
        weight: (M, N), out x in.
        shape: the factors' shape.
        moment: of the inputs, (N, N). Prepare it once where maps share an input, and to choose the ridge or
            centring.
        sweeps: most sweeps over both sides.
        tolerance: stop where a sweep lowers the squared error by less than this share.
        start: factors to start from; None: the nearest sum.
        history: gets sqrt(f / tr(W C W^T)), the error by the ridged moment, at the start and after each half
            step; for a closed form only that of the result.

    Returns:
        Factors of the weight's type and device.

    Raises:
        ShapeError: ``weight`` is not (M, N), or the moment not (N, N).
        ValueError: ``weight`` or the moment holds a value that is not finite.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    exact = weight.detach().to(dtype)
    closed = 1 in (shape.left[1], shape.right[1])
    check_weight(exact, shape)
    prepared = prepare(moment)
    check_moment(prepared, shape)

    @cache
    def first() -> Factors:  # a closed form rarely asks for it
        if start is None:
            return nearest_factors(exact, shape)
        return Factors(start.left.to(dtype), start.right.to(dtype))

    unit = float(exact.abs().amax())
    result = first() if unit == 0.0 else None
    if result is None:
        with without_autocast(weight.device):
            scaled = exact / unit
            fitted, errors = (
                _whitened(scaled, shape, prepared)
                if closed
                else _alternated(scaled, unit, shape, prepared, first(), sweeps, tolerance)
            )
            result = in_gauge(fitted, unit)
        if history is not None:
            history.extend(max(0.0, error) ** 0.5 for error in errors)
        doubtful = errors[-1] < _CLOSE or (len(errors) > 1 and errors[0] - errors[-1] < _CLOSE * errors[-1])
        if doubtful and weighted_error(exact, first(), prepared) <= weighted_error(exact, result, prepared):
            result = first()
    return Factors(result.left.to(weight.dtype), result.right.to(weight.dtype))


def _alternated(
    weight: Tensor,
    unit: float,
    shape: KroneckerShape,
    moment: PreparedMoment,
    start: Factors,
    sweeps: int,
    tolerance: float,
) -> tuple[Factors, list[float]]:
    """Factors of ``weight`` from those of ``unit`` times it, and the shares of f on the way there."""
    matrix = moment.unit.to(weight)
    begin = Factors(start.left / unit, start.right)
    return alternate(Problem.of(weight, shape, matrix), begin, sweeps, tolerance)


def check_moment(moment: PreparedMoment, shape: KroneckerShape) -> None:
    """Raises ShapeError where the moment is not (N, N)."""
    if len(moment.plain) != shape.in_features:
        raise ShapeError(f"second={list(moment.plain.shape)}: {shape} needs {[shape.in_features] * 2}")


def _whitened(weight: Tensor, shape: KroneckerShape, moment: PreparedMoment) -> tuple[Factors, list[float]]:
    """The optimum where C acts on one factor alone, and its f as a share of tr(W C W^T)."""
    lower = moment.cholesky.to(weight)
    whitened = weight @ lower
    left, right = nearest_factors(whitened, shape)
    # Terms are orthogonal, so what they hold adds up.
    held = float((left.double().square().sum((1, 2)) * right.double().square().sum((1, 2))).sum())
    total = float(torch.linalg.vector_norm(whitened, dtype=torch.float64)) ** 2
    # One solve for the rows of all terms: a batch of R small ones takes ten times as long.
    if shape.left[1] == 1:
        right = torch.linalg.solve_triangular(lower, right.flatten(0, 1), upper=False, left=False).view_as(right)
    else:
        left = torch.linalg.solve_triangular(lower, left.flatten(0, 1), upper=False, left=False).view_as(left)
    return Factors(left, right), [1 - held / total]
