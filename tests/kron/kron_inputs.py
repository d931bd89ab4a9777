"""Correlated inputs of a map, and the dense least squares that fits are held against."""

import torch

from kncompress.kron import Moment


def correlated(size: int, tokens: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """(tokens, size): a falling spectrum in a random basis, and a mean."""
    fixed = torch.Generator().manual_seed(size)
    basis = torch.linalg.qr(torch.randn(size, size, generator=fixed, dtype=torch.float64))[0]
    scale = torch.arange(1, size + 1, dtype=torch.float64) ** -1.0
    mean = torch.randn(size, generator=fixed, dtype=torch.float64) / 4
    draw = torch.randn(tokens, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((draw * scale) @ basis + mean).to(dtype)


def moment_of(x: torch.Tensor) -> Moment:
    return Moment(x.T @ x / len(x), x.mean(0), len(x))


def squared(weight: torch.Tensor, formed: torch.Tensor, metric: torch.Tensor) -> float:
    """tr(D C D^T)."""
    difference = (weight - formed).double()
    return float((difference @ metric.double() * difference).sum())


def best_side(weight, fixed, metric, shape, free):
    """Least f over the ``free`` side, ``left`` or ``right``, for the other one's factors: dense least squares."""
    lower = torch.linalg.cholesky(metric)
    columns = []
    sides = shape.left if free == "left" else shape.right
    for term in range(shape.terms):
        for entry in range(sides[0] * sides[1]):
            one = torch.zeros(sides, dtype=torch.float64)
            one.view(-1)[entry] = 1.0
            pair = (one, fixed[term]) if free == "left" else (fixed[term], one)
            columns.append((torch.kron(*pair) @ lower).flatten())
    design, target = torch.stack(columns, dim=1), (weight @ lower).flatten()
    residual = target - design @ torch.linalg.lstsq(design, target, driver="gelsd").solution
    return float(residual.square().sum())
