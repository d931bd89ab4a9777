"""How a number of training tokens becomes blocks, forward passes and optimiser steps."""

import math
from dataclasses import dataclass

from kncompress.config import TrainerConfig
from kncompress.errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    """Sizes of one training run. Blocks are ``context`` tokens long."""

    context: int
    step_blocks: int
    """Blocks of one optimiser step, over all processes."""
    micro_batch: int
    """Blocks of one forward pass in one process."""
    accumulate: int
    """Forward passes of one process in an optimiser step."""
    steps: int | None
    """None: as many as there is time for."""

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimiser step."""
        return self.step_blocks * self.context

    @property
    def tokens(self) -> int:
        """Training tokens of the whole run; 0 where the clock ends it."""
        return (self.steps or 0) * self.step_tokens


def blocks_of_a_step(config: TrainerConfig, context: int, processes: int = 1) -> int:
    """Blocks of one optimiser step: about ``batch_tokens``, whatever the number of processes.

    Raises:
        UserError: the processes cannot share them evenly.
    """
    blocks = max(1, round(config.batch_tokens / context))
    if blocks % processes:
        near = context * processes * max(1, round(blocks / processes))
        raise UserError(
            f"trainer.batch_tokens={config.batch_tokens}: a batch of {blocks} blocks of {context} tokens cannot be "
            f"shared evenly by {processes} processes; give a multiple of {context * processes}, such as {near}"
        )
    return blocks


def plan_batches(config: TrainerConfig, context: int, blocks: int, processes: int = 1) -> BatchPlan:
    """Batches of a run of ``processes`` over a text of ``blocks`` blocks.

    A step has about ``batch_tokens`` tokens whatever the number of processes; a forward pass at most
    ``micro_batch_tokens`` where one block fits in them. Raises UserError as ``blocks_of_a_step`` does.
    """
    step_blocks = blocks_of_a_step(config, context, processes)
    own_blocks = step_blocks // processes
    most = max(1, config.micro_batch_tokens // context)
    micro_batch = max(n for n in range(1, own_blocks + 1) if own_blocks % n == 0 and n <= most)
    tokens = config.tokens or blocks * context
    steps = None if config.minutes else config.steps or math.ceil(tokens / (step_blocks * context))
    return BatchPlan(context, step_blocks, micro_batch, own_blocks // micro_batch, steps)
