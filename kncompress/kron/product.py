"""Apply a Kronecker sum without forming it, and form it (the dense twin).

Notation: ``left`` (R, m1, n1), ``right`` (R, m2, n2), W = sum_r left[r] (x) right[r], which has shape
(M, N) = (m1 m2, n1 n2). With X = reshape(x, n1, n2), W x = sum_r left[r] X right[r]^T, reshaped to M. All
terms go through each of the two products together: concatenated, not one after the other. A right factor with
one row or one column needs no copy of the vectors, and outer products ((M, 1) (x) (1, N)) become the two
plain products of a low-rank map.

A product with a small right factor by itself, two numbers by one say, is far from what a machine can do, its gradient,
a sum over all vectors, still farther, and scaling neighbours by turns is no better: a small block of the identity is
formed with it instead. I_16 (x) B costs 16 times the multiply-adds, which the large product hides, and runs at the
speed of memory: with bfloat16 tiles 1.2 ms in the place of 8 for the 6.3 million numbers of GPT-2 small's hidden layers
on 2,048 tokens, and 1.3 in the place of 22 for the gradient of a factor that meets 2 million pairs.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kncompress.kron.shape import ShapeError, cheaper_order, product_cost

_BLOCK = 16
"""Largest block of the identity that is formed with a right factor."""
_MIXING = 18
"""Most numbers of right factors with several rows and columns for which that is done: it pays up to 3x3, two terms."""
_WIDE = 8192
"""Outputs of a bfloat16 product that a CPU computes at a time, where there are four times as many or more."""
_MANY = 128
"""Vectors for which that was measured to pay."""
_FORMING = 8
"""Cost of forming one number of one term, its gradient included, in multiply-adds of a large product."""


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Compute in the tensors' own type: for fits, exports and look-ups, which autocast would round."""
    if not torch.amp.is_autocast_available(device.type):  # the meta device
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


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


def kronecker_linear(
    x: Tensor,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None = None,
    order: Literal["right", "left", "formed"] | None = None,
) -> Tensor:
    """W x + bias for W = sum_r left[r] (x) right[r], without forming W where that is cheaper.

    Args:
        x: (..., N); any leading shape, none and empty ones included.
        left: (R, m1, n1).
        right: (R, m2, n2).
        bias: (M,).
        order: which factors come first, ``right`` or ``left``, or ``formed`` to multiply by W itself. None
            picks the cheaper order, and ``formed`` where the factored product costs more multiply-adds than
            the dense one and there are vectors enough to pay for forming W. A graph that ``torch.export`` records
            is to serve any number of vectors and to hold the factors: there it never forms W.

    Returns:
        (..., M).

    Raises:
        ShapeError: the last side of ``x`` is not N, or ``order`` is unknown.
    """
    terms, m1, n1 = left.shape
    _, m2, n2 = right.shape
    if x.dim() == 0 or x.shape[-1] != n1 * n2:
        raise ShapeError(f"x={list(x.shape)}: last side must be {n1 * n2} for {m1}x{n1}(x){m2}x{n2}")
    if order is None:
        order = cheaper_order((m1, n1), (m2, n2), terms)
        extra = product_cost((m1, n1), (m2, n2), terms, order)[0] - m1 * m2 * n1 * n2
        many = not torch.compiler.is_exporting() and x.numel() * extra > _FORMING * terms * m1 * m2 * (n1 * n2) ** 2
        if extra > 0 and many:
            order = "formed"
    if order == "right" and n1 == m2 == 1:  # outer products: the two plain products of a low-rank map
        return _linear(_linear(x, right.reshape(terms, n2)), left.reshape(terms, m1).T, bias)
    if order == "left" and m1 == n2 == 1:
        return _linear(_linear(x, left.reshape(terms, n1)), right.reshape(terms, m2).T, bias)
    vectors = x.numel() // (n1 * n2)
    single = terms == 1 and ((order == "right" and m2 == 1) or (order == "left" and n2 == 1))
    if single and not torch.compiler.is_exporting() and vectors < _BLOCK:
        return _few(x, left[0], right[0], bias)
    if min(m2, n2) == 1 or right.numel() <= _MIXING:
        if order == "right" and (block := _block(n1, m1, n2, vectors)):
            return _merged(x, left, right, bias, block)
        if order == "left" and (block := _block(m1, n1, m2, vectors)):
            return _spread(x, left, right, bias, block)
    if order == "right":
        y = _right_first(x, left, right)
    elif order == "left":
        y = _left_first(x, left, right)
    elif order == "formed":
        y = F.linear(x.reshape(-1, n1 * n2), kronecker_weight(left, right))
    else:
        raise ShapeError(f"order={order}: not one of right, left, formed")
    y = y.view(*x.shape[:-1], m1 * m2)
    return y if bias is None else y + bias.to(y.dtype)


