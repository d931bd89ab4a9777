"""How much work the measuring of harms is, in about multiply-adds."""

from kncompress.anatomy.sites import Anatomy, Site
from kncompress.kron import KroneckerShape
from kncompress.planner.ladder import sizes

FAR_EVERY = 3
"""Of so many layers the maps of one get a second reference."""
_SCREEN = 1.6e5
"""Multiply-adds for each number of a map on which all kinds of shapes are tried."""


def kl_cost(anatomy: Anatomy, site: Site, tokens: int) -> float:
    """One KL with this map replaced: the layers from its own on, and the head."""
    first = anatomy.layers if site.group == "head" else site.layer or 0
    maps = (each for each in anatomy.sites.values() if each.layer is not None and each.layer >= first)
    embedding = anatomy.sites["embedding"]
    moved = sum(each.out_features * each.in_features for each in maps)
    return float(tokens) * (moved + embedding.out_features * embedding.in_features)


def map_cost(anatomy: Anatomy, site: Site, once: float) -> float:
    """All that is done for a map without Kronecker sums; ``once``: of one KL."""
    if site.group == "embedding":
        shapes = [KroneckerShape.parse(option.shape) for option in sizes(anatomy, site).options[1:]]
        return sum(once + 20.0 * site.out_features * site.in_features * shape.terms for shape in shapes)
    smaller = min(site.out_features, site.in_features)
    return 30.0 * site.in_features * smaller**2 + once * (1 + (site.layer is None or site.layer % FAR_EVERY == 0))


def screened_layers(anatomy: Anatomy) -> list[int]:
    """Layers on whose maps all kinds of shapes are tried."""
    return sorted({min(1, anatomy.layers - 1), anatomy.layers // 2})


def screen_cost(site: Site) -> float:
    """Trying all kinds of shapes on a map."""
    return _SCREEN * site.out_features * site.in_features
