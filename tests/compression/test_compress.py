"""compress_ changes the model in place, keeps what it must, and counts the truth."""

import copy
import json

import numpy as np
import pytest
import torch
from tiny_models import config_of, random_model
from torch import nn
from transformers import GPT2ForSequenceClassification

from kncompress.anatomy.plan import Plan, RightFactor, plan_from_config
from kncompress.anatomy.sites import anatomy_of
from kncompress.anatomy.swap import FusedMaps, dense_weight, module_at
from kncompress.compression.compress import compress_, unique_parameters
from kncompress.compression.layerwise import CalibrationText
from kncompress.config import FactorConfig, FactorsConfig, FitConfig
from kncompress.errors import UserError
from kncompress.formats.pretrained import to_dense
from kncompress.kron import HybridShape, KroneckerEmbedding, KroneckerLinear, KroneckerShape, kronecker_weight

HALF = RightFactor((2, 1))
EVERYTHING = Plan({"layers.*": HALF, "embedding": RightFactor((1, 2))})


@pytest.fixture
def text():
    return CalibrationText(np.random.default_rng(0).integers(2, 96, 1024), context=16, batch_tokens=256)


def full_rank(out_features, in_features):
    """A shape with as many terms as make any (out, in) weight exactly representable."""
    return KroneckerShape((out_features // 2, in_features // 2), (2, 2), 4)


def test_enough_terms_leave_the_outputs_as_they_were(model_of_kind, ids):
    """Conv1D turned, QKV split in the right order, biases kept, head tied or its own: else the logits would move."""
    sites = anatomy_of(model_of_kind).sites.values()
    plan = Plan({site.name: full_rank(site.out_features, site.in_features) for site in sites})
    before = model_of_kind(ids).logits
    table = compress_(model_of_kind, plan)
    torch.testing.assert_close(model_of_kind(ids).logits, before, atol=1e-3, rtol=1e-4)
    assert max(row.error for row in table.rows) < 1e-5
    assert {type(m).__name__ for m in model_of_kind.modules() if hasattr(m, "weight") and m.weight.ndim == 2} <= {
        "KroneckerLinear",
        "KroneckerEmbedding",
        "Embedding",
        "OPTLearnedPositionalEmbedding",
    }


def test_one_of_the_fused_maps_can_stay_dense(tiny, ids):
    dense = copy.deepcopy(tiny)
    compress_(tiny, Plan({"layers.1.attn.k": HALF}))
    x = torch.randn(4, 24)
    fused = tiny.transformer.h[1].attn.c_attn
    assert isinstance(fused, FusedMaps)
    kinds = {name: type(child) for name, child in fused.named_children()}
    assert kinds == {"q": nn.Linear, "k": KroneckerLinear, "v": nn.Linear}
    y, expected = fused(x), dense.transformer.h[1].attn.c_attn(x)
    torch.testing.assert_close(y[:, :24], expected[:, :24])
    torch.testing.assert_close(y[:, 48:], expected[:, 48:])
    assert not torch.allclose(y[:, 24:48], expected[:, 24:48])
    assert "transformer.h.1.attn.c_attn.k.left" in tiny.state_dict()
    assert type(tiny.transformer.h[0].attn.c_attn).__name__ == "Conv1D"


def test_the_head_shares_the_embeddings_factors(tiny):
    compress_(tiny, Plan({"embedding": RightFactor((1, 2))}))
    embedding = tiny.transformer.wte
    assert isinstance(embedding, KroneckerEmbedding)
    assert tiny.lm_head.left is embedding.left
    assert tiny.lm_head.right is embedding.right


def test_an_untied_head_stays_dense_unless_named(tiny_config):
    tiny_config.tie_word_embeddings = False
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel(tiny_config)
    head = copy.deepcopy(model)
    compress_(model, Plan({"embedding": RightFactor((1, 2))}))
    assert isinstance(model.lm_head, nn.Linear)
    compress_(head, Plan({"head": RightFactor((1, 2))}))
    assert isinstance(head.lm_head, KroneckerLinear)
    assert isinstance(head.transformer.wte, nn.Embedding)


def test_classifier_without_a_language_model_head(tiny_config, ids):
    model = GPT2ForSequenceClassification(tiny_config).eval()
    table = compress_(model, EVERYTHING)
    assert "head" not in {row.name for row in table.rows}
    assert model(ids).logits.shape == (2, 2)


def test_groups_reach_their_maps_and_mlp_is_mirrored_on_the_way_out(model_of_kind):
    factors = FactorsConfig(
        layers=[1], qkv=FactorConfig([2, 1]), o=FactorConfig([1, 2]), mlp=FactorConfig([4, 1], layers=[2])
    )
    table = compress_(model_of_kind, plan_from_config(factors, model_of_kind))
    ends = {row.name: row.shape.partition("(x)")[2] for row in table.rows}
    hidden = [name for name in ("gate", "up") if f"layers.2.mlp.{name}" in anatomy_of(model_of_kind).sites]
    assert ends == {
        **{f"layers.1.attn.{name}": "2x1" for name in "qkv"},
        "layers.1.attn.o": "1x2",
        **{f"layers.2.mlp.{name}": "4x1" for name in hidden},
        "layers.2.mlp.down": "1x4",
    }


def test_totals_of_every_kind(model_of_kind):
    before = unique_parameters(model_of_kind)
    table = compress_(model_of_kind, EVERYTHING)
    assert (table.parameters_before, table.parameters_after) == (before, unique_parameters(model_of_kind))
    saved = sum(row.dense_parameters - row.parameters for row in table.rows)
    assert saved == table.parameters_before - table.parameters_after > 0
    # One token through every matrix, the head's too; a bias, a norm and a look-up cost none.
    positions = ("transformer.wpe.weight", "model.decoder.embed_positions.weight")
    matrices = [p.numel() for name, p in dense_twin(model_of_kind) if p.ndim == 2 and name not in positions]
    tied = anatomy_of(model_of_kind).tied
    embedding = 96 * 24
    assert table.multiply_adds_before == sum(matrices) - (0 if tied else embedding)


def dense_twin(model):
    return list(type(model)(to_dense(model).config).named_parameters())


def test_table_counts_what_the_model_has(tiny):
    before = unique_parameters(tiny)
    weight = tiny.transformer.h[0].mlp.c_fc.weight.detach().T.clone()
    table = compress_(tiny, EVERYTHING)
    assert table.parameters_before == before
    assert table.parameters_after == unique_parameters(tiny) == sum(p.numel() for p in set(tiny.parameters()))
    assert table.parameters_after < before
    saved = sum(row.dense_parameters - row.parameters for row in table.rows)
    assert saved == table.parameters_before - table.parameters_after
    up = next(row for row in table.rows if row.name == "layers.0.mlp.up")
    assert (up.shape, up.parameters, up.dense_parameters) == ("48x24(x)2x1", 48 * 24 + 2, 96 * 24)
    assert (up.multiply_adds, up.dense_multiply_adds) == (48 * 24 + 96, 96 * 24)
    module = tiny.transformer.h[0].mlp.c_fc
    formed = kronecker_weight(module.left, module.right).detach()
    assert up.error == pytest.approx(float((weight - formed).norm() / weight.norm()), rel=1e-4)


def test_table_multiply_adds_of_the_whole_model(tiny):
    """Before: every matrix once per token, the tied head too, the look-up free."""
    table = compress_(tiny, Plan({"layers.1.mlp.up": HALF}))
    assert table.multiply_adds_before == 3 * (4 * 24 * 24 + 2 * 24 * 96) + 96 * 24
    assert table.multiply_adds_before - table.multiply_adds_after == 96 * 24 - (48 * 24 + 96)


def test_tied_head_is_counted_once(tiny):
    table = compress_(tiny, Plan({"embedding": RightFactor((1, 2))}))
    rows = {row.name: row for row in table.rows}
    assert rows["embedding"].parameters == 96 * 12 + 2
    assert rows["embedding"].dense_multiply_adds == 0
    assert rows["head"].parameters == rows["head"].dense_parameters == 0
    assert rows["head"].multiply_adds == 96 * 12 + 24
    assert table.mean_error == rows["embedding"].error


def test_table_as_json_and_text(tiny):
    table = compress_(tiny, EVERYTHING)
    read = json.loads(table.as_json())
    assert read["parameters_after"] == table.parameters_after
    assert read["mean_error"] == pytest.approx(table.mean_error)
    assert [row["name"] for row in read["rows"]] == [row.name for row in table.rows]
    lines = table.text().splitlines()
    assert len(lines) == len(table.rows) + 2
    assert f"{table.parameters_after:,}" in lines[-1]


def test_random_start_has_the_familys_std(tiny_config):
    from transformers import GPT2LMHeadModel

    tiny_config.n_embd, tiny_config.vocab_size = 96, 400
    torch.manual_seed(0)
    model = GPT2LMHeadModel(tiny_config)
    table = compress_(model, EVERYTHING, start="random")
    assert table.mean_error is None
    block = model.transformer.h[1]
    residual = 0.02 / 6**0.5
    for module, std in [
        (model.transformer.wte, 0.02),
        (block.attn.c_attn.q, 0.02),
        (block.mlp.c_fc, 0.02),
        (block.attn.c_proj, residual),
        (block.mlp.c_proj, residual),
    ]:
        assert float(module.weight.detach().std()) == pytest.approx(std, rel=0.05)


def test_nearest_start_draws_no_random_numbers(tiny):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    compress_(tiny, EVERYTHING)
    assert torch.equal(torch.rand(1), expected)


def test_progress_names_each_factored_map(tiny):
    seen = []
    plan = Plan({"layers.1.attn.q": HALF, "embedding": RightFactor((1, 2))})
    compress_(tiny, plan, progress=lambda what, share: seen.append((what, share)))
    assert [what for what, _ in seen] == ["embedding", "layers.1.attn.q"]
    assert seen[0][1] == 0 < seen[1][1] < 1


def test_a_plan_that_does_not_fit_changes_nothing(tiny):
    before = {name: id(module) for name, module in tiny.named_modules()}
    with pytest.raises(UserError, match="7 does not divide"):
        compress_(tiny, Plan({"embedding": RightFactor((1, 2)), "layers.2.mlp.up": RightFactor((7, 1))}))
    assert {name: id(module) for name, module in tiny.named_modules()} == before


def test_factoring_twice_is_refused(tiny):
    compress_(tiny, Plan({"layers.1.attn.q": HALF}))
    with pytest.raises(UserError, match="factored already"):
        compress_(tiny, Plan({"layers.2.attn.q": HALF}))


def test_every_factor_gets_a_gradient(tiny, ids):
    compress_(tiny, EVERYTHING)
    tiny(ids, labels=ids).loss.backward()
    factors = {n: p for n, p in tiny.named_parameters() if n.endswith((".left", ".right"))}
    assert len(factors) == 2 * (1 + 18)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in factors.values())


def hybrid(site):
    """Outer products beside a sum with small right factors."""
    outer = KroneckerShape((site.out_features, 1), (1, site.in_features), 2)
    return HybridShape((outer, KroneckerShape((site.out_features // 2, site.in_features // 2), (2, 2))))


def every_hybrid(model):
    """All maps of a model as hybrids, but the embedding."""
    sites = [site for site in anatomy_of(model).sites.values() if site.group != "embedding"]
    return Plan({"embedding": RightFactor((1, 2)), **{site.name: hybrid(site) for site in sites}})


@pytest.mark.parametrize("start", ["nearest", "random", "calibrated", "sequential"])
def test_hybrids_of_every_start(model_of_kind, ids, text, start):
    dense = copy.deepcopy(model_of_kind)
    before = unique_parameters(dense)
    table = compress_(model_of_kind, every_hybrid(dense), start, text=text)
    rows = {row.name: row for row in table.rows}
    up, wide = rows["layers.1.mlp.up"], anatomy_of(dense).sites["layers.1.mlp.up"].out_features
    assert up.parameters == 2 * (wide + 24) + wide * 24 // 4 + 4
    assert up.shape == f"{wide}x1(x)1x24*2 + {wide // 2}x12(x)2x2"
    assert before - table.parameters_after == sum(row.dense_parameters - row.parameters for row in table.rows)
    assert table.parameters_after == unique_parameters(model_of_kind)
    twin = to_dense(model_of_kind)
    torch.testing.assert_close(twin(ids).logits, model_of_kind(ids).logits, atol=1e-3, rtol=1e-4)
    if start == "random":
        assert table.mean_error is None
        return
    module = model_of_kind.base_model.get_submodule(anatomy_of(dense).sites["layers.1.mlp.up"].module)
    site = anatomy_of(dense).sites["layers.1.mlp.up"]
    weight = dense_weight(module_at(dense, site), site)
    assert up.error == pytest.approx(float((weight - module.weight.detach()).norm() / weight.norm()), rel=1e-4)


def test_calibration_helps_what_it_sees(model_of_kind, text):
    """Fewer errors on the calibration inputs, more in the weights."""
    tables = {}
    for start in ("nearest", "calibrated"):
        model = copy.deepcopy(model_of_kind)
        inputs = FitConfig(sides="inputs")  # whose error is the one in the table
        tables[start] = compress_(model, Plan({"layers.1.mlp.*": HALF}), start, text=text, settings=inputs)
        with torch.no_grad():
            difference = model(text_ids(text)).logits - model_of_kind(text_ids(text)).logits
        tables[start, "logits"] = float(difference.norm())
    nearest, calibrated = tables["nearest"], tables["calibrated"]
    assert nearest.weighted_error is None and 0 < calibrated.weighted_error < calibrated.mean_error
    assert nearest.mean_error < calibrated.mean_error
    assert tables["calibrated", "logits"] < tables["nearest", "logits"]


def text_ids(text):
    return torch.from_numpy(text.tokens[:1024]).view(-1, 16)


def test_biases_take_the_mean_of_the_error(tiny, text):
    """With the correction the mean output of a map is the dense one's."""
    dense = copy.deepcopy(tiny)
    plan = Plan({"layers.1.mlp.up": HALF})
    seen = {}
    for bias in (True, False):
        model = copy.deepcopy(dense)
        compress_(model, plan, "calibrated", text=text, settings=FitConfig(bias=bias))
        up = model.transformer.h[1].mlp.c_fc
        up.register_forward_hook(lambda _, x, y, bias=bias: seen.__setitem__(bias, (x[0], y)))
        with torch.no_grad():
            model(text_ids(text))
    exact = dense.transformer.h[1].mlp.c_fc(seen[True][0]).flatten(0, 1).mean(0).detach()
    off = {bias: float((y.flatten(0, 1).mean(0) - exact).norm()) for bias, (_, y) in seen.items()}
    assert off[True] < 0.05 * off[False]


def test_a_map_without_bias_gets_none(text):
    model = random_model(config_of("llama"))
    names = set(model.state_dict())
    compress_(model, EVERYTHING, "calibrated", text=text)
    assert not [name for name in set(model.state_dict()) - names if name.endswith("bias")]


@pytest.mark.parametrize("start", ["nearest", "calibrated", "sequential"])
@pytest.mark.parametrize("gauge", ["unit_right", "equal_rms"])
def test_a_gauge_moves_scale_and_nothing_else(tiny, text, start, gauge):
    plan = Plan({"layers.1.*": HALF, "embedding": RightFactor((1, 2))})
    models = [copy.deepcopy(tiny) for _ in range(2)]
    for model, chosen in zip(models, ("equal", gauge), strict=True):
        compress_(model, plan, start, text=text, settings=FitConfig(gauge=chosen))
    torch.testing.assert_close(models[1](text_ids(text)).logits, models[0](text_ids(text)).logits, atol=1e-3, rtol=1e-3)
    up = models[1].transformer.h[1].mlp.c_fc
    left, right = up.left.detach(), up.right.detach()
    if gauge == "unit_right":
        assert float(right.norm()) == pytest.approx(1, rel=1e-4)
    else:
        assert float(right.square().mean()) == pytest.approx(float(left.square().mean()), rel=1e-3)


@pytest.mark.parametrize("start", ["calibrated", "sequential"])
def test_a_start_that_reads_needs_text(tiny, start):
    before = {name: id(module) for name, module in tiny.named_modules()}
    with pytest.raises(UserError, match=f"start={start}: needs a text"):
        compress_(tiny, EVERYTHING, start)
    assert {name: id(module) for name, module in tiny.named_modules()} == before


@pytest.mark.parametrize("start", ["calibrated", "sequential"])
def test_calibration_follows_the_dropped_layers(tiny, text, start):
    table = compress_(tiny, EVERYTHING, start, layers=(0, 2), text=text)
    assert table.layers == (0, 2) and 0 < table.weighted_error < 1
    assert len(tiny.transformer.h) == 2


@pytest.mark.parametrize("start", ["calibrated", "sequential"])
def test_a_classifier_is_calibrated(tiny_config, ids, text, start):
    model = GPT2ForSequenceClassification(tiny_config).train()
    table = compress_(model, EVERYTHING, start, text=text)
    assert table.weighted_error is not None
    assert all(module.training for module in model.modules())


def test_half_precision_maps_keep_their_type(tiny):
    tiny.to(torch.bfloat16)
    compress_(tiny, EVERYTHING)
    assert {p.dtype for p in tiny.parameters()} == {torch.bfloat16}
