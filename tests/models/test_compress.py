"""compress_ changes the model in place, keeps what it must, and reports the truth."""

import copy
import json

import pytest
import torch
from torch import nn
from transformers import GPT2ForSequenceClassification

from kncompress.config import FactorConfig, FactorsConfig
from kncompress.errors import UserError
from kncompress.kron import KroneckerEmbedding, KroneckerLinear, KroneckerShape, kronecker_weight
from kncompress.models.anatomy import anatomy_of
from kncompress.models.compress import compress_, unique_parameters
from kncompress.models.plan import Plan, RightFactor, plan_from_config
from kncompress.models.pretrained import to_dense
from kncompress.models.swap import FusedMaps

HALF = RightFactor((2, 1))
EVERYTHING = Plan({"layers.*": HALF, "embedding": RightFactor((1, 2))})


def full_rank(out_features, in_features):
    """A shape with as many terms as make any (out, in) weight exactly representable."""
    return KroneckerShape((out_features // 2, in_features // 2), (2, 2), 4)


def test_enough_terms_leave_the_outputs_as_they_were(model_of_kind, ids):
    """Conv1D turned, QKV split in the right order, biases kept, head tied or its own: else the logits would move."""
    sites = anatomy_of(model_of_kind).sites.values()
    plan = Plan({site.name: full_rank(site.out_features, site.in_features) for site in sites})
    before = model_of_kind(ids).logits
    report = compress_(model_of_kind, plan)
    torch.testing.assert_close(model_of_kind(ids).logits, before, atol=1e-3, rtol=1e-4)
    assert max(row.error for row in report.rows) < 1e-5
    assert {type(m).__name__ for m in model_of_kind.modules() if hasattr(m, "weight") and m.weight.ndim == 2} <= {
        "KroneckerLinear",
        "KroneckerEmbedding",
        "Embedding",
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
    report = compress_(model, EVERYTHING)
    assert "head" not in {row.name for row in report.rows}
    assert model(ids).logits.shape == (2, 2)


def test_groups_reach_their_maps_and_mlp_is_mirrored_on_the_way_out(model_of_kind):
    factors = FactorsConfig(
        layers=[1], qkv=FactorConfig([2, 1]), o=FactorConfig([1, 2]), mlp=FactorConfig([4, 1], layers=[2])
    )
    report = compress_(model_of_kind, plan_from_config(factors, model_of_kind))
    ends = {row.name: row.shape.partition("(x)")[2] for row in report.rows}
    hidden = [name for name in ("gate", "up") if f"layers.2.mlp.{name}" in anatomy_of(model_of_kind).sites]
    assert ends == {
        **{f"layers.1.attn.{name}": "2x1" for name in "qkv"},
        "layers.1.attn.o": "1x2",
        **{f"layers.2.mlp.{name}": "4x1" for name in hidden},
        "layers.2.mlp.down": "1x4",
    }


def test_totals_of_every_kind(model_of_kind):
    before = unique_parameters(model_of_kind)
    report = compress_(model_of_kind, EVERYTHING)
    assert (report.parameters_before, report.parameters_after) == (before, unique_parameters(model_of_kind))
    saved = sum(row.dense_parameters - row.parameters for row in report.rows)
    assert saved == report.parameters_before - report.parameters_after > 0
    # One token through every matrix, the head's too; a bias, a norm and a look-up cost none.
    matrices = [p.numel() for name, p in dense_twin(model_of_kind) if p.ndim == 2 and "wpe" not in name]
    tied = anatomy_of(model_of_kind).tied
    embedding = 96 * 24
    assert report.multiply_adds_before == sum(matrices) - (0 if tied else embedding)


def dense_twin(model):
    return list(type(model)(to_dense(model).config).named_parameters())


def test_report_counts_what_the_model_has(tiny):
    before = unique_parameters(tiny)
    weight = tiny.transformer.h[0].mlp.c_fc.weight.detach().T.clone()
    report = compress_(tiny, EVERYTHING)
    assert report.parameters_before == before
    assert report.parameters_after == unique_parameters(tiny) == sum(p.numel() for p in set(tiny.parameters()))
    assert report.parameters_after < before
    saved = sum(row.dense_parameters - row.parameters for row in report.rows)
    assert saved == report.parameters_before - report.parameters_after
    up = next(row for row in report.rows if row.name == "layers.0.mlp.up")
    assert (up.shape, up.parameters, up.dense_parameters) == ("48x24(x)2x1", 48 * 24 + 2, 96 * 24)
    assert (up.multiply_adds, up.dense_multiply_adds) == (48 * 24 + 96, 96 * 24)
    module = tiny.transformer.h[0].mlp.c_fc
    formed = kronecker_weight(module.left, module.right).detach()
    assert up.error == pytest.approx(float((weight - formed).norm() / weight.norm()), rel=1e-4)


def test_report_multiply_adds_of_the_whole_model(tiny):
    """Before: every matrix once per token, the tied head too, the look-up free."""
    report = compress_(tiny, Plan({"layers.1.mlp.up": HALF}))
    assert report.multiply_adds_before == 3 * (4 * 24 * 24 + 2 * 24 * 96) + 96 * 24
    assert report.multiply_adds_before - report.multiply_adds_after == 96 * 24 - (48 * 24 + 96)


def test_tied_head_is_counted_once(tiny):
    report = compress_(tiny, Plan({"embedding": RightFactor((1, 2))}))
    rows = {row.name: row for row in report.rows}
    assert rows["embedding"].parameters == 96 * 12 + 2
    assert rows["embedding"].dense_multiply_adds == 0
    assert rows["head"].parameters == rows["head"].dense_parameters == 0
    assert rows["head"].multiply_adds == 96 * 12 + 24
    assert report.mean_error == rows["embedding"].error


def test_report_as_json_and_table(tiny):
    report = compress_(tiny, EVERYTHING)
    read = json.loads(report.as_json())
    assert read["parameters_after"] == report.parameters_after
    assert read["mean_error"] == pytest.approx(report.mean_error)
    assert [row["name"] for row in read["rows"]] == [row.name for row in report.rows]
    lines = report.table().splitlines()
    assert len(lines) == len(report.rows) + 2
    assert f"{report.parameters_after:,}" in lines[-1]


def test_random_start_has_the_familys_std(tiny_config):
    from transformers import GPT2LMHeadModel

    tiny_config.n_embd, tiny_config.vocab_size = 96, 400
    torch.manual_seed(0)
    model = GPT2LMHeadModel(tiny_config)
    report = compress_(model, EVERYTHING, start="random")
    assert report.mean_error is None
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
    compress_(tiny, Plan({"layers.1.attn.q": HALF, "embedding": RightFactor((1, 2))}), progress=seen.append)
    assert seen == ["embedding", "layers.1.attn.q"]


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


def test_half_precision_maps_keep_their_type(tiny):
    tiny.to(torch.bfloat16)
    compress_(tiny, EVERYTHING)
    assert {p.dtype for p in tiny.parameters()} == {torch.bfloat16}
