"""Same random numbers in every test, and few, repeatable hypothesis examples."""

import pytest
import torch
from hypothesis import settings

pytest.register_assert_rewrite("contracts.factorisation")
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=25, database=None)
settings.load_profile("repeatable")

LONG = (
    "test_wheel.py",
    "test_processes.py",
    "test_sharded.py",
    "test_export.py",
    "test_bench_verb.py",
    "test_generate.py",
)
"""Files that take a minute or more."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files begin first: where processes share them, none is left alone with one at the end."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Each test starts from the same seed."""
    torch.manual_seed(0)
