"""A text's rows divided over the processes of a training, also of one that goes on with another number of them."""

import itertools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kncompress.config import DataConfig, TrainerConfig
from kncompress.data.module import TextDataModule
from kncompress.data.tokens import Blocks, TokenStream
from kncompress.errors import UserError
from kncompress.training.batches import plan_batches

CONTEXT, STEP = 3, 12


class Numbered(TextDataModule):
    """Its training text has ``rows`` rows; row n is 3n, 3n + 1, 3n + 2."""

    def __init__(self, rows: int, micro_batch: int, step_blocks: int) -> None:
        super().__init__(DataConfig(), None, CONTEXT, micro_batch, step_blocks, seed=5)
        self.rows = rows

    def blocks(self, split: str) -> Blocks:
        return Blocks(TokenStream(np.arange(self.rows * CONTEXT + 1, dtype=np.uint16), 1, 0), CONTEXT)


def read(
    rows: int, ranks: int, micro: int, steps: int, state: dict[str, int]
) -> tuple[list[list[int]], dict[str, int]]:
    """Rows of each of ``steps`` optimiser steps of a training by ``ranks`` processes, and the state that is saved then.

    Every process has a loader of its own, as Lightning gives it one; ``state`` is that of an earlier part.
    """
    plan = plan_batches(
        TrainerConfig(batch_tokens=STEP * CONTEXT, micro_batch_tokens=micro * CONTEXT), CONTEXT, rows, ranks
    )
    before = state["consumed"] // plan.step_blocks
    read_by = []
    for rank in range(ranks):
        module = Numbered(rows, plan.micro_batch, plan.step_blocks)
        module.trainer = SimpleNamespace(global_rank=rank, world_size=ranks, global_step=before + steps)
        module.load_state_dict(state)
        loader = iter(module.train_dataloader())
        batches = ((next(loader)["input_ids"][:, 0] // CONTEXT).tolist() for _ in range(steps * plan.accumulate))
        own = list(itertools.chain(*batches))
        share = len(own) // steps if steps else 0
        read_by.append([own[step * share : (step + 1) * share] for step in range(steps)])
    found = [list(itertools.chain(*turn)) for turn in zip(*read_by, strict=True)]
    return found, module.state_dict()


parts = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(0, 4)), min_size=1, max_size=5)


@settings(max_examples=60)
@given(rows=st.integers(1, 70), parts=parts)
def test_every_row_is_read_once_whatever_processes_go_on(rows: int, parts: list[tuple[int, int, int]]) -> None:
    """``parts``: processes, rows at once and optimiser steps of each part of a training."""
    state, steps = {"consumed": 0}, []
    for ranks, micro, count in parts:
        found, state = read(rows, ranks, micro, count, state)
        steps += found
    alone, _ = read(rows, 1, STEP, len(steps), {"consumed": 0})
    assert [sorted(step) for step in steps] == [sorted(step) for step in alone]
    order = list(itertools.chain(*alone))
    for epoch in range(len(order) // rows):
        assert sorted(order[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    times = Counter(itertools.chain(*steps))
    assert sum(times.values()) == len(steps) * STEP
    assert not steps or max(times.values()) - min(times[row] for row in range(rows)) <= 1


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_one_epoch_is_every_row_once(ranks: int) -> None:
    found, state = read(5 * STEP, ranks, 2, 2, {"consumed": 0})
    assert state == {"consumed": 2 * STEP}
    for others in range(1, 5):
        rest, _ = read(5 * STEP, others, 1, 3, state)
        assert sorted(itertools.chain(*found, *rest)) == list(range(5 * STEP))


def test_processes_that_cannot_share_a_step_are_refused() -> None:
    with pytest.raises(UserError, match=r"trainer\.batch_tokens=36: .* cannot be shared evenly by 5 processes"):
        read(60, 5, 1, 1, {"consumed": 0})
