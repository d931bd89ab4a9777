"""Which symmetries of a dense model let its factors lose less, and how much less.

The order of the hidden units, the basis of a head and the order of the residual coordinates can change without
changing what the model computes, and at no cost at run time. But the error of the factors changes. Each change is
kept only where the fit, nearest or calibrated, has less error with it.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch

from kncompress.anatomy.sites import anatomy_of
from kncompress.anatomy.symmetries import Changing, layer_sites, permute_residual_
from kncompress.compression.dense_walk import moments
from kncompress.compression.layerwise import CalibrationText
from kncompress.compression.map_fit import InputMoment
from kncompress.compression.moments import input_of
from kncompress.compression.parts import Parts
from kncompress.compression.symmetry_search import Found, SymmetrySearch
from kncompress.compression.table import Arrangement
from kncompress.compression.work import Work, fit_cost
from kncompress.config import FitConfig
from kncompress.kron import Shape


@torch.no_grad()
def arrange_(
    model: Any,
    shapes: Mapping[str, Shape],
    settings: FitConfig,
    text: CalibrationText | None = None,
    work: Work | None = None,
    parts: Parts | None = None,
) -> Arrangement:
    """Change ``model``, in place and without changing its function, so that ``settings.symmetries`` help its factors.

    Args:
        model: dense transformers model.
        shapes: what its maps will become.
        settings: which symmetries, and how the maps will be fitted.
        text: that they will be calibrated on; None: they will be nearest factors. The residual order is chosen from
            the weights alone even so, so that a teacher gets the same one at any time.
        work: is told of each step.
        parts: by which weights that lie in files are changed; None: all are in memory.

    Raises:
        UserError: the model has parameters of which it is not known how they meet the residual stream, or gives
            values that are not finite.
    """
    work, which = work or Work(), settings.symmetries
    changing: Changing = (lambda *_: nullcontext()) if parts is None else parts.changing
    scratch = None if parts is None else parts.folder.parent
    chosen = SymmetrySearch(model, anatomy_of(model), shapes, settings)
    # Chosen from the weights as they are given, so that a teacher gets the same one whatever the text; made last, so
    # that moments from disk are those of the model that was given.
    order = chosen.residual(scratch) if "residual" in which else None
    kinds = {"hidden": "hidden", "values": "heads", "queries": "heads"}
    changed: dict[str, list[int]] = {kind: [] for kind in kinds}
    groups = ({"qkv", "o"} if "heads" in which else set()) | ({"mlp"} if "hidden" in which else set())
    costs: dict[int, float] = {}
    for name, shape in shapes.items():
        site = chosen.anatomy.sites[name]
        if site.layer is not None and site.group in groups:  # each map is fitted twice
            cost = 2 * fit_cost(site, shape, text is not None, settings.sweeps)
            costs[site.layer] = costs.get(site.layer, 0.0) + cost
    work.expect(sum(costs.values()))
    layers = model.base_model.get_submodule(chosen.anatomy.family.layers)
    for layer, found in _by_layer(chosen, sorted(costs), groups, text, work):
        work.begin(f"layers.{layer} symmetries")
        with changing(layers[layer]):
            for kind, name in kinds.items():
                if name in which and getattr(chosen, kind)(layer, found):
                    changed[kind].append(layer)
        work.finish(costs[layer])
    if order is not None:
        permute_residual_(model, order, changing)
    return Arrangement(
        hidden=tuple(changed["hidden"]),
        values=tuple(changed["values"]),
        queries=tuple(changed["queries"]),
        residual=None if order is None else tuple(order.tolist()),
    )


def _by_layer(
    chosen: SymmetrySearch, layers: list[int], groups: Collection[str], text: CalibrationText | None, work: Work
) -> Iterator[tuple[int, Found]]:
    """Each of the layers with the moments of its inputs; it may be changed meanwhile."""
    if text is None:
        yield from ((layer, {}) for layer in layers)
        return
    wanted = {
        input_of(site): layer
        for layer in layers
        for site in layer_sites(chosen.anatomy, layer).values()
        if site.group in groups
    }
    found: dict[int, dict[str, InputMoment]] = {layer: {} for layer in layers}
    for name, moment in moments(chosen.model, text, list(wanted), work):
        layer = wanted[name]
        found[layer][name] = InputMoment(moment)
        if len(found[layer]) == sum(other == layer for other in wanted.values()):
            yield layer, found.pop(layer)
