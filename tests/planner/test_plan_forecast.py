"""What plan will need, told from the config alone."""

import pytest
from transformers import LlamaConfig

from kncompress.anatomy.sites import anatomy_of
from kncompress.compression import forecast as module
from kncompress.config import FitConfig, ModelConfig, PlanConfig
from kncompress.errors import UserError
from kncompress.planner.ladder import unmeasured_table
from kncompress.planner.plan_forecast import plan_forecast


def of(layers=20, width=512, table=None, tokens=2048, **keys):
    fields = LlamaConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, dtype="bfloat16"
    )
    config = PlanConfig(model=ModelConfig(path="somewhere"), **keys)
    config.calibration.tokens = tokens
    return plan_forecast(config, fields, table)


def test_the_model_is_held_in_float32_and_so_are_all_maps_at_two_shares():
    """Unlike of compress, whose memory does not depend on the number of layers."""
    small, large = of(20, tokens=1024), of(40, tokens=1024)
    numbers = large.numbers - small.numbers
    maps = 20 * (4 * 512**2 + 3 * 3 * 512**2)
    states = 20 * 4 * 1024 * 512 + 20 * 2 * 4 * 1024 * 512
    assert large.memory - small.memory == pytest.approx(4 * numbers + 2 * 4 * maps + states, rel=0.02)


def test_harms_that_are_known_take_nothing_but_the_program():
    fields = LlamaConfig(vocab_size=1000, hidden_size=512, intermediate_size=1536, num_hidden_layers=20)
    table = unmeasured_table(anatomy_of(fields), 1)
    known = of(table=table, harm="somewhere")
    assert known.memory == module.PROGRAM and known.operations == 0 and known.disk < 1e7
    measured = of(table=table, harm="somewhere", measure=True)
    assert known.memory < measured.memory <= of().memory


def test_disk_is_the_moments():
    inputs, both = of(fit=FitConfig(sides="inputs")), of()
    read, felt = 3 * 512**2 + 1536**2, 5 * 512**2 + 2 * 1536**2
    assert inputs.disk == pytest.approx(4 * (20 * read + 512**2), rel=0.05)
    assert both.disk == pytest.approx(4 * (20 * (read + felt) + 2 * 512**2), rel=0.05)


def test_longer_texts_and_forward_passes_for_each_map_take_longer():
    by_gradients = of(harms="gradients", sums=False)
    assert of(tokens=16384, harms="gradients", sums=False).operations > 1.1 * by_gradients.operations
    assert of(sums=False, harms="measured").operations > 1.1 * by_gradients.operations
    assert of().operations > of(sums=False).operations


def test_too_little_is_one_line_that_names_plan(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "available_memory", lambda: 10**8)
    with pytest.raises(UserError, match=r"model: 0\.1 GB of memory are free, and plan needs \d+\.\d GB of memory"):
        of().check(tmp_path)
