"""Factors multiplied out part by part are those of ``to_dense``, and a slip is found."""

import pytest
import torch
from tiny_models import config_of, random_model

from kncompress.anatomy.in_turn import in_turn
from kncompress.anatomy.plan import Plan, RightFactor
from kncompress.anatomy.swap import FACTORED
from kncompress.compression.compress import compress_
from kncompress.compression.multiply_out import multiply_out_
from kncompress.compression.parts import Parts
from kncompress.errors import CheckFailed
from kncompress.formats.pretrained import load_stored, save_model, to_dense
from kncompress.kron import KroneckerLinear, PackedShape, parse_shape


def compressed(kind):
    model = random_model(config_of(kind))
    maps = {"layers.*": RightFactor((2, 2), 2), "embedding": RightFactor((1, 2)), "layers.1.attn.k": "keep"}
    if "untied" not in kind:
        maps["layers.0.attn.q"] = PackedShape.of_rank(*_sizes(model), 5)
        maps["layers.2.attn.q"] = parse_shape(
            "{0}x1(x)1x{1}*3 + {2}x{1}(x)2x1".format(*_sizes(model), _sizes(model)[0] // 2)
        )
    compress_(model, Plan(maps))
    return model


def _sizes(model):
    config = model.config
    heads = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return heads * config.num_attention_heads, config.hidden_size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parts_are_those_of_the_whole_model(model_of_kind, kind, dtype, ids, tmp_path):
    folder = save_model(compressed(kind), tmp_path / "factored", dtype=dtype)
    stored = load_stored(folder)
    with in_turn(load_stored(folder)) as model:  # a copy in float32
        expected = to_dense(model.float())
        logits = model(ids).logits
    made, parts = load_stored(folder), Parts(tmp_path / "parts", getattr(torch, dtype))
    assert multiply_out_(made, parts, 1e-4) < 1e-5
    assert not any(isinstance(module, FACTORED) for module in made.modules())
    assert made.state_dict().keys() == model_of_kind.state_dict().keys()
    for name, tensor in made.state_dict().items():
        assert tensor.dtype == getattr(torch, dtype)
        torch.testing.assert_close(tensor, expected.state_dict()[name].to(tensor.dtype), rtol=1e-2, atol=1e-4)
    again = load_stored(save_model(made, tmp_path / "dense", dtype=dtype, parts=parts.files))
    with in_turn(again), in_turn(stored):
        assert torch.equal(stored(ids).logits, logits)
        torch.testing.assert_close(again(ids).logits, logits, rtol=0.05, atol=1e-3 if dtype == "float32" else 0.2)


def test_a_slip_in_one_map_is_found(tmp_path, monkeypatch):
    model = compressed("gpt2")
    plain = KroneckerLinear.to_dense

    def slips(self):
        dense = plain(self)
        if self is model.transformer.h[1].attn.c_attn.v:
            dense.weight.data[3, 5] += 0.1
        return dense

    monkeypatch.setattr(KroneckerLinear, "to_dense", slips)
    with pytest.raises(CheckFailed, match=r"outputs of h.1.attn.c_attn change by .* of the largest") as error:
        multiply_out_(model, Parts(tmp_path / "parts", torch.float32), 1e-4)
    assert "\n" not in str(error.value)


def test_in_turn_a_layer_is_raised_only_while_it_runs(kind, ids, tmp_path):
    folder = save_model(compressed(kind), tmp_path / "model", dtype="bfloat16")
    model, seen = load_stored(folder), []
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    for layer in layers:
        layer.register_forward_hook(
            lambda *_: seen.append([{p.dtype for p in each.parameters()} == {torch.float32} for each in layers])
        )
    with in_turn(model):
        found = model(ids).logits
    assert [sum(states) for states in seen] == [1, 1, 1] and [states.index(True) for states in seen] == [0, 1, 2]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(found, load_stored(folder).float()(ids).logits)
