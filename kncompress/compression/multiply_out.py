"""A compressed model in its dense form, made part by part: as many factors in memory as a layer has."""

from typing import Any

import torch
from torch import Tensor, nn

from kncompress.anatomy.mapped import raised
from kncompress.anatomy.mark import factored_maps
from kncompress.anatomy.sites import Site, anatomy_of
from kncompress.anatomy.swap import module_at, unswap_module_, untie_factors_
from kncompress.compression.parts import EMBEDDING, Parts, stage_of, stages_of
from kncompress.errors import CheckFailed
from kncompress.kron.dense_product import without_autocast

_ROWS = 4
"""Random inputs on which each map is compared."""


@torch.no_grad()
def multiply_out_(model: Any, parts: Parts, tolerance: float, seed: int = 0) -> float:
    """Replace the factors of ``model`` by equal dense maps, in place; each part is written when it is done and lies in
    its file from then on.

    Args:
        model: of a family with a table, in any type, its weights in memory or in files.
        parts: takes the dense weights, in its type; products are taken in float32.
        tolerance: most that an output of a map may change in float32, as a share of the map's largest.
        seed: of the inputs on which that is looked at.

    Returns:
        The largest such change.

    Raises:
        CheckFailed: a map has changed by more.
        UserError: a number is too large for the type of ``parts``.
    """
    anatomy, random, worst = anatomy_of(model), torch.Generator().manual_seed(seed), 0.0
    parts.of(model, anatomy, {})
    for stage in stages_of(anatomy):
        for name, sites in anatomy.modules():
            if stage_of(sites[0]) == stage:
                worst = max(worst, _module(model, name, sites, tolerance, random))
        if stage == EMBEDDING:
            untie_factors_(model, anatomy)
        parts.keep(stage, {})
    if factored_maps(model):
        del model.config.quantization_config
    return worst


def _module(model: Any, name: str, sites: list[Site], tolerance: float, random: torch.Generator) -> float:
    """Make one module dense; returns by how much its outputs have changed."""
    with raised(module_at(model, sites[0])):
        old = unswap_module_(model, sites)
        if old is None:
            return 0.0
        found = _change(old, module_at(model, sites[0]), sites[0], random)
    if not found <= tolerance:
        raise CheckFailed(
            f"tolerance={tolerance:g}: outputs of {name} change by {found:.3g} of the largest when its factors are "
            "multiplied out; nothing was kept"
        )
    return found


def _change(old: nn.Module, new: nn.Module, site: Site, random: torch.Generator) -> float:
    inputs: Tensor
    if site.group == "embedding":
        inputs = torch.randint(site.out_features, (_ROWS,), generator=random)
    else:
        inputs = torch.randn(_ROWS, site.in_features, generator=random)
    with without_autocast(inputs.device):
        before, after = old(inputs), new(inputs)
    gap, largest = (after - before).abs().max(), before.abs().max()
    return float(gap / largest if largest else gap)
