"""A layer with a packed low-rank weight: pivot rows or columns, and the coefficients of the others in these."""

import torch
from torch import Tensor, nn

from kncompress.kron.compound import PackedShape
from kncompress.kron.layers import KroneckerLinear, _LinearMap
from kncompress.kron.nearest import Factors, nearest_factors
from kncompress.kron.packed import Packed, pack, packed_linear, packed_weight


class PackedLinear(_LinearMap):
    """y = W x + bias with W of rank R in R (M + N) - R^2 numbers; (..., N) -> (..., M).

    Parameters, where M <= N: ``kept`` (R, N), rows of W, and ``mix`` (R, M - R), the coefficients of the other rows
    in these; else ``kept`` (R, M), columns, and ``mix`` (R, N - R); ``bias`` (M,) or None. Buffer ``order``, int32,
    min(M, N) numbers: which rows or columns those are. Starts from ``reset_parameters()``; nothing is drawn on the
    meta device."""

    shape: PackedShape
    order: Tensor

    def __init__(
        self,
        shape: PackedShape,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.shape = shape
        short, long = sorted((shape.out_features, shape.in_features))
        self.kept = nn.Parameter(torch.empty(shape.rank, long, device=device, dtype=dtype))
        self.mix = nn.Parameter(torch.empty(shape.rank, short - shape.rank, device=device, dtype=dtype))
        self.register_buffer("order", torch.empty(short, device=device, dtype=torch.int32))
        self._add_bias(bias, device, dtype)
        self.reset_parameters()

    @torch.no_grad()
    def set_factors(self, left: Tensor, right: Tensor) -> None:
        """Take outer products, (R, M, 1) and (R, 1, N), as new parameters."""
        packed = pack(Factors(left, right), self.shape)
        self.kept, self.mix, self.order = nn.Parameter(packed.kept), nn.Parameter(packed.mix), packed.order

    def unpacked(self) -> KroneckerLinear | nn.Linear:
        """The same map as orthogonal outer products, both factors of each of one size: R (M + N) numbers; or dense,
        where that has no more."""
        shape = self.shape.outer
        if shape.parameters >= shape.dense_parameters:
            return self.to_dense()
        return KroneckerLinear.from_dense(self.weight.detach(), self.bias, shape)

    @property
    def packed(self) -> Packed:
        """Its numbers."""
        return Packed(self.kept, self.mix, self.order)

    def _fit(self, weight: Tensor) -> None:
        self.set_factors(*nearest_factors(weight, self.shape.outer))

    @property
    def weight(self) -> Tensor:
        """The formed weight, (M, N); made anew at each call."""
        if any(tensor.is_meta for tensor in self.packed):
            # transformers asks for it while it loads one tensor after the other.
            return torch.empty(self.out_features, self.in_features, dtype=self.kept.dtype, device="meta")
        return packed_weight(self.packed, self.shape.side)

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Random numbers, the first rows or columns as pivots, whose formed weight has mean 0 and standard deviation
        ``std``; and a null bias."""
        if self.kept.is_meta:
            return
        torch.arange(len(self.order), out=self.order)
        self.kept.normal_(std=std)
        self.mix.normal_(std=self.shape.rank**-0.5)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """(..., N) -> (..., M)."""
        return packed_linear(x, self.packed, self.shape.side, self.bias)
