"""Activations in one kernel."""

from torch import nn
from transformers.activations import FastGELUActivation, GELUTanh, NewGELUActivation

_WRITTEN_OUT = (NewGELUActivation, FastGELUActivation)
"""GELU by tanh, as eight operations. Under autocast the power, and all that follows it, runs in float32."""


def fuse_gelu_(model: nn.Module) -> int:
    """Have GELU by tanh computed in one operation, in place; returns how many modules were exchanged.

    The function is the same (GPT-2's ``gelu_new``; Hendrycks & Gimpel 2016, arXiv 1606.08415), its rounding is not. The
    model's config keeps its name, so that a saved model computes as it did.
    """
    found = [name for name, module in model.named_modules() if isinstance(module, _WRITTEN_OUT)]
    for name in found:
        model.set_submodule(name, GELUTanh())
    return len(found)
