"""What a map's outputs weigh in a fit to both sides: a moment of gradients, or a weight for each output."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kncompress.kron.moments import Moment, PreparedMoment
from kncompress.kron.nearest import nearest_factors
from kncompress.kron.shape import KroneckerShape, ShapeError

OUTPUT_RIDGE = 0.1
"""Ridge of G, relative to the mean of its diagonal: few tokens say little about the directions of a gradient."""
_SMOOTHING = 0.1
"""Share of the weights of rows that is spread evenly, so that tokens missing from the calibration text count too."""
_SEPARATE_RIDGE = 1e-6


class OutputMoment(PreparedMoment):
    """G = E[g g^T] of the gradients g at the outputs, (M, M), made safe to divide by: G = K K^T.

    A null G becomes the identity: then nothing is known about the outputs, and the fit is that to the inputs alone.
    """

    @property
    def outputs(self) -> int:
        """M."""
        return len(self.plain)

    @property
    def _upper(self) -> Tensor:
        """K^T, but for the scale of G, float64."""
        return (self.cholesky / self.size**0.5).T

    def whitened(self, matrix: Tensor) -> Tensor:
        """K^T X of (..., M, N), but for the scale of G."""
        return self._upper.to(matrix) @ matrix

    def solved(self, factors: Tensor) -> Tensor:
        """K^-T times each (M, n) of ``factors`` (R, M, n): undoes ``whitened``."""
        terms, rows, columns = factors.shape
        wide = factors.transpose(0, 1).reshape(rows, terms * columns)
        solved = torch.linalg.solve_triangular(self._upper, wide.double(), upper=True).to(factors)
        return solved.view(rows, terms, columns).transpose(0, 1).contiguous()

    def separated(self, m1: int, m2: int) -> "tuple[OutputMoment, OutputMoment] | None":
        """G1 and G2 of the Kronecker product nearest to G; None where they are not positive."""
        first, second = nearest_factors(self.matrix, KroneckerShape((m1, m1), (m2, m2), 1))
        found = []
        for part in (first[0], second[0]):
            even = (part + part.T) / 2 * (1 if float(part.trace()) > 0 else -1)
            if not float(even.trace()) > 0:
                return None
            found.append(OutputMoment(Moment(even, even.new_zeros(len(even)), 1), ridge=_SEPARATE_RIDGE))
        return found[0], found[1]


@dataclass(frozen=True, eq=False)
class RowWeights:
    """A diagonal G, for maps with an output for each token of a vocabulary."""

    rows: Tensor
    """(M,), positive"""

    @property
    def outputs(self) -> int:
        """M."""
        return len(self.rows)

    def whitened(self, matrix: Tensor) -> Tensor:
        """G^1/2 X of (..., M, N)."""
        return matrix * self.rows.sqrt().to(matrix)[:, None]

    def solved(self, factors: Tensor) -> Tensor:
        """G^-1/2 times each (M, n) of ``factors`` (R, M, n): undoes ``whitened``."""
        return factors / self.rows.sqrt().to(factors)[:, None]

    @property
    def unit(self) -> Tensor:
        """(M,): the diagonal of G."""
        return self.rows

    def separated(self, m1: int, m2: int) -> "tuple[RowWeights, RowWeights]":
        """The two diagonals whose Kronecker product is nearest to G; both are positive, as G is."""
        first, second = nearest_factors(self.rows[:, None], KroneckerShape((m1, 1), (m2, 1), 1))
        return RowWeights(first.flatten().abs()), RowWeights(second.flatten().abs())


Outputs = OutputMoment | RowWeights


def prepare_outputs(second: Tensor, count: int, ridge: float = OUTPUT_RIDGE) -> OutputMoment:
    """G (M, M), the mean of g g^T over ``count`` tokens, made safe to divide by."""
    return OutputMoment(Moment(second, second.new_zeros(len(second)), count), ridge=ridge)


def row_weights(shares: Tensor) -> RowWeights:
    """Weights of mean 1 from ``shares`` (M,), 0 or more, a tenth of whose sum is spread evenly.

    Raises:
        ShapeError: ``shares`` is not a vector.
        ValueError: a value is negative or not finite.
    """
    if shares.dim() != 1:
        raise ShapeError(f"frequencies={list(shares.shape)}: must be a vector")
    shares = shares.detach().double()
    if not torch.isfinite(shares).all() or bool((shares < 0).any()):
        raise ValueError("frequencies: holds values that are negative or not finite")
    even = torch.ones_like(shares)
    mean = float(shares.mean())
    return RowWeights((1 - _SMOOTHING) * (shares / mean if mean > 0 else even) + _SMOOTHING * even)
