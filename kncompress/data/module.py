"""The Lightning datamodule of text: blocks for training in a resumable order, blocks for validation."""

from typing import Any

import lightning as L
from torch.utils.data import DataLoader, Subset

from kncompress.config import DataConfig
from kncompress.data.sampler import EndlessSampler
from kncompress.data.tokenizer import ignored_token
from kncompress.data.tokens import Blocks, token_stream


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
    ) -> None:
        super().__init__()
        self.config, self.tokenizer, self.context, self.seed = config, tokenizer, context, seed
        self.micro_batch, self.step_blocks, self.validation_blocks = (
            micro_batch,
            step_blocks,
            validation_blocks,
        )
        self.consumed = 0

    def blocks(self, split: str) -> Blocks:
        """Blocks of a split, tokenised at the first call."""
        stream = token_stream(self.config, split, self.tokenizer)
        return Blocks(stream, self.context, ignored_token(self.tokenizer))

    def train_dataloader(self) -> DataLoader:
        blocks = self.blocks("train")
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sampler = EndlessSampler(len(blocks), self.seed, self.consumed, rank, ranks)
        return DataLoader(blocks, batch_size=self.micro_batch, sampler=sampler)

    def val_dataloader(self) -> DataLoader:
        blocks = self.blocks("validation")
        kept = range(min(len(blocks), self.validation_blocks or len(blocks)))
        return DataLoader(Subset(blocks, kept), batch_size=self.micro_batch)

    def state_dict(self) -> dict[str, int]:
        steps = self.trainer.global_step if self.trainer else 0
        return {"consumed": steps * self.step_blocks, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.consumed = state["consumed"]
