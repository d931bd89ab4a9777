"""Taps record what transformers itself would show, and leave no trace."""

import copy

import pytest
import torch
from tiny_models import config_of, random_model
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel

from kncompress.anatomy.plan import Plan, RightFactor
from kncompress.anatomy.sites import anatomy_of
from kncompress.anatomy.taps import Taps
from kncompress.compression.compress import compress_
from kncompress.distill import attention_kl


@pytest.fixture(params=["dense", "factored"])
def model(request, tiny):
    if request.param == "factored":
        compress_(tiny, Plan({"layers.*": RightFactor((2, 1)), "embedding": RightFactor((1, 2))}))
    return tiny


@pytest.fixture
def mask(ids):
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return mask


def test_logits_equal_plain_sdpa(model, ids, mask):
    """With and without padding: the mask of the tapped attention is sdpa's."""
    assert model.config._attn_implementation == "sdpa"
    plain, padded = model(ids).logits, model(ids, attention_mask=mask).logits
    with Taps(model):
        assert torch.equal(model(ids).logits, plain)
        assert torch.equal(model(ids, attention_mask=mask).logits, padded)
    assert not torch.allclose(plain, padded)


def test_attention_agrees_with_eager_maps(model, ids):
    with Taps(model, {"attention"}) as taps:
        model(ids)
    model.set_attn_implementation("eager")
    maps = model(ids, output_attentions=True).attentions
    future = torch.ones(7, 7, dtype=torch.bool).triu(1)
    assert len(taps.attention) == len(maps) == 3
    for tap, expected in zip(taps.attention, maps, strict=True):
        assert tap.query.shape == tap.key.shape == (2, 2, 7, 12)
        scores = tap.query @ tap.key.transpose(-1, -2) * tap.scaling
        torch.testing.assert_close(scores.masked_fill(future, -torch.inf).softmax(-1), expected)


def test_taps_of_every_kind(model_of_kind, ids):
    """Queries and keys after their rotation; of a Llama fewer key heads than query heads, which share them."""
    compress_(model_of_kind, Plan({"layers.1.*": RightFactor((2, 1))}))
    plain = model_of_kind(ids).logits
    with Taps(model_of_kind) as taps:
        assert torch.equal(model_of_kind(ids).logits, plain)
    model_of_kind.set_attn_implementation("eager")
    shown = model_of_kind(ids, output_attentions=True, output_hidden_states=True)
    future = torch.ones(7, 7, dtype=torch.bool).triu(1)
    sizes = anatomy_of(model_of_kind).family.sizes(model_of_kind.config)
    counts = [sizes.get(name, sizes["width"]) // sizes["head"] for name in ("queries", "keys")]
    heads = (*counts, sizes["head"])
    for tap, expected in zip(taps.attention, shown.attentions, strict=True):
        assert (tap.query.shape, tap.key.shape) == ((2, heads[0], 7, heads[2]), (2, heads[1], 7, heads[2]))
        key = tap.key.repeat_interleave(heads[0] // heads[1], dim=1)
        scores = tap.query @ key.transpose(-1, -2) * tap.scaling
        torch.testing.assert_close(scores.masked_fill(future, -torch.inf).softmax(-1), expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(taps.embedding, shown.hidden_states[0])
    torch.testing.assert_close(taps.hidden[0], shown.hidden_states[1], atol=1e-3, rtol=1e-3)
    layer = model_of_kind.base_model.get_submodule(anatomy_of(model_of_kind).family.layers)[1]
    family = model_of_kind.config.model_type
    # Both parts of a GPT-NeoX layer read what enters it.
    reads = taps.hidden[0] if family == "gpt_neox" else taps.hidden[1] - taps.feed_forward[1]
    if family == "opt":
        made = layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(reads))))
    else:
        made = layer.mlp((layer.ln_2 if family == "gpt2" else layer.post_attention_layernorm)(reads))
    torch.testing.assert_close(made, taps.feed_forward[1], atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("padded", [False, True])
def test_attention_losses_see_the_window_that_the_model_sees(ids, padded):
    """One layer of three is full; the losses are those of the maps that eager attention shows."""
    config = config_of("qwen2")
    config.use_sliding_window, config.sliding_window = True, 3
    config.layer_types = ["full_attention", "sliding_attention", "sliding_attention"]
    student, teacher = random_model(copy.deepcopy(config)), random_model(config)
    compress_(student, Plan({"layers.*": RightFactor((2, 1))}))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 5:] = 0
    taps, maps = [], []
    for model in (student, teacher):
        plain = model(ids, attention_mask=mask).logits
        with Taps(model, {"attention"}) as tap:
            assert torch.equal(model(ids, attention_mask=mask).logits, plain)
        taps.append(tap.attention)
        model.set_attn_implementation("eager")
        maps.append(model(ids, attention_mask=mask, output_attentions=True).attentions)
    assert [tap.window for tap in taps[0]] == [None, 3, 3]
    for layer, (q, p) in enumerate(zip(*maps, strict=True)):
        assert (p[:, :, 5, 1] == 0).all() == (layer > 0)
        terms = torch.where(p > 0, p * (p / q).log(), 0).sum(-1)  # (B, H, T)
        expected = terms.transpose(1, 2)[mask.bool()].mean()
        found = attention_kl(taps[0][layer], taps[1][layer], mask)
        assert expected > 1e-3
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_scaling_by_layer_is_recorded(tiny_config, ids):
    tiny_config.scale_attn_by_inverse_layer_idx = True
    model = GPT2LMHeadModel(tiny_config)
    with Taps(model, {"attention"}) as taps:
        model(ids)
    assert [tap.scaling for tap in taps.attention] == pytest.approx([12**-0.5 / n for n in (1, 2, 3)])


