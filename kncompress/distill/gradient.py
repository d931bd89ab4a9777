"""A scalar loss whose gradients were computed together with its value.

The losses over (queries x keys) and (tokens x vocabulary) walk through their inputs block by block. Their
gradients are simple (student distribution minus teacher distribution), so each block yields them on the way;
autograd then has neither a block to keep nor one to compute again.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[count:])
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if upstream.device.type == "cpu" and float(upstream) == 1:  # the usual case: no copy of the logits' size
            return (None, None, *ctx.saved_tensors, *([None] * len(ctx.saved_tensors)))
        gradients = [gradient * upstream.to(gradient.dtype) for gradient in ctx.saved_tensors]
        return (None, None, *gradients, *([None] * len(gradients)))


def with_gradients(value: Tensor, inputs: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """``value`` (scalar) as a function of ``inputs``, whose gradients (same shapes and types) are known.

    First derivatives only: a second one raises.
    """
    return _Attach.apply(value, len(inputs), *inputs, *gradients)


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether a backward pass through any of ``tensors`` may follow."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def full_precision(tensor: Tensor) -> Tensor:
    """``tensor`` in float32, or in float64 where it is already; no copy where nothing changes."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
