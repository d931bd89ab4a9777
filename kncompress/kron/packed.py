"""Packed outer products: R rows of a matrix of rank R as they are, every other row as a combination of them.

W_hat = P [I; X^T] K with K (R, N) the pivot rows, X (R, M - R) and P an order of the rows: R (M + N) - R^2 numbers
and multiply-adds. The two factors of a low-rank map take R (M + N). R^2 of these are redundant, since any invertible
R x R matrix can be put between the factors (PIFA: arXiv 2501.19090, ICML 2025). By columns it is the transpose
of such a matrix.

Any R independent rows would do, but with bad ones X is large, and rounding and training suffer. The rows that span
the largest volume make all entries of X at most 1 in size (Goreinov et al. 1997), but cost more to find. Rows that no
single exchange improves by more than ``_SLACK`` come near and are cheap.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kncompress.kron.compound import PackedShape
from kncompress.kron.dense_product import dense_product, without_autocast
from kncompress.kron.nearest import Factors
from kncompress.kron.shape import ShapeError

_SLACK = 0.05
"""By how much entries of X may be larger than 1."""


class Packed(NamedTuple):
    """The numbers of packed outer products. ``side`` out: of rows; in: of columns."""

    kept: Tensor
    """(R, N) pivot rows; or (R, M) pivot columns"""
    mix: Tensor
    """(R, M - R): coefficients of the other rows in the pivots; or (R, N - R), of the other columns"""
    order: Tensor
    """(M,) int32: place of each row among the pivots and, after them, the others; or (N,): the column at each place"""


def packed_linear(x: Tensor, packed: Packed, side: str, bias: Tensor | None = None) -> Tensor:
    """W_hat x + bias.

    Args:
        x: (..., N); any leading shape.
        packed: the numbers of W_hat.
        side: ``out`` or ``in``, as in ``PackedShape``.
        bias: (M,).

    Returns:
        (..., M).

    Raises:
        ShapeError: the last side of ``x`` is not N.
    """
    kept, mix, order = packed
    inputs = kept.shape[1] if side == "out" else len(order)
    if x.dim() == 0 or x.shape[-1] != inputs:
        raise ShapeError(f"x={list(x.shape)}: last side must be {inputs}")
    if side == "out":
        y = _completed(dense_product(x, kept), mix, order)
        return y if bias is None else y + bias.to(y.dtype)
    pivots, others = _ordered(x, order).tensor_split((len(kept),), dim=-1)
    z = dense_product(others, mix)
    return dense_product(z + pivots.to(z.dtype), kept.T, bias)


def packed_weight(packed: Packed, side: str) -> Tensor:
    """W_hat (M, N), formed."""
    kept, mix, order = packed
    rows = torch.cat([kept, mix.T @ kept])
    if side == "out":
        return rows.index_select(0, order)
    return rows.index_select(0, _inverse(order)).T.contiguous()


def _completed(z: Tensor, mix: Tensor, order: Tensor) -> Tensor:
    """z (..., R), the pivots -> (..., M): with the other outputs, in their order."""
    recording = torch.compiler.is_exporting() or torch.compiler.is_compiling()
    recording = recording or (torch.is_grad_enabled() and (z.requires_grad or mix.requires_grad))
    if recording or z.dtype != mix.dtype:  # of other types under autocast
        return _ordered(torch.cat([z, dense_product(z, mix.T)], dim=-1), order)
    # The product writes beside the pivots, which spares a copy of all outputs.
    flat, rank = z.reshape(-1, len(mix)), len(mix)
    y = flat.new_empty(len(flat), len(order))
    y[:, :rank] = flat
    torch.mm(flat, mix, out=y[:, rank:])
    return y.index_select(1, order).view(*z.shape[:-1], len(order))


def _ordered(x: Tensor, order: Tensor) -> Tensor:
    """(..., n) -> (..., n): number ``order[i]`` of each vector at place i."""
    if torch.compiler.is_exporting() or not (torch.is_grad_enabled() and x.requires_grad):
        return x.index_select(-1, order)
    ordered: Tensor = _Ordered.apply(x, order)
    return ordered


class _Ordered(torch.autograd.Function):
    """``index_select`` with a permutation. Its gradient is a permutation too; torch's own would add up, which takes
    much longer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return x.index_select(-1, order)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return upstream.index_select(-1, _inverse(order)), None


