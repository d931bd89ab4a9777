"""Factors fitted to what a map reads and to what becomes of its outputs.

An error of an output matters as far as the loss feels it. With g the gradient of the loss with respect to the outputs
and x the inputs, the second-order change of the loss is about E[(g^T D x)^2] / 2 with D = W - W_hat. Where g and x are
taken for independent (K-FAC: Martens & Grosse 2015) that is half of

    f(A, B) = tr(G D C D^T),   G = E[g g^T],   C = E[x x^T].

With G = K K^T and C = L L^T, f is the squared Frobenius norm of K^T D L.

- Where m1 or m2 is 1, G acts on one factor alone. Then K^T W_hat is a Kronecker sum of the same shape. So K^T W is
  fitted to the inputs alone, and that factor multiplied by K^-T afterwards. Low-rank maps are of this kind: the
  truncated singular value decomposition of K^T W L is their optimum (OBD-LLM: arXiv 2604.00821).
- Otherwise alternating half steps by conjugate gradients. Each lowers a quadratic function from where the last one left
  it, so f never rises. They start from the better of two: the fit to the inputs alone, and the fit under the Kronecker
  product that is nearest to G, which acts on both factors separately.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kncompress.kron.calibrated import SWEEPS, TOLERANCE, calibrated_factors
from kncompress.kron.dense_product import without_autocast
from kncompress.kron.gauge import in_gauge
from kncompress.kron.moments import Moment, PreparedMoment, as_parts, formed_rows
from kncompress.kron.nearest import Factors, nearest_factors
from kncompress.kron.routes import kronecker_weight
from kncompress.kron.shape import KroneckerShape, ShapeError

OUTPUT_RIDGE = 0.1
"""Ridge of G, relative to the mean of its diagonal: few tokens say little about the directions of a gradient."""
_STEPS = 4
"""Conjugate gradient steps of one half step; each costs a product with G and one with C."""


def prepare_outputs(second: Tensor, count: int, ridge: float = OUTPUT_RIDGE) -> PreparedMoment:
    """G (M, M), the mean of g g^T over ``count`` tokens, made safe to divide by.

    A null G becomes the identity: then nothing is known about the outputs, and the fit is that to the inputs alone.
    """
    return PreparedMoment(Moment(second, second.new_zeros(len(second)), count), ridge=ridge)


@torch.no_grad()
def two_sided_factors(
    weight: Tensor,
    shape: KroneckerShape,
    inputs: PreparedMoment,
    outputs: PreparedMoment,
    *,
    sweeps: int = SWEEPS,
    tolerance: float = TOLERANCE,
    history: list[float] | None = None,
) -> Factors:
    """The Kronecker sum of ``shape`` with the least tr(G D C D^T), both moments ridged.

    The optimum in closed form for low-rank maps, else a local one that is no worse than the fit to the inputs alone.
    Gauge, sign and types as of ``calibrated_factors``.

    Args:
        weight: (M, N), out x in.
        shape: the factors' shape.
        inputs: C, (N, N).
        outputs: G, (M, M), of ``prepare_outputs``.
        sweeps: most sweeps over both sides.
        tolerance: stop where a sweep lowers f by less than this share.
        history: gets sqrt(f / tr(G W C W^T)) at the start and after each half step; it never rises.

    Raises:
        ShapeError: ``weight`` is not (M, N), or a moment not of its size.
        ValueError: a value is not finite.
    """
    if tuple(outputs.plain.shape) != (shape.out_features,) * 2:
        raise ShapeError(f"outputs={list(outputs.plain.shape)}: {shape} needs {[shape.out_features] * 2}")
    dtype = torch.promote_types(weight.dtype, torch.float32)
    exact = weight.detach().to(dtype)
    with without_autocast(weight.device):
        if 1 in (shape.left[0], shape.right[0]):
            upper = (outputs.cholesky / outputs.size**0.5).T.to(exact)  # K^T but for its scale
            right = shape.left[0] == 1
            start = None
            if 1 not in (shape.left[1], shape.right[1]):  # no closed form: from the fit to the inputs alone
                first = calibrated_factors(exact, shape, inputs, sweeps=sweeps, tolerance=tolerance)
                start = Factors(first.left, upper @ first.right) if right else Factors(upper @ first.left, first.right)
            found = calibrated_factors(
                upper @ exact, shape, inputs, sweeps=sweeps, tolerance=tolerance, start=start, history=history
            )
            found = _turned_back(found, upper, right)
        else:
            found = _alternated(exact, shape, inputs, outputs, sweeps, tolerance, history)
    return Factors(found.left.to(weight.dtype), found.right.to(weight.dtype))


def _turned_back(factors: Factors, upper: Tensor, right: bool) -> Factors:
    """The sum whose product with ``upper`` from the left is that of ``factors``; upper acts on one side's rows."""
    if right:
        return in_gauge(Factors(factors.left, _solved(upper, factors.right)))
    return in_gauge(Factors(_solved(upper, factors.left), factors.right))


