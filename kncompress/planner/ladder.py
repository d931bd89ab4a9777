"""The candidates of each map that need no screening: outer products of rising rank, and one-term sums of the
embedding."""

from kncompress.anatomy.sites import Anatomy, Site
from kncompress.kron import KroneckerShape, ShapeError
from kncompress.planner.budget import HarmTable, MapHarms
from kncompress.planner.candidates import Option, outer, outer_ranks, packed, ranks

EMBEDDING_STEPS = 8
"""Ranks tried for an embedding. Its fits take long, so there are few, from step ``EMBEDDING_FROM`` on."""
EMBEDDING_FROM = 3
EMBEDDING_SIDES = ((1, 2), (1, 4))
"""Right factors of one-term sums for an embedding."""


def unmeasured_table(anatomy: Anatomy, parameters: int) -> HarmTable:
    """Candidates without errors and harms: what budgets can be reached.

    Args:
        anatomy: of the model.
        parameters: its unique ones.
    """
    maps = [sizes(anatomy, site) for site in anatomy.sites.values()]
    return HarmTable("", "", parameters, dense_adds(anatomy), tuple(maps))


def sizes(anatomy: Anatomy, site: Site) -> MapHarms:
    """The candidates of a map that need no screening."""
    size = site.out_features, site.in_features
    dense = site.out_features * site.in_features
    if site.group != "embedding":
        shapes = [Option.of(packed(*size, rank), 0.0) for rank in ranks(*size)]
        return MapHarms(site.name, dense, dense, (keep(site), *shapes), ())
    made = [outer(*size, rank) for rank in outer_ranks(*size, EMBEDDING_STEPS)[EMBEDDING_FROM - 1 :]]
    made += [shape for right in EMBEDDING_SIDES if (shape := _fitting(*size, right)) is not None]
    head = anatomy.tied and anatomy.has_head
    adds = dense if head else 0
    options = [
        Option(str(s), s.parameters, s.terms * s.in_features + (s.multiply_adds if head else 0), 0.0) for s in made
    ]
    return MapHarms(site.name, dense, adds, (keep(site, adds), *options), ())


def keep(site: Site, adds: int | None = None) -> Option:
    """A map left dense, of ``adds`` multiply-adds."""
    dense = site.out_features * site.in_features
    return Option("keep", dense, dense if adds is None else adds, 0.0)


def dense_adds(anatomy: Anatomy) -> int:
    """Multiply-adds of all dense maps, per token; a tied head as much as its own would."""
    return sum(sizes(anatomy, site).multiply_adds for site in anatomy.sites.values())


def _fitting(outputs: int, inputs: int, right: tuple[int, int]) -> KroneckerShape | None:
    try:
        return KroneckerShape.fit(outputs, inputs, right)
    except ShapeError:
        return None
