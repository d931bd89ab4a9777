"""What this machine can do at best: the speed of a large matrix product and of a copy."""

import statistics
from dataclasses import dataclass

import torch

from kncompress.bench.timing import once

_REPEATS = 5


@dataclass(frozen=True)
class Ceiling:
    """Measured limits of a device, for one type of numbers."""

    flops: float
    """Floating-point operations a second of a large matrix product; a multiply-add is two."""
    bandwidth: float
    """Bytes a second that a copy of large tensors reads and writes."""

    def seconds(self, flops: float, numbers_of_bytes: float) -> float:
        """The least time for so many operations and so many bytes moved, whichever takes longer."""
        return max(flops / self.flops, numbers_of_bytes / self.bandwidth)


def measure_ceiling(device: torch.device, dtype: torch.dtype, side: int, copied: int) -> Ceiling:
    """Median of five products of (``side``, ``side``) matrices, and of five copies of ``copied`` bytes."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)  # pages are there
    out = a @ b
    products = [once(lambda: torch.mm(a, b, out=out), device) for _ in range(_REPEATS)]
    copies = [once(lambda: target.copy_(source), device) for _ in range(_REPEATS)]
    return Ceiling(2 * side**3 / statistics.median(products), 2 * copied / statistics.median(copies))
