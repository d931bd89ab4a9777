"""A mean over tokens that stays right over many tokens and many processes."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenMean(Metric):
    """Sum over count, both summed over the processes of a distributed run before they are divided.

    Unlike torchmetrics' ``MeanMetric``, whose float32 states lose single tokens beyond 2^24, the sum is
    float64 and the count an integer. No token at all gives nan.

    Args:
        sync_on_compute: false in a metric that one process of several uses alone.
    """

    full_state_update = False
    is_differentiable = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, total: Tensor | float, count: Tensor | int) -> None:
        """Add ``count`` tokens whose values sum to ``total``."""
        self.total += total
        self.count += count

    def compute(self) -> Tensor:
        """Mean over all tokens of all processes; float64 scalar."""
        return self.total / self.count

    def totals(self) -> tuple[float, int]:
        """Sum and count over all processes."""
        with self.sync_context(self.dist_sync_fn, should_sync=self.sync_on_compute):
            return float(self.total), int(self.count)
