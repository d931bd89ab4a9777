"""Seconds of calls that take turns, so that whatever else the machine does slows all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

_LEAST = 0.02
"""Seconds that one timing lasts at least; shorter calls are repeated within it."""
_MOST_CALLS = 200
_MOST_SECONDS, _LEAST_ROUNDS = 20.0, 3
"""Most seconds for one figure, and the fewest rounds even if they take longer (fewer where fewer are asked for)."""


@dataclass(frozen=True)
class Rounds:
    """Seconds of each call, one for each round."""

    seconds: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        """Median over the rounds."""
        return statistics.median(self.seconds[name])

    @property
    def medians(self) -> dict[str, float]:
        """Of all calls."""
        return {name: self.median(name) for name in self.seconds}

    def ratio(self, slower: str, faster: str) -> float:
        """How many times as long ``slower`` takes: median of the ratios of each round."""
        pairs = zip(self.seconds[slower], self.seconds[faster], strict=True)
        return statistics.median(slow / fast for slow, fast in pairs)


def once(call: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Seconds of one call; of a GPU until its work is done."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - began) / calls


def alternate(calls: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> Rounds:
    """Time ``calls`` in turn, ``repeats`` times after two calls each to warm up; fewer times where that takes long.

    The first of one round is the last of the next, so that none always follows the same other.
    """
    counts, round_seconds = {}, 0.0
    for name, call in calls.items():
        once(call, device)
        single = once(call, device)
        counts[name] = max(1, min(_MOST_CALLS, round(_LEAST / single)))
        round_seconds += counts[name] * single
    repeats = min(repeats, max(_LEAST_ROUNDS, int(_MOST_SECONDS / round_seconds)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for _ in range(repeats):
        for name in order:
            seconds[name].append(once(calls[name], device, counts[name]))
        order = order[1:] + order[:1]
    return Rounds(seconds)


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
