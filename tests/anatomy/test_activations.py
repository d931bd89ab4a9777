"""GELU in one operation: the same values and gradients."""

import pytest
import torch
from transformers.activations import ACT2FN

from kncompress.anatomy.activations import fuse_gelu_


@pytest.mark.parametrize(("name", "exchanged"), [("gelu_new", 1), ("gelu_fast", 1), ("gelu", 0), ("silu", 0)])
def test_values_and_gradients_stay(name: str, exchanged: int) -> None:
    plain, fused = torch.nn.Sequential(ACT2FN[name]), torch.nn.Sequential(ACT2FN[name])
    assert fuse_gelu_(fused) == exchanged
    ours, theirs = (torch.linspace(-8, 8, 501, dtype=torch.float64, requires_grad=True) for _ in range(2))
    fused(ours).sum().backward()
    plain(theirs).sum().backward()
    torch.testing.assert_close(fused(ours), plain(theirs), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-9)


def test_a_model_computes_as_before_and_keeps_its_config(tiny) -> None:
    model, ids = tiny.eval(), torch.arange(12)[None]
    before = model(ids).logits
    assert fuse_gelu_(model) == model.config.n_layer
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-6)
    assert model.config.activation_function == "gelu_new"
    with torch.autocast("cpu", torch.bfloat16):
        assert model.transformer.h[0].mlp.act(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.bfloat16
