"""Gemma's embeddings: rows are multiplied by a number as they are looked up; a head tied to the table is not."""

from typing import Any

import torch
from torch import Tensor, nn

from kncompress.errors import UserError
from kncompress.kron import KroneckerEmbedding, KroneckerShape

_SCALE = "scalar_embed_scale"
"""What transformers' modules of this kind call their number."""


class ScaledEmbedding(KroneckerEmbedding):
    """A factored table whose look-ups are multiplied by ``scale``; ``weight`` is that of the table."""

    def __init__(self, shape: KroneckerShape, padding_idx: int | None, dense: type[nn.Embedding], scale: float) -> None:
        super().__init__(shape, padding_idx, device="meta")
        self.dense, self.scale_of_rows = dense, scale

    def forward(self, ids: Tensor) -> Tensor:
        """Integers (...) in [0, V) -> (..., D)."""
        rows = super().forward(ids)
        # Rounded to the type of the weights first, as the dense module does it.
        return rows * torch.tensor(self.scale_of_rows, dtype=self.left.dtype, device=rows.device)

    @torch.no_grad()
    def to_dense(self) -> nn.Embedding:
        """The equal module of transformers."""
        plain = super().to_dense()
        with torch.device("meta"):
            made: Any = self.dense(self.num_embeddings, self.embedding_dim, self.padding_idx, self.scale_of_rows)
        made.weight = plain.weight
        made.embed_scale = torch.tensor(self.scale_of_rows, device=plain.weight.device)
        return made.train(self.training)


def embedding_like(old: Any, shape: KroneckerShape) -> KroneckerEmbedding:
    """The empty factored embedding, on the meta device, that takes the place of ``old``.

    Raises:
        UserError: ``old`` does something else to the rows that it looks up.
    """
    padding_idx = getattr(old, "padding_idx", None)
    if hasattr(old, _SCALE):
        return ScaledEmbedding(shape, padding_idx, type(old), getattr(old, _SCALE)).to(old.weight.dtype)
    if type(old).forward is not nn.Embedding.forward:
        raise UserError(f"factors.embedding: a {type(old).__name__} does more than look up rows; leave it dense")
    return KroneckerEmbedding(shape, padding_idx, device="meta", dtype=old.weight.dtype)
