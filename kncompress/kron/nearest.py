"""Factors nearest to a weight in the Frobenius norm (Van Loan & Pitsianis, 1993).

The rearrangement R(W)[(i1, j1), (i2, j2)] = W[(i1, i2), (j1, j2)] turns a Kronecker sum of R terms into a
matrix of rank R, so the truncated SVD of R(W) gives the best factors.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kncompress.kron.dense_product import without_autocast
from kncompress.kron.routes import kronecker_weight
from kncompress.kron.shape import KroneckerShape, ShapeError

_CHUNK = 1 << 22
"""Numbers of the weight that are held in another type or form at a time."""
_FEW = 4
"""Most numbers of a factor that is fitted without rearranging the weight."""


class Factors(NamedTuple):
    """Factors of a Kronecker sum."""

    left: Tensor
    """(R, m1, n1)"""
    right: Tensor
    """(R, m2, n2)"""


@torch.no_grad()
def nearest_factors(weight: Tensor, shape: KroneckerShape) -> Factors:
    """The Kronecker sum of ``shape`` nearest to ``weight`` in the Frobenius norm.

    The two factors of a term have equal norms, terms come largest first, and the sign is fixed by the right
    factor: the first of its largest entries is positive. A term that the weight does not need has one null
    factor (the larger) and one that is not, so that training can still use it. Weights in half precision are
    fitted in float32.

    Args:
        weight: (M, N), out x in.
        shape: the factors' shape.

    Returns:
        Factors of the weight's type and device.

    Raises:
        ShapeError: ``weight`` is not (M, N).
        ValueError: ``weight`` holds a value that is not finite.
    """
    _check_shape(weight, shape)
    (m1, n1), (m2, n2) = shape.left, shape.right
    matrix = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    with without_autocast(matrix.device):
        factors = _one_term(matrix, shape) if shape.terms == 1 and matrix.dtype == torch.float32 else None
        if factors is None:
            check_weight(weight, shape)
            matrix = matrix.reshape(m1, m2, n1, n2).transpose(1, 2).reshape(m1 * n1, m2 * n2)
            left, right = _truncated_svd(matrix, shape.terms)
            sign = sign_of(right)
            factors = Factors(left * sign, right * sign)
    return Factors(
        factors.left.reshape(-1, m1, n1).to(weight.dtype).contiguous(),
        factors.right.reshape(-1, m2, n2).to(weight.dtype).contiguous(),
    )


def check_weight(weight: Tensor, shape: KroneckerShape) -> None:
    """Raises ShapeError where the weight is not (M, N), ValueError where it is not finite."""
    _check_shape(weight, shape)
    # The sum is much faster than a look at each number. It is not finite where a number is not, or where it
    # overflowed.
    if not torch.isfinite(weight.sum()) and not torch.isfinite(weight).all():
        raise ValueError("weight: holds values that are not finite")


def _check_shape(weight: Tensor, shape: KroneckerShape) -> None:
    if tuple(weight.shape) != (shape.out_features, shape.in_features):
        raise ShapeError(f"weight={list(weight.shape)}: {shape} needs {[shape.out_features, shape.in_features]}")


def _one_term(weight: Tensor, shape: KroneckerShape) -> Factors | None:
    """One term of which a factor is a row or a column of a few numbers, in two passes over the float32 weight.

    None for other shapes, and where squares of the weight leave float32. Accuracy: a relative error e of the Gram
    matrix turns the factor by e s1^2 / (s1^2 - s2^2), with s1 and s2 the largest singular values. The squared
    distance grows by at most e^2 times the squared norm of the weight.
    """
    (m1, n1), (m2, n2) = shape.left, shape.right
    small_right = m2 * n2 <= m1 * n1
    few = min(m1 * n1, m2 * n2)
    block = 1
    if not 2 <= few <= _FEW or weight.device.type != "cpu":
        return None
    if small_right and m2 == 1:
        block = next(size for size in (8, 4, 2, 1) if n1 % size == 0)
        parts = weight.reshape(-1, block * n2)  # columns: ``block`` numbers of R(W) each
        squares = torch.stack([rows.T @ rows for rows in parts.split(_CHUNK // parts.shape[1])]).sum(
            0, dtype=torch.float64
        )
        gram = squares.view(block, n2, block, n2).diagonal(dim1=0, dim2=2).sum(-1)
    elif small_right and n2 == 1:
        parts = weight.reshape(m1, m2, n1)
    elif not small_right and n1 == 1:
        parts = weight.reshape(m1, m2, n2).transpose(0, 1)
    elif not small_right and m1 == 1:
        parts = weight.reshape(m2, n1, n2)
    else:
        return None
    if parts.dim() == 3:
        gram = torch.bmm(parts, parts.transpose(1, 2)).sum(0, dtype=torch.float64)
    mean = float(gram.trace()) / weight.numel()
    if not 1e-20 < mean < 1e20:  # null, not finite, or squares that float32 cannot hold
        return None
    values, vectors = torch.linalg.eigh(gram)
    root = values[-1] ** 0.25  # of the singular value: each factor's norm
    vector = vectors[:, -1]
    few_numbers, onto = (vector * root).float()[None], (vector / root).float()
    image = onto @ parts if parts.dim() == 3 else parts @ torch.block_diag(*[onto[:, None]] * block)
    rest = image.reshape(1, -1)
    left, right = (rest, few_numbers) if small_right else (few_numbers, rest)
    if float(sign_of(right)) < 0:
        left, right = left.neg_(), right.neg_()
    return Factors(left, right)


def _truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Rows (rank, rows) and (rank, columns) with matrix ~ sum_r left[r]^T right[r], scale shared evenly."""
    if matrix.shape[0] < matrix.shape[1]:
        right, left = _truncated_svd(matrix.T, rank)
        return left, right
    if matrix.dtype == torch.float64:
        basis = torch.linalg.svd(matrix, full_matrices=False).Vh[:rank]
    else:
        # The short side's eigenvectors in float64: squaring a float32 matrix loses nothing there, and
        # projecting on orthonormal vectors keeps float32 accuracy however small a singular value is.
        gram = matrix.new_zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64)
        for rows in matrix.split(max(1, _CHUNK // matrix.shape[1])):
            double = rows.double()
            gram += double.T @ double
        vectors = torch.linalg.eigh(gram).eigenvectors  # columns, smallest first
        basis = vectors.flip(1)[:, :rank].T.to(matrix.dtype)
    return balanced(basis @ matrix.T, basis)


def balanced(image: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The terms image[r]^T basis[r] with equal norms, for a ``basis`` of unit vectors.

    A null term keeps a null image, and a basis vector of the size of the largest term's.
    """
    # In float64: torch's float32 norm of 19 million numbers is off by 1e-3.
    sigma = torch.linalg.vector_norm(image, dim=1, keepdim=True, dtype=torch.float64).to(image.dtype)  # (R, 1)
    most = sigma.max()
    null = sigma <= 10 * torch.finfo(sigma.dtype).eps * most
    root = sigma.sqrt()
    image = torch.where(null, 0.0, image / root)
    return image, basis * torch.where(null, torch.where(most > 0, most.sqrt(), 1.0), root)


def sign_of(right: Tensor) -> Tensor:
    """(R, 1): 1 or -1, so that the first of each row's largest entries becomes positive."""
    size = right.abs()
    # Entries that equal the largest up to rounding count as largest; else noise would choose the sign.
    first = (size >= 0.999 * size.amax(dim=1, keepdim=True)).int().argmax(dim=1, keepdim=True)
    return torch.where(right.gather(1, first) < 0, -1.0, 1.0)


@torch.no_grad()
def relative_error(weight: Tensor, left: Tensor, right: Tensor) -> float:
    """||weight - sum_r left[r] (x) right[r]|| / ||weight||, Frobenius; 0 where both are null.

    Formed a few rows at a time, in float32 or better.
    """
    dtype = torch.promote_types(torch.promote_types(weight.dtype, left.dtype), torch.float32)
    m2 = right.shape[1]
    error, total = 0.0, 0.0
    right = right.to(dtype)
    rows = max(1, _CHUNK // (m2 * weight.shape[1]))
    for start in range(0, left.shape[1], rows):
        block = weight[start * m2 : (start + rows) * m2].to(dtype)
        with without_autocast(weight.device):
            formed = kronecker_weight(left[:, start : start + rows].to(dtype), right)
        total += float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2
        error += float(torch.linalg.vector_norm(block - formed, dtype=torch.float64)) ** 2
    if error == 0.0:
        return 0.0
    return (error / total) ** 0.5 if total > 0 else float("inf")
