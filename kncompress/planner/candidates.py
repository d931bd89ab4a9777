"""Shapes that one map may take, and the weighted error of each.

Outer products (low rank) need no fit: one eigendecomposition gives the error of every rank (whitened SVD). They are
packed, which takes fewer numbers and multiply-adds and changes nothing else. Kronecker sums have to be fitted. So
each kind is tried on a few layers first, and fitted on all only where it beats packed outer products of its size
there.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor

from kncompress.kron import (
    HybridShape,
    KroneckerShape,
    OutputMoment,
    PackedShape,
    PreparedMoment,
    Shape,
    ShapeError,
    calibrated_factors,
    calibrated_hybrid,
    two_sided_factors,
)
from kncompress.kron.dense_product import without_autocast
from kncompress.reading import Count

Harm = Annotated[float, Interval(ge=0, le=1e6)]
"""A relative error, or nats per token; above this it is no measurement."""
STEPS = 32
"""Ranks tried for a low-rank map; their parameters are evenly spread up to those of the dense map."""
SIDES = ((2, 1), (1, 2), (4, 1), (1, 4), (2, 2), (4, 4))
"""Right factors of Kronecker sums, besides (2, k) with k of ``LONG``."""
LONG = (16, 32)
TERM_SHARES = (0.3, 0.5, 0.7)
"""Shares of the dense parameters for which sums of several terms are sized."""
SCREEN_SHARE = 0.5
SCREEN_SWEEPS = 3
MARGIN = 0.03
"""Relative gain that a family of shapes needs on a screened map to be tried everywhere."""


@dataclass(frozen=True)
class Option:
    """One shape for a map. Multiply-adds are per token; the error is relative, on the calibration text."""

    shape: str
    """Shape as in ``factors.maps``, or ``keep``."""
    parameters: Count
    multiply_adds: Count
    error: Harm

    @classmethod
    def of(cls, shape: Shape, error: float) -> "Option":
        """What a shape costs."""
        return cls(str(shape), shape.parameters, shape.multiply_adds, error)


class Spectrum:
    """Singular values of a weight W (M, N) between its metrics: errors of all ranks, and the best weight of each.

    With C = L L^T the ridged moment of the inputs: where M <= N from the eigenvectors U of W C W^T, the best weight of
    rank r being U_r U_r^T W; else from those of L^T W^T W L. With G = K K^T the ridged moment of the gradients at the
    outputs, K^T W takes the place of W.
    """

    @torch.no_grad()
    def __init__(self, weight: Tensor, moment: PreparedMoment, outputs: OutputMoment | None = None) -> None:
        self.moment, self.type, self.size = moment, weight.dtype, (weight.shape[0], weight.shape[1])
        self.upper = None if outputs is None else outputs.cholesky.T
        with without_autocast(weight.device):
            exact = weight.double() if self.upper is None else self.upper @ weight.double()
            self.weight = exact
            """W, or K^T W, float64."""
            self.wide = weight.shape[0] <= weight.shape[1]
            if self.wide:
                gram = exact @ moment.matrix @ exact.T
            else:
                whitened = exact @ moment.cholesky
                gram = whitened.T @ whitened
            values, vectors = torch.linalg.eigh(gram)
        self.vectors = vectors.flip(1)
        self.values = values.flip(0).clamp(min=0)
        """Squared singular values, largest first: what each direction is worth in tr(G W C W^T)."""

    def error(self, rank: float) -> float:
        """Error of the best weight of a rank; between whole ranks the squared error is interpolated."""
        total = float(self.values.sum())
        if total <= 0:
            return 0.0
        whole = min(int(rank), len(self.values))
        left = float(self.values[whole:].sum())
        if whole < len(self.values):
            left -= (rank - whole) * float(self.values[whole])
        return (max(0.0, left) / total) ** 0.5

    def error_at(self, parameters: int) -> float:
        """Error of the packed outer products with so many numbers."""
        return self.error(packed_rank(*self.size, parameters))

    @torch.no_grad()
    def best(self, rank: int) -> Tensor:
        """The weight of that rank with the least error, (M, N)."""
        with without_autocast(self.weight.device):
            kept, exact = self.vectors[:, :rank], self.weight
            if self.wide:
                made = kept @ (kept.T @ exact)
            else:
                lower = self.moment.cholesky
                right = torch.linalg.solve_triangular(lower, kept.T, upper=False, left=False)
                made = (exact @ (lower @ kept)) @ right
            if self.upper is not None:
                made = torch.linalg.solve_triangular(self.upper, made, upper=True)
        return made.to(self.type)


def outer_ranks(outputs: int, inputs: int, steps: int = STEPS) -> list[int]:
    """Ranks of outer products with fewer numbers than the dense map, evenly spread, smallest first."""
    most = outputs * inputs / (outputs + inputs)
    found = {max(1, round(most * step / steps)) for step in range(1, steps)}
    return sorted(rank for rank in found if rank * (outputs + inputs) < outputs * inputs)


def ranks(outputs: int, inputs: int, steps: int = STEPS) -> list[int]:
    """Ranks of packed outer products whose numbers are evenly spread, smallest first."""
    found = {max(1, round(packed_rank(outputs, inputs, step / steps * outputs * inputs))) for step in range(1, steps)}
    return sorted(rank for rank in found if rank < min(outputs, inputs))


def packed_rank(outputs: int, inputs: int, numbers: float) -> float:
    """Rank, between whole ones, of the packed outer products with so many numbers: r (M + N) - r^2 of them."""
    whole = outputs + inputs
    return min(min(outputs, inputs), (whole - math.sqrt(max(0.0, whole**2 - 4 * numbers))) / 2)


def outer(outputs: int, inputs: int, rank: int) -> KroneckerShape:
    """Outer products: a low-rank map."""
    return KroneckerShape((outputs, 1), (1, inputs), rank)


def packed(outputs: int, inputs: int, rank: int) -> PackedShape:
    """The same, packed."""
    return PackedShape.of_rank(outputs, inputs, rank)


def sums(outputs: int, inputs: int) -> Iterator[list[KroneckerShape]]:
    """Kinds of Kronecker sums: each a list of shapes with one right factor and a rising number of terms."""
    for right in (*SIDES, *((2, k) for k in LONG)):
        try:
            one = KroneckerShape.fit(outputs, inputs, right)
        except ShapeError:
            continue
        dense, most = one.dense_parameters, min(right[0] * right[1], one.left[0] * one.left[1])
        terms = {int(share * dense / one.parameters) for share in TERM_SHARES} | {1} if most > 4 else range(1, most)
        shapes = [KroneckerShape(one.left, right, count) for count in sorted(terms) if 1 <= count <= most]
        shapes = [shape for shape in shapes if shape.parameters < dense and min(one.left) > 1]
        if shapes:
            yield shapes


def hybrids(shapes: Sequence[KroneckerShape]) -> list[Shape]:
    """Each of the smaller shapes with outer products added, both with about as many numbers."""
    found: list[Shape] = []
    for shape in shapes:
        rank = shape.parameters // (shape.out_features + shape.in_features)
        if rank and 2 * shape.parameters < shape.dense_parameters:
            found.append(HybridShape((outer(shape.out_features, shape.in_features, rank), shape)))
    return found


def error_of(
    weight: Tensor, shape: Shape, moment: PreparedMoment, sweeps: int, outputs: OutputMoment | None = None
) -> float:
    """Error of a fitted shape by the ridged moments. Packing changes no error."""
    history: list[float] = []
    if isinstance(shape, HybridShape):
        calibrated_hybrid(weight, shape, moment, rounds=2, history=history, outputs=outputs)
    elif outputs is not None:
        two_sided_factors(weight, shape.sums[0], moment, outputs, sweeps=sweeps, history=history)
    else:
        calibrated_factors(weight, shape.sums[0], moment, sweeps=sweeps, history=history)
    return min(history, default=0.0)


def screened(weight: Tensor, moment: PreparedMoment) -> list[list[Shape]]:
    """Kinds of shapes whose middle one beats the packed outer products of its size on this map by ``MARGIN``: the best,
    and the best of those that take as few multiply-adds as parameters.

    Hybrids are tried for the kinds that come near.
    """
    spectrum = Spectrum(weight, moment)
    won: list[tuple[float, list[Shape]]] = []
    for shapes in sums(*weight.shape):
        ratio = _against(weight, shapes, moment, spectrum)
        won.append((ratio, list(shapes)))
        if ratio < 1 + MARGIN and (mixed := hybrids(shapes)):
            won.append((_against(weight, mixed, moment, spectrum), mixed))
    better = sorted((kind for kind in won if kind[0] < 1 - MARGIN), key=lambda kind: kind[0])
    kinds = [shapes for _, shapes in better]
    lean = next((shapes for shapes in kinds if shapes[0].multiply_adds <= 1.1 * shapes[0].parameters), None)
    return kinds[:1] if lean is None or lean is kinds[0] else [kinds[0], lean]


def _against(weight: Tensor, shapes: Sequence[Shape], moment: PreparedMoment, spectrum: Spectrum) -> float:
    """Error of the middle one of a kind, relative to that of the packed outer products of its size."""
    dense = weight.numel()
    middle = min(shapes, key=lambda shape: abs(shape.parameters / dense - SCREEN_SHARE))
    known = spectrum.error_at(middle.parameters)
    return error_of(weight, middle, moment, SCREEN_SWEEPS) / known if known > 0 else math.inf
