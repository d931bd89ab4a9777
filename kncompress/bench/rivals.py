"""How others multiply by a Kronecker sum: the same factors in their layers."""

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kncompress.kron import KroneckerLinear


class Unavailable(Exception):
    """A rival that cannot be measured here, and why."""


class FormedEveryTime(nn.Module):
    """torch.kron at every forward, then a dense product, as Krony-PT and peft's LoKr do."""

    def __init__(self, layer: KroneckerLinear) -> None:
        super().__init__()
        left, right = (factors.detach().clone() for factors in layer.scaled_factors())
        self.left = nn.ParameterList(left.unbind())
        self.right = nn.ParameterList(right.unbind())
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """(..., N) -> (..., M)."""
        pairs = list(zip(self.left, self.right, strict=True))
        weight = torch.kron(*pairs[0])
        for left, right in pairs[1:]:
            weight = weight + torch.kron(left, right)
        return F.linear(x, weight, self.bias)


def tensorly(layer: KroneckerLinear) -> nn.Module:
    """tensorly-torch's ``FactorizedLinear``: a block tensor train of two cores and rank R is a Kronecker sum.

    Raises:
        Unavailable: it is not installed.
    """
    if find_spec("tltorch") is None:
        raise Unavailable("not installed (extra `bench`)")
    (m1, n1), (m2, n2) = layer.shape.left, layer.shape.right
    module: Any = importlib.import_module("tltorch").FactorizedLinear(
        (n1, n2), (m1, m2), bias=layer.bias is not None, factorization="blocktt", rank=layer.shape.terms
    )
    left, right = (factors.detach() for factors in layer.scaled_factors())
    cores = module.weight.factors
    with torch.no_grad():
        cores[0].copy_(left.permute(1, 2, 0)[None])  # (1, m1, n1, R)
        cores[1].copy_(right[..., None])  # (R, m2, n2, 1)
        if layer.bias is not None:
            module.bias.copy_(layer.bias)
    return module.to(device=left.device, dtype=left.dtype)


class FastKron(nn.Module):
    """pyfastkron's product, a call for each term.

    Raises:
        Unavailable: it is not installed, or does not multiply numbers of this type.
    """

    def __init__(self, layer: KroneckerLinear) -> None:
        super().__init__()
        if find_spec("pyfastkron") is None:
            raise Unavailable("not installed (extra `bench`)")
        left, right = (factors.detach() for factors in layer.scaled_factors())
        if left.dtype not in (torch.float32, torch.float64):
            raise Unavailable(f"does not multiply {str(left.dtype).removeprefix('torch.')}")
        if layer.shape.terms > 16:
            raise Unavailable(f"a call for each of {layer.shape.terms} terms")
        self.multiply = importlib.import_module("pyfastkron.fastkrontorch").gemkm
        self.left = nn.ParameterList(factor.T.contiguous() for factor in left)
        self.right = nn.ParameterList(factor.T.contiguous() for factor in right)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """(..., N) -> (..., M)."""
        # It takes tensors alone, no parameters.
        pairs = ((left.view_as(left), right.view_as(right)) for left, right in zip(self.left, self.right, strict=True))
        terms = [self.multiply(x, list(pair)) for pair in pairs]
        y = terms[0]
        for term in terms[1:]:
            y = y + term
        return y if self.bias is None else y + self.bias


def check_backward(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Keep a rival from ending the whole process.

    Raises:
        Unavailable: its gradients would.
    """
    # torch 2.13's batched product, (1, 3, n) by (1, n, 6) with a transposed first operand, which it alone asks for.
    if name == "tensorly" and device.type == "cpu" and dtype == torch.bfloat16:
        raise Unavailable("its gradients end the process (SIGFPE) in bfloat16 on CPUs for some shapes")


RIVALS: dict[str, Callable[[KroneckerLinear], nn.Module]] = {
    "torch_kron": FormedEveryTime,
    "tensorly": tensorly,
    "pyfastkron": FastKron,
}
"""Name and layer; given a layer of ours they compute the same."""
