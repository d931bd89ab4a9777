"""The routes by which a Kronecker sum is applied: one function each, all with the same result.

Every route takes ``x`` (..., N), ``left`` (R, m1, n1), ``right`` (R, m2, n2) and ``bias`` (M,) or None, and returns
W x + bias (..., M) for W = sum_r left[r] (x) right[r]. With X = reshape(x, n1, n2), W x = sum_r left[r] X right[r]^T.
"Right first" multiplies X by the right factors before the left ones. Where there are several terms, each of the two
products takes all of them at once. ``kron/product.py`` chooses among the routes. L is the number of vectors.

Why blocks of the identity. A small right factor, 1x2 say, makes a product far too small for what a machine can do. Its
gradient, a sum over all vectors, is slower still. So two routes form I (x) right[r] with a small identity. That is up
to 16 times the multiply-adds, in a product large enough to run at the speed of memory. Measured with bfloat16 tiles on
2,048 tokens of GPT-2 small's hidden layers: 1.2 ms in the place of 8, and 1.3 in the place of 22 for the gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kncompress.kron.dense_product import dense_product

_LARGEST_BLOCK = 16
"""Rows of the largest identity that is formed with a right factor."""


def kronecker_weight(left: Tensor, right: Tensor) -> Tensor:
    """The dense matrix sum_r left[r] (x) right[r].

    Args:
        left: (R, m1, n1).
        right: (R, m2, n2).

    Returns:
        (m1 m2, n1 n2).
    """
    _, m1, n1 = left.shape
    _, m2, n2 = right.shape
    return torch.einsum("rij,rkl->ikjl", left, right).reshape(m1 * m2, n1 * n2)


def formed(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply by W itself, formed anew. For sums that cost more multiply-adds than W, on many vectors."""
    y = F.linear(x.reshape(-1, x.shape[-1]), kronecker_weight(left, right))
    return _finished(y, x, bias)


