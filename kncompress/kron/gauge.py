"""Which of the many equal pairs of factors to take: rotation, scale, and the step sizes that follow from it.

A Kronecker sum does not change when one factor of a term is multiplied by c and the other divided by it, nor when
the terms are mixed by an invertible R x R matrix on the left and its inverse transpose on the right. Training sees
the difference.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from kncompress.kron.layers import KroneckerEmbedding, KroneckerLinear
from kncompress.kron.nearest import Factors, balanced, sign_of
from kncompress.kron.packed_linear import PackedLinear

Gauge = Literal["equal", "unit_right", "equal_rms"]
GAUGES: tuple[Gauge, ...] = ("equal", "unit_right", "equal_rms")


@torch.no_grad()
def regauge(factors: Factors, gauge: Gauge) -> Factors:
    """The same Kronecker sum with the scale of each term shared otherwise between its two factors.

    Args:
        factors: of any type and device.
        gauge: ``equal``: both factors of a term have the same Frobenius norm; ``unit_right``: the right factor
            has norm 1; ``equal_rms``: the entries of both have the same root mean square. A term with a null
            factor keeps its scales, except that ``unit_right`` still gives a right factor norm 1 where it is not
            null.

    Raises:
        ValueError: another gauge.
    """
    if gauge not in GAUGES:
        raise ValueError(f"gauge={gauge}: not one of {', '.join(GAUGES)}")
    left, right = factors
    dtype = torch.promote_types(left.dtype, torch.float32)
    a, b = left.to(dtype), right.to(dtype)
    size_a = torch.linalg.vector_norm(a, dim=(1, 2), keepdim=True)
    size_b = torch.linalg.vector_norm(b, dim=(1, 2), keepdim=True)
    if gauge == "unit_right":
        scale, null = size_b, size_b == 0
    else:
        ratio = size_b / size_a
        if gauge == "equal_rms":
            ratio = ratio * math.sqrt(a[0].numel() / b[0].numel())
        scale, null = ratio.sqrt(), (size_a == 0) | (size_b == 0)
    scale = torch.where(null, 1.0, scale)
    return Factors((a * scale).to(left.dtype), (b / scale).to(right.dtype))


def canonical(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same sum of products left[r]^T right[r], (R, p) and (R, q), in the form that nearest factors have.

    Terms are orthogonal on both sides, largest first, of equal norms; the sign is fixed by the right side; a
    null term has a null larger side.
    """
    if left.shape[1] < right.shape[1]:
        basis, image = _rotated(left, right)
    else:
        basis, image = _rotated(right, left)
    image, basis = balanced(image, basis)
    left, right = (basis, image) if left.shape[1] < right.shape[1] else (image, basis)
    sign = sign_of(right)
    return left * sign, right * sign


def in_gauge(factors: Factors, unit: float = 1.0) -> Factors:
    """``unit`` times the sum, in the gauge of nearest factors (``canonical``)."""
    left, right = canonical(factors.left.flatten(1), factors.right.flatten(1))
    root = unit**0.5
    return Factors((left * root).view_as(factors.left), (right * root).view_as(factors.right))


def _rotated(small: Tensor, large: Tensor) -> tuple[Tensor, Tensor]:
    """(orthonormal basis (R, small), image (R, large)) of the same sum, images orthogonal and largest first."""
    basis, image = orthonormal(small, large)
    double = image.double()
    vectors = torch.linalg.eigh(double @ double.T).eigenvectors.flip(1).T.to(image.dtype)
    return vectors @ basis, vectors @ image


def orthonormal(small: Tensor, large: Tensor) -> tuple[Tensor, Tensor]:
    """The same sum with the rows of ``small`` orthonormal; R <= its columns.

    Rows that depend on others become new directions with a null ``large`` row: nothing is lost, and a fit can use
    them again.
    """
    basis, mix = torch.linalg.qr(small.T)  # small^T = basis mix
    return basis.T.contiguous(), mix @ large


def factor_rates(model: nn.Module) -> dict[str, float]:
    """{name of a parameter: its rate} for all factors and their scalars, where that of a dense weight is 1.

    At these rates one Adam step of either factor moves the entries of W_hat by a root mean square of 1: by as much as
    a step of rate 1 moves those of a dense weight. An Adam step of rate h moves each entry of a parameter by about h.
    Moving the left factors by D moves the entry ((i1, i2), (j1, j2)) of W_hat by sum_r D_r[i1, j1] B_r[i2, j2]. Where
    the signs of D differ between the terms, the mean square of that is h^2 R b^2, with b the root mean square of the
    right factors' entries. So the left factors take the rate 1 / (sqrt(R) b). With a that of the left factors', the
    right factors take 1 / (sqrt(R) a) and the scalars 1 / (sqrt(R) a b). The small factor of a pair of equal norms
    takes the larger rate. Both factors step at once, so that their moves add up.

    In packed outer products, with a of the coefficients and b of the pivots, a step on the pivots moves the pivots by h
    and the other rows by h sqrt(R) a; a step on the coefficients moves the other rows by h sqrt(R) b.
    """
    rates: dict[str, float] = {}
    for name, module in model.named_modules():
        moves: dict[str, float] = {}
        if isinstance(module, KroneckerLinear | KroneckerEmbedding):
            terms = math.sqrt(module.shape.terms)
            a, b = map(_root_mean_square, module.scaled_factors())
            moves = {"left": terms * b, "right": terms * a}
            if module.scale is not None:
                moves["scale"] = terms * a * b
        elif isinstance(module, PackedLinear):
            rank, all_rows = module.shape.rank, len(module.order)
            others = (all_rows - rank) / all_rows
            a, b = map(_root_mean_square, (module.mix, module.kept))
            moves = {"kept": math.sqrt(1 - others + others * rank * a * a), "mix": math.sqrt(others * rank) * b}
        rates |= {f"{name}.{side}".lstrip("."): 1 / size if size > 0 else 1.0 for side, size in moves.items()}
    return rates


def _root_mean_square(factors: Tensor) -> float:
    return float(factors.detach().float().square().mean().sqrt())
