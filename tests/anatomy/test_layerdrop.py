"""A model of fewer layers is an ordinary model that computes what its kept layers did."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2ForSequenceClassification, GPT2LMHeadModel

from kncompress.anatomy.layerdrop import config_of_layers, keep_layers_
from kncompress.anatomy.plan import Plan, RightFactor
from kncompress.anatomy.sites import anatomy_of
from kncompress.anatomy.taps import Taps
from kncompress.compression.compress import compress_, unique_parameters
from kncompress.errors import UserError
from kncompress.formats.pretrained import load_model, save_model


def by_hand(model, layers):
    """The same weights under the new numbers, in a model that transformers builds at that depth."""
    config = copy.deepcopy(model.config)
    if getattr(config, "layer_types", None) is not None:  # Qwen
        config.layer_types = [config.layer_types[layer] for layer in layers]
    config.num_hidden_layers = len(layers)
    shallow = type(model)(config).eval()
    path = f"{model.base_model_prefix}.{anatomy_of(model).family.layers}"
    state = model.state_dict()
    for key in shallow.state_dict():
        if key.startswith(f"{path}."):
            number, _, rest = key.removeprefix(f"{path}.").partition(".")
            shallow.state_dict()[key].copy_(state[f"{path}.{layers[int(number)]}.{rest}"])
        else:
            shallow.state_dict()[key].copy_(state[key])
    return shallow


@pytest.mark.parametrize("layers", [(0, 2), (1,), (0, 1, 2)])
def test_equals_a_model_built_at_that_depth(model_of_kind, ids, layers):
    expected = by_hand(model_of_kind, layers)
    keep_layers_(model_of_kind, layers)
    assert torch.equal(model_of_kind(ids).logits, expected(ids).logits)
    assert unique_parameters(model_of_kind) == unique_parameters(expected)
    assert model_of_kind.config.to_dict() == expected.config.to_dict()


def test_the_kept_layers_see_and_make_what_they_should(model_of_kind, ids):
    """Layer 2 after layer 0: as if layer 1 passed its input on."""
    whole = copy.deepcopy(model_of_kind)
    path = anatomy_of(whole).family.layers
    middle = whole.base_model.get_submodule(path)[1]
    middle.register_forward_hook(
        lambda _, args, kwargs, output: args[0] if args else kwargs["hidden_states"], with_kwargs=True
    )
    keep_layers_(model_of_kind, (0, 2))
    with Taps(model_of_kind, {"hidden", "attention"}) as taps:
        torch.testing.assert_close(model_of_kind(ids).logits, whole(ids, use_cache=False).logits)
    assert len(taps.hidden) == len(taps.attention) == 2


@pytest.mark.parametrize("factored", [False, True])
def test_saves_loads_and_generates(model_of_kind, tmp_path, ids, factored):
    """With the cache of keys and values, whose entries go by the layers' numbers."""
    plan = Plan({"layers.1.*": RightFactor((2, 1)), "embedding": RightFactor((1, 2))} if factored else {})
    compress_(model_of_kind, plan, layers=(0, 2))
    expected = model_of_kind(ids).logits
    fast, slow = (
        model_of_kind.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=cache)
        for cache in (True, False)
    )
    assert torch.equal(fast, slow)
    save_model(model_of_kind, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert torch.equal(loaded(ids).logits, expected)
    assert torch.equal(loaded.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False), fast)
    assert loaded.config.num_hidden_layers == anatomy_of(loaded).layers == 2


def test_a_shallow_dense_folder_is_plain_transformers(model_of_kind, tmp_path):
    """Config and weights are those of a model that was made at that depth."""
    expected = by_hand(model_of_kind, (0, 2))
    keep_layers_(model_of_kind, (0, 2))
    save_model(model_of_kind, tmp_path / "model")
    save_model(expected, tmp_path / "expected")
    written, hoped = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("model", "expected"))
    assert written == hoped and "quantization_config" not in written
    written, hoped = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "expected"))
    assert written.keys() == hoped.keys() and all(torch.equal(written[key], hoped[key]) for key in hoped)


