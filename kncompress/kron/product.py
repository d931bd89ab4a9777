"""Apply a Kronecker sum without forming it: choose the route and take it.

Notation: ``left`` (R, m1, n1), ``right`` (R, m2, n2), W = sum_r left[r] (x) right[r], which has shape
(M, N) = (m1 m2, n1 n2). The routes themselves are in ``kron/routes.py``; ``ROUTES`` below says when each is taken and
what it costs. The result is the same by each, up to rounding.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kncompress.kron import routes
from kncompress.kron.routes import identity_block
from kncompress.kron.shape import ShapeError, cheaper_order

Order = Literal["right", "left", "formed"]

_FEW = 16
"""Below so many vectors the time is that of the calls, and blocks of the identity do not pay."""
_SMALL = 18
"""Most numbers in right factors with several rows and columns for which blocks pay: up to 3x3, two terms."""
_FORMING = 8
"""Cost of forming one number of one term, its gradient included, in multiply-adds of a large product."""


class Sizes(NamedTuple):
    """What the choice of a route depends on."""

    terms: int
    m1: int
    n1: int
    m2: int
    n2: int
    vectors: int | None
    """None while ``torch.export`` records: the graph is to serve any number of vectors."""

    @property
    def few(self) -> bool:
        """Few vectors, and their number is known."""
        return self.vectors is not None and self.vectors < _FEW

    @property
    def blocks(self) -> bool:
        """Vectors enough, and right factors small enough, for blocks of the identity."""
        small = min(self.m2, self.n2) == 1 or self.terms * self.m2 * self.n2 <= _SMALL
        return self.vectors is not None and self.vectors >= _FEW and small


class Route(NamedTuple):
    """One way to apply a Kronecker sum."""

    order: Order
    """Which factors come first, or that W is formed."""
    apply: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    """(x, left, right, bias) -> W x + bias."""
    fits: Callable[[Sizes], bool]
    """When the route can be taken and was measured to be faster than those below it."""
    cost: Callable[[Sizes], int]
    """Multiply-adds for one vector."""


def _right(s: Sizes, block: int = 1) -> int:
    return block * s.terms * s.n1 * s.n2 * s.m2 + s.terms * s.n1 * s.m2 * s.m1


def _left(s: Sizes, block: int = 1) -> int:
    return s.terms * s.m1 * s.n1 * s.n2 + block * s.terms * s.m1 * s.n2 * s.m2


def _always(s: Sizes) -> bool:
    return True


ROUTES: tuple[Route, ...] = (
    Route("right", routes.low_rank_right_first, lambda s: s.n1 == s.m2 == 1, _right),
    Route("right", routes.single_row, lambda s: s.few and s.terms == s.m2 == 1, _right),
    Route(
        "right",
        routes.right_first_by_blocks,
        lambda s: s.blocks and identity_block(s.n1, s.m1, s.n2) > 0,
        lambda s: _right(s, identity_block(s.n1, s.m1, s.n2)),
    ),
    Route("right", routes.right_first, _always, _right),
    Route("left", routes.low_rank_left_first, lambda s: s.m1 == s.n2 == 1, _left),
    Route("left", routes.single_column, lambda s: s.few and s.terms == s.n2 == 1, _left),
    Route(
        "left",
        routes.left_first_by_blocks,
        lambda s: s.blocks and identity_block(s.m1, s.n1, s.m2) > 0,
        lambda s: _left(s, identity_block(s.m1, s.n1, s.m2)),
    ),
    Route("left", routes.left_first, _always, _left),
    Route("formed", routes.formed, _always, lambda s: s.m1 * s.m2 * s.n1 * s.n2),
)
"""Of the routes with the chosen order, the first that fits is taken."""


def choose(sizes: Sizes, order: Order | None = None) -> Route:
    """The route to take: of the cheaper order, or of the one that is given.

    W is formed where the factored product costs more multiply-adds than the dense one, on so many vectors that this
    pays for the forming.

    Raises:
        ShapeError: ``order`` is unknown.
    """
    if order is None:
        terms, m1, n1, m2, n2, vectors = sizes
        order = cheaper_order((m1, n1), (m2, n2), terms)
        if vectors is not None:
            dense = m1 * m2 * n1 * n2
            factored = (_right if order == "right" else _left)(sizes)
            if vectors * (factored - dense) > _FORMING * terms * dense:
                order = "formed"
    for route in ROUTES:
        if route.order == order and route.fits(sizes):
            return route
    raise ShapeError(f"order={order}: not one of right, left, formed")


@lru_cache(maxsize=4096)
def _remembered(order: Order | None, *sizes: int) -> Route:
    """``choose``, whose few microseconds count for a single vector."""
    return choose(Sizes(*sizes), order)


def kronecker_linear(
    x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None, order: Order | None = None
) -> Tensor:
    """W x + bias for W = sum_r left[r] (x) right[r], without forming W where that is cheaper.

    Args:
        x: (..., N); any leading shape, none and empty ones included.
        left: (R, m1, n1).
        right: (R, m2, n2).
        bias: (M,).
        order: which factors come first, ``right`` or ``left``, or ``formed`` to multiply by W itself. None takes what
            is cheapest. A graph that ``torch.export`` records is to serve any number of vectors and to hold the
            factors: None never forms W there.

    Returns:
        (..., M).

    Raises:
        ShapeError: the last side of ``x`` is not N, or ``order`` is unknown.
    """
    terms, m1, n1 = left.shape
    _, m2, n2 = right.shape
    if x.dim() == 0 or x.shape[-1] != n1 * n2:
        raise ShapeError(f"x={list(x.shape)}: last side must be {n1 * n2} for {m1}x{n1}(x){m2}x{n2}")
    vectors = x.numel() // (n1 * n2)
    if torch.compiler.is_compiling():  # a compiler traces the choice, and warns of a cache
        known = None if torch.compiler.is_exporting() else vectors
        route = choose(Sizes(terms, m1, n1, m2, n2, known), order)
    else:
        route = _remembered(order, terms, m1, n1, m2, n2, vectors)
    return route.apply(x, left, right, bias)
