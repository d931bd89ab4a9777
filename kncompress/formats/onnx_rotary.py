"""Rotary positions as one operator of onnxruntime, in the place of the dozen that transformers' function is."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_NAME = "apply_rotary_pos_emb"
"""transformers' function for it, which each family's module has."""


@contextmanager
def turning(model: nn.Module) -> Iterator[None]:
    """While this is open, ``model`` turns queries and keys by the operator, where its function does what that does."""
    modules = {sys.modules[type(part).__module__] for part in model.modules()}
    found = {module: getattr(module, _NAME) for module in modules if hasattr(module, _NAME)}
    replaced = {module: function for module, function in found.items() if _turns_halves(function)}
    for module, function in replaced.items():
        setattr(module, _NAME, partial(_turned, function))
    try:
        yield
    finally:
        for module, function in replaced.items():
            setattr(module, _NAME, function)


def _turns_halves(function: Callable[..., Any]) -> bool:
    """Whether ``function`` pairs each coordinate of a head with the one half a head further on, as most families do."""
    random = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 3, 4, 8, generator=random).unbind()  # (batch, heads, tokens, size)
    angles = torch.randn(2, 4, 4, generator=random).repeat(1, 1, 2)
    try:
        turned = function(q, k, angles.cos(), angles.sin())
    except Exception:  # another signature
        return False

    def expected(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos()[:, None] + torch.cat([-second, first], dim=-1) * angles.sin()[:, None]

    return all(torch.allclose(y, expected(x), atol=1e-6) for x, y in zip((q, k), turned, strict=True))


def _turned(
    function: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor]:
    """(B, heads, T, size) each, by angles (B, T, size or less: the rest of a head stays as it is)."""
    batch, tokens, size = cos.shape
    if q.shape[-1] < size:  # a part of a head so small that ``function`` makes it wider
        made: tuple[Tensor, Tensor] = function(q, k, cos, sin)
        return made
    places = torch.arange(batch * tokens).view(batch, tokens)
    tables = [table[..., : size // 2].reshape(batch * tokens, size // 2).to(q.dtype) for table in (cos, sin)]

    def turned(x: Tensor) -> Tensor:
        heads = x.shape[1]
        flat = x.transpose(1, 2).flatten(2)
        # OpenVINO wants what onnxruntime takes for granted to be said.
        attributes: dict[str, Any] = {"num_heads": heads, "interleaved": 0}
        attributes["rotary_embedding_dim"] = size if size < x.shape[-1] else 0
        made = torch.onnx.ops.symbolic(
            "com.microsoft::RotaryEmbedding",
            (flat, places, *tables),
            attributes,
            dtype=x.dtype,
            shape=flat.shape,
            version=1,
        )
        return made.unflatten(-1, (heads, x.shape[-1])).transpose(1, 2)

    return turned(q), turned(k)
