"""The Lightning datamodule of text: blocks for training in a resumable order, blocks for validation."""

from typing import Any

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kncompress.config import DataConfig
from kncompress.data.sampler import EndlessSampler
from kncompress.data.tokenizer import ignored_token
from kncompress.data.tokens import IGNORED_LABEL, Blocks, TokenStream, token_stream


class Share(Dataset[dict[str, Tensor]]):
    """Every ``ranks``-th of ``count`` blocks, which are spread evenly over all, from ``rank`` on.

    All ranks get equally many, because they work in step. Where the blocks cannot be shared evenly, the last one is
    repeated without labels, and no metric counts it.
    """

    def __init__(self, blocks: Blocks, count: int, rank: int = 0, ranks: int = 1) -> None:
        self.blocks, self.count, self.rank, self.ranks = blocks, count, rank, ranks

    def __len__(self) -> int:
        return -(-self.count // self.ranks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        position = index * self.ranks + self.rank
        block = self.blocks[min(position, self.count - 1) * len(self.blocks) // self.count]
        if position < self.count:
            return block
        return block | {"labels": block["labels"].new_full((), IGNORED_LABEL).expand_as(block["labels"])}


class TextDataModule(L.LightningDataModule):
    """Training and validation blocks of a text.

    ``micro_batch`` is the number of blocks in one forward pass, ``step_blocks`` that of one optimiser step over all
    devices. Its state is the number of blocks consumed, taken from the trainer's optimiser steps, so that a batch
    that was fetched ahead and never trained on is not lost.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Any,
        context: int,
        micro_batch: int,
        step_blocks: int,
        seed: int = 0,
        validation_blocks: int | None = None,
        numbered: bool = False,
        unseen: TokenStream | None = None,
    ) -> None:
        super().__init__()
        self.config, self.tokenizer, self.context, self.seed = config, tokenizer, context, seed
        self.micro_batch, self.step_blocks, self.validation_blocks = micro_batch, step_blocks, validation_blocks
        self.numbered = numbered
        """Whether training blocks tell their number."""
        self.unseen = unseen
        """A text that is validated on beside the validation split."""
        self.consumed = 0

    def blocks(self, split: str) -> Blocks:
        """Blocks of a split, tokenised at the first call."""
        stream = token_stream(self.config, split, self.tokenizer)
        return self._cut(stream)

    def _cut(self, stream: TokenStream) -> Blocks:
        return Blocks(stream, self.context, ignored_token(self.tokenizer))

    def train_dataloader(self) -> DataLoader:
        blocks = self.blocks("train")
        blocks.numbered = self.numbered
        sampler = EndlessSampler(len(blocks), self.seed, self.consumed, *self._place())
        return DataLoader(blocks, batch_size=self.micro_batch, sampler=sampler)

    def val_dataloader(self) -> list[DataLoader]:
        """The validation split, then the unseen text where there is one; at most ``validation_blocks`` of each."""
        texts = [self.blocks("validation")] + ([] if self.unseen is None else [self._cut(self.unseen)])
        return [DataLoader(self._share(blocks), batch_size=self.micro_batch) for blocks in texts]

    def _share(self, blocks: Blocks) -> Share:
        return Share(blocks, min(len(blocks), self.validation_blocks or len(blocks)), *self._place())

    def _place(self) -> tuple[int, int]:
        """Rank of this process, and the number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def state_dict(self) -> dict[str, int]:
        steps = self.trainer.global_step if self.trainer else 0
        return {"consumed": steps * self.step_blocks}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.consumed = state["consumed"]
