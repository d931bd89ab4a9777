"""The dense product that every route of a Kronecker sum is made of, and a guard against autocast."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_WIDE = 8192
"""Outputs that a wide bfloat16 product on a CPU computes at a time. Wide: at least four times as many outputs."""
_MANY = 128
"""Vectors from which that was measured to pay."""


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Compute in the tensors' own type: for fits, exports and look-ups, which autocast would round."""
    if not torch.amp.is_autocast_available(device.type):  # the meta device
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def dense_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, by another way where torch's own is slow: on CPUs in bfloat16, with autocast or without.

    A single vector takes the product of a matrix and a vector. The tens of thousands of outputs of a language-model
    head are computed some at a time. Each is twice as fast (torch 2.13, oneDNN).

    Args:
        x: (..., K).
        weight: (M, K).
        bias: (M,) or None.

    Returns:
        (..., M).
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return F.linear(x, weight, bias)
    wide = bias is None and len(weight) > 4 * _WIDE and x.numel() >= _MANY * x.shape[-1]
    if torch.is_autocast_enabled("cpu"):
        if wide and torch.get_autocast_dtype("cpu") == torch.bfloat16:
            with without_autocast(x.device):
                return dense_product(x.bfloat16(), weight.bfloat16())
        return F.linear(x, weight, bias)
    if not x.dtype == weight.dtype == torch.bfloat16:
        return F.linear(x, weight, bias)
    if x.numel() == x.shape[-1]:
        vector = x.reshape(-1)
        y = torch.mv(weight, vector) if bias is None else torch.addmv(bias, weight, vector)
        return y.view(*x.shape[:-1], len(weight))
    if wide:
        y = _WideProduct.apply(x.reshape(-1, x.shape[-1]), weight)
        return y.view(*x.shape[:-1], len(weight))
    return F.linear(x, weight, bias)


class _WideProduct(torch.autograd.Function):
    """z (L, K), weight (M, K) -> z weight^T (L, M), ``_WIDE`` outputs at a time."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(z, weight)
        y = z.new_empty(len(z), len(weight))
        for start in range(0, len(weight), _WIDE):
            rows = slice(start, start + _WIDE)
            torch.mm(z, weight[rows].T, out=y[:, rows])
        return y

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        z, weight = ctx.saved_tensors
        to_z, to_weight = ctx.needs_input_grad
        return upstream @ weight if to_z else None, upstream.T @ z if to_weight else None
