"""Values out of range are one line before anything is read."""

import pytest

from kncompress.config import DataConfig, EvaluateConfig, GlueConfig, PlanConfig, TrainConfig
from kncompress.errors import UserError


@pytest.mark.parametrize("config", [TrainConfig, EvaluateConfig, GlueConfig, PlanConfig])
@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds(config, seed):
    with pytest.raises(UserError, match=f"^seed={seed}: must lie between 0 and 4294967295$"):
        config(seed=seed)
    assert config(seed=2**32 - 1).seed == 2**32 - 1


def test_seeds_and_windows_of_the_text():
    with pytest.raises(UserError, match=r"^data\.seed=-3: must lie between"):
        DataConfig(seed=-3)
    with pytest.raises(UserError, match=r"^data\.context=1: must be 2 or more$"):
        DataConfig(context=1)
    with pytest.raises(UserError, match=r"^context=1: must be 2 or more$"):
        EvaluateConfig(context=1)
