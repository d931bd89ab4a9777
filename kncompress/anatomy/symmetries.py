"""Changes of a dense model's weights that leave its function as it is.

- hidden: the units of a feed-forward layer in another order;
- heads: another basis of what a head carries from its values to its output map, and, where positions are not turned
  into queries and keys (rotary embeddings), of what it compares;
- residual: the coordinates of the residual stream in another order, in the whole model.

All are in place and exact up to rounding. Factors do not commute with them: see ``arrangement``.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kncompress.anatomy.sites import Anatomy, Site, anatomy_of
from kncompress.anatomy.swap import dense_bias, dense_weight, module_at, set_bias_, set_weight_
from kncompress.errors import UserError
from kncompress.kron import Moment

Changing = Callable[..., AbstractContextManager[None]]
"""Within this block the weights of the modules that it is called with may be changed in place."""


class HeadBasis(NamedTuple):
    """A new basis of each of G heads of d numbers: x becomes ``there`` x."""

    there: Tensor
    """(G, d, d), float64"""
    back: Tensor
    """(G, d, d), float64: the inverse"""

    def onto(self, weight: Tensor) -> Tensor:
        """(G d, N) or (G d,), of a map that writes to the heads -> the same in the new basis."""
        split = weight.double().view(*self.there.shape[:2], -1)
        return (self.there @ split).reshape(weight.shape)

    def off(self, weight: Tensor) -> Tensor:
        """(M, G n d), of a map that reads the heads, n times each -> the same from the new basis."""
        heads, size = self.there.shape[:2]
        split = weight.double().view(len(weight), heads, -1, size)
        return torch.einsum("mgnd,gde->mgne", split, self.back).reshape(weight.shape)

    def against(self) -> "HeadBasis":
        """The basis of the other side of a scalar product, which it leaves as it is."""
        return HeadBasis(self.back.mT, self.there.mT)


def layer_sites(anatomy: Anatomy, layer: int) -> dict[str, Site]:
    """{``attn.q``, ..., ``mlp.down``: site} of one layer."""
    return {site.kind: site for site in anatomy.sites.values() if site.layer == layer}


@torch.no_grad()
def permute_hidden_(model: Any, layer: int, order: Tensor) -> None:
    """Unit ``order[i]`` of a feed-forward layer becomes unit i; ``order`` (H,) int64 holds each once."""
    for site in anatomy_of(model).sites.values():
        if site.layer == layer and site.group == "mlp":
            module = module_at(model, site)
            if site.mirrored:
                set_weight_(module, site, dense_weight(module, site)[:, order])
            else:
                _replace_rows(module, site, order)


def permuted_moment(moment: Moment, order: Tensor) -> Moment:
    """The moment of the same inputs (N,) in another order."""
    return Moment(moment.second[order][:, order], moment.mean[order], moment.count)


def turned_moment(moment: Moment, basis: HeadBasis) -> Moment:
    """The moment of what query heads give, (G n d,), after ``turn_values_``: n of them share a head of the basis."""
    repeats = len(moment.mean) // (basis.there.shape[0] * basis.there.shape[1])
    each = HeadBasis(*(turn.repeat_interleave(repeats, 0) for turn in basis))
    second = each.onto(each.onto(moment.second.double()).T.contiguous())
    return Moment(second.to(moment.second), each.onto(moment.mean.double()).to(moment.mean), moment.count)


@torch.no_grad()
def turn_values_(model: Any, layer: int, basis: HeadBasis) -> None:
    """Another basis of the values of one layer's heads; G is the number of key and value heads."""
    sites = layer_sites(anatomy_of(model), layer)
    _turn(model, sites["attn.v"], basis)
    output = module_at(model, sites["attn.o"])
    set_weight_(output, sites["attn.o"], basis.off(dense_weight(output, sites["attn.o"])))


@torch.no_grad()
def turn_queries_(model: Any, layer: int, basis: HeadBasis) -> None:
    """Another basis of the queries of one layer's heads, and that of the keys that keeps their scores.

    Raises:
        ValueError: queries and keys are turned by their positions (rotary embeddings).
    """
    anatomy = anatomy_of(model)
    if anatomy.family.rotary:
        raise ValueError("rotary: queries and keys are turned by their positions, in a basis that is fixed")
    sites = layer_sites(anatomy, layer)
    _turn(model, sites["attn.q"], basis)
    _turn(model, sites["attn.k"], basis.against())


def _turn(model: Any, site: Site, basis: HeadBasis) -> None:
    module = module_at(model, site)
    weight, bias = dense_weight(module, site), dense_bias(module, site)
    set_weight_(module, site, basis.onto(weight))
    if bias is not None:
        set_bias_(module, site, basis.onto(bias))


@torch.no_grad()
def permute_residual_(model: Any, order: Tensor, changing: Changing = lambda *_: nullcontext()) -> None:
    """Coordinate ``order[i]`` of the residual stream becomes coordinate i; ``order`` (D,) int64 holds each once.

    Hidden states and outputs of layers are permuted alike; logits stay as they are. One layer after the other is
    ``changing``.

    Raises:
        UserError: the model has parameters of which it is not known how they meet the residual stream; nothing is
            changed then.
    """
    others = check_residual(model)
    for _, group in groupby(anatomy_of(model).sites.values(), key=lambda site: (site.layer, site.group == "head")):
        sites = list(group)
        with changing(*(module_at(model, site) for site in sites)):
            for site in sites:
                module = module_at(model, site)
                if site.mirrored or site.group == "o":
                    _replace_rows(module, site, order)
                else:
                    set_weight_(module, site, dense_weight(module, site)[:, order])
    with changing(nn.ParameterList(others)):
        for parameter in others:  # positions, norms, a classifier's head
            parameter.copy_(parameter[..., order])


def check_residual(model: Any) -> list[nn.Parameter]:
    """Parameters of no map that hold vectors of the residual stream, in their last dimension; raises UserError."""
    anatomy = anatomy_of(model)
    family, width = anatomy.family, anatomy.family.sizes(model.config)["width"]
    if not family.head_reads_residual or anatomy.sites["embedding"].in_features != width:
        raise UserError(
            f"fit.symmetries: residual: the embedding or the head of this {family.model_type} does not meet "
            "the residual stream directly; leave residual out"
        )
    modules = [module_at(model, site) for site in anatomy.sites.values()]
    mapped = {id(parameter) for module in modules for parameter in module.parameters()}
    inside = {id(parameter) for parameter in model.base_model.parameters()}
    found = []
    for name, parameter in model.named_parameters():
        if id(parameter) in mapped or any(f".{module}." in name for module in family.in_heads):
            continue
        # Outside of the base model a head reads the stream: its bias is of its outputs.
        if id(parameter) not in inside and parameter.ndim == 1:
            continue
        if parameter.shape[-1] != width:
            raise UserError(
                f"fit.symmetries: residual: {name} is {list(parameter.shape)}, not of the residual width "
                f"{width}; leave residual out"
            )
        found.append(parameter)
    return found


def _replace_rows(module: nn.Module, site: Site, order: Tensor) -> None:
    weight, bias = dense_weight(module, site), dense_bias(module, site)
    set_weight_(module, site, weight[order])
    if bias is not None:
        set_bias_(module, site, bias[order])
