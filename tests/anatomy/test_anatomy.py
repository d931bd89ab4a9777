"""The table names every map of a family."""

import pytest
import torch
from tiny_models import config_of
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    T5Config,
)

from kncompress.anatomy.sites import anatomy_of
from kncompress.anatomy.swap import dense_bias, dense_weight, module_at
from kncompress.errors import UserError


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


@pytest.mark.parametrize("source", ["config", "model"])
def test_unknown_family_is_named_with_its_modules(source):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CohereConfig(vocab_size=32, pad_token_id=0, **sizes)
    with pytest.raises(UserError) as caught:
        anatomy_of(config if source == "config" else CohereForCausalLM(config))
    text = str(caught.value)
    assert text.startswith(
        "model_type=cohere: no table of its maps; it has 1 Embedding, 8 Linear; known: bert, bloom, "
    )
    assert "stablelm; a new family is one entry of the table in kncompress/anatomy/families.py" in text


def test_unknown_family_without_a_language_model_is_named():
    with pytest.raises(UserError, match="model_type=t5: no table of its maps; known: bert, bloom, falcon"):
        anatomy_of(T5Config())


def test_llama_names_in_forward_order():
    names = list(anatomy_of(config_of("llama.untied")).sites)
    layer = ["attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down"]
    assert names == ["embedding", *(f"layers.{i}.{name}" for i in range(3) for name in layer), "head"]


def test_llama_head_size_is_the_configs_or_a_share_of_the_width():
    """SmolLM2-135M has 9 query and 3 key heads of 64; other Llamas name a head size of their own."""
    config = LlamaConfig(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3)
    sites = anatomy_of(config).sites
    assert (sites["layers.0.attn.k"].out_features, sites["layers.0.attn.k"].in_features) == (192, 576)
    config.head_dim = 128
    sites = anatomy_of(config).sites
    assert (sites["layers.0.attn.v"].out_features, sites["layers.0.attn.q"].out_features) == (384, 1152)
    assert (sites["layers.0.attn.o"].out_features, sites["layers.0.attn.o"].in_features) == (576, 1152)


def test_the_table_matches_the_modules(model_of_kind):
    """Every weight matrix of the model belongs to a site of its size, but for learned positions and a tied head."""
    table = anatomy_of(model_of_kind)
    sizes = {}
    for _, sites in table.modules():
        root = model_of_kind if sites[0].group == "head" else model_of_kind.base_model
        module = root.get_submodule(sites[0].module)
        sizes[id(module.weight)] = (sum(site.out_features for site in sites), sites[0].in_features)
        assert tuple(torch.cat([dense_weight(module, site) for site in sites]).shape) == sizes[id(module.weight)]
    left = [name for name, p in model_of_kind.named_parameters() if p.ndim == 2 and id(p) not in sizes]
    learned = {"gpt2": ["transformer.wpe.weight"], "opt": ["model.decoder.embed_positions.weight"]}
    assert left == learned.get(table.family.model_type, [])


def test_families_have_the_names_that_taps_and_layerdrop_use(model_of_kind):
    family = anatomy_of(model_of_kind).family
    layers = model_of_kind.base_model.get_submodule(family.layers)
    assert len(layers) == 3
    for layer in layers:
        assert layer.get_submodule(family.attention).layer_idx is not None
        assert layer.get_submodule(family.feed_forward) is not None


def test_gpt2_small_config_is_enough():
    assert len(anatomy_of(GPT2Config()).sites) == 73
