"""Alternating least squares for a Kronecker sum under the metric of its inputs.

Works on rearranged matrices, so that left and right factors play the same part: the side with more columns is
called large, the other small. The large factors are (R, mb, nb), the small ones (R, ms, ns), and

- ``target`` (mb nb, ms ns) is W C, rearranged as in ``nearest``;
- ``metric`` (nb nb, ns ns) is C: entry ((j, k), (j', k')) is C[(j, j'), (k, k')] for a large left side.

Both normal matrices are then products of ``metric`` with the Gram matrices X_r^T X_s of the other side's terms. So no
array of R^2 N^2 numbers is made; the largest is the system that is solved, of (R nb)^2.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kncompress.kron.gauge import orthonormal
from kncompress.kron.nearest import Factors
from kncompress.kron.shape import KroneckerShape

_PAIRS = 1 << 25
"""Numbers in the Gram matrices of term pairs that are held at a time."""
_ROWS = 1 << 21
"""Numbers of right-hand sides that are solved for at a time."""
_SYSTEM = 2048
"""Unknowns of a row solved for at once; more are solved for in groups of terms, one after the other."""
_JITTERS = (0.0, 1e-12, 1e-9, 1e-6)
"""Added to the unit diagonal of a normal matrix until it has a Cholesky factor."""


@dataclass
class Problem:
    """One fit: sides, rearranged target and metric."""

    large: tuple[int, int]
    """(mb, nb)"""
    small: tuple[int, int]
    """(ms, ns)"""
    target: Tensor
    """(mb nb, ms ns)"""
    metric: Tensor
    """(nb nb, ns ns)"""
    total: float
    """tr(W C W^T): f of null factors."""
    mirrored: bool
    """The right factors are the large ones."""

    @classmethod
    def of(cls, weight: Tensor, shape: KroneckerShape, matrix: Tensor) -> "Problem":
        """The fit of ``shape`` to ``weight`` (M, N) under the metric ``matrix`` (N, N)."""
        (m1, n1), (m2, n2) = shape.left, shape.right
        product = weight @ matrix
        total = float((product * weight).sum(dim=1).double().sum())
        target, metric = product.view(m1, m2, n1, n2), matrix.view(n1, n2, n1, n2)
        if n1 >= n2:
            target = target.permute(0, 2, 1, 3).reshape(m1 * n1, m2 * n2)
            metric = metric.permute(0, 2, 1, 3).reshape(n1 * n1, n2 * n2)
            return cls((m1, n1), (m2, n2), target, metric, total, False)
        target = target.permute(1, 3, 0, 2).reshape(m2 * n2, m1 * n1)
        metric = metric.permute(1, 3, 0, 2).reshape(n2 * n2, n1 * n1)
        return cls((m2, n2), (m1, n1), target, metric, total, True)


def alternate(problem: Problem, start: Factors, sweeps: int, tolerance: float) -> tuple[Factors, list[float]]:
    """Factors of an f that never rises, from ``start``.

    Args:
        problem: in the type to compute in, float32 or float64; systems are solved in float64.
        start: factors, of that type.
        sweeps: most updates of the large side.
        tolerance: stop where a sweep lowers f by less than this share.

    Returns:
        The factors, and f / ``total`` at the start and after each half step. A half step that raises f, by rounding,
        is not taken; if it was one of the large side, the fit ends.
    """
    large, small = (start.right, start.left) if problem.mirrored else (start.left, start.right)
    terms = len(large)
    large, small = large.reshape(terms, -1), small.reshape(terms, -1)
    large, small, history = _descend(problem, large, small, sweeps, tolerance)
    left, right = (small, large) if problem.mirrored else (large, small)
    sides = (problem.small, problem.large) if problem.mirrored else (problem.large, problem.small)
    return Factors(left.view(terms, *sides[0]), right.view(terms, *sides[1])), history


def _descend(
    problem: Problem, large: Tensor, small: Tensor, sweeps: int, tolerance: float
) -> tuple[Tensor, Tensor, list[float]]:
    """Large and small factors, a row a term, and f / total at the start and after each half step; f never rises.

    The small ones are made orthonormal before each step of the large side.
    """
    history: list[float] = []
    accepted = large, small
    for sweep in range(sweeps + 1):
        value, solved, value_solved = _small_step(problem, large, small)
        if history and not value <= history[-1]:
            break
        before = history[-1] if history else value
        history.append(value)
        if value_solved < value:  # else rounding: there was nothing to gain
            small, value = solved, value_solved
        history.append(value)
        accepted = large, small
        if sweep == sweeps or value <= 0 or (sweep > 0 and before - value < tolerance * value):
            break
        small, large = orthonormal(small, large)
        large = _large_step(problem, large, small)
    return *accepted, history


def _small_step(problem: Problem, large: Tensor, small: Tensor) -> tuple[float, Tensor, float]:
    """f / total of the factors, the best small factors for the large ones, and f / total of those."""
    terms, (ms, ns) = len(large), problem.small
    matrix = normal_matrix(large.view(terms, *problem.large), problem.metric, ns).double()
    rhs = _rows(large @ problem.target, terms, ms, ns).double()
    old = _rows(small, terms, ms, ns).double()
    new = solve(matrix, rhs)

    def value(rows: Tensor) -> float:
        return 1.0 + float(((rows @ matrix - 2 * rhs) * rows).sum()) / problem.total

    solved = _terms(new, terms, ms, ns).to(small.dtype)
    return value(old), solved, value(_rows(solved, terms, ms, ns).double())


def _large_step(problem: Problem, large: Tensor, small: Tensor) -> Tensor:
    """Better large factors for the small ones: the best, where the system is solved in one piece."""
    terms, (mb, nb) = len(large), problem.large
    matrix = normal_matrix(small.view(terms, *problem.small), problem.metric.T, nb)
    rhs = _rows(small @ problem.target.T, terms, mb, nb)
    rows = _rows(large, terms, mb, nb)
    width = nb * max(1, _SYSTEM // nb)
    for first in range(0, terms * nb, width):
        group = slice(first, first + width)
        block, wanted = matrix[group, group], rhs[:, group]
        if width < terms * nb:
            wanted = wanted - rows @ matrix[:, group] + rows[:, group] @ block
        rows[:, group] = solve(block.double(), wanted)
    return _terms(rows, terms, mb, nb)


def _rows(flat: Tensor, terms: int, m: int, n: int) -> Tensor:
    """(R, m n) -> (m, R n): a row of all terms side by side."""
    return flat.view(terms, m, n).transpose(0, 1).reshape(m, terms * n)


def _terms(rows: Tensor, terms: int, m: int, n: int) -> Tensor:
    """(m, R n) -> (R, m n)."""
    return rows.view(m, terms, n).transpose(0, 1).reshape(terms, m * n)


def normal_matrix(fixed: Tensor, metric: Tensor, side: int) -> Tensor:
    """(R side, R side): normal matrix of the free side given the terms of the fixed one, (R, m, n).

    Args:
        fixed: (R, m, n).
        metric: (n n, side side).
        side: columns of a free factor.
    """
    terms, m, n = fixed.shape
    if 2 * m * side * side * (n + terms) < terms * n * (m + side * side):
        return _by_rows(fixed, metric, side)
    matrix = fixed.new_empty(terms, side, terms, side)
    first, second = torch.triu_indices(terms, terms, device=fixed.device)
    step = max(1, _PAIRS // (n * n + 2 * m * n))
    for r, s in zip(first.split(step), second.split(step), strict=True):
        grams = torch.bmm(fixed[r].transpose(1, 2), fixed[s])  # (pairs, n, n)
        blocks = (grams.view(len(r), n * n) @ metric).view(len(r), side, side)
        matrix[s, :, r] = blocks.transpose(1, 2)
        matrix[r, :, s] = blocks
    return matrix.view(terms * side, terms * side)


def _by_rows(fixed: Tensor, metric: Tensor, side: int) -> Tensor:
    """``normal_matrix`` row by row of the fixed terms: cheaper for many terms of few, long rows."""
    terms, m, n = fixed.shape
    rows = fixed.reshape(terms, m * n)
    wide = metric.reshape(n, n * side * side)
    blocks = []
    for some in fixed.split(max(1, _PAIRS // (m * n * side * side))):
        applied = (some.reshape(-1, n) @ wide).view(len(some), m * n, side * side)
        blocks.append(rows @ applied)  # (some, R, side side)
    matrix = torch.cat(blocks).view(terms, terms, side, side).transpose(1, 2).reshape(terms * side, terms * side)
    return (matrix + matrix.T) / 2


def solve(matrix: Tensor, rhs: Tensor) -> Tensor:
    """X (m, K) with X matrix = rhs in the least squares sense, for a positive semidefinite (K, K) matrix.

    Null unknowns stay null. Dependent ones get the least jitter, relative to each unknown's own size, that makes
    a Cholesky factor; where none does, the least squares solution of least norm. Computed in float64, some rows at a
    time; X has the type of ``rhs``.
    """
    diagonal = matrix.diagonal()
    live = diagonal > 1e-30 * diagonal.max().clamp(min=0)
    scale = torch.where(live, diagonal.clamp(min=torch.finfo(matrix.dtype).tiny).rsqrt(), 0.0)
    unit = matrix * scale[:, None] * scale
    unit.diagonal().copy_(torch.where(live, unit.diagonal(), 1.0))
    lower = _cholesky(unit)
    if lower is not None:
        return _by_blocks(rhs, lambda rows: torch.cholesky_solve((rows * scale).T, lower).T * scale)
    values, vectors = torch.linalg.eigh(unit)
    kept = values > len(values) * 1e-9 * values[-1]
    inverse = torch.where(kept, 1 / values, 0.0)
    return _by_blocks(rhs, lambda rows: (rows * scale) @ (vectors * inverse) @ vectors.T * scale)


def _cholesky(unit: Tensor) -> Tensor | None:
    """Lower factor of a matrix with unit diagonal, with the least jitter that gives one; None where none does."""
    for jitter in _JITTERS:
        if jitter:
            unit.diagonal().add_(jitter)
        lower, failed = torch.linalg.cholesky_ex(unit)
        if not failed:
            return lower
    return None


def _by_blocks(rhs: Tensor, solved: Callable[[Tensor], Tensor]) -> Tensor:
    """``solved`` of the rows in float64, a block at a time, in the type of ``rhs``."""
    found = torch.empty_like(rhs)
    for rows in torch.arange(len(rhs)).split(max(1, _ROWS // max(1, rhs.shape[1]))):
        block = slice(int(rows[0]), int(rows[-1]) + 1)
        found[block] = solved(rhs[block].double()).to(rhs.dtype)
    return found
