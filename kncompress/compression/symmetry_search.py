"""Tries the symmetries of a dense model on the factors of its maps, by the fits that they will get."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kncompress.anatomy.mapped import raised
from kncompress.anatomy.sites import Anatomy, Site
from kncompress.anatomy.swap import dense_bias, dense_weight, module_at
from kncompress.anatomy.symmetries import (
    HeadBasis,
    check_residual,
    layer_sites,
    permute_hidden_,
    permuted_moment,
    turn_queries_,
    turn_values_,
    turned_moment,
)
from kncompress.compression.grouping import balanced_basis, grouped_order
from kncompress.compression.map_fit import InputMoment, fit_calibrated, fit_nearest
from kncompress.compression.moments import input_of
from kncompress.config import FitConfig
from kncompress.kron import KroneckerShape, Shape

Found = Mapping[str, InputMoment]
"""Moments by input; empty for a fit without a text."""

_MOST = 16
"""Largest group of neighbours for which an order is searched."""


class SymmetrySearch:
    """Tries symmetries on ``model``. ``hidden``, ``values`` and ``queries`` change it where that helps, and return
    whether they did."""

    def __init__(self, model: Any, anatomy: Anatomy, shapes: Mapping[str, Shape], settings: FitConfig) -> None:
        self.model, self.anatomy, self.shapes, self.settings = model, anatomy, shapes, settings
        self.sizes = anatomy.family.sizes(model.config)

    def hidden(self, layer: int, found: Found) -> bool:
        """An order of the hidden units."""
        sites = [site for site in self.anatomy.sites.values() if site.layer == layer and site.group == "mlp"]
        sizes = {self._group(site, inner=not site.mirrored) for site in sites} - {1}
        if len(sizes) != 1:
            return False
        grams = [gram for site in sites if (gram := self._gram(site, found)) is not None]
        order = grouped_order(grams, sizes.pop()).to(grams[0].device)
        moved = dict(found)
        name = f"layers.{layer}.mlp.hidden"
        if name in found:
            moved[name] = InputMoment(permuted_moment(found[name].moment, order))
        before = after = 0.0
        for site in sites:
            weight, bias = self._numbers(site)
            before += self._loss(site, weight, bias, found)
            if site.mirrored:
                after += self._loss(site, weight[:, order], bias, moved)
            else:
                after += self._loss(site, weight[order], None if bias is None else bias[order], moved)
        if not after < before:
            return False
        permute_hidden_(self.model, layer, order)
        return True

    def _gram(self, site: Site, found: Found) -> Tensor | None:
        """(H, H): inner products of a map's hidden rows or columns, as its inputs weigh them; None if it is dense."""
        if site.name not in self.shapes:
            return None
        weight, bias = self._numbers(site)
        weight = weight.double()
        moment = found.get(input_of(site))
        if not site.mirrored:
            return weight @ self._metric(site, bias, moment) @ weight.T
        gram = weight.T @ weight
        if moment is not None:
            root = self._metric(site, bias, moment).diagonal().sqrt()
            gram *= root[:, None] * root
        return gram

    def values(self, layer: int, found: Found) -> bool:
        """A basis of the values, where values or outputs are factored within the heads."""
        sites = layer_sites(self.anatomy, layer)
        value, output = sites["attn.v"], sites["attn.o"]
        size = self._head_group(value, output, inner=(True, False))
        if size is None:
            return False
        (weight, bias), (reading, reading_bias) = self._numbers(value), self._numbers(output)
        d, heads = self.sizes["head"], value.out_features // self.sizes["head"]
        written = self._heads_moment(value, weight, bias, found)
        columns = reading.double().view(len(reading), heads, -1, d)
        read = torch.einsum("mgnd,mgne->gde", columns, columns)
        basis = balanced_basis(written, read, size)
        before = self._loss(value, weight, bias, found) + self._loss(output, reading, reading_bias, found)
        moved = dict(found)
        if (name := input_of(output)) in found:
            moved[name] = InputMoment(turned_moment(found[name].moment, basis))
        after = self._loss(value, *_onto(basis, weight, bias), moved)
        after += self._loss(output, basis.off(reading).to(reading), reading_bias, moved)
        if not after < before:
            return False
        turn_values_(self.model, layer, basis)
        return True

    def queries(self, layer: int, found: Found) -> bool:
        """A basis of queries and keys, where they are factored within the heads; none with rotary embeddings."""
        sites = layer_sites(self.anatomy, layer)
        query, key = sites["attn.q"], sites["attn.k"]
        size = self._head_group(query, key, inner=(True, True))
        if size is None or self.anatomy.family.rotary:
            return False
        (asks, asks_bias), (holds, holds_bias) = self._numbers(query), self._numbers(key)
        basis = balanced_basis(
            self._heads_moment(query, asks, asks_bias, found), self._heads_moment(key, holds, holds_bias, found), size
        )
        before = self._loss(query, asks, asks_bias, found) + self._loss(key, holds, holds_bias, found)
        after = self._loss(query, *_onto(basis, asks, asks_bias), found)
        after += self._loss(key, *_onto(basis.against(), holds, holds_bias), found)
        if not after < before:
            return False
        turn_queries_(self.model, layer, basis)
        return True

    def residual(self, scratch: str | Path | None = None) -> Tensor | None:
        """An order (D,) of the residual coordinates, from the weights alone; changes nothing. ``scratch``: folder for
        what finds no room in memory."""
        sites = [site for name, site in self.anatomy.sites.items() if name in self.shapes]
        inner = {site.name: site.mirrored or site.group == "o" for site in sites}  # rows are residual coordinates
        sizes = {site.name: self._group(site, inner[site.name]) for site in sites}
        size = next((size for size in sizes.values() if size > 1), 1)  # the embedding's, where it has one
        sites = [site for site in sites if sizes[site.name] == size]
        if size == 1:
            return None
        check_residual(self.model)

        def gram(site: Site) -> Tensor:
            with raised(module_at(self.model, site)):
                weight = self._numbers(site)[0].double()
                return weight @ weight.T if inner[site.name] else weight.T @ weight

        order = grouped_order(map(gram, sites), size, scratch).to(next(self.model.parameters()).device)
        before = after = 0.0
        for site in sites:
            with raised(module_at(self.model, site)):
                weight = self._numbers(site)[0]
                before += self._loss(site, weight, None, {})
                after += self._loss(site, weight[order] if inner[site.name] else weight[:, order], None, {})
        return order if after < before else None

    def _group(self, site: Site, inner: bool) -> int:
        """Neighbours that a map's right factor joins, of its outputs (``inner``) or its inputs; 1 if it joins none."""
        shape = self.shapes.get(site.name)
        if not isinstance(shape, KroneckerShape):
            return 1
        (m2, n2), side = shape.right, 0 if inner else 1
        mine, other = (m2, n2) if inner else (n2, m2)
        # Not outer products, whose one group is everything, nor sums that hold any weight.
        return mine if other == 1 < shape.left[side] and shape.terms < mine <= _MOST else 1

    def _head_group(self, first: Site, second: Site, inner: tuple[bool, bool]) -> int | None:
        """The group that two maps of a head share, or that one of them has; None where there is none within a head."""
        sizes = {self._group(site, side) for site, side in zip((first, second), inner, strict=True)} - {1}
        return sizes.pop() if len(sizes) == 1 and all(self.sizes["head"] % size == 0 for size in sizes) else None

    def _numbers(self, site: Site) -> tuple[Tensor, Tensor | None]:
        module = module_at(self.model, site)
        return dense_weight(module, site), dense_bias(module, site)

    def _metric(self, site: Site, bias: Tensor | None, moment: InputMoment | None) -> Tensor:
        """(N, N), float64: what the map's fit weighs its inputs by."""
        if moment is None:
            return torch.eye(site.in_features, dtype=torch.float64, device=next(self.model.parameters()).device)
        return moment.prepared(bias is not None and self.settings.bias).matrix

    def _heads_moment(self, site: Site, weight: Tensor, bias: Tensor | None, found: Found) -> Tensor:
        """(G, d, d): moment of what a map writes to the heads, centred as its fit is."""
        rows = weight.double().view(-1, self.sizes["head"], site.in_features)
        return rows @ self._metric(site, bias, found.get(input_of(site))) @ rows.mT

    def _loss(self, site: Site, weight: Tensor, bias: Tensor | None, found: Found) -> float:
        """Squared relative error of a map's fit; 0 where it stays dense."""
        if site.name not in self.shapes:
            return 0.0
        moment = found.get(input_of(site))
        if moment is None:
            return fit_nearest(weight, bias, self.shapes[site.name], self.settings).error ** 2
        fitted = fit_calibrated(weight, bias, self.shapes[site.name], moment, self.settings)
        return (fitted.weighted or 0.0) ** 2


def _onto(basis: HeadBasis, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return basis.onto(weight).to(weight), None if bias is None else basis.onto(bias).to(bias)
