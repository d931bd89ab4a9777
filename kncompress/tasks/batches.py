"""How a number of training tokens becomes blocks, forward passes and optimiser steps."""

import math
from dataclasses import dataclass

from kncompress.config import TrainerConfig


@dataclass(frozen=True)
class BatchPlan:
    """Sizes of one training run. Blocks are ``context`` tokens long."""

    context: int
    step_blocks: int
    """Blocks of one optimiser step, over all devices."""
    micro_batch: int
    """Blocks of one forward pass on one device."""
    accumulate: int
    """Forward passes of one device in an optimiser step."""
    steps: int

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimiser step."""
        return self.step_blocks * self.context

    @property
    def tokens(self) -> int:
        """Training tokens of the whole run."""
        return self.steps * self.step_tokens


def plan_batches(config: TrainerConfig, context: int, blocks: int) -> BatchPlan:
    """Batches of a run over a text of ``blocks`` blocks.

    A step has about ``batch_tokens`` tokens whatever the number of devices; a forward pass at most
    ``micro_batch_tokens`` where one block fits in them.
    """
    device_blocks = max(1, round(config.batch_tokens / context / config.devices))
    most = max(1, config.micro_batch_tokens // context)
    micro_batch = max(n for n in range(1, device_blocks + 1) if device_blocks % n == 0 and n <= most)
    step_blocks = device_blocks * config.devices
    tokens = config.tokens or blocks * context
    steps = config.steps or math.ceil(tokens / (step_blocks * context))
    return BatchPlan(context, step_blocks, micro_batch, device_blocks // micro_batch, steps)