def _inverse(order: Tensor) -> Tensor:
    """The order that undoes it."""
    places = torch.arange(len(order), dtype=order.dtype, device=order.device)
    return torch.empty_like(order).index_copy_(0, order.long(), places)


@torch.no_grad()
def pack(factors: Factors, shape: PackedShape) -> Packed:
    """The same matrix as the outer products ``factors``, packed; worked out in float64.

    Where the rank is below R, the surplus pivots are arbitrary rows, and no other row uses them.

    Args:
        factors: left (R, M, 1), right (R, 1, N), finite.
        shape: of the result.

    Returns:
        Numbers of the factors' type and device; entries of ``mix`` are at most 1.05 in size, but for rounding.

    Raises:
        ShapeError: the factors are not of that shape.
    """
    sizes = (shape.rank, *shape.outer.left), (shape.rank, *shape.outer.right)
    if (tuple(factors.left.shape), tuple(factors.right.shape)) != sizes:
        found = f"{list(factors.left.shape)} and {list(factors.right.shape)}"
        raise ShapeError(f"factors={found}: {shape} needs {list(sizes[0])} and {list(sizes[1])}")
    dtype = factors.left.dtype
    with without_autocast(factors.left.device):
        left, right = factors.left[:, :, 0].double().T, factors.right[:, 0].double()  # (M, R), (R, N)
        long, wide = (left, right) if shape.side == "out" else (right.T, left.T)
        pivots, others, mix = _interpolated(long, wide)
        order = torch.cat([pivots, others]).int()
        kept, mix = (long[pivots] @ wide).to(dtype), mix.T.to(dtype).contiguous()
        return Packed(kept, mix, _inverse(order) if shape.side == "out" else order)


def _interpolated(long: Tensor, wide: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(R) pivots, (n - R) other rows, and X (n - R, R), of the matrix ``long`` (n, R) times ``wide`` (R, N)."""
    size, rank = long.shape
    # The same row relations hold in an orthonormal basis of the columns, where they are well conditioned.
    turned = long @ torch.linalg.qr(wide.T).R.T
    basis, values, _ = torch.linalg.svd(turned, full_matrices=False)
    full = int((values > size * torch.finfo(values.dtype).eps * values[0]).sum())
    basis = basis[:, :full]
    chosen = dominant_rows(basis)
    free = torch.ones(size, dtype=torch.bool, device=long.device)
    free[chosen] = False
    spare = free.nonzero()[: rank - full, 0]
    free[spare] = False
    pivots, by_place = torch.cat([chosen, spare]).sort()
    others = free.nonzero()[:, 0]
    mix = long.new_zeros(len(others), rank)
    if full:
        mix[:, :full] = torch.linalg.solve(basis[chosen], basis[others], left=False)
    return pivots, others, mix[:, by_place]


def dominant_rows(basis: Tensor) -> Tensor:
    """(k,) int64: rows of ``basis`` (n, k), of full rank, such that combinations of them make each other row with
    coefficients of at most 1 + ``_SLACK`` in size.

    Starts from the rows that Gaussian elimination with row pivoting takes, then exchanges rows. An exchange at a
    coefficient c multiplies the volume that the rows span by c, so the exchanges end.
    """
    size, count = basis.shape
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=basis.device)
    rows = list(range(size))
    for place, row in enumerate(torch.linalg.lu_factor(basis).pivots.tolist()):
        rows[place], rows[row - 1] = rows[row - 1], rows[place]
    chosen = torch.tensor(rows[:count], device=basis.device)
    table = torch.linalg.solve(basis[chosen], basis, left=False)  # (n, k): each row by the chosen ones
    while True:
        flat = int(table.abs().argmax())
        row, place = divmod(flat, count)
        most = float(table[row, place])
        if abs(most) <= 1 + _SLACK:
            return chosen
        change = table[row].clone()
        change[place] -= 1
        table -= torch.outer(table[:, place] / most, change)
        chosen[place] = row
