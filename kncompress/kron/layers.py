"""Layers whose weight is a Kronecker sum: drop-in for ``nn.Linear`` and ``nn.Embedding``."""

import math
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kncompress.kron.compound import Shape
from kncompress.kron.dense_product import without_autocast
from kncompress.kron.nearest import nearest_factors
from kncompress.kron.product import kronecker_linear
from kncompress.kron.routes import kronecker_weight
from kncompress.kron.shape import KroneckerShape, ShapeError


class _Factored(nn.Module):
    """Left and right factors of ``shape`` as parameters, and where it has scalars ``scale`` (R,), which starts at 1.

    Scale starts at 1, so the factors keep their size and learning rate. An Adam step of rate h then changes a term by
    the share h, less than a step of the factors does. The other way, factors of norm 1 and the norm in the scale,
    does not train with one rate: the norm is about 0.02 sqrt(M N), so a step would be far too large for the factors
    and far too small for the scale.
    """

    def __init__(self, shape: KroneckerShape, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.shape = shape
        self.left = nn.Parameter(torch.empty(shape.terms, *shape.left, device=device, dtype=dtype))
        self.right = nn.Parameter(torch.empty(shape.terms, *shape.right, device=device, dtype=dtype))
        self.scale: nn.Parameter | None
        if shape.scalars:
            self.scale = nn.Parameter(torch.ones(shape.terms, device=device, dtype=dtype))
        else:
            self.register_parameter("scale", None)

    @torch.no_grad()
    def set_factors(self, left: Tensor, right: Tensor) -> None:
        """Take (R, m1, n1) and (R, m2, n2) as new parameters; scalars become 1."""
        self.left = nn.Parameter(left)
        self.right = nn.Parameter(right)
        if self.scale is not None:
            self.scale = nn.Parameter(left.new_ones(len(left)))

    def scaled_factors(self) -> tuple[Tensor, Tensor]:
        """The factors; where there are scalars, the smaller factor is multiplied by them."""
        if self.scale is None:
            return self.left, self.right
        scale = self.scale[:, None, None]
        if self.left.numel() < self.right.numel():
            return self.left * scale, self.right
        return self.left, self.right * scale

    @property
    def weight(self) -> Tensor:
        """The formed weight, (M, N); made anew at each call."""
        if any(factor is not None and factor.is_meta for factor in (self.left, self.right, self.scale)):
            # transformers asks for it while it ties one factor after the other.
            return torch.empty(self.shape.out_features, self.shape.in_features, dtype=self.left.dtype, device="meta")
        return kronecker_weight(*self.scaled_factors())

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Random factors whose formed weight has mean 0 and standard deviation ``std`` (GPT-2's is 0.02).

        The factors of a term have equal norms, as nearest factors have. Left factors are drawn from a normal
        distribution. Right factors are orthogonal to each other. A single right factor has entries of equal size and
        random sign, so that no part of the map starts near 0.
        """
        if self.left.is_meta:
            return
        if self.scale is not None:
            self.scale.fill_(1.0)
        terms, size = self.shape.terms, self.right[0].numel()
        norm = math.sqrt(std * math.sqrt(self.shape.dense_parameters / terms))
        self.left.normal_(std=norm / math.sqrt(self.left[0].numel()))
        right = torch.empty(terms, size, device=self.right.device)
        if terms == 1:
            right.bernoulli_().mul_(2).sub_(1).mul_(norm / math.sqrt(size))
        else:
            nn.init.orthogonal_(right, gain=norm)
        self.right.copy_(right.view_as(self.right))

    @torch.no_grad()
    def _fit(self, weight: Tensor) -> None:
        self.set_factors(*nearest_factors(weight, self.shape))


class _LinearMap(nn.Module):
    """What a map with factors of ``shape`` shares with ``nn.Linear``: sizes, a bias (M,), the way from a dense one and
    back. A subclass has ``weight``, and ``_fit`` to take the factors near to one."""

    shape: Shape
    bias: nn.Parameter | None

    def _add_bias(self, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        empty = torch.empty(self.shape.out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty))

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None, shape: Shape) -> Self:
        """The layer near to a dense map: a Kronecker sum's nearest one, a hybrid's by back-fitting.

        Type and device are the weight's, the bias is copied.

        Args:
            weight: (M, N), out x in.
            bias: (M,) or None.
            shape: the factors' shape.

        Raises:
            ShapeError: ``weight`` is not (M, N).
        """
        layer = cls(shape, bias=False, device="meta")
        layer._fit(weight)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone())
        return layer

    def _fit(self, weight: Tensor) -> None:
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The formed weight, (M, N); made anew at each call."""
        raise NotImplementedError

    @property
    def in_features(self) -> int:
        """N."""
        return self.shape.in_features

    @property
    def out_features(self) -> int:
        """M."""
        return self.shape.out_features

    @torch.no_grad()
    def to_dense(self) -> nn.Linear:
        """The equal ``nn.Linear``, with a weight and a bias of its own."""
        with without_autocast(next(self.parameters()).device):
            weight = self.weight
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta")
        dense.weight = nn.Parameter(weight)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone())
        return dense.train(self.training)

    def extra_repr(self) -> str:
        return f"{_costs(self.shape)}, bias={self.bias is not None}"


class KroneckerLinear(_Factored, _LinearMap):
    """y = W x + bias with W = sum_r s_r left[r] (x) right[r]; (..., N) -> (..., M).

    Parameters ``left`` (R, m1, n1), ``right`` (R, m2, n2), ``scale`` (R,) or None for s = 1, and ``bias`` (M,) or
    None. Starts from ``reset_parameters()``; nothing is drawn on the meta device.
    """

    shape: KroneckerShape

    def __init__(
        self,
        shape: KroneckerShape,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(shape, device, dtype)
        self._add_bias(bias, device, dtype)
        self.reset_parameters()

    @classmethod
    def tied_to(cls, embedding: "KroneckerEmbedding") -> "KroneckerLinear":
        """The language-model head that shares the embedding's factors (the same Parameters), without bias."""
        head = cls(embedding.shape, bias=False, device="meta")
        head.left, head.right, head.scale = embedding.left, embedding.right, embedding.scale
        return head

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Random factors whose formed weight has standard deviation ``std``, and a null bias."""
        super().reset_parameters(std)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """(..., N) -> (..., M)."""
        return kronecker_linear(x, *self.scaled_factors(), self.bias)


def _costs(shape: Shape) -> str:
    """One line: the shape, its parameters and its multiply-adds."""
    return (
        f"{shape}, parameters={shape.parameters:,} of {shape.dense_parameters:,}, "
        f"multiply_adds={shape.multiply_adds:,} of {shape.dense_multiply_adds:,}"
    )


class KroneckerEmbedding(_Factored):
    """A (V, D) = (M, N) table as a Kronecker sum; a look-up makes only the rows asked for.

    Row i is sum_r s_r left[r, i // m2] (x) right[r, i % m2]. Parameters ``left`` (R, m1, n1), ``right``
    (R, m2, n2) and ``scale`` (R,) or None for s = 1. Positions that hold ``padding_idx`` give no gradient, as in
    ``nn.Embedding``; the row itself starts at 0 only where m2 = 1, since otherwise other rows share its left factors.

    Raises:
        ShapeError: ``padding_idx`` is not one of the V rows.
    """

    def __init__(
        self,
        shape: KroneckerShape,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(shape, device, dtype)
        if padding_idx is not None and not -shape.out_features <= padding_idx < shape.out_features:
            raise ShapeError(f"padding_idx={padding_idx}: must lie within the {shape.out_features} rows")
        self.padding_idx = padding_idx if padding_idx is None else padding_idx % shape.out_features
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Random factors, the formed table's deviation ``std``; a null padding row where m2 = 1."""
        super().reset_parameters(std)
        if self.padding_idx is not None and self.shape.right[0] == 1:
            self.left[:, self.padding_idx] = 0.0

    @property
    def num_embeddings(self) -> int:
        """V, number of rows."""
        return self.shape.out_features

    @property
    def embedding_dim(self) -> int:
        """D, numbers in a row."""
        return self.shape.in_features

    @classmethod
    def from_dense(cls, weight: Tensor, shape: KroneckerShape, padding_idx: int | None = None) -> "KroneckerEmbedding":
        """The table nearest to a dense one, (V, D); type and device are the weight's."""
        layer = cls(shape, padding_idx, device="meta")
        layer._fit(weight)
        return layer

    def forward(self, ids: Tensor) -> Tensor:
        """Integers (...) in [0, V) -> (..., D).

        Raises:
            IndexError: an integer outside [0, V), on CPU.
        """
        left, right = self.scaled_factors()
        terms, m1, n1 = left.shape
        _, m2, n2 = right.shape
        flat = ids.reshape(-1)
        # Row i of term r is row r m1 + i of the stacked factors. An i outside [0, m1) cannot pass for a row
        # of another term: a negative one fails for the first term, one too large for the last.
        term = torch.arange(terms, device=ids.device, dtype=ids.dtype)[:, None]
        a = F.embedding(flat // m2 + m1 * term, left.reshape(terms * m1, n1))  # (R, L, n1)
        with without_autocast(a.device):  # as nn.Embedding, which autocast leaves alone
            if m2 == 1:
                rows = F.linear(a.reshape(terms, -1).T, right.reshape(terms, n2).T)  # (L n1, n2)
            else:
                b = F.embedding(flat % m2 + m2 * term, right.reshape(terms * m2, n2))  # (R, L, n2)
                rows = torch.einsum("rli,rlj->lij", a, b)
        rows = rows.reshape(*ids.shape, n1 * n2)
        if self.padding_idx is None:
            return rows
        return torch.where((ids == self.padding_idx)[..., None], rows.detach(), rows)

    @torch.no_grad()
    def to_dense(self) -> nn.Embedding:
        """The equal ``nn.Embedding``."""
        with without_autocast(self.left.device):
            weight = self.weight
        dense = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        dense.weight = nn.Parameter(weight)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        return _costs(self.shape)
