"""Factored models whose weights lie partly on disk give the logits of the plainly loaded ones."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import config_of, random_model

from kncompress.anatomy.plan import Plan
from kncompress.anatomy.sites import anatomy_of
from kncompress.compression.compress import compress_, unique_parameters
from kncompress.config import PlacedModelConfig
from kncompress.errors import UserError
from kncompress.evaluation.scoring import input_device
from kncompress.formats.placed import placement
from kncompress.formats.pretrained import load_model, save_model
from kncompress.hub import CHECKSUMS
from kncompress.kron import HybridLinear, HybridShape, KroneckerLinear, KroneckerShape, PackedLinear, PackedShape


def mixed(kind):
    """A model with factors of each kind: embedding (and an untied head) Kronecker, layers packed, sums, hybrids."""
    model = random_model(config_of(kind))
    shapes = {}
    for name, site in anatomy_of(model).sites.items():
        rows, columns = site.out_features, site.in_features
        if site.group == "embedding":
            shapes[name] = KroneckerShape((rows, columns // 2), (1, 2))
        elif site.group == "head":
            shapes[name] = KroneckerShape((rows // 2, columns), (2, 1), 2)
        elif site.layer == 0:
            shapes[name] = PackedShape.of_rank(rows, columns, 7)
        elif site.layer == 1:
            shapes[name] = KroneckerShape((rows // 2, columns // 2), (2, 2), 2)
        else:
            outer, halves = KroneckerShape((rows, 1), (1, columns), 3), KroneckerShape((rows // 2, columns), (2, 1))
            shapes[name] = HybridShape((outer, halves))
    compress_(model, Plan(shapes))
    found = {type(module) for module in model.modules()}
    assert {PackedLinear, KroneckerLinear, HybridLinear} <= found
    return model


KINDS = ("gpt2", "gpt2.untied", "llama", "llama.untied")


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    return save_model(mixed(request.param), tmp_path_factory.mktemp(request.param) / "model")


def _weights(model):
    return sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize("share", [0, 0.6, 0.9], ids=["all away", "layers away", "some away"])
def test_logits_and_texts_are_the_same(folder, share, ids, tmp_path):
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        device_map="auto",
        max_memory={"cpu": int(share * _weights(plain))},
        offload_folder=tmp_path / "away",
        low_cpu_mem_usage=True,
    )
    away = {name: parameter.is_meta for name, parameter in model.named_parameters()}
    assert all(away.values()) if share == 0 else any(away.values()) and not all(away.values())
    assert torch.equal(model(ids).logits, plain(ids).logits)
    mask = torch.ones_like(ids)
    written = [m.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False) for m in (model, plain)]
    assert torch.equal(*written)
    assert all(parameter.is_meta == away.get(name, share == 0) for name, parameter in model.named_parameters())
    assert unique_parameters(model) == unique_parameters(plain)
    assert input_device(model) == torch.device("cpu")


def test_buffers_may_be_away_and_a_base_model_be_placed(folder, ids, tmp_path):
    plain = transformers.AutoModel.from_pretrained(folder)
    placed = {"device_map": "auto", "max_memory": {"cpu": 0}, "offload_buffers": True, "offload_folder": tmp_path / "a"}
    model = transformers.AutoModel.from_pretrained(folder, **placed)
    orders = [module.order for module in model.modules() if isinstance(module, PackedLinear)]
    assert orders and all(order.is_meta for order in orders)
    assert torch.equal(model(ids)[0], plain(ids)[0])


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_a_placed_model_can_be_saved(folder, ids, tmp_path):
    plain = load_model(folder)
    model = load_model(folder, device_map="auto", max_memory={"cpu": int(0.9 * _weights(plain))})
    model.save_pretrained(tmp_path / "again")
    again = load_model(tmp_path / "again")
    assert torch.equal(again(ids).logits, plain(ids).logits)
    assert again.state_dict().keys() == plain.state_dict().keys()


def test_half_precision_is_raised_when_it_comes(ids, tmp_path):
    """A folder of bfloat16, in float32 as evaluate takes it, and in its own type."""
    folder = save_model(mixed("llama"), tmp_path / "model", dtype="bfloat16")
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(folder, dtype=dtype, device_map="auto", max_memory={"cpu": 0})
        assert all(parameter.is_meta for parameter in model.parameters())
        assert torch.equal(model(ids).logits, load_model(folder, dtype=dtype)(ids).logits)


def test_a_weight_that_is_away_is_checked_too(tmp_path):
    folder = save_model(mixed("gpt2"), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.2.mlp.c_fc.parts.0.left"][0, 0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / CHECKSUMS).unlink()
    with pytest.raises(UserError, match=r"a weight of layers.2.mlp.up .* is not a finite number"):
        load_model(folder, device_map="auto", max_memory={"cpu": 0})


def test_sizes_are_told(folder, capsys):
    capsys.readouterr()
    load_model(folder, device_map="auto", max_memory={"cpu": 0})
    assert capsys.readouterr().err == f"kncompress: model.path={folder}: weights: 0.00 GB read from disk when needed\n"
    load_model(folder)
    assert not capsys.readouterr().err


def test_what_a_configuration_asks_for():
    def asked(**keys):
        return placement(PlacedModelConfig(path="model", **keys))

    assert asked() == {}
    assert asked(device_map="auto") == {"device_map": "auto", "max_memory": None, "offload_folder": None}
    assert asked(device_map="auto", max_memory="4GB")["max_memory"]["cpu"] == 4_000_000_000
    assert asked(device_map="auto", max_memory={"cpu": "1.5GiB"})["max_memory"] == {"cpu": 3 << 29}
    assert asked(device_map="auto", max_memory=1000, offload_folder="x")["offload_folder"] == "x"
