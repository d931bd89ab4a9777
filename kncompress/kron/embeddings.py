"""Factors of a token embedding, fitted to how often tokens occur and to what a tied head sees.

Minimises over the Kronecker sums E_hat of one shape

    f = sum_v p_v |e_v - ê_v|^2 + lambda tr((E - E_hat) C (E - E_hat)^T)

with p the tokens' frequencies at the input and C the second moment of the head's inputs: row v is measured by the
metric p_v I + lambda C. Alternating least squares:

- Left given right, with orthonormal right factors: where m2 = 1 or R = 1, the normal matrix of left row i1 is
  w_(i1) I + lambda G with one G for all rows. One eigenbasis of G solves them all, exactly. Otherwise the rows'
  weights are R x R matrices sum_(i2) p_(i1,i2) B[i2] B[i2]^T. In a small problem each row's system is solved. In a
  large one the matrix's largest eigenvalue takes the place of w. That bounds f from above and equals it at the
  present factors, so f still falls, with shorter steps.
- Right given left: one exact system of R n2 unknowns for each of the m2 rows of the right factors. Where n1 = 1
  that is the outer-product case, S X + lambda T X C = Q: the eigenbasis of C splits it into n2 systems of R.
"""

import torch
from torch import Tensor

from kncompress.kron.alternating import descend, normal_matrix, solve
from kncompress.kron.calibrated import check_moment
from kncompress.kron.dense_product import without_autocast
from kncompress.kron.gauge import canonical
from kncompress.kron.moments import Moment, PreparedMoment, prepare
from kncompress.kron.nearest import Factors, nearest_factors
from kncompress.kron.shape import KroneckerShape, ShapeError

_SMOOTHING = 0.1
"""Share of the frequencies that is spread evenly, so that tokens missing from the calibration text count too."""
_EXACT = 1 << 20
"""Most multiply-adds for solving a system for each left row; above that the bound of the module's docstring is used."""

SWEEPS = 8
TOLERANCE = 2e-3


@torch.no_grad()
def calibrated_embedding(
    weight: Tensor,
    shape: KroneckerShape,
    frequencies: Tensor,
    moment: Moment | PreparedMoment | None = None,
    *,
    sweeps: int = SWEEPS,
    tolerance: float = TOLERANCE,
    history: list[float] | None = None,
) -> Factors:
    """Factors of an embedding that tokens look up and, where a head is tied to it, hidden states multiply.

    Starts from the nearest sum and never ends above it in f. Gauge, sign and types as ``nearest_factors``.

    Args:
        weight: (V, D).
        shape: the factors' shape.
        frequencies: (V,), counts or shares of the tokens at the input, 0 or more. A tenth of the whole is spread
            evenly.
        moment: of the tied head's inputs, (D, D); None: no head is tied. Both terms weigh alike: lambda is their
            ratio at E_hat = 0.
        sweeps: most sweeps over both sides.
        tolerance: stop where a sweep lowers f by less than this share.
        history: gets sqrt(f / f(0)) at the start and after each half step.

    Returns:
        Factors of the weight's type and device.

    Raises:
        ShapeError: ``weight`` is not (V, D), the moment not (D, D) or ``frequencies`` not (V,).
        ValueError: a value is not finite, or a frequency is negative.
    """
    start = nearest_factors(weight, shape)
    unit = float(weight.abs().amax())
    if unit == 0.0:
        return start
    scaled = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)) / unit
    with without_autocast(weight.device):
        fit = _Fit(scaled, shape, frequencies, moment)
        left = (start.left.to(scaled) / unit).flatten(1)
        left, right, values = fit.run(left, start.right.to(scaled).flatten(1), sweeps, tolerance)
        left, right = canonical(left, right)
    if history is not None:
        history.extend(max(0.0, value) ** 0.5 for value in values)
    if values[-1] >= values[0]:
        return start
    root = unit**0.5
    return Factors(
        (left * root).view(-1, *shape.left).to(weight.dtype), (right * root).view(-1, *shape.right).to(weight.dtype)
    )


