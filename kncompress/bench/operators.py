"""Which of torch's operators a call spends its time in: the explanation of a figure that falls short."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from kncompress.bench.timing import once

_CALLS, _LONG = 5, 0.5
"""Calls that are profiled; one alone where it takes so many seconds: the profiler keeps note of every operator."""
_MOST = 7
"""Operators named; the rest is one sum."""
REST = "rest"
_PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "mv", "addmv", "addmv_")


def time_by_operator(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Shares of the time of ``call``, warm, largest first: of the device's kernels on a GPU, else of operators, matrix
    products by their sizes.

    A profiler lengthens what takes microseconds, so that the rest of a call of many small operators looks larger than
    it is.
    """
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    calls = 1 if once(call, device) > _LONG else _CALLS
    with profile(activities=activities, record_shapes=device.type == "cpu") as profiler:
        for _ in range(calls):
            call()
    own = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    spent: Counter[str] = Counter()
    for event in profiler.key_averages(group_by_input_shape=device.type == "cpu"):
        spent[_name(event)] += getattr(event, own)
    total = sum(spent.values()) or 1.0
    largest = sorted(spent, key=lambda name: -spent[name])[:_MOST]
    shares = {name: spent[name] / total for name in largest if spent[name] > 0}
    return shares | {REST: max(0.0, 1.0 - sum(shares.values()))}


def _name(event: Any) -> str:
    """``cat``; ``addmm 2048x768 768x2304`` of a matrix product."""
    name = str(event.key).removeprefix("aten::")
    if name not in _PRODUCTS:
        return name
    sides = ["x".join(map(str, shape)) for shape in event.input_shapes if len(shape) > 1]
    return " ".join([name, *sides[-2:]])


def in_words(shares: Mapping[str, float]) -> str:
    """``addmm 61%, cat 18%, ...``; what rounds to nothing is left out."""
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share >= 0.005)
