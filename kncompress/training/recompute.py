"""Activation checkpointing: a layer keeps its input alone, and is computed again in the backward pass."""

from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from kncompress.anatomy.sites import anatomy_of


def recompute_layers(model: Any) -> None:
    """Have every layer of ``model`` computed again when its gradients are asked for, until ``keep_activations``.

    Results are the same; what hooks on the inside of a layer hold is kept all the same, and they run a second time.
    Hooks on the layer itself stay outside, as shards need.
    """
    for layer in _layers(model):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def keep_activations(model: Any) -> None:
    """Undo ``recompute_layers``; harmless where it was not called."""
    for layer in _layers(model):
        vars(layer).pop("forward", None)


def _layers(model: Any) -> Any:
    return model.base_model.get_submodule(anatomy_of(model).family.layers)