def _solved(upper: Tensor, factors: Tensor) -> Tensor:
    """upper^-1 times each (m, n) of ``factors`` (R, m, n)."""
    terms, rows, columns = factors.shape
    wide = factors.transpose(0, 1).reshape(rows, terms * columns)
    solved = torch.linalg.solve_triangular(upper.double(), wide.double(), upper=True).to(factors)
    return solved.view(rows, terms, columns).transpose(0, 1).contiguous()


def _alternated(
    weight: Tensor,
    shape: KroneckerShape,
    inputs: PreparedMoment,
    outputs: PreparedMoment,
    sweeps: int,
    tolerance: float,
    history: list[float] | None,
) -> Factors:
    unit = float(weight.abs().amax())
    if unit == 0.0:
        return nearest_factors(weight, shape)
    problem = _Problem(weight / unit, shape, inputs, outputs)
    starts = [calibrated_factors(problem.weight, shape, inputs, sweeps=sweeps, tolerance=tolerance)]
    separate = _separated(problem.weight, shape, inputs, outputs, sweeps, tolerance)
    if separate is not None:
        starts.append(separate)
    error, best = min(((problem.error(start), start) for start in starts), key=lambda pair: pair[0])
    left, right = best
    errors = [error]
    for _ in range(sweeps):
        before = errors[-1]
        for side in ("left", "right"):
            moved = problem.step(left, right, side)
            value = problem.error(moved)
            if value < errors[-1]:  # else rounding: there was nothing to gain
                left, right = moved
            errors.append(min(value, errors[-1]))
        if before - errors[-1] <= tolerance * errors[-1]:
            break
    if history is not None:
        history.extend((value / problem.total) ** 0.5 if problem.total > 0 else 0.0 for value in errors)
    return in_gauge(Factors(left, right), unit)


def _separated(
    weight: Tensor,
    shape: KroneckerShape,
    inputs: PreparedMoment,
    outputs: PreparedMoment,
    sweeps: int,
    tolerance: float,
) -> Factors | None:
    """The fit under the Kronecker product G1 (x) G2 nearest to G; None where that has no Cholesky factor."""
    (m1, _), (m2, _) = shape.left, shape.right
    first, second = nearest_factors(outputs.matrix, KroneckerShape((m1, m1), (m2, m2), 1))
    uppers = []
    for part in (first[0], second[0]):
        even = (part + part.T) / 2 * (1 if float(part.trace()) > 0 else -1)
        scale = float(even.diagonal().mean())
        if not scale > 0:
            return None
        lower, failed = torch.linalg.cholesky_ex(even / scale + 1e-6 * torch.eye(len(even)).to(even))
        if failed:
            return None
        uppers.append(lower.T.to(weight))
    whitened = torch.einsum("ai,bj,ijn->abn", uppers[0], uppers[1], weight.view(m1, m2, -1)).reshape(weight.shape)
    found = calibrated_factors(whitened, shape, inputs, sweeps=sweeps, tolerance=tolerance)
    return Factors(_solved(uppers[0], found.left), _solved(uppers[1], found.right))


