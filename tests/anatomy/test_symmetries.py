"""Symmetries leave a dense model's function as it is; arrangements of them let its factors lose less."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import config_of, random_model
from transformers import GPT2ForSequenceClassification

from kncompress.anatomy.plan import Plan, RightFactor
from kncompress.anatomy.sites import anatomy_of
from kncompress.anatomy.swap import dense_bias, module_at
from kncompress.anatomy.symmetries import (
    HeadBasis,
    permute_hidden_,
    permute_residual_,
    permuted_moment,
    turn_queries_,
    turn_values_,
    turned_moment,
)
from kncompress.compression.compress import compress_
from kncompress.compression.dense_walk import stream_moments
from kncompress.compression.grouping import balanced_basis, grouped_order
from kncompress.compression.layerwise import CalibrationText
from kncompress.compression.table import Arrangement
from kncompress.config import FitConfig
from kncompress.errors import UserError
from kncompress.formats.pretrained import load_model, save_model

EVERY = ["hidden", "heads", "residual"]
HALVES = Plan(
    {
        "layers.*": RightFactor((2, 1)),
        "layers.*.attn.o": RightFactor((1, 2)),
        "layers.*.mlp.down": RightFactor((1, 2)),
        "embedding": RightFactor((1, 2)),
    }
)


@pytest.fixture
def text():
    return CalibrationText(np.random.default_rng(0).integers(2, 96, 1024), context=16, batch_tokens=256)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_basis(heads, size):
    """Far from orthogonal, so that a transpose in the place of an inverse shows."""
    there = torch.randn(heads, size, size, generator=generator(), dtype=torch.float64)
    there += 4 * torch.eye(size, dtype=torch.float64)
    return HeadBasis(there, torch.linalg.inv(there))


def heads_of(model):
    sizes = anatomy_of(model).family.sizes(model.config)
    return sizes.get("keys", sizes["width"]) // sizes["head"], sizes["head"]


def changed(model, change, ids):
    """Hidden states and logits before and after, in float64."""
    model = model.double()
    before = model(ids, output_hidden_states=True)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    change(model)
    assert any(not torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())
    return before, model(ids, output_hidden_states=True)


@pytest.mark.parametrize("layer", [0, 2])
def test_the_order_of_hidden_units_does_not_show(model_of_kind, ids, layer):
    order = torch.randperm(anatomy_of(model_of_kind).sites["layers.0.mlp.up"].out_features, generator=generator())
    before, after = changed(model_of_kind, lambda model: permute_hidden_(model, layer, order), ids)
    torch.testing.assert_close(after.logits, before.logits)


def test_a_basis_of_the_values_does_not_show(model_of_kind, ids):
    basis = random_basis(*heads_of(model_of_kind))
    before, after = changed(model_of_kind, lambda model: turn_values_(model, 1, basis), ids)
    torch.testing.assert_close(after.logits, before.logits)


def test_the_bias_of_values_turns_with_them(tiny):
    basis, site = random_basis(2, 12), anatomy_of(tiny).sites["layers.1.attn.v"]
    old = dense_bias(module_at(tiny, site), site).clone()
    others = module_at(tiny, site).bias[:48].clone()
    turn_values_(tiny, 1, basis)
    new = dense_bias(module_at(tiny, site), site)
    torch.testing.assert_close(
        new.double().view(2, 12), torch.einsum("gij,gj->gi", basis.there, old.double().view(2, 12))
    )
    assert torch.equal(module_at(tiny, site).bias[:48], others)


def test_a_basis_of_queries_and_keys_does_not_show(tiny, ids):
    before, after = changed(tiny, lambda model: turn_queries_(model, 1, random_basis(2, 12)), ids)
    torch.testing.assert_close(after.logits, before.logits)


def test_queries_that_positions_turn_keep_their_basis():
    with pytest.raises(ValueError, match="rotary"):
        turn_queries_(random_model(config_of("llama")), 1, random_basis(4, 8))


def test_the_order_of_the_residual_shows_in_hidden_states_alone(model_of_kind, ids):
    order = torch.randperm(24, generator=generator())
    before, after = changed(model_of_kind, lambda model: permute_residual_(model, order), ids)
    # The norms of Llama and Qwen are float32 whatever the model is.
    rounded = model_of_kind.config.model_type in ("llama", "qwen2", "qwen3")
    near = {"rtol": 1e-5, "atol": 1e-5} if rounded else {}
    torch.testing.assert_close(after.logits, before.logits, **near)
    for old, new in zip(before.hidden_states, after.hidden_states, strict=True):
        torch.testing.assert_close(new, old[..., order], **near)


def test_a_classifier_reads_the_permuted_residual(tiny_config, ids):
    model = GPT2ForSequenceClassification(tiny_config).eval().double()
    before = model(ids).logits
    permute_residual_(model, torch.randperm(24, generator=generator()))
    torch.testing.assert_close(model(ids).logits, before)


def test_parameters_that_nothing_is_known_of_are_refused(tiny):
    tiny.transformer.extra = torch.nn.Linear(5, 5)
    before = copy.deepcopy(tiny.state_dict())
    with pytest.raises(UserError, match=r"residual: transformer.extra.weight is \[5, 5\]"):
        permute_residual_(tiny, torch.arange(24).flip(0))
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_an_order_is_a_permutation_that_keeps_more(size, seed):
    rows = torch.randn(24, 10, generator=generator(seed), dtype=torch.float64)
    rows *= torch.rand(24, 1, generator=generator(seed), dtype=torch.float64) + 0.1
    gram = rows @ rows.T
    order = grouped_order([gram], size)
    assert sorted(order.tolist()) == list(range(24))
    assert torch.equal(order, grouped_order([gram * 7.0], size))
    strongest = gram.diagonal().argsort(descending=True).view(size, -1).T.reshape(-1)
    assert kept(gram, order, size) >= kept(gram, strongest, size) >= kept(gram, torch.arange(24), size)


def kept(gram, order, size):
    groups = order.view(-1, size)
    return float(torch.linalg.eigvalsh(gram[groups[:, :, None], groups[:, None, :]].sum(0))[-1])


def test_rows_that_are_multiples_of_each_other_meet():
    rows = torch.nn.functional.normalize(torch.randn(12, 40, generator=generator(), dtype=torch.float64))
    both = torch.cat([rows, -0.7 * rows])[torch.randperm(24, generator=generator())]
    order = grouped_order([both @ both.T], 2)
    assert kept(both @ both.T, order, 2) == pytest.approx(float(both.square().sum()))


def test_null_vectors_have_an_order_and_a_basis():
    assert sorted(grouped_order([torch.zeros(6, 6)], 2).tolist()) == list(range(6))
    basis = balanced_basis(torch.zeros(2, 4, 4), torch.zeros(2, 4, 4), 2)
    torch.testing.assert_close(basis.there @ basis.back, torch.eye(4, dtype=torch.float64).expand(2, 4, 4))


@pytest.mark.parametrize("deficient", [False, True])
def test_a_balanced_basis_balances(deficient):
    written, read = (torch.randn(3, 8, 20, generator=generator(seed), dtype=torch.float64) for seed in (0, 1))
    if deficient:
        written[:, 5:] = 0
    written, read = written @ written.mT, read @ read.mT
    basis = balanced_basis(written, read, 2)
    torch.testing.assert_close(basis.there @ basis.back, torch.eye(8, dtype=torch.float64).expand(3, 8, 8))
    if not deficient:
        one, other = basis.there @ written @ basis.there.mT, basis.back.mT @ read @ basis.back
        torch.testing.assert_close(one, torch.diag_embed(one.diagonal(dim1=1, dim2=2)))
        torch.testing.assert_close(one, other)
        strength = one.diagonal(dim1=1, dim2=2)
        assert (strength[:, 0::2].amin(1) >= strength[:, 1::2].amax(1)).all()


@pytest.mark.parametrize("start", ["nearest", "calibrated"])
@pytest.mark.parametrize("which", [["hidden"], ["heads"], ["residual"]], ids="+".join)
@pytest.mark.parametrize("kind", ["gpt2", "llama.bias"])
def test_the_fitted_error_never_rises(model_of_kind, text, start, which):
    """Of single maps it may: their squares add up to no more."""
    tables = []
    for symmetries in ([], which):
        settings = FitConfig(symmetries=symmetries)
        tables.append(compress_(copy.deepcopy(model_of_kind), HALVES, start, text=text, settings=settings))
    assert tables[0].arrangement is None
    found = tables[1].arrangement
    hidden, heads, rotary = which == ["hidden"], which == ["heads"], model_of_kind.config.model_type == "llama"
    assert (hidden, heads, heads and not rotary) == (bool(found.hidden), bool(found.values), bool(found.queries))
    assert (found.residual is not None) == (which == ["residual"])
    assert json.loads(tables[1].as_json())["arrangement"]["values"] == list(found.values)
    if start == "nearest" or which != ["residual"]:  # that is chosen from the weights alone
        plain, arranged = (
            sum((row.error if start == "nearest" else row.weighted) ** 2 for row in table.rows) for table in tables
        )
        assert arranged < plain


@pytest.mark.parametrize("which", ["hidden", "values"])
def test_moments_move_with_the_symmetries(model_of_kind, text, which):
    """What the next map would see is told without running the model again."""
    name = "layers.1.mlp.hidden" if which == "hidden" else "layers.1.o"
    (before,) = dict(stream_moments(model_of_kind, text, [name])).values()
    if which == "hidden":
        order = torch.randperm(len(before.mean), generator=generator())
        permute_hidden_(model_of_kind, 1, order)
        told = permuted_moment(before, order)
    else:
        basis = random_basis(*heads_of(model_of_kind))
        turn_values_(model_of_kind, 1, basis)
        told = turned_moment(before, basis)
    (seen,) = dict(stream_moments(model_of_kind, text, [name])).values()
    torch.testing.assert_close(told.second, seen.second, rtol=1e-3, atol=1e-3 * float(seen.second.abs().max()))
    torch.testing.assert_close(told.mean, seen.mean, rtol=1e-3, atol=1e-3 * float(seen.mean.abs().max()))


def test_moments_kept_on_disk_are_of_the_model_as_it_was(tiny, text, tmp_path):
    plain, text = copy.deepcopy(tiny), replace(text, moments=tmp_path)
    tables = []
    for symmetries in (EVERY, ["heads"]):
        settings = FitConfig(symmetries=symmetries)
        tables.append(compress_(copy.deepcopy(tiny), HALVES, "calibrated", text=text, settings=settings))
    compress_(plain, HALVES, "calibrated", text=text, settings=FitConfig())
    assert tables[0].arrangement.values == tables[1].arrangement.values


def test_what_does_not_help_is_left_out(tiny, text):
    """Maps with as many terms as make any weight: nothing to gain, nothing changed."""
    before = copy.deepcopy(tiny)
    plan = Plan({"layers.*": RightFactor((2, 1), 2), "embedding": RightFactor((1, 2), 2)})
    table = compress_(tiny, plan, "calibrated", text=text, settings=FitConfig(symmetries=EVERY))
    assert table.arrangement.residual is None and not table.arrangement.values and not table.arrangement.hidden
    assert torch.equal(tiny.transformer.ln_f.weight, before.transformer.ln_f.weight)


def test_dropped_layers_are_not_arranged(tiny, text):
    settings = FitConfig(symmetries=EVERY)
    table = compress_(tiny, HALVES, "calibrated", layers=(0, 2), text=text, settings=settings)
    assert set(table.arrangement.values) <= {0, 1} and len(tiny.transformer.h) == 2


@pytest.mark.parametrize("start", ["nearest", "calibrated", "sequential"])
def test_an_arranged_model_loads_again(tiny, ids, text, start, tmp_path):
    compress_(tiny, HALVES, start, text=text, settings=FitConfig(symmetries=EVERY))
    loaded = load_model(save_model(tiny, tmp_path / "model"))
    torch.testing.assert_close(loaded(ids).logits, tiny(ids).logits)
    assert loaded.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3


def test_the_order_of_the_residual_follows_from_the_weights_alone(tiny, text):
    """So the teacher of a resumed run is that of its start."""
    settings, orders = FitConfig(symmetries=EVERY), set()
    for start, tokens in (("nearest", text.tokens), ("calibrated", text.tokens), ("calibrated", text.tokens[:200])):
        read = CalibrationText(tokens, 16)
        table = compress_(copy.deepcopy(tiny), HALVES, start, text=read, settings=settings)
        orders.add(table.arrangement.residual)
    assert len(orders) == 1 and orders != {None}


def test_outer_products_have_no_groups(tiny):
    """The one group of (x) 1x24 is everything."""
    plan = Plan({"layers.1.mlp.up": RightFactor((1, 24), 4), "layers.1.attn.v": RightFactor((1, 24), 4)})
    table = compress_(tiny, plan, settings=FitConfig(symmetries=EVERY))
    assert table.arrangement == Arrangement()


def test_a_random_start_has_no_symmetries(tiny):
    assert compress_(tiny, HALVES, "random", settings=FitConfig(symmetries=EVERY)).arrangement is None


def test_an_unknown_symmetry_is_named():
    with pytest.raises(UserError, match=r"fit.symmetries=head: not one of hidden, heads, residual"):
        FitConfig(symmetries=["head"])
