"""Exchange a model's dense modules for factored ones, and back; no weights are fitted here.

Both ways to a compressed model end in the same object: ``compress_`` fills the new modules from the dense
ones, loading fills them from a file.
"""

from collections.abc import Collection, Iterator, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from kncompress.anatomy.families import FAMILIES
from kncompress.anatomy.scaled import embedding_like
from kncompress.anatomy.sites import Anatomy, Site, anatomy_of
from kncompress.kron import (
    HybridLinear,
    HybridShape,
    KroneckerEmbedding,
    KroneckerLinear,
    PackedLinear,
    PackedShape,
    Shape,
)

FACTORED = (KroneckerLinear, HybridLinear, PackedLinear, KroneckerEmbedding)
"""Factored modules."""


class FusedMaps(nn.Module):
    """Several maps of one input, (..., N) -> (..., M1 + M2 + ...): their outputs side by side.

    Stands where a model has one dense module for several maps, such as GPT-2's ``c_attn`` for Q, K and V.
    Each child is a factored map or, where the map stays dense, an ``nn.Linear``. With ``blocks`` above 1 the first
    block of each map's outputs comes first, then the second of each, and so on: GPT-NeoX has a block for each head.
    """

    def __init__(self, maps: Mapping[str, nn.Module], blocks: int = 1) -> None:
        super().__init__()
        self.blocks = blocks
        for name, module in maps.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        """(..., N) -> (..., sum of M)."""
        return _side_by_side([child(x) for child in self.children()], self.blocks)

    @property
    def in_features(self) -> int:
        """N."""
        return next(_widths(self))[0]

    @property
    def out_features(self) -> int:
        """Sum of M."""
        return sum(outputs for _, outputs in _widths(self))

    def extra_repr(self) -> str:
        return f"blocks={self.blocks}" if self.blocks > 1 else ""


def _widths(fused: FusedMaps) -> Iterator[tuple[int, int]]:
    """(N, M) of each map."""
    for child in fused.children():
        assert isinstance(child, (nn.Linear, KroneckerLinear, HybridLinear, PackedLinear))
        yield child.in_features, child.out_features


def _side_by_side(parts: list[Tensor], blocks: int) -> Tensor:
    """(..., M1), (..., M2), ... -> (..., M1 + M2 + ...), block by block of each."""
    if blocks == 1:
        return torch.cat(parts, dim=-1)
    return torch.cat([part.unflatten(-1, (blocks, -1)) for part in parts], dim=-1).flatten(-2)


def module_at(model: nn.Module, site: Site) -> nn.Module:
    """The module that holds a map (with its fused companions, if any)."""
    return _root(model, site).get_submodule(site.module)


def put_module(model: nn.Module, site: Site, module: nn.Module) -> None:
    """Replace that module."""
    _root(model, site).set_submodule(site.module, module.train(model.training))


def _root(model: Any, site: Site) -> nn.Module:
    return model if site.group == "head" else model.base_model


def site_path(model: Any, site: Site) -> str:
    """Path of the map in the whole model: the prefix of its parameters' names."""
    base = "" if site.group == "head" or model.base_model is model else f"{model.base_model_prefix}."
    return f"{base}{site.module}" + (f".{site.part}" if site.part else "")


def map_names(model: Any) -> dict[str, str]:
    """{path of a module in the whole model: the names of its maps}; nothing for a family without a table."""
    if model.config.model_type not in FAMILIES:
        return {}
    found = {}
    for _, sites in anatomy_of(model).modules():
        path = site_path(model, sites[0]).removesuffix(f".{sites[0].part}")
        found[path] = ", ".join(site.name for site in sites)
    return found


def dense_weight(module: nn.Module, site: Site) -> Tensor:
    """The weight of one map of a dense module, (out, in); a view where the map's rows lie together, else a copy."""
    return _rows(_out_by_in(module, site), site).reshape(site.out_features, site.in_features)


def dense_bias(module: nn.Module, site: Site) -> Tensor | None:
    """The bias of one map of a dense module, (out,), a view or a copy as ``dense_weight``; None without one."""
    bias = getattr(module, "bias", None)
    return None if bias is None else _rows(bias.detach(), site).reshape(site.out_features)


def set_weight_(module: nn.Module, site: Site, weight: Tensor) -> None:
    """Give one map of a dense module another weight, (out, in)."""
    rows = _rows(_out_by_in(module, site), site)
    rows.copy_(weight.reshape(rows.shape))


def set_bias_(module: nn.Module, site: Site, bias: Tensor) -> None:
    """Give one map of a dense module another bias, (out,)."""
    rows = _rows(module.get_parameter("bias").detach(), site)
    rows.copy_(bias.reshape(rows.shape))


def _out_by_in(module: nn.Module, site: Site) -> Tensor:
    weight: Tensor = module.get_parameter("weight").detach()
    return weight.T if site.conv1d else weight


def _rows(tensor: Tensor, site: Site) -> Tensor:
    """The rows of one map, (out, ...) or (blocks, out / blocks, ...); a view."""
    if site.blocks == 1:
        return tensor[site.start : site.start + site.out_features]
    size = site.out_features // site.blocks
    return tensor.unflatten(0, (site.blocks, -1))[:, site.start : site.start + size]


