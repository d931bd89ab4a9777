"""How much work a fit is, in about multiply-adds, and how much of it is done."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from kncompress.anatomy.sites import Site
from kncompress.kron import Shape

Progress = Callable[[str, float], None]
"""Called with what is worked on, and the share of the whole work that is done."""


@dataclass
class Work:
    """How much is done, in about multiply-adds, told to ``progress``."""

    progress: Progress | None = None
    total: float = field(default=0.0, init=False)
    done: float = field(default=0.0, init=False)
    seconds_moments: float = field(default=0.0, init=False)
    """Time spent on moments."""

    def begin(self, what: str) -> None:
        """Tell what comes now."""
        if self.progress is not None:
            self.progress(what, min(1.0, self.done / self.total) if self.total else 0.0)

    def expect(self, cost: float) -> None:
        """There is more to be done."""
        self.total += cost

    @contextmanager
    def moments(self) -> Iterator[None]:
        """Count the time of this block as spent on moments."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds_moments += time.perf_counter() - began

    def finish(self, cost: float) -> None:
        """Count what is done."""
        self.done += cost


def fit_cost(site: Site, shape: Shape, calibrated: bool, sweeps: int, felt: bool = False) -> float:
    """About the multiply-adds of a fit, for the estimate of time; ``felt``: it weighs the outputs too."""
    cost = 0.0
    outputs, inputs = site.out_features, site.in_features
    size, felt = outputs * inputs, felt and site.layer is not None
    for part in shape.sums:
        (m1, n1), (m2, n2) = part.left, part.right
        cost += size * (min(m1 * n1, m2 * n2) + 20.0)
        if calibrated:
            cost += size * inputs + (0 if 1 in (n1, n2) else sweeps * 4 * part.terms * size)
        if calibrated and felt:
            cost += size * outputs + 2 * outputs**3
            if 1 not in (m1, m2):
                free = part.terms * max(m1, m2)
                solved = 2 * free**3 + free * size  # in float64, for a sweep; few are needed
                pulled = size * (outputs + inputs) * min(1.0, part.terms / max(1, min(n1, n2)))  # G X C for a half step
                cost += sweeps / 4 * solved if 1 in (n1, n2) else sweeps * 6 * pulled
    return cost


def moment_cost(sites: list[Site], tokens: int) -> float:
    """About the multiply-adds of taking the moment of an input and preparing it."""
    return sites[0].in_features ** 2 * (tokens + 4.0 * sites[0].in_features)


def layer_cost(layer: Any, tokens: int) -> float:
    """About the multiply-adds of one pass of a layer."""
    return float(tokens * sum(parameter.numel() for parameter in layer.parameters()))
