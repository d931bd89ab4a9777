"""An order, or a basis, in which neighbours are nearly multiples of each other.

A factor (k, 1) or (1, k) with one term makes the k rows or columns of every group multiples of one vector, by the same
k numbers in all groups. With G the Gram matrix of the rows in the metric of the inputs, it keeps
max_b sum_g b^T G[g, g] b of the squared norm, over unit vectors b. For example
b = (1, 1) keeps half of it where neighbours are unlike, and b = (1, 0) keeps what the first members of the groups hold.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kncompress.anatomy.symmetries import HeadBasis
from kncompress.compression.rows import Rows

_ROUNDS = 3
_GAIN = 1e-3
"""Rounds end when one gains less than this share."""
_FLOOR = 1e-6
"""Smallest eigenvalue allowed, relative to the largest; below it the basis would be badly conditioned."""


class _Tables:
    """The Gram matrices, (H, H) float64 of trace 1 each, in a file where they find no room."""

    def __init__(self, grams: Iterable[Tensor], folder: str | Path | None) -> None:
        shares = (gram.double() / max(float(gram.trace()), 1e-300) for gram in grams)
        self.rows = Rows(shares, folder)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (table.numpy() for table in self.rows)


def grouped_order(grams: Iterable[Tensor], size: int, scratch: str | Path | None = None) -> Tensor:
    """(H,) int64: an order of H vectors whose groups of ``size`` neighbours keep much of what the Gram matrices hold.

    Coordinate ascent on the sum of the kept shares, each Gram matrix with its own b: b is the top eigenvector; given
    b, which vectors meet in a group is a linear assignment for each place of the group, and their order within it
    is improved by exchanges. Begins with the strongest vectors in the first places, and ends in a local optimum.
    About (H / k)^3 operations.

    Args:
        grams: (H, H) each, one for every map that takes its groups from these vectors.
        size: k, a divisor of H.
        scratch: folder for matrices that find no room in memory; None: the system's.
    """
    tables = _Tables(grams, scratch)
    strength = sum(np.diag(table) for table in tables)
    order = np.argsort(-strength, kind="stable").reshape(size, -1).T.copy()
    begun = [_improved(tables, order, factors) for factors in _first_factors(tables, order)]
    order, kept = max(begun, key=lambda found: found[1])
    for _ in range(_ROUNDS):
        better, more = _improved(tables, order, _factors(tables, order)[0])
        if more <= kept * (1 + _GAIN):
            break
        order, kept = better, more
    return torch.from_numpy(np.ascontiguousarray(order).reshape(-1))


def _first_factors(tables: _Tables, order: np.ndarray) -> list[list[np.ndarray]]:
    """What b may be at first: the best for this order, and even ones, of like and of alternating signs."""
    size = order.shape[1]
    signs = np.ones(size), np.where(np.arange(size) % 2, -1.0, 1.0)
    return [_factors(tables, order)[0], *([sign / size**0.5] * len(tables) for sign in signs)]


def _improved(tables: _Tables, order: np.ndarray, factors: list[np.ndarray]) -> tuple[np.ndarray, float]:
    """(H / k, k): groups that keep more by these b than those of ``order``; and what they keep by the best b."""
    order, size = order.copy(), order.shape[1]
    for place in range(1, size):
        _assign(tables, factors, order, place)
    for one in range(size):
        for other in range(one + 1, size):
            _exchange(tables, factors, order, one, other)
    return order, _factors(tables, order)[1]


def _factors(tables: _Tables, order: np.ndarray) -> tuple[list[np.ndarray], float]:
    """The best b for each table, and the sum of what they keep."""
    factors, kept = [], 0.0
    for table in tables:
        blocks = table[order[:, :, None], order[:, None, :]].sum(0)
        values, vectors = np.linalg.eigh(blocks)
        factors.append(vectors[:, -1])
        kept += float(values[-1])
    return factors, kept


def _assign(tables: _Tables, factors: list[np.ndarray], order: np.ndarray, place: int) -> None:
    """Deal the members of one place anew to the groups."""
    from scipy.optimize import linear_sum_assignment

    gain = np.zeros((len(order), len(order)))
    for table, b in zip(tables, factors, strict=True):
        for other in range(order.shape[1]):
            if other != place:
                gain += 2 * b[place] * b[other] * table[np.ix_(order[:, other], order[:, place])]
    groups, members = linear_sum_assignment(gain, maximize=True)
    order[groups, place] = order[members, place]


def _exchange(tables: _Tables, factors: list[np.ndarray], order: np.ndarray, one: int, other: int) -> None:
    """Exchange two places of those groups that keep more then."""
    swapped = order.copy()
    swapped[:, [one, other]] = swapped[:, [other, one]]
    kept = [
        sum(
            np.einsum("i,gij,j->g", b, table[groups[:, :, None], groups[:, None, :]], b)
            for table, b in zip(tables, factors, strict=True)
        )
        for groups in (order, swapped)
    ]
    better = kept[1] > kept[0] * (1 + 1e-9)
    order[better] = swapped[better]


def balanced_basis(written: Tensor, read: Tensor, size: int) -> HeadBasis:
    """The basis of each head in which its numbers are uncorrelated, and as strong where written as where read.

    Both moments are the same diagonal matrix then, as in balanced truncation. So leaving out the numbers with the
    smallest entries loses about the least of the product of the two maps. Numbers are dealt to groups of ``size``
    neighbours: the strongest share of them takes the first places, and so on.

    Args:
        written: (G, d, d), second moment of what enters the heads.
        read: (G, d, d), Gram matrix of the columns that read them.
        size: k, a divisor of d.
    """
    written, read = written.double(), read.double()
    values, vectors = torch.linalg.eigh(written)
    root = _floored(values).sqrt()
    lower, inverse = vectors * root[:, None], (vectors / root[:, None]).mT  # written = lower lower^T
    values, vectors = torch.linalg.eigh(lower.mT @ read @ lower)
    values, vectors = values.flip(-1), vectors.flip(-1)
    strength = _floored(values) ** 0.25
    there, back = strength[:, :, None] * (vectors.mT @ inverse), lower @ vectors / strength[:, None]
    d = written.shape[-1]
    order = torch.arange(d, device=written.device).view(size, d // size).T.reshape(-1)
    return HeadBasis(there[:, order], back[:, :, order])


def _floored(values: Tensor) -> Tensor:
    """Eigenvalues that can be divided by; 1 where all are null."""
    most = float(values.max())
    return values.clamp(min=_FLOOR * most) if most > 0 else torch.ones_like(values)
