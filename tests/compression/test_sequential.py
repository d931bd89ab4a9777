"""The sequential fit answers to what the factored layers before it give, and to nothing else."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import config_of, random_model

from kncompress.anatomy.plan import Plan, RightFactor
from kncompress.anatomy.sites import anatomy_of
from kncompress.compression.compress import compress_
from kncompress.compression.drift import Drift, PairFit
from kncompress.compression.layerwise import CalibrationText
from kncompress.compression.moments import inputs_of
from kncompress.config import FitConfig
from kncompress.kron import KroneckerShape, Moment, kronecker_linear

LAYERS = Plan({"layers.*": RightFactor((2, 2), 2)})


@pytest.fixture
def text():
    return CalibrationText(np.random.default_rng(0).integers(2, 96, 1030), context=16, batch_tokens=256)


def outputs(model, text):
    """Hidden states after every layer, (layers, tokens, D), without the final norm."""
    seen = []
    layers = model.base_model.get_submodule(anatomy_of(model).family.layers)
    note = lambda _, __, output: seen.append((output[0] if isinstance(output, tuple) else output).flatten(0, 1))  # noqa: E731
    handles = [layer.register_forward_hook(note) for layer in layers]
    whole = text.tokens[: len(text.tokens) // text.context * text.context]
    with torch.no_grad():
        model.base_model(torch.from_numpy(whole).view(-1, text.context))
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


def errors_by_layer(dense, model, text):
    right = outputs(dense, text)
    return (outputs(model, text) - right).flatten(1).norm(dim=1) / right.flatten(1).norm(dim=1)


def test_layer_outputs_are_nearer_than_those_of_the_independent_fit(model_of_kind, text):
    found = {}
    for start in ("nearest", "calibrated", "sequential"):
        model = copy.deepcopy(model_of_kind)
        compress_(model, LAYERS, start, text=text)
        found[start] = errors_by_layer(model_of_kind, model, text)
    assert (found["sequential"] <= found["calibrated"] * 1.001).all()
    assert found["sequential"][-1] < 0.95 * found["calibrated"][-1]
    assert found["calibrated"][-1] < found["nearest"][-1]


def test_layers_before_the_factored_one_are_untouched(model_of_kind, text):
    model = copy.deepcopy(model_of_kind)
    compress_(model, Plan({"layers.2.*": RightFactor((2, 1))}), "sequential", text=text)
    before, after = model_of_kind.state_dict(), model.state_dict()
    same = [name for name in before if ".2." not in name]
    assert len(same) > 10
    assert all(torch.equal(before[name], after[name]) for name in same)


def test_the_first_factored_input_is_fitted_as_if_alone(model_of_kind, text):
    """Before it both models are the same; GPT-2's Q, K and V are one module, Llama's three."""
    plan = Plan({"layers.1.attn.[qkv]": RightFactor((2, 2), 2)})
    models = {start: copy.deepcopy(model_of_kind) for start in ("calibrated", "sequential")}
    tables = {start: compress_(model, plan, start, text=text) for start, model in models.items()}
    for name, weight in models["calibrated"].state_dict().items():
        torch.testing.assert_close(models["sequential"].state_dict()[name], weight, rtol=1e-3, atol=1e-4)
    assert tables["sequential"].weighted_error == pytest.approx(tables["calibrated"].weighted_error, rel=1e-3)


def test_target_is_the_least_squares_map():
    """Enough terms for any weight: what comes out is numpy's least squares solution on x~, means apart."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 6, generator=generator).double() + 0.5
    seen = x @ torch.randn(6, 6, generator=generator).double() + 0.3 * torch.randn(4000, 6, generator=generator) - 1
    weight, bias = torch.randn(4, 6, generator=generator), torch.randn(4, generator=generator)
    gap = x - seen
    factored = Moment((seen.T @ seen / 4000).float(), seen.mean(0).float(), 4000)
    drift = Drift(gap.T @ seen / 4000, Moment((gap.T @ gap / 4000).float(), gap.mean(0).float(), 4000))
    fitted = PairFit(factored, drift, FitConfig()).fit(weight, bias, KroneckerShape((2, 3), (2, 2), 4))
    wanted = x @ weight.double().T + bias
    ones = torch.cat([seen, torch.ones(4000, 1)], 1)
    best = torch.linalg.lstsq(ones, wanted).solution
    (part,) = fitted.parts
    made = kronecker_linear(seen.float(), part.left, part.right, fitted.bias).double()
    left = float((wanted - made).norm())
    assert left == pytest.approx(float((wanted - ones @ best).norm()), rel=1e-3)
    centred = (x - x.mean(0)) @ weight.double().T
    assert fitted.weighted == pytest.approx(left / float(centred.norm()), rel=1e-3)


