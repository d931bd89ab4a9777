"""What a map's inputs look like, and errors measured by it.

The error that matters is the one on real inputs: E ||(W - W_hat) x||^2 = tr((W - W_hat) C (W - W_hat)^T) with the
second moment C = E[x x^T].
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kncompress.kron.dense_product import without_autocast
from kncompress.kron.nearest import Factors
from kncompress.kron.product import kronecker_linear
from kncompress.kron.routes import kronecker_weight
from kncompress.kron.shape import ShapeError

_ROWS = 1 << 22
"""Numbers of the weight that are held in another type or form at a time."""
_LEAST_RIDGE = 1e-4
_MOST_RIDGE = 1e-1


@dataclass(frozen=True, eq=False)
class Moment:
    """Moments of a map's inputs over calibration tokens, in float32 or float64."""

    second: Tensor
    """(N, N): E[x x^T], not centred"""
    mean: Tensor
    """(N,): E[x]"""
    count: int
    """tokens averaged over"""


class PreparedMoment:
    """A moment made safe to divide by: ridged, and factored once for all maps that share the input.

    Few tokens say little about rare directions of the inputs, so ``ridge`` times the mean of the diagonal is added to
    the diagonal. None chooses the ridge from the data, between 1e-4 and 0.1: less for many tokens, more for few
    tokens or inputs that spread in all directions. The rule is oracle approximating shrinkage, the best in the
    Frobenius norm for Gaussian inputs (Chen, Wiesel, Eldar & Hero 2010). While the matrix has no Cholesky factor in
    float64, the ridge grows tenfold. A null moment becomes the identity: nothing is known about the inputs, and the
    nearest factors are the best.

    Args:
        moment: of the inputs.
        centred: take C - mean mean^T, for maps whose bias is corrected (``corrected_bias``).
        ridge: relative to the mean of the diagonal; None: chosen as above.

    Raises:
        ShapeError: ``second`` is not square, or ``mean`` not of its size.
        ValueError: a value is not finite, or the ridge is not above 0.
    """

    def __init__(self, moment: Moment, centred: bool = False, ridge: float | None = None) -> None:
        second, mean = moment.second.detach(), moment.mean.detach()
        if second.dim() != 2 or second.shape[0] != second.shape[1]:
            raise ShapeError(f"second={list(second.shape)}: must be square")
        if mean.shape != second.shape[:1]:
            raise ShapeError(f"mean={list(mean.shape)}: must be {list(second.shape[:1])}")
        if not (torch.isfinite(second).all() and torch.isfinite(mean).all()):
            raise ValueError("moment: holds values that are not finite")
        if ridge is not None and not ridge > 0:
            raise ValueError(f"ridge={ridge}: must be above 0")
        dtype = torch.promote_types(second.dtype, torch.float32)
        with without_autocast(second.device):
            exact = second.double()
            exact = exact + exact.T
            exact /= 2
            if centred:
                exact -= torch.outer(mean.double(), mean.double())
        self.moment = moment
        self.centred = centred
        self.scale = max(0.0, float(exact.diagonal().mean()))
        """Mean of the diagonal: mean square of an input."""
        self.plain = exact.to(dtype)
        """(N, N): the moment without ridge; errors are measured by it."""
        self.ridge = _shrinkage(exact, moment.count) if ridge is None else ridge
        """Relative to ``scale``; final once ``matrix`` or ``cholesky`` was asked for."""

    @cached_property
    def cholesky(self) -> Tensor:
        """(N, N), float64: lower L with L L^T = ``matrix``; ||D L|| is the weighted norm of D."""
        if self.null:
            return self.matrix
        with without_autocast(self.plain.device):
            while True:
                lower, failed = torch.linalg.cholesky_ex(self._ridged())
                if not failed:
                    return lower
                self.ridge *= 10

    def _ridged(self) -> Tensor:
        exact = self.plain.to(torch.float64, copy=True)
        exact.diagonal().add_(self.ridge * self.scale)
        return exact

    @property
    def null(self) -> bool:
        """Nothing is known about the inputs: they are all null, or so small that float32 has no inverse of them."""
        return not self.scale > torch.finfo(torch.float32).tiny

    @property
    def matrix(self) -> Tensor:
        """(N, N), float64: the ridged moment, positive definite; made anew each time, for it is large."""
        if self.null:
            return torch.eye(len(self.plain), dtype=torch.float64, device=self.plain.device)
        _ = self.cholesky  # which finds the ridge
        return self._ridged()

    @property
    def size(self) -> float:
        """About the largest number in ``matrix``: divided by it, tiny gradients stay within float32."""
        return 1.0 if self.null else self.scale

    @property
    def unit(self) -> Tensor:
        """(N, N), float64: ``matrix`` divided by ``size``."""
        return self.matrix.div_(self.size)


