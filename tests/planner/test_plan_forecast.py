"""What plan will need, told from the config alone."""

import pytest
from transformers import LlamaConfig

from kncompress.anatomy.sites import anatomy_of
from kncompress.compression import forecast as module
from kncompress.config import FitConfig, ModelConfig, PlanConfig
from kncompress.errors import UserError
from kncompress.planner.ladder import unmeasured_table
from kncompress.planner.plan_forecast import plan_forecast
from kncompress.planner.sensitivity import TOGETHER_ROOM


def of(layers=20, width=512, table=None, tokens=2048, **keys):
    fields = LlamaConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, dtype="bfloat16"
    )
    config = PlanConfig(**{"model": ModelConfig(path="somewhere")} | keys)
    config.calibration.tokens = tokens
    return plan_forecast(config, fields, table)


def test_layers_cost_disk_and_time_but_no_memory_beyond_what_the_text_does():
    """Weights at two shares have 67 MB each, and states 0.27 GB, before they go to files."""
    small, large = (of(layers, width=2048, tokens=1024, harms="gradients", sums=False) for layers in (40, 80))
    assert large.memory == pytest.approx(small.memory, rel=1e-6)
    assert large.operations > 1.9 * small.operations
    numbers = large.numbers - small.numbers
    assert large.disk - small.disk > 2 * 4 * 0.9 * numbers


def test_a_model_of_gguf_is_read_as_a_whole_and_laid_down_in_files():
    """Beyond what its fits need it takes memory for its numbers alone."""
    file = ModelConfig(path="somewhere", gguf_file="a.gguf")
    plain, small, large = of(40), of(40, model=file), of(900, model=file)
    assert small.memory == plain.memory and large.memory == module.PROGRAM + 4 * (large.numbers + 2 * 1000 * 512)
    assert small.disk - plain.disk == pytest.approx(4 * small.numbers, rel=1e-6)


def test_harms_that_are_known_take_nothing_but_the_program():
    fields = LlamaConfig(vocab_size=1000, hidden_size=512, intermediate_size=1536, num_hidden_layers=20)
    table = unmeasured_table(anatomy_of(fields), 1)
    known = of(table=table, harm="somewhere")
    assert known.memory == module.PROGRAM and known.operations == 0 and known.disk < 1e7
    measured = of(table=table, harm="somewhere", measure=True)
    assert known.memory < measured.memory <= of().memory
    assert known.disk < measured.disk <= of().disk


def test_disk_is_the_moments_and_the_student():
    inputs, both = of(10, fit=FitConfig(sides="inputs"), measure=False), of(10, measure=False)
    read, felt = 3 * 512**2 + 1536**2, 5 * 512**2 + 2 * 1536**2
    shares = 2 * (4 * 10 * (4 * 512**2 + 3 * 3 * 512**2) - TOGETHER_ROOM)
    assert inputs.disk == pytest.approx(4 * (10 * read + 512**2) + shares, rel=0.05)
    assert both.disk == pytest.approx(4 * (10 * (read + felt) + 2 * 512**2) + shares, rel=0.05)
    few, measured = of(4, measure=False), of(4, budget=0.9)
    assert measured.disk - few.disk == pytest.approx(4 * 0.9 * few.numbers, rel=1e-3)


def test_longer_texts_and_forward_passes_for_each_map_take_longer():
    by_gradients = of(harms="gradients", sums=False)
    assert of(tokens=16384, harms="gradients", sums=False).operations > 1.1 * by_gradients.operations
    assert of(sums=False, harms="measured").operations > 1.1 * by_gradients.operations
    assert of().operations > of(sums=False).operations


def test_too_little_is_one_line_that_names_plan(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "available_memory", lambda: 10**8)
    with pytest.raises(UserError, match=r"model: 0\.1 GB of memory are free, and plan needs \d+\.\d GB of memory"):
        of().check(tmp_path)
