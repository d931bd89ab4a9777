"""Families beside GPT-2 and Llama: what their tables have that is their own, from dense model to distilled folder."""

import copy

import numpy as np
import pytest
import torch
from tiny_models import FURTHER, NEWER, RARE, config_of, random_model
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig, BertForPreTraining

from kncompress.anatomy.plan import Plan, RightFactor
from kncompress.anatomy.sites import anatomy_of
from kncompress.anatomy.swap import FusedMaps, dense_bias, dense_weight, module_at, set_weight_
from kncompress.anatomy.symmetries import HeadBasis, permute_hidden_, permute_residual_, turn_queries_, turn_values_
from kncompress.anatomy.taps import Taps
from kncompress.compression.compress import compress_, unique_parameters
from kncompress.compression.dense_walk import moments
from kncompress.compression.inspection import predict
from kncompress.compression.layerwise import CalibrationText
from kncompress.config import FitConfig, ObjectiveConfig, OptimizerConfig
from kncompress.distill import Objective, attention_kl, attention_score_mse
from kncompress.errors import UserError
from kncompress.formats.onnx_graph import write_onnx
from kncompress.formats.onnx_session import OnnxModel, largest_difference
from kncompress.formats.pretrained import load_model, save_model, to_dense
from kncompress.kron import KroneckerShape
from kncompress.planner.harm import HarmMeter
from kncompress.training.distillation import Distillation
from kncompress.training.student import require_causal

EVERY_TERM = ObjectiveConfig(embedding=1, attention=1, hidden=1, feed_forward=1, logits=1, cross_entropy=0)
HALVES = Plan({"layers.*": RightFactor((2, 1)), "embedding": RightFactor((1, 2))})
SLOW = tuple(pytest.param(kind, marks=pytest.mark.slow) for kind in NEWER)
NEW = (*RARE, *FURTHER, *SLOW)


@pytest.fixture
def text():
    return CalibrationText(np.random.default_rng(0).integers(2, 96, 96), context=16, batch_tokens=48)


