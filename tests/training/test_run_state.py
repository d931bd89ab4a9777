"""Random numbers of a run: each process draws its own, and a resumed run goes on where they were."""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
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
