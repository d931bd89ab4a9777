"""Same random numbers in every test, and few, repeatable hypothesis examples."""

import pytest
import torch
from hypothesis import settings

pytest.register_assert_rewrite("contracts.factorisation")
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=25, database=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Each test starts from the same seed."""
    torch.manual_seed(0)