def full_rank(rows, columns):
    """Of as many terms as there are: any weight."""
    return KroneckerShape((rows // 2, columns // 2), (2, 2), 4)


@pytest.mark.parametrize("kind", NEW)
def test_a_factored_model_is_saved_loaded_and_distilled(kind, ids, tmp_path):
    dense = random_model(config_of(kind))
    whole = copy.deepcopy(dense)
    sites = anatomy_of(dense).sites.values()
    exact = Plan({site.name: full_rank(site.out_features, site.in_features) for site in sites})
    compress_(whole, exact)
    expected = dense(ids).logits
    torch.testing.assert_close(whole(ids).logits, expected, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(to_dense(whole)(ids).logits, expected, atol=2e-3, rtol=1e-3)

    student = copy.deepcopy(dense)
    told, table = predict(config_of(kind), HALVES), compress_(student, HALVES)
    assert told.parameters_after == table.parameters_after == unique_parameters(student)
    loaded = load_model(save_model(student, tmp_path / "model"))
    assert type(loaded) is type(dense)
    assert torch.equal(loaded(ids).logits, student(ids).logits)
    assert unique_parameters(loaded) == table.parameters_after
    assert to_dense(loaded).state_dict().keys() == dense.state_dict().keys()

    module = Distillation(loaded, dense, Objective(EVERY_TERM), OptimizerConfig(), steps=2)
    optimizer = torch.optim.Adam(loaded.parameters(), lr=1e-3)
    before = {name: p.detach().clone() for name, p in loaded.named_parameters()}
    totals = []
    for _ in range(2):
        loss = module.objective(*module.outputs(input_ids=ids))
        assert all(term > 0 for term in loss.terms.values())
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        totals.append(loss.total.item())
    module.close()
    assert totals[1] < totals[0]
    # Where its head is not tied, a BERT has a second bias that it does not read.
    still = [name for name, p in loaded.named_parameters() if torch.equal(p, before[name])]
    assert still == (["cls.predictions.bias"] if kind == "bert.untied" else [])


@pytest.mark.parametrize("kind", (*FURTHER, *SLOW))
def test_calibrated_and_sequential_fits(kind, text):
    entries = {"layers.1.*": RightFactor((2, 1)), "embedding": RightFactor((1, 2))}
    dense = random_model(config_of(kind))
    for start in ("calibrated", "sequential"):
        model = copy.deepcopy(dense)
        table = compress_(model, Plan(entries), start, text=text)
        nearest = compress_(copy.deepcopy(dense), Plan(entries))
        inner = {row.name: row for row in table.rows if row.name.startswith("layers.1.")}
        assert all(0 < row.weighted < 1.2 for row in inner.values())
        assert sum(row.error for row in inner.values()) > sum(r.error for r in nearest.rows if r.name in inner)


@pytest.mark.parametrize("kind", (*FURTHER, *SLOW, "gemma2", "granite"))
def test_the_harm_of_a_replaced_map(kind, text):
    model = random_model(config_of(kind))
    site = anatomy_of(model).sites["layers.1.attn.k"]
    weight = torch.randn(site.out_features, site.in_features)
    meter = HarmMeter(model, text)
    found, ids = meter.kl({site.name: weight}), list(text.batches())
    dense = [model(input_ids=x).logits.detach().log_softmax(-1) for x in ids]
    set_weight_(module_at(model, site), site, weight)
    changed = [model(input_ids=x).logits.detach().log_softmax(-1) for x in ids]
    whole = sum(float((p.exp() * (p - q)).sum()) for p, q in zip(dense, changed, strict=True)) / 96
    assert found == pytest.approx(whole, rel=1e-3)


def test_interleaved_maps_are_those_of_the_block(ids):
    """GPT-NeoX: the q, k, v rows of the fused weight, as maps of their own, give what the attention compares."""
    model = random_model(config_of("gpt_neox"))
    sites = anatomy_of(model).sites
    x, module = torch.randn(5, 24), module_at(model, sites["layers.1.attn.q"])
    expected = module(x).view(5, 4, 18).chunk(3, dim=-1)
    for part, heads in zip("qkv", expected, strict=True):
        site = sites[f"layers.1.attn.{part}"]
        y = torch.nn.functional.linear(x, dense_weight(module, site), dense_bias(module, site))
        torch.testing.assert_close(y, heads.reshape(5, 24))
    site, before = sites["layers.1.attn.k"], module.weight.clone()
    set_weight_(module, site, torch.zeros(24, 24))
    zeroed = (module.weight == 0).all(1).view(4, 18)
    assert torch.equal(zeroed, torch.tensor([0] * 6 + [1] * 6 + [0] * 6).bool().expand(4, 18))
    assert torch.equal(module.weight[~zeroed.flatten()], before[~zeroed.flatten()])


def test_an_interleaved_map_may_stay_dense(ids):
    model = random_model(config_of("gpt_neox"))
    expected = model(ids).logits
    compress_(model, Plan({"layers.1.attn.k": full_rank(24, 24)}))
    fused = model.gpt_neox.layers[1].attention.query_key_value
    assert isinstance(fused, FusedMaps) and fused.blocks == 4
    assert [type(child).__name__ for child in fused.children()] == ["Linear", "KroneckerLinear", "Linear"]
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", (*FURTHER, *SLOW))
def test_symmetries_hold_or_are_refused(kind, ids):
    """In float64: the order of hidden units, bases of the heads, the order of the residual coordinates."""
    model = random_model(config_of(kind)).double()
    expected = model(ids).logits
    family, sizes = anatomy_of(model).family, anatomy_of(model).family.sizes(model.config)
    near = {"rtol": 1e-5, "atol": 1e-5}
    generator = torch.Generator().manual_seed(0)
    permute_hidden_(model, 1, torch.randperm(sizes["hidden"], generator=generator))
    heads = sizes.get("keys", sizes["width"]) // sizes["head"]
    there = torch.randn(heads, sizes["head"], sizes["head"], generator=generator, dtype=torch.float64)
    there += 4 * torch.eye(sizes["head"], dtype=torch.float64)
    basis = HeadBasis(there, torch.linalg.inv(there))
    turn_values_(model, 1, basis)
    torch.testing.assert_close(model(ids).logits, expected, **near)
    if family.rotary:
        with pytest.raises(ValueError, match="rotary"):
            turn_queries_(model, 1, basis)
    else:
        turn_queries_(model, 1, basis)
        torch.testing.assert_close(model(ids).logits, expected, **near)
    order = torch.randperm(24, generator=generator)
    if family.model_type == "bert" or kind == "opt.narrow":
        with pytest.raises(UserError, match="does not meet the residual stream directly; leave residual out"):
            permute_residual_(model, order)
    else:
        permute_residual_(model, order)
    torch.testing.assert_close(model(ids).logits, expected, **near)


@pytest.mark.parametrize("kind", NEWER)
def test_a_newer_family_loses_nothing_and_shows_its_attention(kind, ids):
    """With factors of full rank; the taps' queries and keys make the maps that the model's own code shows."""
    dense = random_model(config_of(kind))
    model, expected = copy.deepcopy(dense), dense(ids).logits
    sites = anatomy_of(dense).sites.values()
    compress_(model, Plan({site.name: full_rank(site.out_features, site.in_features) for site in sites}))
    torch.testing.assert_close(model(ids).logits, expected, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(to_dense(model)(ids).logits, expected, atol=2e-3, rtol=1e-3)
    with Taps(dense) as taps:
        assert torch.equal(dense(ids).logits, expected)
    if kind == "falcon.rw":  # transformers' own code adds its biases twice where it shows the maps
        slopes = 2.0 ** -torch.tensor([2, 4, 6, 8]).view(4, 1, 1)
        biases = (slopes * torch.arange(7)).masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), -torch.inf)
        shown = [((tap.query @ tap.key.mT + biases) * tap.scaling).softmax(-1) for tap in taps.attention]
    else:
        eager = AutoModelForCausalLM.from_config(config_of(kind), attn_implementation="eager").eval()
        eager.load_state_dict(dense.state_dict())
        shown = eager(ids, output_attentions=True).attentions
    for tap, p in zip(taps.attention, shown, strict=True):
        visible = torch.ones(7, 7, dtype=torch.bool).tril().triu(1 - (tap.window or 7))
        assert torch.equal((p > 0).all(0).all(0), visible)
        # Against a twin whose attention is even, KL(p || even) = log(keys seen) - entropy of p.
        even = tap._replace(query=torch.zeros_like(tap.query), bias=None)
        entropy = -torch.where(p > 0, p * p.log(), 0).sum(-1)
        found = attention_kl(even, tap)
        torch.testing.assert_close(found, (visible.sum(-1).log() - entropy).mean(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["gemma2", "bloom"])
def test_the_gradient_of_attention_with_a_cap_or_a_bias(kind, ids):
    """In float64, of the student's queries and keys, by both losses."""
    model = random_model(config_of(kind)).double()
    with Taps(model, {"attention"}) as taps, torch.no_grad():
        model(ids)
    teacher = taps.attention[2]
    query, key = (tensor.detach().mul(1.3).requires_grad_() for tensor in (teacher.query, teacher.key))
    for loss in (attention_kl, attention_score_mse):
        assert torch.autograd.gradcheck(lambda q, k, f=loss: f(teacher._replace(query=q, key=k), teacher), (query, key))


def test_layers_that_see_different_spans_are_fitted_on_what_they_see(text):
    """Gemma 3: the moments are those of the inputs in the model's own pass, windows and positions of each layer."""
    model = random_model(config_of("gemma3_text"))
    paths = {name: f"model.layers.{name[7]}.self_attn.o_proj" for name in ("layers.1.o", "layers.2.o")}
    seen = {name: [] for name in paths}
    for name, path in paths.items():
        model.get_submodule(path).register_forward_pre_hook(lambda _, args, n=name: seen[n].append(args[0].detach()))
    with torch.no_grad():
        for ids in text.batches():
            model(ids)
    expected = {name: torch.cat([x.flatten(0, 1) for x in found]) for name, found in seen.items()}
    for name, moment in moments(model, text, list(paths)):
        x = expected[name].double()
        torch.testing.assert_close(moment.second.double(), x.T @ x / len(x), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", NEWER)
def test_a_newer_family_as_onnx(kind, tmp_path):
    model = random_model(config_of(kind))
    compress_(model, HALVES)
    write_onnx(model, tmp_path / "model.onnx")
    assert largest_difference(model, OnnxModel(tmp_path / "model.onnx", model.config)) < 1e-4


@pytest.mark.parametrize("kind", ["gpt_neo", pytest.param("smollm3", marks=pytest.mark.slow)])
def test_a_newer_family_without_some_layers(kind, ids, tmp_path):
    """The kept layers see what they saw: their kinds go with them into the folder."""
    model = random_model(config_of(kind))
    kept = copy.deepcopy(model)
    path = anatomy_of(model).family.layers
    layers = model.base_model.get_submodule(path)
    layers[1].forward = lambda states, *_, **__: states if kind == "smollm3" else (states, None)
    expected = model(ids).logits
    compress_(kept, Plan(), layers=[0, 2])
    assert torch.equal(kept(ids).logits, expected)
    loaded = load_model(save_model(kept, tmp_path / "model"))
    assert torch.equal(loaded(ids).logits, expected)


def test_verbs_that_need_the_next_token_refuse_bert():
    with pytest.raises(
        UserError, match=r"a bert fills in masked tokens, and train needs one that predicts the next token"
    ):
        require_causal(config_of("bert"), "train")
    require_causal(config_of("opt"), "train")


def test_bert_attention_is_compared_both_ways(ids):
    """A query of an encoder sees later keys: maps from the taps are those that transformers shows."""
    model = random_model(config_of("bert"))
    with Taps(model) as taps:
        model(ids)
    model.set_attn_implementation("eager")
    shown = model(ids, output_attentions=True, output_hidden_states=True)
    for tap, expected in zip(taps.attention, shown.attentions, strict=True):
        assert not tap.causal
        torch.testing.assert_close((tap.query @ tap.key.mT * tap.scaling).softmax(-1), expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(taps.hidden[0], shown.hidden_states[1], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(taps.embedding, shown.hidden_states[0])
    output = model.bert.encoder.layer[2].output
    entering = model.bert.encoder.layer[2].attention
    states = entering(taps.hidden[1])[0]
    torch.testing.assert_close(output.LayerNorm(taps.feed_forward[2] + states), taps.hidden[2], atol=1e-4, rtol=1e-3)


def test_a_bert_folder_of_pre_training_is_read(ids, tmp_path):
    """As on the hub: with a pooler and a second head, which a masked language model has not."""
    torch.manual_seed(0)
    model = BertForPreTraining(config_of("bert")).eval()
    model.save_pretrained(tmp_path / "dense")
    loaded = load_model(tmp_path / "dense")
    assert torch.equal(loaded(ids).logits, model(ids).prediction_logits)
    settings = FitConfig(symmetries=["residual"])
    with pytest.raises(UserError, match="leave residual out"):
        compress_(copy.deepcopy(loaded), HALVES, settings=settings)
    compress_(loaded, HALVES)
    save_model(loaded, tmp_path / "model")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "model")
    assert torch.equal(again(ids).logits, loaded(ids).logits)
    decoder = again.cls.predictions.decoder
    assert decoder.bias is again.cls.predictions.bias and decoder.left is again.get_input_embeddings().left
    assert isinstance(again.config, BertConfig)
