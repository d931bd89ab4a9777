"""The table names every map, and a new family is a table alone."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification, LlamaConfig, LlamaForCausalLM

from kncompress.errors import UserError
from kncompress.kron import KroneckerLinear
from kncompress.models import anatomy
from kncompress.models.anatomy import Family, MapRow, anatomy_of
from kncompress.models.compress import compress_
from kncompress.models.plan import Plan, RightFactor
from kncompress.models.pretrained import load_model, save_model, to_dense
from kncompress.models.swap import dense_bias, dense_weight, module_at
from kncompress.models.taps import capture


def test_gpt2_names_in_forward_order(tiny_config):
    names = list(anatomy_of(tiny_config).sites)
    layer = ["attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down"]
    assert names == ["embedding", *(f"layers.{i}.{name}" for i in range(3) for name in layer)]


def test_head_is_a_map_only_where_it_is_untied_and_there(tiny_config):
    assert "head" not in anatomy_of(tiny_config).sites
    tiny_config.tie_word_embeddings = False
    assert "head" in anatomy_of(tiny_config).sites
    assert "head" not in anatomy_of(GPT2ForSequenceClassification(tiny_config)).sites


def test_weights_are_read_out_by_in(tiny, ids):
    """The q, k, v slices of the Conv1D, as maps of their own, give what the block computes."""
    sites = anatomy_of(tiny).sites
    x = torch.randn(5, 24)
    fused = tiny.transformer.h[1].attn.c_attn
    for number, part in enumerate("qkv"):
        site = sites[f"layers.1.attn.{part}"]
        module = module_at(tiny, site)
        assert module is fused
        y = torch.nn.functional.linear(x, dense_weight(module, site), dense_bias(module, site))
        torch.testing.assert_close(y, fused(x)[:, 24 * number : 24 * number + 24])
    up = sites["layers.2.mlp.up"]
    assert dense_weight(module_at(tiny, up), up).shape == (96, 24)


def test_inner_size_comes_from_the_config(tiny_config):
    tiny_config.n_inner = 60
    site = anatomy_of(tiny_config).sites["layers.0.mlp.down"]
    assert (site.out_features, site.in_features) == (24, 60)


def test_unknown_family_is_named_with_its_modules():
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(UserError, match=r"model_type=llama: .*1 Embedding, 8 Linear; known: gpt2; .*FAMILIES"):
        anatomy_of(LlamaForCausalLM(config))


LLAMA = Family(
    model_type="llama",
    embedding="embed_tokens",
    layers="layers",
    attention="self_attn",
    feed_forward="mlp",
    head="lm_head",
    conv1d=False,
    rows=(
        MapRow("attn.q", "qkv", "self_attn.q_proj", "queries", "width"),
        MapRow("attn.k", "qkv", "self_attn.k_proj", "keys", "width"),
        MapRow("attn.v", "qkv", "self_attn.v_proj", "keys", "width"),
        MapRow("attn.o", "o", "self_attn.o_proj", "width", "queries"),
        MapRow("mlp.gate", "mlp", "mlp.gate_proj", "hidden", "width"),
        MapRow("mlp.up", "mlp", "mlp.up_proj", "hidden", "width"),
        MapRow("mlp.down", "mlp", "mlp.down_proj", "width", "hidden", mirrored=True),
    ),
    sizes=lambda config: {
        "vocabulary": config.vocab_size,
        "width": config.hidden_size,
        "hidden": config.intermediate_size,
        "queries": config.num_attention_heads * config.head_dim,
        "keys": config.num_key_value_heads * config.head_dim,
        "layers": config.num_hidden_layers,
    },
    std=lambda config, residual: config.initializer_range,
)


@pytest.mark.parametrize("tied", [True, False])
def test_llama_needs_only_its_table(monkeypatch, tmp_path, ids, tied):
    """Grouped queries, SwiGLU, no biases, rotary positions, tied and untied head: no other code changes."""
    monkeypatch.setitem(anatomy.FAMILIES, "llama", LLAMA)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    half = RightFactor((2, 1))
    entries = {"embedding": RightFactor((1, 2)), "layers.*.attn.[qkv]": half, "layers.1.mlp.*": half}
    if not tied:
        entries["head"] = half
    report = compress_(model, Plan(entries))
    assert {row.name for row in report.rows} >= {"layers.1.mlp.gate", "layers.0.attn.k", "head"}
    assert isinstance(model.lm_head, KroneckerLinear)
    assert (model.lm_head.left is model.model.embed_tokens.left) == tied
    before = model(ids).logits
    with capture(model) as taps:
        torch.testing.assert_close(model(ids).logits, before)
    assert [tap.key.shape for tap in taps.attention] == [(2, 2, 7, 6)] * 2
    torch.testing.assert_close(to_dense(model)(ids).logits, before, atol=1e-5, rtol=1e-5)
    save_model(model, tmp_path / "llama")
    torch.testing.assert_close(load_model(tmp_path / "llama")(ids).logits, before)


def test_gpt2_table_matches_the_modules(tiny):
    """Every weight matrix of the layers belongs to a site of its size."""
    table = anatomy_of(tiny)
    sizes = {f"transformer.{path}": sum(s.out_features for s in sites) for path, sites in table.modules()}
    for name, module in copy.deepcopy(tiny).named_modules():
        if type(module).__name__ == "Conv1D":
            assert sizes.pop(name) == module.nf
    assert set(sizes) == {"transformer.wte"}


def test_gpt2_small_config_is_enough():
    assert len(anatomy_of(GPT2Config()).sites) == 73
