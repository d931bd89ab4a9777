"""A layer whose weight is the sum of several Kronecker sums of different shapes."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kncompress.kron.compound import HybridShape
from kncompress.kron.hybrids import nearest_hybrid
from kncompress.kron.layers import KroneckerLinear, _LinearMap
from kncompress.kron.nearest import Factors


class HybridLinear(_LinearMap):
    """y = W x + bias with W the sum of several Kronecker sums of different shapes; (..., N) -> (..., M).

    ``parts`` are ``KroneckerLinear`` without bias, in the order of the shape's parts; ``bias`` (M,) or None is
    shared. Starts from ``reset_parameters()``; nothing is drawn on the meta device.
    """

    shape: HybridShape

    def __init__(
        self,
        shape: HybridShape,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.parts = nn.ModuleList(KroneckerLinear(part, False, device, dtype) for part in shape.parts)
        self._add_bias(bias, device, dtype)
        self.reset_parameters()

    @torch.no_grad()
    def set_factors(self, factors: Sequence[Factors]) -> None:
        """Take the factors of each part as new parameters."""
        for part, (left, right) in zip(self._parts(), factors, strict=True):
            part.set_factors(left, right)

    def _parts(self) -> list[KroneckerLinear]:
        return [part for part in self.parts if isinstance(part, KroneckerLinear)]

    def _fit(self, weight: Tensor) -> None:
        self.set_factors(nearest_hybrid(weight, self.shape))

    @property
    def weight(self) -> Tensor:
        """The formed weight, (M, N); made anew at each call."""
        first, *others = (part.weight for part in self._parts())
        for other in others:
            first = first + other
        return first

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Random factors whose formed weight has standard deviation ``std``, shared evenly, and a null bias."""
        for part in self._parts():
            part.reset_parameters(std / math.sqrt(len(self.parts)))
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """(..., N) -> (..., M)."""
        first, *others = self._parts()
        y: Tensor = first(x)
        for part in others:
            y = y + part(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)