def _few(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """One term whose right factor is a row (1, n2) or a column (m2, 1), in as few calls as can be: they take time."""
    if right.shape[0] == 1:
        z = x.unflatten(-1, (left.shape[1], right.shape[1])) @ right[0]
        return _linear(z, left, bias)
    z = _linear(x, left).unsqueeze(-1)
    column = right[:, 0].to(z.dtype)
    y = z * column if bias is None else torch.addcmul(bias.view(-1, len(column)).to(z.dtype), z, column)
    return y.flatten(-2)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, by another way where torch's is slow on CPUs in bfloat16, with autocast or without.

    One vector takes the product of a matrix and a vector, which is twice as fast; the tens of thousands of outputs of
    a language-model head are computed some at a time, twice as fast as well (torch 2.13, oneDNN).
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return F.linear(x, weight, bias)
    wide = bias is None and len(weight) > 4 * _WIDE and x.numel() >= _MANY * x.shape[-1]
    if torch.is_autocast_enabled("cpu"):
        if wide and torch.get_autocast_dtype("cpu") == torch.bfloat16:
            with without_autocast(x.device):
                return _linear(x.bfloat16(), weight.bfloat16())
        return F.linear(x, weight, bias)
    if not x.dtype == weight.dtype == torch.bfloat16:
        return F.linear(x, weight, bias)
    if x.numel() == x.shape[-1]:
        vector = x.reshape(-1)
        y = torch.mv(weight, vector) if bias is None else torch.addmv(bias, weight, vector)
        return y.view(*x.shape[:-1], len(weight))
    if wide:
        y = _WideProduct.apply(x.reshape(-1, x.shape[-1]), weight)
        return y.view(*x.shape[:-1], len(weight))
    return F.linear(x, weight, bias)


class _WideProduct(torch.autograd.Function):
    """z (L, K), weight (M, K) -> z weight^T (L, M), ``_WIDE`` outputs at a time."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(z, weight)
        y = z.new_empty(len(z), len(weight))
        for start in range(0, len(weight), _WIDE):
            rows = slice(start, start + _WIDE)
            torch.mm(z, weight[rows].T, out=y[:, rows])
        return y

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        z, weight = ctx.saved_tensors
        to_z, to_weight = ctx.needs_input_grad
        return upstream @ weight if to_z else None, upstream.T @ z if to_weight else None


def _block(side: int, other: int, factor: int, vectors: int) -> int:
    """Rows of the identity to form with a right factor of ``factor`` numbers, which meets ``side`` numbers; 0: none.

    A divisor of ``side`` that adds an eighth to the multiply-adds at most; ``other`` is the left factor's second side.
    None for a few vectors, whose time is that of the calls, nor where only a small one fits, nor in an exported graph.
    """
    if torch.compiler.is_exporting() or vectors < _BLOCK:
        return 0
    most = min(_BLOCK, other // (8 * factor))
    return next((block for block in range(most, 3, -1) if side % block == 0), 0)


def _merged(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, block: int) -> Tensor:
    """Right first: (..., N) -> (..., M). ``block`` groups of n2 inputs become m2 times as many numbers of each term."""
    terms, m1, n1 = left.shape
    _, m2, n2 = right.shape
    eye = torch.eye(block, dtype=right.dtype, device=right.device)
    small = torch.einsum("rmn,ij->inrmj", right, eye).reshape(block * n2, terms * m2 * block)
    z = x.reshape(-1, block * n2) @ small  # (L n1 / block, R m2 block)
    if terms > 1:  # columns in the order of z's numbers
        left = left.view(terms, m1, n1 // block, block).permute(1, 2, 0, 3)
    left = left.reshape(m1, terms * n1)
    if m2 == 1:
        return _linear(z.view(*x.shape[:-1], terms * n1), left, bias)
    # Runs of ``block`` numbers stay together: a copy of single ones would take several times as long.
    z = z.view(-1, n1 // block, terms, m2, block).permute(3, 0, 1, 2, 4).reshape(-1, terms * n1)
    y = F.linear(z, left).view(m2, -1, m1).permute(1, 2, 0).reshape(*x.shape[:-1], m1 * m2)
    return y if bias is None else y + bias.to(y.dtype)


def _spread(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, block: int) -> Tensor:
    """Left first: (..., N) -> (..., M). ``block`` numbers of each term become as many groups of m2 outputs."""
    terms, m1, n1 = left.shape
    _, m2, n2 = right.shape
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
        # The product is added to the bias: a pass less over y than the other way round. A copy even where reshape by
        # itself would make none: it is written to.
        y = bias.to(z.dtype).expand(x.numel() // (n1 * n2), -1).clone(memory_format=torch.contiguous_format)
        y = y.view(-1, small.shape[1]).addmm_(z, small)
    return y.view(*x.shape[:-1], -1)


def _right_first(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x (L n1 n2 numbers) -> (L, M)."""
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
    return y.view(m2, vectors, m1).permute(1, 2, 0).reshape(vectors, m1 * m2)


def _left_first(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x (L n1 n2 numbers) -> (L, M)."""
    terms, m1, n1 = left.shape
    _, m2, n2 = right.shape
    x = x.reshape(-1, n1, n2).permute(2, 0, 1)  # (n2, L, n1)
    vectors = x.shape[1]
    z = F.linear(x, left.reshape(terms * m1, n1))  # (n2, L, R m1)
    z = z.view(n2, vectors, terms, m1).transpose(1, 2).reshape(n2 * terms, vectors * m1)
    y = F.linear(z.T, right.permute(1, 2, 0).reshape(m2, n2 * terms))  # (L m1, m2)
    return y.view(vectors, m1 * m2)
