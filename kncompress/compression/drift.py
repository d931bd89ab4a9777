"""Fits against the dense model's outputs, for maps whose inputs differ from the dense model's.

Let x be what the dense map reads, x~ what its factored twin reads, and d = x - x~. The least squares map from x~ to W
x is W + W E[d x~^T] C~^-1 with C~ = E[x~ x~^T]. It is enough to factor that map under C~, since the error that no map
of x~ can remove does not depend on the factors. Thanks to the ridge of C~ the target stays W in directions about
which nothing is known.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kncompress.compression.map_fit import Fitted, InputMoment, calibrated_parts, frobenius_error, gauged
from kncompress.compression.moments import MomentSum
from kncompress.config import FitConfig
from kncompress.kron import Factors, Moment, PreparedMoment, RowWeights, Shape, corrected_bias
from kncompress.kron.dense_product import without_autocast
from kncompress.kron.moments import formed_rows


class Drift(NamedTuple):
    """How an input of the dense model differs from that of the factored one: d = x - x~."""

    cross: Tensor
    """(N, N): E[d x~^T], float64"""
    gap: Moment
    """E[d d^T] and E[d]"""


class PairSum:
    """Running moments of an input in the factored model, and of its distance from that in the dense one."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.factored, self.gap = MomentSum(size, device), MomentSum(size, device)
        self.cross = torch.zeros_like(self.gap.second)

    def add(self, dense: Tensor, factored: Tensor) -> None:
        """Take in vectors (..., N) of both models, of the same tokens."""
        y = factored.detach().reshape(-1, factored.shape[-1]).float()
        difference = dense.detach().reshape_as(y).float() - y
        self.factored.add(y)
        self.gap.add(difference)
        with without_autocast(y.device):
            self.cross += difference.T @ y


class PairFit:
    """Fits maps that share an input.

    Args:
        factored: moment of the input in the factored model.
        drift: of the dense model's input from it; None: they are the same.
        settings: sweeps, gauge, and whether biases are corrected.
    """

    def __init__(self, factored: Moment, drift: Drift | None, settings: FitConfig) -> None:
        self.factored, self.drift, self.settings = factored, drift, settings
        self.moment = InputMoment(factored)

    @torch.no_grad()
    def fit(
        self, weight: Tensor, bias: Tensor | None, shape: Shape, outputs: Moment | RowWeights | None = None
    ) -> Fitted:
        """Factors for W (M, N) and its bias (M,); the weighted error is that against the dense model's outputs.

        ``outputs``: as of ``fit_calibrated``, at the dense map's outputs.
        """
        correct = bias is not None and self.settings.bias
        prepared = self.moment.prepared(correct)
        with without_autocast(weight.device):
            cross, gap = self._centred(prepared.centred)
            target = weight if cross is None else _target(weight, cross, prepared)
            parts = gauged(calibrated_parts(target, shape, prepared, self.settings, outputs), self.settings)
            if bias is not None and correct:
                shift = (weight - target).double() @ self.factored.mean.double()
                if self.drift is not None:
                    shift += weight.double() @ self.drift.gap.mean.double()
                aim = (bias.double() + shift).to(target.dtype)
                bias = corrected_bias(aim, target, parts, self.factored.mean).to(weight.dtype)
            weighted = _output_error(weight, parts, prepared.plain.double(), cross, gap)
        return Fitted(parts, bias, frobenius_error(weight, parts), weighted)

    def _centred(self, centred: bool) -> tuple[Tensor | None, Tensor | None]:
        """(E[d x~^T], E[d d^T]), float64, with the means taken out where asked."""
        if self.drift is None:
            return None, None
        cross, gap = self.drift.cross, self.drift.gap.second.double()
        if centred:
            mean = self.drift.gap.mean.double()
            cross, gap = cross - torch.outer(mean, self.factored.mean.double()), gap - torch.outer(mean, mean)
        return cross, gap


def _target(weight: Tensor, cross: Tensor, prepared: PreparedMoment) -> Tensor:
    """W + W E[d x~^T] (C~ + ridge)^-1, float32 or better."""
    change = torch.cholesky_solve((weight.double() @ cross).T, prepared.cholesky).T
    return (weight.double() + change).to(torch.promote_types(weight.dtype, torch.float32))


def _output_error(
    weight: Tensor, parts: tuple[Factors, ...], factored: Tensor, cross: Tensor | None, gap: Tensor | None
) -> float:
    """sqrt(E|W x - W_hat x~|^2 / E|W x|^2), a few rows at a time: W x - W_hat x~ = (W - W_hat) x~ + W d."""
    error = total = 0.0
    for rows, formed in formed_rows(weight, parts):
        block = weight[rows].double()
        rest = block - formed.double()
        error += float((rest @ factored * rest).sum())
        total += float((block @ factored * block).sum())
        if cross is not None and gap is not None:
            moved = block @ cross
            spread = float((block @ gap * block).sum())
            error += 2 * float((moved * rest).sum()) + spread
            total += 2 * float((moved * block).sum()) + spread
    if error <= 0.0:
        return 0.0
    return (error / total) ** 0.5 if total > 0 else float("inf")