class _Fit:
    """f of one embedding and its two half steps; left (R, m1 n1) and right (R, m2 n2) are flat."""

    def __init__(
        self, weight: Tensor, shape: KroneckerShape, frequencies: Tensor, moment: Moment | PreparedMoment | None
    ) -> None:
        self.shape = shape
        (m1, n1), (m2, n2) = shape.left, shape.right
        rows = _row_weights(frequencies, len(weight)).to(weight)
        self.rows = rows.view(m1, m2)
        """p, smoothed: the weight of row (i1, i2)."""
        target = weight * rows[:, None]
        self.total = float((target * weight).sum(dim=1).double().sum())
        """f of null factors."""
        self.metric: Tensor | None = None
        """lambda C."""
        if moment is not None:
            prepared = prepare(moment)
            check_moment(prepared, shape)
            matrix = prepared.matrix.to(weight)
            product = weight @ matrix
            scale = self.total / float((product * weight).sum(dim=1).double().sum())
            self.metric = matrix * scale
            target += product.mul_(scale)
            self.total *= 2
            self.pairs = self.metric.view(n1, n2, n1, n2).permute(0, 2, 1, 3).reshape(n1 * n1, n2 * n2)
            if n1 == 1:
                self.values, self.vectors = torch.linalg.eigh(self.metric.double())
        self.target = target.view(m1, m2, n1, n2).permute(0, 2, 1, 3).reshape(m1 * n1, m2 * n2)

    def run(self, left: Tensor, right: Tensor, sweeps: int, tolerance: float) -> tuple[Tensor, Tensor, list[float]]:
        """The factors after the fit, and f / total at the start and after each half step; it never rises."""
        return descend(left, right, self._right_step, self._left_step, sweeps, tolerance)

    def _left_step(self, left: Tensor, right: Tensor) -> Tensor:
        """Left factors with less f for orthonormal right ones; the best where m2 = 1 or R = 1."""
        terms, (m1, n1), (m2, n2) = len(left), self.shape.left, self.shape.right
        wanted = (self.target @ right.T).view(m1, n1, terms).transpose(1, 2)  # (m1, R, n1)
        if m2 == 1:
            weights = self.rows[:, 0]
        else:
            b = right.view(terms, m2, n2)
            mixes = torch.einsum("im,rmn,smn->irs", self.rows, b, b)
            weights = torch.linalg.eigvalsh(mixes)[:, -1]
            if terms > 1 and m1 * (terms * n1) ** 3 <= _EXACT:
                return self._left_exact(right, mixes, wanted)
            if terms > 1:
                present = left.view(terms, m1, n1).transpose(0, 1)
                wanted = wanted + weights[:, None, None] * present - mixes @ present
        flat = wanted.reshape(m1, terms * n1)
        if self.metric is None:
            flat = flat / weights[:, None]
        else:
            matrix = normal_matrix(right.view(terms, m2, n2), self.pairs.T, n1)
            values, vectors = torch.linalg.eigh(matrix.double())
            vectors = vectors.to(flat)
            flat = (flat @ vectors) / (weights[:, None] + values.clamp(min=0).to(flat)) @ vectors.T
        return flat.view(m1, terms, n1).transpose(0, 1).reshape(terms, m1 * n1)

    def _left_exact(self, right: Tensor, mixes: Tensor, wanted: Tensor) -> Tensor:
        """The best left factors, by one system of R n1 unknowns for each of the m1 rows."""
        m1, terms, n1 = wanted.shape
        eye = torch.eye(n1, dtype=torch.float64, device=right.device)
        systems = torch.einsum("irs,jk->irjsk", mixes.double(), eye).reshape(m1, terms * n1, terms * n1)
        if self.metric is not None:
            systems = systems + normal_matrix(right.view(terms, *self.shape.right), self.pairs.T, n1).double()
        flat = wanted.double().reshape(m1, 1, terms * n1)
        rows = torch.stack([solve(system, side) for system, side in zip(systems, flat, strict=True)]).to(right)
        return rows.view(m1, terms, n1).transpose(0, 1).reshape(terms, m1 * n1)

    def _right_step(self, left: Tensor, right: Tensor) -> tuple[float, Tensor, float]:
        """f / total of the factors, the best right factors for the left ones, and f / total of those."""
        terms, (m1, n1), (m2, n2) = len(left), self.shape.left, self.shape.right
        wanted = (left @ self.target).view(terms, m2, n2).transpose(0, 1).double()  # (m2, R, n2)
        old = right.view(terms, m2, n2).transpose(0, 1).double()
        a = left.view(terms, m1, n1)
        rows = torch.stack([((a * p[:, None]).flatten(1) @ left.T).double() for p in self.rows.T])  # (m2, R, R)
        if self.metric is None:
            new = torch.stack([solve(g, q.T).T for g, q in zip(rows, wanted, strict=True)])

            def applied(b: Tensor) -> Tensor:
                return rows @ b
        elif n1 == 1:
            gram = (left @ left.T).double()
            new = self._split(rows, gram, wanted)

            def applied(b: Tensor) -> Tensor:
                return rows @ b + gram @ b @ (self.vectors * self.values) @ self.vectors.T
        else:
            eye = torch.eye(n2, dtype=torch.float64, device=left.device)
            matrices = torch.einsum("mrs,jk->mrjsk", rows, eye).reshape(m2, terms * n2, terms * n2)
            matrices = matrices + normal_matrix(a, self.pairs, n2).double()
            flat = wanted.reshape(m2, 1, terms * n2)
            new = torch.stack([solve(g, q) for g, q in zip(matrices, flat, strict=True)]).view(m2, terms, n2)

            def applied(b: Tensor) -> Tensor:
                return (b.reshape(m2, 1, terms * n2) @ matrices).view(m2, terms, n2)

        def value(b: Tensor) -> float:
            return 1.0 + float(((applied(b) - 2 * wanted) * b).sum()) / self.total

        solved = new.transpose(0, 1).reshape(terms, m2 * n2).to(right.dtype)
        return value(old), solved, value(solved.view(terms, m2, n2).transpose(0, 1).double())

    def _split(self, rows: Tensor, gram: Tensor, wanted: Tensor) -> Tensor:
        """X (m2, R, n2) with rows[i] X[i] + gram X[i] metric = wanted[i], in the eigenbasis of the metric."""
        turned = wanted @ self.vectors  # (m2, R, n2)
        values = self.values.clamp(min=0)
        found = [_shifted(row, gram, values, side) for row, side in zip(rows, turned, strict=True)]
        return torch.stack(found) @ self.vectors.T


