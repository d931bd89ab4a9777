"""The presets in conf/factors have the published sizes on GPT-2 small, and scale to other widths."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from kncompress.anatomy.plan import plan_from_config
from kncompress.compression.compress import unique_parameters
from kncompress.compression.student_plan import StudentPlan
from kncompress.config import FactorsConfig
from kncompress.training.student import factor_

FOLDER = Path(__file__).parents[2] / "conf" / "factors"

PARAMETERS = {
    "dense": 124_439_808,
    "kngpt2": 83_907_530,
    "kngpt2_odd_ffn": 90_985_370,
    "kronypt_81m": 81_972_576,
    "kronypt_80m": 80_400_048,
    "layerdrop": 81_912_576,
}


def preset(name):
    merged = OmegaConf.merge(OmegaConf.structured(FactorsConfig), OmegaConf.load(FOLDER / f"{name}.yaml"))
    return OmegaConf.to_object(merged)


def test_every_preset_is_counted():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_unique_parameters_of_gpt2_small(name):
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    table = factor_(model, StudentPlan.of(preset(name), model.config), "nearest")
    assert table.parameters_after == unique_parameters(model) == PARAMETERS[name]
    assert table.parameters_before == PARAMETERS["dense"]


@pytest.mark.parametrize("kind", ["gpt2", "llama.untied"])
@pytest.mark.parametrize("name", PARAMETERS)
def test_presets_fit_other_widths_and_families(name, model_of_kind, ids):
    before = unique_parameters(model_of_kind)
    factor_(model_of_kind, StudentPlan.of(preset(name), model_of_kind.config), "nearest")
    assert model_of_kind(ids).logits.isfinite().all()
    assert (unique_parameters(model_of_kind) < before) == (name != "dense")


SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


UP, LAYER, EMBEDDING = 1536 * 576, 4 * 1536 * 576 + 2 * 576, 49152 * 576  # attention: 2 * 576 * (576 + 192)
SAVED = {
    "dense": 0,
    "kngpt2": (EMBEDDING // 2 - 2) + 15 * (4 * UP // 2 - 7 * 2),
    "kngpt2_odd_ffn": (EMBEDDING // 2 - 2) + 15 * 3 * (UP // 2 - 2),
    "kronypt_80m": 30 * 3 * (UP - 2 * (UP // 9 + 9)),
    "kronypt_81m": 30 * 3 * (UP - (UP // 4 + 4)),
    "layerdrop": 15 * LAYER,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_unique_parameters_of_smollm2(name):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SMOLLM2_135M))
    table = factor_(model, StudentPlan.of(preset(name), model.config), "nearest")
    assert table.parameters_before == 134_515_008
    assert table.parameters_after == unique_parameters(model) == 134_515_008 - SAVED[name]


def test_kngpt2_is_odd_layers_and_tied_head():
    shapes = plan_from_config(preset("kngpt2"), GPT2Config()).resolve(GPT2Config())
    assert {int(name.split(".")[1]) for name in shapes if "." in name} == {1, 3, 5, 7, 9, 11}
    assert str(shapes["embedding"]) == "50257x384(x)1x2"
    assert str(shapes["layers.1.mlp.up"]) == "1536x768(x)2x1"
    assert str(shapes["layers.1.mlp.down"]) == "768x1536(x)1x2"
    assert len(shapes) == 1 + 6 * 6


def test_kronypt_80m_shapes():
    shapes = plan_from_config(preset("kronypt_80m"), GPT2Config()).resolve(GPT2Config())
    assert str(shapes["layers.0.mlp.up"]) == "1024x256(x)3x3*2"
    assert str(shapes["layers.0.mlp.down"]) == "256x1024(x)3x3*2"
