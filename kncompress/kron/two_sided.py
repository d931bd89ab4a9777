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

from collections.abc import Callable

import torch
from torch import Tensor

from kncompress.kron.alternating import solve
from kncompress.kron.calibrated import SWEEPS, TOLERANCE, calibrated_factors
from kncompress.kron.dense_product import without_autocast
from kncompress.kron.gauge import in_gauge
from kncompress.kron.moments import PreparedMoment, as_parts, formed_rows
from kncompress.kron.nearest import Factors, nearest_factors
from kncompress.kron.outputs import OutputMoment, Outputs
from kncompress.kron.routes import kronecker_weight
from kncompress.kron.shape import KroneckerShape, ShapeError

_STEPS = 4
"""Conjugate gradient steps of one half step."""
_SYSTEM = 2048
"""Most unknowns that are solved for at once."""


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
    problem = _Problem(weight / unit, shape, inputs, outputs)
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


class _Problem:
    """f of one weight and shape, and half steps that lower it.

    The side with more numbers is called large, the other small; where the right one is large, everything is put into
    the other order. Shapes: large (R, m1, n1), small (R, m2, n2). Where the small factors are few and not tall, no half
    step forms W_hat: products with G and C go through the factors.
    """

    def __init__(self, weight: Tensor, shape: KroneckerShape, inputs: PreparedMoment, outputs: Outputs) -> None:
        (m1, n1), (m2, n2) = shape.left, shape.right
        c, g = inputs.unit.to(weight), outputs.unit.to(weight)
        self.swapped = m1 * n1 < m2 * n2
        if self.swapped:
            weight, c = _swapped(weight, m1, m2, n1, n2), _swapped(c, n1, n2, n1, n2)
            g = _swapped(g, m1, m2, m1, m2) if g.dim() == 2 else g.view(m1, m2).T.flatten()
            (m1, n1), (m2, n2) = (m2, n2), (m1, n1)
        self.weight, self.c, self.g = weight, c, g
        self.large, self.small = (m1, n1), (m2, n2)
        self.aim = self._applied(weight).view(m1, m2, n1, n2)
        """G W C"""
        self.total = max(0.0, float((self.aim.reshape(weight.shape) * weight).sum(dtype=torch.float64)))

    def sides(self, factors: Factors) -> tuple[Tensor, Tensor]:
        """(large, small)."""
        return (factors.right, factors.left) if self.swapped else (factors.left, factors.right)

    def factors(self, large: Tensor, small: Tensor) -> Factors:
        """The other way."""
        return Factors(small, large) if self.swapped else Factors(large, small)

    def _applied(self, matrix: Tensor) -> Tensor:
        """G X C."""
        return (self.g @ matrix if self.g.dim() == 2 else self.g[:, None] * matrix) @ self.c

    def error(self, factors: Factors) -> float:
        """f."""
        rest = self.weight - kronecker_weight(*self.sides(factors))
        return max(0.0, float((self._applied(rest) * rest).sum(dtype=torch.float64)))

    def large_step(self, large: Tensor, small: Tensor) -> tuple[Tensor, Tensor, float]:
        """Lower f by moving the large factors: (large, small, f)."""
        few = len(small) * self.small[0] <= 2 * self.small[1]
        operator = self._through_factors(small) if few else self._formed(small, "ambn,rmn->rab", kronecker_weight)
        moved, value = self._descended(large, operator, torch.einsum("ambn,rmn->rab", self.aim, small))
        return moved, small, value

    def small_step(self, large: Tensor, small: Tensor) -> tuple[Tensor, Tensor, float]:
        """Lower f by moving the small factors, to the best ones where these are few numbers: (large, small, f)."""
        aim = torch.einsum("ambn,rab->rmn", self.aim, large)
        if not self._solvable(len(large)):
            operator = self._formed(large, "ambn,rab->rmn", lambda x, fixed: kronecker_weight(fixed, x))
            moved, value = self._descended(small, operator, aim)
            return large, moved, value
        matrix, wanted = self._small_matrix(large).double(), aim.reshape(1, -1).double()
        moved = solve(matrix, wanted).view(small.shape).to(small)
        flat = moved.reshape(1, -1).double()
        return large, moved, max(0.0, self.total + float(((flat @ matrix - 2 * wanted) * flat).sum()))

    def _solvable(self, terms: int) -> bool:
        """Whether the normal matrix of the small factors costs no more than twice the conjugate gradients."""
        (m1, n1), (m2, n2) = self.large, self.small
        rows, columns, numbers = m1 * m2, n1 * n2, terms * m2 * n2
        pairs = terms**2 / 2 * (rows * m2 * n1**2 + (columns * m2) ** 2)
        exact = terms * rows**2 * n1 + pairs + numbers**3
        return m2 <= 2 * n2 and numbers <= _SYSTEM and exact <= 2 * (_STEPS + 1) * rows * columns * (rows + columns)

    def _descended(self, begin: Tensor, operator: Callable[[Tensor], Tensor], aim: Tensor) -> tuple[Tensor, float]:
        """Factors of one side after conjugate gradients from ``begin``, and their f."""
        change, rest = _conjugate_gradients(operator, aim - operator(begin), _STEPS)
        moved = begin + change
        return moved, max(0.0, self.total - float((moved * (aim + rest)).sum(dtype=torch.float64)))

    def _formed(
        self, fixed: Tensor, gather: str, weight: Callable[[Tensor, Tensor], Tensor]
    ) -> Callable[[Tensor], Tensor]:
        """X of one side -> the gradient by it of <W_hat, G W_hat C> / 2 at X, the other side being ``fixed``."""
        (m1, n1), (m2, n2) = self.large, self.small
        return lambda x: torch.einsum(gather, self._applied(weight(x, fixed)).view(m1, m2, n1, n2), fixed)

    def _through_factors(self, small: Tensor) -> Callable[[Tensor], Tensor]:
        """The same of the large side, without W_hat."""
        (m1, n1), (m2, n2), terms = self.large, self.small, len(small)
        # The small factors times C, and G by the rows that belong to one row of a small factor.
        right = torch.einsum("rmn,bnk->rbmk", small, self.c.view(n1, n2, n1 * n2)).reshape(terms * n1, -1)
        columns = small.reshape(terms * m2, n2).T

        def gathered(x: Tensor) -> Tensor:
            product = x.transpose(0, 1).reshape(m1, terms * n1) @ right  # (m1, m2 N): W_hat C
            inner = (product.view(-1, n2) @ columns).view(m1 * m2, n1, terms, m2)
            if self.g.dim() == 1:
                own = inner.view(m1, m2, n1, terms, m2).diagonal(dim1=1, dim2=4)  # (m1, n1, R, m2)
                return torch.einsum("abrm,am->rab", own, self.g.view(m1, m2))
            rows = self.g.view(m1, m2, m1 * m2).transpose(0, 1)
            inner = inner.permute(3, 0, 2, 1).reshape(m2, m1 * m2, terms * n1)
            return torch.bmm(rows, inner).sum(0).view(m1, terms, n1).transpose(0, 1)

        return gathered

    def _small_matrix(self, large: Tensor) -> Tensor:
        """(R m2 n2, R m2 n2): the normal matrix of the small factors."""
        (m1, n1), (m2, n2), terms = self.large, self.small, len(large)
        c = self.c.view(n1, n2, n1, n2).permute(0, 2, 1, 3).reshape(n1 * n1, n2 * n2)
        matrix = large.new_empty(terms, m2, n2, terms, m2, n2)
        for s in range(terms):
            if self.g.dim() == 2:  # (m1, m2, m2, n1): G times the factor
                pulled = torch.einsum("kam,ab->kmb", self.g.view(m1 * m2, m1, m2), large[s]).view(m1, m2, m2, n1)
            for r in range(s + 1):
                if self.g.dim() == 2:
                    grams = torch.einsum("ab,amld->mlbd", large[r], pulled).reshape(m2 * m2, n1 * n1)
                    block = (grams @ c).view(m2, m2, n2, n2).transpose(1, 2)
                else:
                    grams = torch.einsum("ab,am,ad->mbd", large[r], self.g.view(m1, m2), large[s])
                    block = torch.diag_embed((grams.reshape(m2, n1 * n1) @ c).view(m2, n2, n2).permute(1, 2, 0))
                    block = block.permute(2, 0, 3, 1)
                matrix[r, :, :, s] = block
                matrix[s, :, :, r] = block.permute(2, 3, 0, 1)
        return matrix.view(terms * m2 * n2, terms * m2 * n2)


def _swapped(matrix: Tensor, m1: int, m2: int, n1: int, n2: int) -> Tensor:
    """Rows (i1, i2) and columns (j1, j2) as (i2, i1) and (j2, j1)."""
    return matrix.view(m1, m2, n1, n2).permute(1, 0, 3, 2).reshape(m1 * m2, n1 * n2)


def _conjugate_gradients(operator: Callable[[Tensor], Tensor], wanted: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """X that lowers <X, operator(X)> / 2 - <X, wanted> from X = 0, for a positive semidefinite operator, and
    ``wanted`` - operator(X)."""
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
    return solution, residual


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