def _shifted(row: Tensor, gram: Tensor, values: Tensor, wanted: Tensor) -> Tensor:
    """X (R, n) with (row + values[j] gram) X[:, j] = wanted[:, j], for semidefinite (R, R) matrices.

    Both matrices are made diagonal at once, so that all columns are solved together. Where terms depend on each other
    that fails, and each column is solved by itself.
    """
    lower, failed = torch.linalg.cholesky_ex(row)
    if failed:
        systems = row + values[:, None, None] * gram
        return torch.cat([solve(s, side[None]) for s, side in zip(systems, wanted.T, strict=True)]).T
    half = torch.linalg.solve_triangular(lower, gram, upper=False)
    half = torch.linalg.solve_triangular(lower, half.T, upper=False)
    shifts, basis = torch.linalg.eigh((half + half.T) / 2)
    turned = basis.T @ torch.linalg.solve_triangular(lower, wanted, upper=False)
    solved = turned / (1 + shifts.clamp(min=0)[:, None] * values)
    return torch.linalg.solve_triangular(lower.T, basis @ solved, upper=True)


def _row_weights(frequencies: Tensor, count: int) -> Tensor:
    """(V,), float64: shares of 1, smoothed."""
    if frequencies.shape != (count,):
        raise ShapeError(f"frequencies={list(frequencies.shape)}: must be {[count]}")
    shares = frequencies.detach().double()
    if not torch.isfinite(shares).all() or bool((shares < 0).any()):
        raise ValueError("frequencies: holds values that are negative or not finite")
    whole = float(shares.sum())
    shares = shares / whole if whole > 0 else torch.full_like(shares, 1 / count)
    return (1 - _SMOOTHING) * shares + _SMOOTHING / count