def test_embedding_hidden_and_feed_forward(model, ids):
    with Taps(model) as taps:
        states = model(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(taps.embedding, states[0])
    for layer in (0, 1):
        torch.testing.assert_close(taps.hidden[layer], states[layer + 1])
    torch.testing.assert_close(model.transformer.ln_f(taps.hidden[2]), states[3])
    assert len(taps.hidden) == len(taps.feed_forward) == 3
    block = model.transformer.h[1]
    after_attention = taps.hidden[1] - taps.feed_forward[1]
    torch.testing.assert_close(block.mlp(block.ln_2(after_attention)), taps.feed_forward[1], atol=1e-4, rtol=1e-4)


def test_gradients_flow_through_every_tap(model, ids):
    with Taps(model) as taps:
        model(ids)
        first = next(model.transformer.wte.parameters())
        for tensor in (taps.embedding, taps.attention[2].query, taps.hidden[1], taps.feed_forward[2]):
            (gradient,) = torch.autograd.grad(tensor.square().sum(), first, retain_graph=True)
            assert gradient.abs().sum() > 0


def test_a_new_forward_starts_new_records(model, ids):
    with Taps(model, {"hidden", "attention"}) as taps:
        model(ids)
        first, hidden = taps.records, taps.hidden[0].clone()
        model(ids.flip(0)[:, :4])
        assert taps.hidden[0].shape == (2, 4, 24)
        assert taps.attention[0].query.shape == (2, 2, 4, 12)
        assert taps.records is not first
        assert torch.equal(first.hidden[0], hidden)
    assert taps.hidden[0].shape == (2, 4, 24)


def test_generation_with_cache_under_taps(model, ids):
    plain = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    with Taps(model, {"attention"}) as taps:
        assert torch.equal(model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False), plain)
    assert taps.attention[0].query.shape == (2, 2, 1, 12)
    assert taps.attention[0].key.shape == (2, 2, 10, 12)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_nothing_is_left_behind(tiny, ids, implementation):
    tiny.set_attn_implementation(implementation)
    taps = Taps(tiny)
    tiny(ids)
    taps.close()
    taps.close()
    assert tiny.config._attn_implementation == implementation
    hooks = [m for m in tiny.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []
    before = taps.hidden[0]
    tiny(ids[:, :3])
    assert taps.hidden[0] is before
    with Taps(tiny):
        tiny(ids)


def test_closed_after_an_error_in_the_block(tiny):
    with pytest.raises(KeyError), Taps(tiny):
        raise KeyError
    assert tiny.config._attn_implementation == "sdpa"


def test_attention_that_bypasses_the_taps_is_an_error(tiny, ids):
    with Taps(tiny, {"attention"}):
        tiny.set_attn_implementation("eager")
        with pytest.raises(RuntimeError, match="attention recorded 0 times in a forward pass, not 3"):
            tiny(ids)


def test_reading_before_a_forward_or_without_a_tap_is_an_error(tiny, ids):
    with Taps(tiny, {"hidden"}) as taps:
        with pytest.raises(RuntimeError, match="hidden recorded 0 times"):
            _ = taps.hidden
        tiny(ids)
        with pytest.raises(RuntimeError, match="not among the tapped names: hidden"):
            _ = taps.feed_forward
    with pytest.raises(ValueError, match="names=scores"):
        Taps(tiny, {"scores"})


def test_two_models_side_by_side_and_one_tapped_twice(tiny, ids):
    """Teacher and student made from one config object share its attention setting."""
    other = GPT2LMHeadModel(tiny.config).eval()
    with Taps(tiny) as taps:
        tiny(ids)
        query = taps.attention[0].query
        other(ids)
        assert taps.attention[0].query is query
        with pytest.raises(RuntimeError, match="tapped already"):
            Taps(tiny)
        tiny(ids)


def test_classifier_can_be_tapped(tiny_config, ids):
    model = GPT2ForSequenceClassification(tiny_config)
    with Taps(model) as taps:
        model(ids)
    assert len(taps.attention) == 3