def low_rank_right_first(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """Outer products as columns (M, 1) (x) rows (1, N): the two plain products of a low-rank map."""
    return dense_product(dense_product(x, right.flatten(1)), left.flatten(1).T, bias)


def low_rank_left_first(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """Outer products the other way round, rows (1, N) (x) columns (M, 1)."""
    return dense_product(dense_product(x, left.flatten(1)), right.flatten(1).T, bias)


def single_row(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """One term, right factor (1, n2), few vectors: the fewest calls, since their number decides the time."""
    z = x.unflatten(-1, (left.shape[2], right.shape[2])) @ right[0, 0]
    return dense_product(z, left[0], bias)


def single_column(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """One term, right factor (m2, 1), few vectors: the fewest calls, since their number decides the time."""
    z = dense_product(x, left[0]).unsqueeze(-1)
    column = right[0, :, 0].to(z.dtype)
    y = z * column if bias is None else torch.addcmul(bias.view(-1, len(column)).to(z.dtype), z, column)
    return y.flatten(-2)


def identity_block(side: int, other: int, facing: int) -> int:
    """Rows of the identity to form with a right factor; 0 where only a small one fits.

    The largest divisor of ``side``, from 4 to 16, that adds at most an eighth to the multiply-adds.

    Args:
        side: side of the left factor on which the identity stands: n1 right first, m1 left first.
        other: the left factor's other side.
        facing: side of the right factor that is summed over right first (n2) or written left first (m2).
    """
    most = min(_LARGEST_BLOCK, other // (8 * facing))
    return next((block for block in range(most, 3, -1) if side % block == 0), 0)


def right_first_by_blocks(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """Right first, a small right factor with a block of the identity: groups of ``block`` n2 inputs at a time."""
    terms, m1, n1 = left.shape
    _, m2, n2 = right.shape
    block = identity_block(n1, m1, n2)
    eye = torch.eye(block, dtype=right.dtype, device=right.device)
    small = torch.einsum("rmn,ij->inrmj", right, eye).reshape(block * n2, terms * m2 * block)
    z = x.reshape(-1, block * n2) @ small  # (L n1 / block, R m2 block)
    if terms > 1:  # columns in the order of z's numbers
        left = left.view(terms, m1, n1 // block, block).permute(1, 2, 0, 3)
    left = left.reshape(m1, terms * n1)
    if m2 == 1:
        return dense_product(z.view(*x.shape[:-1], terms * n1), left, bias)
    # Runs of ``block`` numbers stay together: a copy of single ones would take several times as long.
    z = z.view(-1, n1 // block, terms, m2, block).permute(3, 0, 1, 2, 4).reshape(-1, terms * n1)
    y = F.linear(z, left).view(m2, -1, m1).permute(1, 2, 0).reshape(*x.shape[:-1], m1 * m2)
    return y if bias is None else y + bias.to(y.dtype)


def left_first_by_blocks(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """Left first, a small right factor with a block of the identity: ``block`` groups of m2 outputs at a time."""
    terms, m1, n1 = left.shape
    _, m2, n2 = right.shape
    block = identity_block(m1, n1, m2)
    if terms > 1:  # rows in the order in which the second product takes them
        left = left.view(terms, m1 // block, block, n1).transpose(0, 1)
    left = left.reshape(terms * m1, n1)
    if n2 == 1:
        z = F.linear(x, left)
    else:
        z = F.linear(x.reshape(-1, n1, n2).permute(2, 0, 1), left)
        z = z.view(n2, -1, m1 // block, terms * block).permute(1, 2, 0, 3).contiguous()
    eye = torch.eye(block, dtype=right.dtype, device=right.device)
    small = torch.einsum("rmn,ij->nrijm", right, eye).reshape(n2 * terms * block, block * m2).to(z.dtype)
    z = z.view(-1, len(small))  # (L m1 / block, n2 R block)
    if bias is None:
        y = z @ small
    else:
        # The product is added to the bias: one pass over y fewer than to add the bias to the product. The copy is
        # forced, because it is written to and reshape alone would sometimes make none.
        y = bias.to(z.dtype).expand(x.numel() // (n1 * n2), -1).clone(memory_format=torch.contiguous_format)
        y = y.view(-1, small.shape[1]).addmm_(z, small)
    return y.view(*x.shape[:-1], m1 * m2)


def right_first(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """Right factors first, of any shape."""
    terms, m1, n1 = left.shape
    _, m2, n2 = right.shape
    # Right factors on the left-hand side of the product: z comes out with n1 last, ready for the next one.
    z = F.linear(right.reshape(terms * m2, n2), x.reshape(-1, n2))  # (R m2, L n1)
    vectors = z.shape[1] // n1
    if terms > 1 and not torch.compiler.is_exporting() and vectors * m2 < n1:
        # Few vectors: R outputs to be added are fewer numbers than a concatenated copy of the left factors.
        y = torch.bmm(z.view(terms, m2 * vectors, n1), left.transpose(1, 2)).sum(0, dtype=z.dtype)
    else:
        z = z.view(terms, m2, vectors, n1).permute(1, 2, 0, 3).reshape(m2 * vectors, terms * n1)
        y = F.linear(z, left.transpose(0, 1).reshape(m1, terms * n1))
    return _finished(y.view(m2, vectors, m1).permute(1, 2, 0).reshape(vectors, m1 * m2), x, bias)


def left_first(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """Left factors first, of any shape."""
    terms, m1, n1 = left.shape
    _, m2, n2 = right.shape
    columns = x.reshape(-1, n1, n2).permute(2, 0, 1)  # (n2, L, n1)
    vectors = columns.shape[1]
    z = F.linear(columns, left.reshape(terms * m1, n1))  # (n2, L, R m1)
    z = z.view(n2, vectors, terms, m1).transpose(1, 2).reshape(n2 * terms, vectors * m1)
    y = F.linear(z.T, right.permute(1, 2, 0).reshape(m2, n2 * terms))  # (L m1, m2)
    return _finished(y.view(vectors, m1 * m2), x, bias)


def _finished(y: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """``y`` (L, M) in the leading shape of ``x``, plus the bias."""
    y = y.view(*x.shape[:-1], y.shape[-1])
    return y if bias is None else y + bias.to(y.dtype)