def empty_module(old: nn.Module, sites: list[Site], shapes: Mapping[str, Shape]) -> nn.Module:
    """What takes the place of a dense module: on the meta device, in the weight's type."""
    weight = old.get_parameter("weight")
    bias = getattr(old, "bias", None) is not None

    def one(site: Site) -> nn.Module:
        shape = shapes.get(site.name)
        if shape is None:
            return nn.Linear(site.in_features, site.out_features, bias, "meta", weight.dtype)
        if isinstance(shape, HybridShape):
            return HybridLinear(shape, bias, device="meta", dtype=weight.dtype)
        if isinstance(shape, PackedShape):
            return PackedLinear(shape, bias, device="meta", dtype=weight.dtype)
        if site.group == "embedding":
            return embedding_like(old, shape)
        return KroneckerLinear(shape, bias, device="meta", dtype=weight.dtype)

    if sites[0].part is None:
        return one(sites[0])
    return FusedMaps({str(site.part): one(site) for site in sites}, sites[0].blocks)


def swap_(model: Any, shapes: Mapping[str, Shape]) -> None:
    """Put empty factored modules, on the meta device, in the place of dense ones."""
    anatomy = anatomy_of(model)
    for _, sites in anatomy.modules():
        if any(site.name in shapes for site in sites):
            old = module_at(model, sites[0])
            put_module(model, sites[0], empty_module(old, sites, shapes))
    tie_head_(model, anatomy)


def tie_head_(model: Any, anatomy: Anatomy) -> None:
    """Where embedding and head are tied and the embedding is factored, give the head its factors.

    transformers learns the names of the tied factors, so that it saves them once and ties them at load. Tokens can be
    added to a model with a factored embedding or head: ``resize_token_embeddings`` multiplies those two out first.
    """
    embedding = model.base_model.get_submodule(anatomy.family.embedding)
    ends = [embedding, *([model.get_submodule(anatomy.family.head)] if anatomy.has_head else [])]
    if any(isinstance(end, FACTORED) for end in ends):
        model.resize_token_embeddings = MethodType(_resize, model)
    if not (anatomy.has_head and anatomy.tied and isinstance(embedding, KroneckerEmbedding)):
        return
    head = anatomy.family.head
    tied = KroneckerLinear.tied_to(embedding)
    tied.bias = getattr(model.get_submodule(head), "bias", None)
    model.set_submodule(head, tied)
    source = site_path(model, anatomy.sites["embedding"])
    names = [name for name, _ in embedding.named_parameters()]
    others = {key: name for key, name in (type(model)._tied_weights_keys or {}).items() if key != f"{head}.weight"}
    model._tied_weights_keys = {f"{head}.{name}": f"{source}.{name}" for name in names} | others
    model.all_tied_weights_keys = dict(model._tied_weights_keys)


def _resize(
    model: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, **options: Any
) -> Any:
    """transformers' ``resize_token_embeddings``; a model that already has that size stays as it is."""
    size = model.get_input_embeddings().num_embeddings
    wanted, step = new_num_tokens or size, pad_to_multiple_of or 1
    if -(-wanted // step) * step == size:
        return model.get_input_embeddings()
    unswap_(model, ("embedding", "head"))
    config = model.config.quantization_config
    config.maps = {name: shape for name, shape in config.maps.items() if name not in ("embedding", "head")}
    if not config.maps:
        del model.config.quantization_config
    return model.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, **options)


def unswap_(model: Any, groups: Collection[str] | None = None) -> None:
    """Replace factored modules by equal dense ones: all of them, or those of the named ``groups`` of maps."""
    anatomy = anatomy_of(model)
    for _, sites in anatomy.modules():
        if groups is None or sites[0].group in groups:
            unswap_module_(model, sites)
    untie_factors_(model, anatomy)


def unswap_module_(model: Any, sites: list[Site]) -> nn.Module | None:
    """Replace the module of these maps by the equal dense one; returns what was there, None where it is dense."""
    old = module_at(model, sites[0])
    if not isinstance(old, (*FACTORED, FusedMaps)):
        return None
    put_module(model, sites[0], _dense_module(old, sites))
    return old


def untie_factors_(model: Any, anatomy: Anatomy) -> None:
    """After the embedding has become dense: a head that shared its factors shares its weight."""
    model.__dict__.pop("resize_token_embeddings", None)
    if "_tied_weights_keys" in model.__dict__:
        del model._tied_weights_keys
        embedding = model.base_model.get_submodule(anatomy.family.embedding)
        bias = getattr(model.get_submodule(anatomy.family.head), "bias", None)
        head: Any = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False, device="meta")
        head.weight, head.bias = embedding.weight, bias
        model.set_submodule(anatomy.family.head, head)
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _dense_module(old: nn.Module, sites: list[Site]) -> nn.Module:
    parts = [old] if sites[0].part is None else list(old.children())
    dense: list[Any] = [part.to_dense() if isinstance(part, FACTORED) else part for part in parts]
    if sites[0].group in ("embedding", "head"):
        return dense[0]
    blocks = sites[0].blocks
    weight = _side_by_side([part.weight.detach().T for part in dense], blocks).T.contiguous()
    biases = [part.bias.detach() for part in dense if part.bias is not None]
    bias = _side_by_side(biases, blocks) if biases else None
    if sites[0].conv1d:
        return _conv1d(weight, bias)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight)
    if bias is not None:
        linear.bias = nn.Parameter(bias)
    return linear


def _conv1d(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """transformers' ``Conv1D`` of a (out, in) weight."""
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        module = Conv1D(*weight.shape)
    module.weight = nn.Parameter(weight.T.contiguous())
    module.bias = nn.Parameter(weight.new_zeros(len(weight)) if bias is None else bias)
    return module
