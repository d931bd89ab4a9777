"""Models whose maps are packed: every family and start, equal to unpacked ones, saved, loaded, trained, exported."""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FURTHER, KINDS, RARE, config_of, random_model

from kncompress.anatomy.mark import factored_maps
from kncompress.anatomy.plan import Plan, RightFactor, plan_from_config
from kncompress.anatomy.sites import anatomy_of
from kncompress.compression.compress import compress_, unique_parameters
from kncompress.compression.inspection import predict
from kncompress.compression.layerwise import CalibrationText
from kncompress.config import FactorsConfig
from kncompress.errors import UserError
from kncompress.formats.card import card_text
from kncompress.formats.pretrained import load_model, save_model, to_dense
from kncompress.hub import CHECKSUMS
from kncompress.kron import PackedLinear, PackedShape


@pytest.fixture
def text():
    return CalibrationText(np.random.default_rng(0).integers(2, 96, 96), context=16, batch_tokens=48)


def plans(model, rank=7):
    """All maps of the layers and an untied head but one: packed, and the same outer products as they are."""
    sites = [s for s in anatomy_of(model).sites.values() if s.group != "embedding" and s.name != "layers.1.attn.k"]
    packed = {site.name: PackedShape.of_rank(site.out_features, site.in_features, rank) for site in sites}
    plain = {name: shape.outer for name, shape in packed.items()}
    return tuple(Plan({"embedding": RightFactor((1, 2)), **entries}) for entries in (packed, plain))


@pytest.mark.parametrize("kind", [*KINDS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (*RARE, *FURTHER))])
def test_every_kind_of_model_comes_back(kind, ids, tmp_path):
    dense = random_model(config_of(kind))
    packed, plain = copy.deepcopy(dense), copy.deepcopy(dense)
    told = predict(config_of(kind), plans(dense)[0])
    report = compress_(packed, plans(dense)[0])
    compress_(plain, plans(dense)[1])
    expected = packed(ids).logits
    torch.testing.assert_close(expected, plain(ids).logits, atol=1e-3, rtol=1e-3)
    maps = sum(shape.startswith("p*") for shape in factored_maps(packed).values())
    assert maps == sum(isinstance(module, PackedLinear) for module in packed.modules()) > 10
    assert unique_parameters(plain) - unique_parameters(packed) == maps * 7**2
    assert told.parameters_after == report.parameters_after == unique_parameters(packed)
    assert told.multiply_adds_after == report.multiply_adds_after

    loaded = load_model(save_model(packed, tmp_path / "model"))
    assert type(loaded) is type(dense)
    assert torch.equal(loaded(ids).logits, expected)
    assert factored_maps(loaded) == factored_maps(packed)
    torch.testing.assert_close(to_dense(loaded)(ids).logits, expected, atol=1e-3, rtol=1e-3)
    assert to_dense(loaded).state_dict().keys() == dense.state_dict().keys()
    assert "| p*" in card_text(loaded)


@pytest.mark.parametrize(("kind", "start"), [("gpt2.untied", "calibrated"), ("llama.bias", "sequential")])
def test_fits_are_those_of_the_outer_products(kind, start, ids, text):
    dense = random_model(config_of(kind))
    models = copy.deepcopy(dense), copy.deepcopy(dense)
    reports = [compress_(m, p, start, text=text) for m, p in zip(models, plans(dense), strict=True)]
    torch.testing.assert_close(models[0](ids).logits, models[1](ids).logits, atol=2e-3, rtol=2e-3)
    for packed, plain in zip(reports[0].rows, reports[1].rows, strict=True):
        assert packed.weighted == pytest.approx(plain.weighted, rel=1e-3)
        assert packed.parameters == plain.parameters - (49 if packed.shape.startswith("p*") else 0)


@pytest.mark.parametrize("start", ["nearest", "random"])
def test_they_train(start, ids):
    model = random_model(config_of("gpt2"))
    compress_(model, plans(model)[0], start)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for _ in range(5):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    still = [name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])]
    assert still and all(name.endswith(".order") for name in still)


def test_half_precision_keeps_the_order(ids, tmp_path):
    model = random_model(config_of("gpt2")).bfloat16()
    compress_(model, plans(model)[0])
    loaded = load_model(save_model(model, tmp_path / "model", dtype="bfloat16"), dtype=torch.bfloat16)
    orders = [module.order for module in loaded.modules() if isinstance(module, PackedLinear)]
    assert orders and all(order.dtype == torch.int32 for order in orders)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_damaged_order_is_refused(tmp_path):
    model = random_model(config_of("gpt2"))
    compress_(model, plans(model)[0])
    folder = save_model(model, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.1.mlp.c_fc.order"][3] = 4
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / CHECKSUMS).unlink()
    with pytest.raises(UserError, match=r"h.1.mlp.c_fc.order does not have each of 0 to 23 once") as error:
        load_model(folder)
    assert "\n" not in str(error.value)


def test_what_cannot_be_packed_is_said():
    config = config_of("gpt2")
    for maps, message in (
        ({"embedding": "p*96x1(x)1x24*4"}, "an embedding takes a single Kronecker shape, without + or p*"),
        ({"layers.1.attn.q": "p*24x1(x)1x24*24"}, "at most 23 terms; or keep"),
        ({"layers.1.attn.q": "p*24x1(x)1x96*2"}, "makes 24x96, but layers.1.attn.q is 24x24"),
    ):
        with pytest.raises(UserError) as error:
            plan_from_config(FactorsConfig(maps=maps), config)
        assert message in str(error.value)
    with pytest.raises(UserError, match=r"factors.scalars=true: p\*s\*24x1.*take no scalars"):
        plan_from_config(FactorsConfig(maps={"layers.1.attn.q": "p*24x1(x)1x24*2"}, scalars=True), config)
