"""A plan of a model whose weights lie in files is that of the model in memory, with one layer of it in float32."""

import copy
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import config_of, random_model

from kncompress.anatomy import mapped
from kncompress.compression import rows
from kncompress.compression.compress import compress_
from kncompress.compression.layerwise import CalibrationText
from kncompress.compression.student_plan import StudentPlan
from kncompress.config import FactorsConfig, FitConfig, ModelConfig, PlanConfig, RepairConfig
from kncompress.evaluation import compare
from kncompress.formats.pretrained import load_model, load_stored, save_model
from kncompress.planner import harm, planning, sensitivity
from kncompress.planner.budget import spend
from kncompress.planner.planning import fit_and_score
from kncompress.planner.sensitivity import measure_harms

KINDS = ("gpt2", "llama.untied", "gemma2")


@pytest.fixture(params=KINDS)
def both(request, tmp_path):
    """The same model in float32 and in memory, and in bfloat16 and in its files."""
    folder = save_model(random_model(config_of(request.param)), tmp_path / "dense", dtype=torch.bfloat16)
    return load_model(folder, dtype=torch.float32), load_stored(folder)


@pytest.fixture
def text():
    return CalibrationText(np.random.default_rng(0).integers(2, 96, 256), context=16, batch_tokens=64)


def stays(model):
    """Fails where a weight is no longer that of its file."""
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    if sys.platform == "linux":
        files = mapped._mapped_files()
        assert all(mapped._end_of_file(files, p.data) is not None for p in model.parameters())


@pytest.mark.parametrize("harms", ["gradients", "measured"])
@pytest.mark.parametrize("room", [1 << 28, 0])
def test_harms_are_those_of_the_whole_model(both, text, harms, room, tmp_path, monkeypatch):
    """Every number, also where states and weights find no room in memory."""
    exact, stored = both
    before = {name: tensor.clone() for name, tensor in stored.state_dict().items()}
    settings = FitConfig(sweeps=1, sides="both")
    wanted = measure_harms(exact, text, text, settings, harms=harms, sums=harms == "measured")
    for module, name in ((rows, "ROOM"), (harm, "ROOM"), (sensitivity, "TOGETHER_ROOM")):
        monkeypatch.setattr(module, name, room)
    read = replace(text, scratch=tmp_path, room=room)
    assert measure_harms(stored, read, read, settings, harms=harms, sums=harms == "measured") == wanted
    stays(stored)
    assert all(torch.equal(tensor, before[name]) for name, tensor in stored.state_dict().items())


@pytest.mark.parametrize("passes", [0, 1])
def test_a_plan_is_measured_as_the_student_in_memory_is(both, text, passes, tmp_path, monkeypatch):
    exact, stored = both
    plan = spend(measure_harms(exact, text, text, FitConfig(), sums=False), 0.7)
    config = PlanConfig(model=ModelConfig(path="somewhere"), validation_tokens=64, repair=RepairConfig(passes=passes))
    tokens = np.random.default_rng(1).integers(2, 96, 256)
    monkeypatch.setattr(planning, "token_stream", lambda *_: SimpleNamespace(tokens=tokens, first=None))
    monkeypatch.setattr(planning, "ignored_token", lambda _: None)
    student = copy.deepcopy(exact)
    maps = StudentPlan.of(FactorsConfig(maps=plan.maps), exact.config).maps
    wanted = compress_(student, maps, config.start, None, None, text, config.fit, config.repair)
    score = compare(exact, student, tokens, text.context, limit=64)
    made, found = fit_and_score(config, stored, None, text, plan, tmp_path / "parts")
    assert found == score and made.rows == wanted.rows and made.parameters_after == wanted.parameters_after
    stays(stored)