def test_inputs_are_those_that_the_maps_before_leave(tiny, text):
    """The last map's error against the dense outputs, measured on the finished model."""
    dense = copy.deepcopy(tiny)
    table = compress_(tiny, LAYERS, "sequential", text=text, settings=FitConfig(bias=False))
    whole = torch.from_numpy(text.tokens[:1024]).view(-1, 16)
    seen = {}
    for name, model in (("dense", dense), ("student", tiny)):
        down = model.transformer.h[2].mlp.c_proj
        down.register_forward_hook(lambda _, __, y, name=name: seen.__setitem__(name, y))
        with torch.no_grad():
            model(whole)
    bias = dense.transformer.h[2].mlp.c_proj.bias.detach()
    error = float((seen["student"] - seen["dense"]).norm() / (seen["dense"] - bias).norm())
    row = next(row for row in table.rows if row.name == "layers.2.mlp.down")
    assert row.weighted == pytest.approx(error, rel=0.02)  # 6 tokens of the text are no whole block


@pytest.mark.parametrize("kind", ["gpt2", "llama.untied"])
def test_embedding_and_head_are_part_of_the_chain(kind, text):
    """A factored embedding is the first error to answer to; an untied head the last map."""
    dense = random_model(config_of(kind))
    entries = {"embedding": RightFactor((1, 2)), "layers.1.mlp.*": RightFactor((2, 1))}
    if kind == "llama.untied":
        entries["head"] = RightFactor((1, 2))
    ids = torch.from_numpy(text.tokens[:1024]).view(-1, 16)
    found = {}
    for start in ("calibrated", "sequential"):
        model = copy.deepcopy(dense)
        table = compress_(model, Plan(entries), start, text=text)
        assert all(row.weighted is not None for row in table.rows)
        with torch.no_grad():
            found[start] = float((model(ids).logits - dense(ids).logits).norm())
    assert found["sequential"] < found["calibrated"]


def test_each_layer_is_run_a_few_times_and_the_model_never(tiny, text):
    """What it costs: no pass of the whole model but up to its first layer, few passes of each layer."""
    calls = []
    original = type(tiny.transformer.h[0]).forward

    def counted(self, *args, **options):
        calls.append(self)
        return original(self, *args, **options)

    type(tiny.transformer.h[0]).forward = counted
    try:
        compress_(tiny, LAYERS, "sequential", text=text, settings=FitConfig(sides="inputs"))
    finally:
        type(tiny.transformer.h[0]).forward = original
    batches = len(list(text.batches()))
    inputs = len(inputs_of(anatomy_of(tiny))) // 3
    # Each layer: once dense, once for each input, once for its outputs. The first layer's pre-hook ends two more.
    assert len(calls) <= 3 * batches * (2 + inputs)


def test_inputs_that_find_no_room_lie_in_files(tiny, text):
    models = [copy.deepcopy(tiny), tiny]
    compress_(models[0], LAYERS, "sequential", text=text)
    compress_(models[1], LAYERS, "sequential", text=replace(text, room=1000))
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