class _Problem:
    """f of one weight and shape, and half steps that lower it."""

    def __init__(self, weight: Tensor, shape: KroneckerShape, inputs: PreparedMoment, outputs: PreparedMoment) -> None:
        self.weight, self.shape = weight, shape
        self.inputs = inputs.unit.to(weight)
        self.outputs = outputs.unit.to(weight)
        self.total = self._squared(weight)

    def _squared(self, difference: Tensor) -> float:
        return max(0.0, float((self._applied(difference) * difference).sum(dtype=torch.float64)))

    def _applied(self, matrix: Tensor) -> Tensor:
        """G X C."""
        return self.outputs @ matrix @ self.inputs

    def error(self, factors: Factors) -> float:
        """f."""
        return self._squared(self.weight - kronecker_weight(*factors))

    def step(self, left: Tensor, right: Tensor, side: str) -> Factors:
        """Lower f by moving the factors of one side, by conjugate gradients."""

        def formed(moved: Tensor) -> Tensor:
            return kronecker_weight(moved, right) if side == "left" else kronecker_weight(left, moved)

        def gathered(matrix: Tensor) -> Tensor:
            """The gradient with respect to the side, of a gradient (M, N) with respect to W_hat."""
            (m1, n1), (m2, n2) = self.shape.left, self.shape.right
            blocks = matrix.view(m1, m2, n1, n2)
            if side == "left":
                return torch.einsum("ambn,rmn->rab", blocks, right)
            return torch.einsum("ambn,rab->rmn", blocks, left)

        begin = left if side == "left" else right
        wanted = gathered(self._applied(self.weight - formed(begin)))
        change = _conjugate_gradients(lambda x: gathered(self._applied(formed(x))), wanted, _STEPS)
        return Factors(begin + change, right) if side == "left" else Factors(left, begin + change)


def _conjugate_gradients(operator: Callable[[Tensor], Tensor], wanted: Tensor, steps: int) -> Tensor:
    """X that lowers <X, operator(X)> / 2 - <X, wanted> from X = 0, for a positive semidefinite operator."""
    solution, residual, direction = torch.zeros_like(wanted), wanted, wanted
    square = float((residual * residual).sum(dtype=torch.float64))
    for _ in range(steps):
        applied = operator(direction)
        curvature = float((direction * applied).sum(dtype=torch.float64))
        if square <= 0 or curvature <= 0:
            break
        solution = solution + direction * (square / curvature)
        residual = residual - applied * (square / curvature)
        before, square = square, float((residual * residual).sum(dtype=torch.float64))
        direction = residual + direction * (square / before)
    return solution


@torch.no_grad()
def two_sided_error(
    weight: Tensor, factors: Factors | list[Factors], inputs: PreparedMoment, outputs: PreparedMoment
) -> float:
    """sqrt(tr(G D C D^T) / tr(G W C W^T)) with D = W - W_hat and neither moment ridged; 0 where both are null.

    Args:
        weight: (M, N).
        factors: of one Kronecker sum, or of the parts of a hybrid.
        inputs: C, (N, N).
        outputs: G, (M, M).
    """
    with without_autocast(weight.device):
        exact = weight.double()
        rest = exact.clone()
        for rows, formed in formed_rows(weight, as_parts(factors)):
            rest[rows] -= formed.double()
        g, c = outputs.plain.double(), inputs.plain.double()
        error = float(((g @ rest @ c) * rest).sum())
        total = float(((g @ exact @ c) * exact).sum())
    if error <= 0.0:
        return 0.0
    return (error / total) ** 0.5 if total > 0 else float("inf")
