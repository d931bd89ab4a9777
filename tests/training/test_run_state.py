"""Random numbers of a run: each process draws its own, and a resumed run goes on where they were."""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything

from kncompress.training.run_state import RunState, random_state, restore_random_state


def draws() -> tuple[Any, ...]:
    """A few numbers of every generator; an odd number of normal ones, so that one is left over."""
    return torch.rand(3).tolist(), np.random.normal(), np.random.rand(), random.gauss(0, 1), random.random()


def begun(state: RunState, rank: int, seed: int = 5) -> list[float]:
    """What dropout would draw first in the process ``rank``, all of which were seeded alike."""
    torch.manual_seed(seed)
    state.on_train_start(SimpleNamespace(global_rank=rank), None)
    return torch.rand(4).tolist()


def test_every_process_drops_out_other_units() -> None:
    ranks = [begun(RunState(5), rank) for rank in range(3)]
    assert len({tuple(rank) for rank in ranks}) == 3
    assert ranks == [begun(RunState(5), rank) for rank in range(3)]
    torch.manual_seed(5)
    assert ranks[0] == torch.rand(4).tolist()  # a run of one process is that of its seed
    assert ranks[1] != begun(RunState(6), 1, 6)


def test_a_resumed_process_takes_up_its_own_row() -> None:
    states, wanted = [], []
    for seed in (1, 2):
        seed_everything(seed, verbose=False)
        draws()
        states.append(random_state())
        wanted.append(draws())
    resumed = RunState(0)
    resumed.load_state_dict({"random": torch.stack(states), "wandb_id": None})
    for rank in (1, 0):
        resumed.on_train_start(SimpleNamespace(global_rank=rank), None)
        assert draws() == wanted[rank]


def test_a_process_that_was_not_there_draws_its_own() -> None:
    resumed = RunState(5)
    seed_everything(1, verbose=False)
    resumed.load_state_dict({"random": random_state()[None], "wandb_id": None})
    assert begun(resumed, 1) == begun(RunState(5), 1) != begun(resumed, 0)


@pytest.mark.parametrize(("before", "now"), [(1, 3), (6, 2), (2, 2)])
def test_micro_batches_are_recounted_where_a_step_has_others(before: int, now: int) -> None:
    saved = {"ready": 4 * before, "started": 4 * before, "processed": 4 * before, "completed": 4 * before - 1}
    progress = {"total": dict(saved), "current": dict(saved), "is_last_batch": False}
    checkpoint = {"loops": {"fit_loop": {"epoch_loop.batch_progress": progress}}}
    state = RunState(0)
    state.on_save_checkpoint(SimpleNamespace(accumulate_grad_batches=before), None, checkpoint)
    state.on_load_checkpoint(SimpleNamespace(accumulate_grad_batches=now), None, checkpoint)
    wanted = {"ready": 4 * now, "started": 4 * now, "processed": 4 * now, "completed": 4 * now - 1}
    assert progress == {"total": wanted, "current": wanted, "is_last_batch": False}


def test_a_checkpoint_holds_the_state_and_the_wandb_run() -> None:
    seed_everything(3, verbose=False)
    saved = RunState(3, "abc").state_dict()
    wanted = draws()
    assert saved["random"].shape[0] == 1 and saved["wandb_id"] == "abc"
    resumed = RunState(3)
    resumed.load_state_dict(saved)
    resumed.on_train_start(SimpleNamespace(global_rank=0), None)
    assert draws() == wanted


def test_states_of_all_generators_come_back() -> None:
    for _ in range(2):  # the second time with normal numbers left over
        state, first = random_state(), draws()
        restore_random_state(state)
        assert draws() == first
