"""A layer whose weight is the sum of several Kronecker sums of different shapes."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kncompress.kron.hybrids import nearest_hybrid
from kncompress.kron.layers import KroneckerLinear, costs_of, dense_linear
from kncompress.kron.nearest import Factors
from kncompress.kron.product import without_autocast
from kncompress.kron.shape import HybridShape


class HybridLinear(nn.Module):
    """y = W x + bias with W the sum of several Kronecker sums of different shapes; (..., N) -> (..., M).

    ``parts`` are ``KroneckerLinear`` without bias, in the order of the shape's parts; ``bias`` (M,) or None is
    shared. Starts from ``reset_parameters()``; nothing is drawn on the meta device.
    """

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
        self.bias: nn.Parameter | None
        if bias:
            self.bias = nn.Parameter(torch.empty(shape.out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None, shape: HybridShape) -> "HybridLinear":
        """The layer near to a dense map, back-fitted; type and device are the weight's, the bias is copied.

        Raises:
            ShapeError: ``weight`` is not (M, N).
        """
        layer = cls(shape, bias=False, device="meta")
        layer.set_factors(nearest_hybrid(weight, shape))
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone())
        return layer

    @torch.no_grad()
    def set_factors(self, factors: Sequence[Factors]) -> None:
        """Take the factors of each part as new parameters."""
        for part, (left, right) in zip(self._parts(), factors, strict=True):
            part.set_factors(left, right)

    def _parts(self) -> list[KroneckerLinear]:
        return [part for part in self.parts if isinstance(part, KroneckerLinear)]

    @property
    def in_features(self) -> int:
        """N."""
        return self.shape.in_features

    @property
    def out_features(self) -> int:
        """M."""
        return self.shape.out_features

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

    @torch.no_grad()
    def to_dense(self) -> nn.Linear:
        """The equal ``nn.Linear``."""
        with without_autocast(self._parts()[0].left.device):
            weight = self.weight
        return dense_linear(weight, self.bias, self.training)

    def extra_repr(self) -> str:
        return f"{costs_of(self.shape)}, bias={self.bias is not None}"
