"""What compress will need, told from the config alone."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig

from kncompress.anatomy.mapped import ONE_FILE
from kncompress.compression import forecast as module
from kncompress.compression.forecast import ENDS, PROGRAM, forecast
from kncompress.compression.student_plan import StudentPlan
from kncompress.config import CompressConfig, FactorConfig, FactorsConfig, FitConfig, ModelConfig
from kncompress.errors import UserError

HALF = FactorsConfig(mlp=FactorConfig(right=[2, 1]), embedding=FactorConfig(right=[1, 2]))


def llama(layers, width=2048, hidden=5632, **fields):
    return LlamaConfig(
        vocab_size=32000, hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers, **fields
    )


def of(layers, start="nearest", tokens=4096, factors=HALF, symmetries=(), **fields):
    fit = FitConfig(symmetries=list(symmetries))
    config = CompressConfig(model=ModelConfig(path="somewhere"), factors=factors, start=start, fit=fit)
    config.calibration.tokens = tokens
    fields = llama(layers, dtype="bfloat16", **fields)
    return forecast(config, fields, StudentPlan.of(factors, fields))


@pytest.mark.parametrize("start", ["nearest", "calibrated", "sequential"])
def test_layers_cost_disk_and_time_but_no_memory(start):
    small, large = of(20, start), of(200, start)
    assert large.memory - small.memory < 1e6 < large.disk - small.disk
    assert 9 < large.operations / small.operations < 11
    assert large.memory < 0.2 * 2 * large.numbers


def test_dropped_layers_cost_no_memory():
    assert of(60, factors=replace(HALF, depth=30)).memory == of(30).memory


@pytest.mark.parametrize("which", [["hidden"], ["residual"], ["heads"]])
@pytest.mark.parametrize("start", ["nearest", "calibrated"])
def test_symmetries_hold_a_layer_and_write_the_dense_weights(which, start):
    small, large, plain = (
        of(layers, start, symmetries=some) for layers, some in ((20, which), (200, which), (200, ()))
    )
    assert large.memory - small.memory < 1e6 and plain.memory <= large.memory
    files = large.numbers * (4 if which == ["heads"] else 2)
    assert files * 0.7 < large.disk - plain.disk < 1.01 * files


def test_disk_is_the_student_and_the_files_of_states():
    near, fitted = of(100), of(100, "calibrated")
    whole = 2 * 0.5 * 1.04 * near.numbers
    assert ONE_FILE < near.disk < 2 * near.numbers and near.disk > whole / 2
    states = 2 * 4 * 4096 * 2048 * 100
    assert states * 0.9 < fitted.disk - near.disk + 2**28 < states * 1.2


def test_a_type_of_half_the_bytes_takes_half_the_disk():
    config = CompressConfig(model=ModelConfig(path="somewhere"), factors=HALF)
    fields = llama(60, dtype="float32")
    plan = StudentPlan.of(HALF, fields)
    full = forecast(config, fields, plan).disk
    config.dtype = "bfloat16"
    assert forecast(config, fields, plan).disk == pytest.approx(full / 2, rel=0.01)


def test_memory_of_the_nearest_start_is_that_of_the_embedding_or_of_one_layer():
    assert of(30).memory == PROGRAM + ENDS * 32000 * 2048
    assert of(30, width=4096, hidden=16384).memory > PROGRAM + 6 * (4 * 4096**2 + 3 * 4096 * 16384)


def test_too_little_is_told_in_one_line(monkeypatch, tmp_path):
    needs = of(30)
    needs.check(tmp_path / "not" / "there")
    monkeypatch.setattr(module, "available_memory", lambda: int(needs.memory) - 1)
    with pytest.raises(
        UserError, match=r"model: 1\.5 GB of memory are free, and compress needs 1\.5 GB of memory and "
    ):
        needs.check(tmp_path)
    monkeypatch.setattr(module, "available_memory", lambda: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    with pytest.raises(UserError, match=rf"run_dir={tmp_path}: 1\.0 GB of disk are free there, and compress needs "):
        needs.check(tmp_path)
    needs.check(tmp_path, there=10**10)


def test_this_machine_tells_its_memory():
    if Path("/proc/meminfo").exists():
        assert 10**7 < module.available_memory() < 10**14
