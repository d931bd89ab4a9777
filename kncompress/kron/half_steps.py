"""Half steps of a fit to inputs and outputs: one side of a Kronecker sum moves, the other one stays (``two_sided``)."""

from collections.abc import Callable

import torch
from torch import Tensor

from kncompress.kron.alternating import solve
from kncompress.kron.moments import PreparedMoment
from kncompress.kron.nearest import Factors
from kncompress.kron.outputs import Outputs
from kncompress.kron.routes import kronecker_weight
from kncompress.kron.shape import KroneckerShape

_STEPS = 4
"""Conjugate gradient steps of one half step."""
_SYSTEM = 2048
"""Most unknowns that are solved for at once."""


class TwoSidedProblem:
    """f of one weight and shape, and half steps that lower it.

    The side with more numbers is called large, the other small; where the right one is large, everything is put into
    the other order. Shapes: large (R, m1, n1), small (R, m2, n2). Where the small factors are few and not tall, no half
    step forms W_hat: products with G and C go through the factors.
    """

    def __init__(self, weight: Tensor, shape: KroneckerShape, inputs: PreparedMoment, outputs: Outputs) -> None:
        (m1, n1), (m2, n2) = shape.left, shape.right
        c, g = inputs.unit.to(weight), outputs.unit.to(weight)
        self.swapped = m1 * n1 < m2 * n2
        if self.swapped:
            weight, c = _swapped(weight, m1, m2, n1, n2), _swapped(c, n1, n2, n1, n2)
            g = _swapped(g, m1, m2, m1, m2) if g.dim() == 2 else g.view(m1, m2).T.flatten()
            (m1, n1), (m2, n2) = (m2, n2), (m1, n1)
        self.weight, self.c, self.g = weight, c, g
        self.large, self.small = (m1, n1), (m2, n2)
        self.aim = self._applied(weight).view(m1, m2, n1, n2)
        """G W C"""
        self.total = max(0.0, float((self.aim.reshape(weight.shape) * weight).sum(dtype=torch.float64)))

    def sides(self, factors: Factors) -> tuple[Tensor, Tensor]:
        """(large, small)."""
        return (factors.right, factors.left) if self.swapped else (factors.left, factors.right)

    def factors(self, large: Tensor, small: Tensor) -> Factors:
        """The other way."""
        return Factors(small, large) if self.swapped else Factors(large, small)

    def _applied(self, matrix: Tensor) -> Tensor:
        """G X C."""
        return (self.g @ matrix if self.g.dim() == 2 else self.g[:, None] * matrix) @ self.c

    def error(self, factors: Factors) -> float:
        """f."""
        rest = self.weight - kronecker_weight(*self.sides(factors))
        return max(0.0, float((self._applied(rest) * rest).sum(dtype=torch.float64)))

    def large_step(self, large: Tensor, small: Tensor) -> tuple[Tensor, Tensor, float]:
        """Lower f by moving the large factors: (large, small, f)."""
        few = len(small) * self.small[0] <= 2 * self.small[1]
        operator = self._through_factors(small) if few else self._formed(small, "ambn,rmn->rab", kronecker_weight)
        moved, value = self._descended(large, operator, torch.einsum("ambn,rmn->rab", self.aim, small))
        return moved, small, value

    def small_step(self, large: Tensor, small: Tensor) -> tuple[Tensor, Tensor, float]:
        """Lower f by moving the small factors, to the best ones where these are few numbers: (large, small, f)."""
        aim = torch.einsum("ambn,rab->rmn", self.aim, large)
        if not self._solvable(len(large)):
            operator = self._formed(large, "ambn,rab->rmn", lambda x, fixed: kronecker_weight(fixed, x))
            moved, value = self._descended(small, operator, aim)
            return large, moved, value
        matrix, wanted = self._small_matrix(large).double(), aim.reshape(1, -1).double()
        moved = solve(matrix, wanted).view(small.shape).to(small)
        flat = moved.reshape(1, -1).double()
        return large, moved, max(0.0, self.total + float(((flat @ matrix - 2 * wanted) * flat).sum()))

    def _solvable(self, terms: int) -> bool:
        """Whether the normal matrix of the small factors costs no more than twice the conjugate gradients."""
        (m1, n1), (m2, n2) = self.large, self.small
        rows, columns, numbers = m1 * m2, n1 * n2, terms * m2 * n2
        pairs = terms**2 / 2 * (rows * m2 * n1**2 + (columns * m2) ** 2)
        exact = terms * rows**2 * n1 + pairs + numbers**3
        return m2 <= 2 * n2 and numbers <= _SYSTEM and exact <= 2 * (_STEPS + 1) * rows * columns * (rows + columns)

    def _descended(self, begin: Tensor, operator: Callable[[Tensor], Tensor], aim: Tensor) -> tuple[Tensor, float]:
        """Factors of one side after conjugate gradients from ``begin``, and their f."""
        change, rest = _conjugate_gradients(operator, aim - operator(begin), _STEPS)
        moved = begin + change
        return moved, max(0.0, self.total - float((moved * (aim + rest)).sum(dtype=torch.float64)))

    def _formed(
        self, fixed: Tensor, gather: str, weight: Callable[[Tensor, Tensor], Tensor]
    ) -> Callable[[Tensor], Tensor]:
        """X of one side -> the gradient by it of <W_hat, G W_hat C> / 2 at X, the other side being ``fixed``."""
        (m1, n1), (m2, n2) = self.large, self.small
        return lambda x: torch.einsum(gather, self._applied(weight(x, fixed)).view(m1, m2, n1, n2), fixed)

    def _through_factors(self, small: Tensor) -> Callable[[Tensor], Tensor]:
        """The same of the large side, without W_hat."""
        (m1, n1), (m2, n2), terms = self.large, self.small, len(small)
        # The small factors times C, and G by the rows that belong to one row of a small factor.
        right = torch.einsum("rmn,bnk->rbmk", small, self.c.view(n1, n2, n1 * n2)).reshape(terms * n1, -1)
        columns = small.reshape(terms * m2, n2).T

        def gathered(x: Tensor) -> Tensor:
            product = x.transpose(0, 1).reshape(m1, terms * n1) @ right  # (m1, m2 N): W_hat C
            inner = (product.view(-1, n2) @ columns).view(m1 * m2, n1, terms, m2)
            if self.g.dim() == 1:
                own = inner.view(m1, m2, n1, terms, m2).diagonal(dim1=1, dim2=4)  # (m1, n1, R, m2)
                return torch.einsum("abrm,am->rab", own, self.g.view(m1, m2))
            rows = self.g.view(m1, m2, m1 * m2).transpose(0, 1)
            inner = inner.permute(3, 0, 2, 1).reshape(m2, m1 * m2, terms * n1)
            return torch.bmm(rows, inner).sum(0).view(m1, terms, n1).transpose(0, 1)

        return gathered

    def _small_matrix(self, large: Tensor) -> Tensor:
        """(R m2 n2, R m2 n2): the normal matrix of the small factors."""
        (m1, n1), (m2, n2), terms = self.large, self.small, len(large)
        c = self.c.view(n1, n2, n1, n2).permute(0, 2, 1, 3).reshape(n1 * n1, n2 * n2)
        matrix = large.new_empty(terms, m2, n2, terms, m2, n2)
        for s in range(terms):
            if self.g.dim() == 2:  # (m1, m2, m2, n1): G times the factor
                pulled = torch.einsum("kam,ab->kmb", self.g.view(m1 * m2, m1, m2), large[s]).view(m1, m2, m2, n1)
            for r in range(s + 1):
                if self.g.dim() == 2:
                    grams = torch.einsum("ab,amld->mlbd", large[r], pulled).reshape(m2 * m2, n1 * n1)
                    block = (grams @ c).view(m2, m2, n2, n2).transpose(1, 2)
                else:
                    grams = torch.einsum("ab,am,ad->mbd", large[r], self.g.view(m1, m2), large[s])
                    block = torch.diag_embed((grams.reshape(m2, n1 * n1) @ c).view(m2, n2, n2).permute(1, 2, 0))
                    block = block.permute(2, 0, 3, 1)
                matrix[r, :, :, s] = block
                matrix[s, :, :, r] = block.permute(2, 3, 0, 1)
        return matrix.view(terms * m2 * n2, terms * m2 * n2)


def _swapped(matrix: Tensor, m1: int, m2: int, n1: int, n2: int) -> Tensor:
    """Rows (i1, i2) and columns (j1, j2) as (i2, i1) and (j2, j1)."""
    return matrix.view(m1, m2, n1, n2).permute(1, 0, 3, 2).reshape(m1 * m2, n1 * n2)


def _conjugate_gradients(operator: Callable[[Tensor], Tensor], wanted: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """X that lowers <X, operator(X)> / 2 - <X, wanted> from X = 0, for a positive semidefinite operator, and
    ``wanted`` - operator(X)."""
    solution, residual, direction = torch.zeros_like(wanted), wanted, wanted
    square = float((residual * residual).sum(dtype=torch.float64))
    for _ in range(steps):
        applied = operator(direction)
        curvature = float((direction * applied).sum(dtype=torch.float64))
        if square <= 0 or curvature <= 0:
            break
        solution = solution + direction * (square / curvature)
        residual = residual - applied * (square / curvature)
        before, square = square, float((residual * residual).sum(dtype=torch.float64))
        direction = residual + direction * (square / before)
    return solution, residual