def test_another_model_of_the_same_config_is_left_alone(tiny, ids):
    other = GPT2LMHeadModel(tiny.config).eval()
    before = other(ids).logits
    keep_layers_(tiny, (0, 2))
    assert (tiny.config.n_layer, other.config.n_layer) == (2, 3)
    assert {m.config.n_layer for m in tiny.modules() if hasattr(m, "config")} == {2}
    tiny.set_attn_implementation("eager")
    assert torch.equal(other(ids).logits, before) and other.config._attn_implementation == "sdpa"


def test_scores_divided_by_the_layers_number(tiny_config, tmp_path, ids):
    """``scale_attn_by_inverse_layer_idx``: the moved layer keeps its scale, in memory and from a folder."""
    tiny_config.scale_attn_by_inverse_layer_idx = True
    tiny_config.initializer_range = 0.5
    model = GPT2LMHeadModel(tiny_config).eval()
    whole = copy.deepcopy(model)
    whole.transformer.h[1].register_forward_hook(lambda _, args, output: args[0])
    expected = whole(ids, use_cache=False).logits
    keep_layers_(model, (0, 2))
    torch.testing.assert_close(model(ids).logits, expected)
    save_model(model, tmp_path / "model")
    torch.testing.assert_close(load_model(tmp_path / "model")(ids).logits, expected)


def test_lists_with_one_entry_a_layer_are_cut(tiny_config):
    tiny_config.layer_types = ["a", "b", "c"]
    config = config_of_layers(tiny_config, (0, 2))
    assert (config.layer_types, config.num_hidden_layers, config.n_layer) == (["a", "c"], 2, 2)
    assert (tiny_config.layer_types, tiny_config.n_layer) == (["a", "b", "c"], 3)


def test_a_classifier_can_lose_layers_too(tiny_config, ids):
    model = GPT2ForSequenceClassification(tiny_config).eval()
    compress_(model, Plan({"layers.1.mlp.up": RightFactor((2, 1))}), layers=(0, 2))
    assert len(model.transformer.h) == 2 and model(ids).logits.shape == (2, 2)


def test_table_is_of_the_whole_model_before(model_of_kind):
    whole = compress_(copy.deepcopy(model_of_kind), Plan())
    layer = sum(
        p.numel()
        for p in model_of_kind.base_model.get_submodule(anatomy_of(model_of_kind).family.layers)[1].parameters()
    )
    maps = [site for name, site in anatomy_of(model_of_kind).sites.items() if name.startswith("layers.1.")]
    table = compress_(model_of_kind, Plan(), layers=(0, 2))
    assert (table.layers, whole.layers) == ((0, 2), None)
    assert table.parameters_before == whole.parameters_after
    assert table.parameters_before - table.parameters_after == layer
    assert table.multiply_adds_before == whole.multiply_adds_after
    assert table.multiply_adds_before - table.multiply_adds_after == sum(s.out_features * s.in_features for s in maps)
    assert table.text().endswith("layers kept: 0, 2")
    assert "layers kept" not in whole.text()
    assert json.loads(table.as_json())["layers"] == [0, 2]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((), "layers=[]: the model has layers 0 to 2"),
        ((0, 3), "layers=[0, 3]: the model has layers 0 to 2"),
        ((-1,), "layers=[-1]: the model has layers 0 to 2"),
        ((2, 0), "layers=[2, 0]: must rise"),
        ((1, 1), "layers=[1, 1]: must rise"),
        ((True,), "layers=[True]: the model has layers 0 to 2"),
    ],
)
def test_mistakes_change_nothing(tiny, ids, layers, message):
    before = tiny(ids).logits
    for drop in (keep_layers_, lambda model, chosen: compress_(model, Plan(), layers=chosen)):
        with pytest.raises(UserError) as caught:
            drop(tiny, layers)
        assert str(caught.value).startswith(message)
    with pytest.raises(UserError, match="matches no map"):
        compress_(tiny, Plan({"layers.2.mlp.up": RightFactor((2, 1))}), layers=(0, 2))
    assert torch.equal(tiny(ids).logits, before)
    assert isinstance(tiny, GPT2LMHeadModel) and AutoModelForCausalLM.from_config(tiny.config).config.n_layer == 3
