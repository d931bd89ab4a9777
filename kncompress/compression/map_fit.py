"""Factors for one map: nearest to its weight, or with the least error on its inputs."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kncompress.config import FitConfig
from kncompress.kron import (
    Factors,
    HybridShape,
    KroneckerShape,
    Moment,
    Outputs,
    PreparedMoment,
    RowWeights,
    Shape,
    calibrated_embedding,
    calibrated_factors,
    calibrated_hybrid,
    corrected_bias,
    nearest_factors,
    nearest_hybrid,
    prepare_outputs,
    regauge,
    two_sided_factors,
    weighted_error,
)
from kncompress.kron.moments import formed_rows

_SPREAD = 1e-5
"""Least variance of the inputs, as a share of their mean square, for a fit to be centred."""


@dataclass(frozen=True)
class Fitted:
    """Numbers for one factored map."""

    parts: tuple[Factors, ...]
    """Factors; several of a hybrid; of packed outer products as they are before they are packed."""
    bias: Tensor | None
    """(M,), corrected where that was asked for; None for a map without bias."""
    error: float
    """||W - W_hat|| / ||W||, Frobenius."""
    weighted: float | None = None
    """Relative error of the outputs on the calibration text; None where there was none."""

    @property
    def told(self) -> "Fitted":
        """The errors alone: what is left to tell once the numbers are in the model."""
        return Fitted((), None, self.error, self.weighted)


class InputMoment:
    """The moment of an input, prepared once for all maps that read it, centred for those whose bias is corrected."""

    def __init__(self, moment: Moment) -> None:
        self.moment = moment
        self._prepared: dict[bool, PreparedMoment] = {}

    def prepared(self, centred: bool) -> PreparedMoment:
        """The moment, made safe to divide by; not centred where nothing but rounding would be left (one token)."""
        if centred:
            trace = float(self.moment.second.diagonal().double().sum())
            centred = trace - float(self.moment.mean.double().square().sum()) > _SPREAD * trace
        if centred not in self._prepared:
            self._prepared[centred] = PreparedMoment(self.moment, centred)
        return self._prepared[centred]


@torch.no_grad()
def fit_nearest(weight: Tensor, bias: Tensor | None, shape: Shape, settings: FitConfig) -> Fitted:
    """Factors nearest to ``weight`` (M, N) in the Frobenius norm."""
    parts = gauged(nearest_parts(weight, shape), settings)
    return Fitted(parts, bias, frobenius_error(weight, parts))


@torch.no_grad()
def fit_calibrated(
    weight: Tensor,
    bias: Tensor | None,
    shape: Shape,
    moment: InputMoment,
    settings: FitConfig,
    outputs: Moment | RowWeights | None = None,
) -> Fitted:
    """Factors of ``weight`` (M, N) with the least error on the inputs; the bias (M,) takes the mean of what is left.

    ``outputs``: moment of the loss's gradients at the outputs, (M, M), where the fit weighs both sides; of a head, its
    rows' weights, which a hybrid leaves out.
    """
    correct = bias is not None and settings.bias
    prepared = moment.prepared(correct)
    parts = gauged(calibrated_parts(weight, shape, prepared, settings, outputs), settings)
    if correct:
        bias = corrected_bias(bias, weight, parts, moment.moment.mean)
    return Fitted(parts, bias, frobenius_error(weight, parts), weighted_error(weight, parts, prepared))


@torch.no_grad()
def fit_embedding(
    weight: Tensor,
    shape: KroneckerShape,
    frequencies: Tensor,
    head: InputMoment | None,
    settings: FitConfig,
    felt: Moment | None = None,
) -> Fitted:
    """Factors of an embedding (V, D) for tokens of these frequencies (V,) and the inputs of a head tied to it.

    ``felt``: moment of the loss's gradients at its outputs, (D, D), where the fit weighs both sides. The weighted error
    covers look-ups and head together; each has the same weight at the start.
    """
    history: list[float] = []
    moment = None if head is None else head.prepared(False)
    factors = calibrated_embedding(weight, shape, frequencies, moment, felt, history=history)
    parts = gauged((factors,), settings)
    return Fitted(parts, None, frobenius_error(weight, parts), min(history, default=0.0))


def nearest_parts(weight: Tensor, shape: Shape) -> tuple[Factors, ...]:
    """Nearest factors of each Kronecker sum of a shape."""
    if isinstance(shape, HybridShape):
        return tuple(nearest_hybrid(weight, shape))
    return (nearest_factors(weight, shape.sums[0]),)


def calibrated_parts(
    weight: Tensor,
    shape: Shape,
    moment: PreparedMoment,
    settings: FitConfig,
    outputs: Moment | RowWeights | None = None,
) -> tuple[Factors, ...]:
    """Calibrated factors of each Kronecker sum of a shape; ``outputs`` as of ``fit_calibrated``."""
    feels: Outputs | None = outputs if isinstance(outputs, RowWeights) else None
    if isinstance(outputs, Moment):
        feels = prepare_outputs(outputs.second, outputs.count, settings.output_ridge)
    if isinstance(shape, HybridShape):
        return tuple(calibrated_hybrid(weight, shape, moment, outputs=None if isinstance(feels, RowWeights) else feels))
    if feels is not None:
        return (two_sided_factors(weight, shape.sums[0], moment, feels, sweeps=settings.sweeps),)
    return (calibrated_factors(weight, shape.sums[0], moment, sweeps=settings.sweeps),)


def gauged(parts: tuple[Factors, ...], settings: FitConfig) -> tuple[Factors, ...]:
    """The same sums in the gauge asked for."""
    if settings.gauge == "equal":  # the fits end in this gauge
        return parts
    return tuple(regauge(part, settings.gauge) for part in parts)  # type: ignore[arg-type]


@torch.no_grad()
def frobenius_error(weight: Tensor, parts: tuple[Factors, ...]) -> float:
    """||W - W_hat|| / ||W||; 0 where both are null. Formed a few rows at a time, in float32 or better."""
    error = total = 0.0
    for rows, formed in formed_rows(weight, parts):
        block = weight[rows].to(formed.dtype)
        total += float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2
        error += float(torch.linalg.vector_norm(block - formed, dtype=torch.float64)) ** 2
    if error == 0.0:
        return 0.0
    return (error / total) ** 0.5 if total > 0 else math.inf
