"""Weights of a few bits: their rounding, their bytes, dense and factored."""

import copy

import pytest
import torch
from tiny_models import config_of, random_model
from torch import nn

from kncompress.anatomy.plan import Plan
from kncompress.compression.compress import compress_
from kncompress.evaluation.quantised import quantise_
from kncompress.kron import KroneckerLinear, KroneckerShape, PackedLinear, PackedShape


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [4, 5, None])
def test_every_number_is_the_nearest_multiple_of_its_groups_scale(bits, group):
    layer = nn.Linear(12, 7, bias=True)
    before, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    quantise_(layer, bits, group)
    most = 2 ** (bits - 1) - 1
    for row, found in zip(before, layer.weight, strict=True):
        for old, new in zip(row.split(group or 12), found.split(group or 12), strict=True):
            scale = (old.abs().max() / most).half().float()
            multiples = new / scale
            torch.testing.assert_close(multiples, multiples.round(), atol=1e-3, rtol=0)
            assert multiples.abs().max() <= most + 1e-3
            assert (new - old).abs().max() <= scale * 0.501
    assert torch.equal(layer.bias, bias)


def test_bytes_count_integers_scales_and_the_rest_once():
    layer = nn.Linear(64, 10, bias=True)
    assert quantise_(layer, 4, 32) == 64 * 10 // 2 + 2 * 20 + 2 * 10
    model = random_model(config_of("llama"))
    model.lm_head.weight = model.model.embed_tokens.weight
    numbers = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    rows = sum(len(p) for p in model.parameters() if p.dim() > 1)
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert quantise_(model, 8, None) == numbers + 2 * rows + 2 * vectors


def test_more_bits_change_a_factored_model_less():
    model, ids = random_model(config_of("gpt2")), torch.arange(7)[None]
    compress_(model, Plan({f"layers.{n}.mlp.up": KroneckerShape.parse("48x24(x)2x1") for n in range(3)}))
    with torch.no_grad():
        gaps = []
        for bits in (3, 5, 8):
            rounded = copy.deepcopy(model)
            quantise_(rounded, bits, 16)
            gaps.append(float((rounded(ids).logits - model(ids).logits).abs().max()))
    assert gaps[0] > gaps[1] > gaps[2] > 0


def test_packed_maps_are_rounded_as_outer_products():
    """Rounded as they are, the error of the pivots comes several times in the outputs that are made of them."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(128, 160, generator=generator) * torch.logspace(0, -1.5, 160)
    shape = PackedShape.of_rank(128, 160, 56)
    model = nn.Sequential(PackedLinear.from_dense(weight, None, shape))
    before = model[0].weight.detach()
    as_it_is = copy.deepcopy(model[0])
    for numbers in (as_it_is.kept, as_it_is.mix):
        quantise_(nn.ParameterList([numbers]), 4, 32)
    total = quantise_(model, 4, 32)
    assert isinstance(model[0], KroneckerLinear) and total > 56 * (128 + 160) // 2
    errors = [float((made.weight.detach() - before).norm() / before.norm()) for made in (as_it_is, model[0])]
    assert 0.02 < errors[1] < 0.75 * errors[0]
    kept = nn.Sequential(PackedLinear.from_dense(weight, None, shape))
    quantise_(kept, 8, 32)
    assert isinstance(kept[0], PackedLinear)