def prepare(moment: Moment | PreparedMoment) -> PreparedMoment:
    """``moment`` itself where it is prepared, else prepared by default, not centred."""
    return moment if isinstance(moment, PreparedMoment) else PreparedMoment(moment)


def _shrinkage(second: Tensor, count: int) -> float:
    """Ridge over mean diagonal that equals OAS shrinkage: (1 - d) C + d m I ~ C + d / (1 - d) m I."""
    size = len(second)
    square, trace = float((second * second).sum()), float(second.trace())
    spread = (count + 1 - 2 / size) * (square - trace**2 / size)
    share = ((1 - 2 / size) * square + trace**2) / spread if spread > 0 else 1.0
    return min(_MOST_RIDGE, max(_LEAST_RIDGE, share / (1 - share) if share < 1 else _MOST_RIDGE))


@torch.no_grad()
def weighted_error(weight: Tensor, factors: Factors | Sequence[Factors], moment: Moment | PreparedMoment) -> float:
    """sqrt(tr(D C D^T) / tr(W C W^T)) with D = W - W_hat: relative error of the outputs on the calibration text.

    C has no ridge; it is centred where a prepared moment is. W_hat is formed a few rows at a time, in float32 or
    better. 0 where both traces are null.

    Args:
        weight: (M, N).
        factors: of one Kronecker sum, or of the parts of a hybrid.
        moment: of the inputs, (N, N).
    """
    plain = prepare(moment).plain
    dtype = torch.promote_types(weight.dtype, torch.float32)
    plain = plain.to(dtype)
    error, total = 0.0, 0.0
    with without_autocast(weight.device):
        for rows, formed in formed_rows(weight, factors):
            block = weight[rows].to(dtype)
            total += _trace(block, plain)
            error += _trace(block - formed, plain)
    if error <= 0.0:
        return 0.0
    return (error / total) ** 0.5 if total > 0 else float("inf")


def _trace(rows: Tensor, moment: Tensor) -> float:
    return float((rows @ moment * rows).sum(dim=1).double().sum())


def formed_rows(weight: Tensor, factors: Factors | Sequence[Factors]) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of whole rows of W_hat, in float32 or better, with the rows that they stand at."""
    parts = as_parts(factors)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    out_features, in_features = weight.shape
    step = math.lcm(*(part.right.shape[1] for part in parts))  # whole left rows of every part
    height = min(out_features, step * max(1, _ROWS // (step * in_features)))
    for start in range(0, out_features, height):
        rows = slice(start, min(start + height, out_features))
        formed = weight.new_zeros(rows.stop - rows.start, in_features, dtype=dtype)
        for left, right in parts:
            m2 = right.shape[1]
            formed += kronecker_weight(left[:, rows.start // m2 : rows.stop // m2].to(dtype), right.to(dtype))
        yield rows, formed


def as_parts(factors: Factors | Sequence[Factors]) -> list[Factors]:
    """The parts of a hybrid; a list of one for a single Kronecker sum."""
    return [factors] if isinstance(factors, Factors) else list(factors)


@torch.no_grad()
def corrected_bias(bias: Tensor | None, weight: Tensor, factors: Factors | Sequence[Factors], mean: Tensor) -> Tensor:
    """bias + (W - W_hat) mean: the mean output stays what it was.

    With it the error left is that of the centred inputs, so fit with ``PreparedMoment(..., centred=True)``.

    Args:
        bias: (M,), or None for a map that had none; the result then counts as M more parameters.
        weight: (M, N).
        factors: of one Kronecker sum, or of the parts of a hybrid.
        mean: (N,).

    Returns:
        (M,), of the weight's type.
    """
    with without_autocast(weight.device):
        mean = mean.to(weight.device, torch.float64)
        formed = sum(kronecker_linear(mean, left.double(), right.double()) for left, right in as_parts(factors))
        shift = torch.cat([rows.double() @ mean for rows in weight.split(max(1, _ROWS // weight.shape[1]))]) - formed
        return (shift if bias is None else bias.double() + shift).to(weight.dtype)
