"""The order in which blocks are seen, as a pure function of (seed, epoch, consumed)."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class EndlessSampler(Sampler[int]):
    """Seeded permutations of the blocks, one an epoch, from position ``consumed`` on, without end.

    Position p lies in epoch p // n; every block is seen once before any is seen twice, and a run that starts at
    ``consumed`` continues exactly where one that stopped there would have gone on. Rank r of w takes every w-th
    position from r.
    """

    def __init__(self, blocks: int, seed: int, consumed: int = 0, rank: int = 0, ranks: int = 1) -> None:
        if blocks < 1:
            raise ValueError(f"blocks={blocks}: at least one block is needed")
        self.blocks, self.seed, self.consumed, self.rank, self.ranks = blocks, seed, consumed, rank, ranks

    def order(self, epoch: int) -> list[int]:
        """Block numbers in the order of an epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.blocks, generator=generator).tolist()

    def __iter__(self) -> Iterator[int]:
        position = self.consumed + self.rank
        epoch, order = -1, []
        while True:
            if position // self.blocks != epoch:
                epoch = position // self.blocks
                order = self.order(epoch)
            yield order[position % self.blocks]
            position += self.ranks
