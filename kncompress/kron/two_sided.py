"""Factors fitted to what a map reads and to what becomes of its outputs.

An error of an output matters as far as the loss feels it. With g the gradient of the loss with respect to the outputs
and x the inputs, the second-order change of the loss is about E[(g^T D x)^2] / 2 with D = W - W_hat. Where g and x are
taken for independent (K-FAC: Martens & Grosse 2015) that is half of

    f(A, B) = tr(G D C D^T),   G = E[g g^T],   C = E[x x^T].

With G = K K^T and C = L L^T, f is the squared Frobenius norm of K^T D L.

- Where m1 or m2 is 1, G acts on one factor alone. Then K^T W_hat is a Kronecker sum of the same shape. So K^T W is
  fitted to the inputs alone, and that factor multiplied by K^-T afterwards. Low-rank maps are of this kind: the
  truncated singular value decomposition of K^T W L is their optimum (OBD-LLM: arXiv 2604.00821).
- Where n1 or n2 is 1, C acts on one factor alone: the transpose of W L is fitted to "inputs" of the moment G, and that
  factor multiplied by L^-1 afterwards.
- Otherwise alternating half steps: the best of the factors with fewer numbers, and conjugate gradients for the others,
  from where the last half step left them, so that f never rises. They start from the better of two: the fit to the
  inputs alone, and the fit under the Kronecker product that is nearest to G, which acts on both factors separately.
"""

import torch
from torch import Tensor

from kncompress.kron.calibrated import SWEEPS, TOLERANCE, calibrated_factors
from kncompress.kron.dense_product import without_autocast
from kncompress.kron.gauge import in_gauge
from kncompress.kron.half_steps import TwoSidedProblem
from kncompress.kron.moments import PreparedMoment, as_parts, formed_rows
from kncompress.kron.nearest import Factors, nearest_factors
from kncompress.kron.outputs import OutputMoment, Outputs
from kncompress.kron.shape import KroneckerShape, ShapeError


@torch.no_grad()
def two_sided_factors(
    weight: Tensor,
    shape: KroneckerShape,
    inputs: PreparedMoment,
    outputs: Outputs,
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
        outputs: G, of ``prepare_outputs`` or ``row_weights``, for M outputs.
        sweeps: most sweeps over both sides.
        tolerance: stop where a sweep lowers f by less than this share.
        history: gets sqrt(f / tr(G W C W^T)) at the start and after each half step; it never rises.

    Raises:
        ShapeError: ``weight`` is not (M, N), or a moment not of its size.
        ValueError: a value is not finite.
    """
    if outputs.outputs != shape.out_features:
        raise ShapeError(f"outputs={outputs.outputs}: {shape} needs {shape.out_features}")
    dtype = torch.promote_types(weight.dtype, torch.float32)
    exact = weight.detach().to(dtype)
    with without_autocast(weight.device):
        if 1 in (shape.left[0], shape.right[0]):
            right = shape.left[0] == 1
            start = None
            if 1 not in (shape.left[1], shape.right[1]):  # no closed form: from the fit to the inputs alone
                left, turned = calibrated_factors(exact, shape, inputs, sweeps=sweeps, tolerance=tolerance)
                start = Factors(left, outputs.whitened(turned)) if right else Factors(outputs.whitened(left), turned)
            whitened = outputs.whitened(exact)
            left, turned = calibrated_factors(
                whitened, shape, inputs, sweeps=sweeps, tolerance=tolerance, start=start, history=history
            )
            found = Factors(left, outputs.solved(turned)) if right else Factors(outputs.solved(left), turned)
            found = in_gauge(found)
        elif isinstance(outputs, OutputMoment) and 1 in (shape.left[1], shape.right[1]):
            found = _turned(exact, shape, inputs, outputs, sweeps, tolerance, history)
        else:
            found = _alternated(exact, shape, inputs, outputs, sweeps, tolerance, history)
    return Factors(found.left.to(weight.dtype), found.right.to(weight.dtype))


def _turned(
    weight: Tensor,
    shape: KroneckerShape,
    inputs: PreparedMoment,
    outputs: OutputMoment,
    sweeps: int,
    tolerance: float,
    history: list[float] | None,
) -> Factors:
    """The fit where C acts on one factor alone: that of (W L)^T to "inputs" of the moment G."""
    lower = inputs.cholesky.to(weight)
    turned = KroneckerShape(shape.left[::-1], shape.right[::-1], shape.terms)
    found = calibrated_factors((weight @ lower).T, turned, outputs, sweeps=sweeps, tolerance=tolerance, history=history)
    left, right = (factors.transpose(1, 2) for factors in found)
    if shape.left[1] == 1:
        right = torch.linalg.solve_triangular(lower, right, upper=False, left=False)
    else:
        left = torch.linalg.solve_triangular(lower, left, upper=False, left=False)
    return in_gauge(Factors(left.contiguous(), right.contiguous()))


def _alternated(
    weight: Tensor,
    shape: KroneckerShape,
    inputs: PreparedMoment,
    outputs: Outputs,
    sweeps: int,
    tolerance: float,
    history: list[float] | None,
) -> Factors:
    unit = float(weight.abs().amax())
    if unit == 0.0:
        return nearest_factors(weight, shape)
    problem = TwoSidedProblem(weight / unit, shape, inputs, outputs)
    starts = [calibrated_factors(weight / unit, shape, inputs, sweeps=sweeps, tolerance=tolerance)]
    separate = _separated(weight / unit, shape, inputs, outputs, sweeps, tolerance)
    if separate is not None:
        starts.append(separate)
    error, best = min(((problem.error(start), start) for start in starts), key=lambda pair: pair[0])
    large, small = problem.sides(best)
    errors = [error]
    for _ in range(sweeps):
        before = errors[-1]
        for step in (problem.large_step, problem.small_step):
            *moved, value = step(large, small)
            if value < errors[-1]:  # else rounding: there was nothing to gain
                large, small = moved
            errors.append(min(value, errors[-1]))
        if before - errors[-1] <= tolerance * errors[-1]:
            break
    found = problem.factors(large, small)
    if problem.error(found) > error:  # steps tell f by what it falls, which rounding may hide
        found, errors = best, [error]
    if history is not None:
        history.extend((value / problem.total) ** 0.5 if problem.total > 0 else 0.0 for value in errors)
    return in_gauge(found, unit)


def _separated(
    weight: Tensor,
    shape: KroneckerShape,
    inputs: PreparedMoment,
    outputs: Outputs,
    sweeps: int,
    tolerance: float,
) -> Factors | None:
    """The fit under the Kronecker product G1 (x) G2 nearest to G; None where there is none."""
    (m1, n1), (m2, n2) = shape.left, shape.right
    parts = outputs.separated(m1, m2)
    if parts is None:
        return None
    first, second = parts
    columns = n1 * n2
    turned = first.whitened(weight.reshape(m1, m2 * columns)).view(m1, m2, columns).transpose(0, 1)
    whitened = second.whitened(turned.reshape(m2, m1 * columns)).view(m2, m1, columns).transpose(0, 1)
    left, right = calibrated_factors(whitened.reshape(weight.shape), shape, inputs, sweeps=sweeps, tolerance=tolerance)
    return Factors(first.solved(left), second.solved(right))


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
