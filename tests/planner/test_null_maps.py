"""Maps and whole models that are null: planned and compressed as others are, with finite numbers."""

import copy
import math

import numpy as np
import pytest
import torch
from tiny_models import config_of, random_model

from kncompress.anatomy.plan import plan_from_config
from kncompress.compression.compress import compress_
from kncompress.compression.layerwise import CalibrationText
from kncompress.config import FactorsConfig, FitConfig
from kncompress.planner.budget import spend
from kncompress.planner.sensitivity import measure_harms

NULL = {
    "values": lambda model: model.model.layers[1].self_attn.v_proj.weight,  # its output map reads nothing but 0
    "hidden": lambda model: model.model.layers[2].mlp.up_proj.weight,
    "embedding": lambda model: model.model.embed_tokens.weight,
}


@pytest.mark.parametrize("null", [*NULL, "all"])
def test_a_plan_of_null_maps_is_made_and_carried_out(null):
    model = random_model(config_of("llama.untied"))
    with torch.no_grad():
        for parameter in model.parameters() if null == "all" else [NULL[null](model)]:
            parameter.zero_()
    text = CalibrationText(np.random.default_rng(0).integers(2, 96, 64), context=16)
    plan = spend(measure_harms(model, text, text, FitConfig()), 0.7)
    assert math.isfinite(plan.kl)
    assert all(math.isfinite(option.error) for row in plan.table.maps for option in row.options)
    student = copy.deepcopy(model)
    factors = plan_from_config(FactorsConfig(maps=plan.maps), model.config)
    made = compress_(student, factors, "calibrated", text=text)
    assert made.parameters_after == plan.parameters <= plan.budget
    assert all(torch.isfinite(parameter).all() for parameter in student.parameters())
