"""Leave out layers of a model: the student of DistilGPT2 (arXiv 1910.01108), alone or before factoring.

What is left is an ordinary, shallower model of the same family, which transformers loads without this package.
"""

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from kncompress.anatomy.mapped import own_
from kncompress.anatomy.sites import anatomy_of, family_of
from kncompress.anatomy.swap import dense_bias, dense_weight, module_at
from kncompress.errors import UserError


def check_layers(layers: Sequence[int], count: int, key: str = "layers") -> tuple[int, ...]:
    """``layers`` of a model of ``count`` layers as a tuple.

    Raises:
        UserError: none, one that the model has not, or not in rising order; names ``key``.
    """
    known = f"the model has layers 0 to {count - 1}"
    if not layers or any(type(layer) is not int or not 0 <= layer < count for layer in layers):
        raise UserError(f"{key}={list(layers)}: {known}; give at least one of them")
    if any(after <= before for before, after in pairwise(layers)):
        raise UserError(f"{key}={list(layers)}: must rise from each layer to the next; {known}")
    return tuple(layers)


def config_of_layers(config: Any, layers: Sequence[int]) -> Any:
    """A copy of a transformers config for a model of these layers alone, counted from 0.

    Raises:
        UserError: layers that the model has not, or a family without a table.
    """
    family = family_of(config)
    chosen = check_layers(layers, family.sizes(config)["layers"])
    kept = copy.deepcopy(config)
    for name in family.by_layer:
        entries = getattr(config, name, None)
        if entries is not None:
            setattr(kept, name, [entries[layer] for layer in chosen])
    if hasattr(config, "attention_types"):  # GPT-Neo reads its list anew from this one: [[kinds], how often]
        kept.attention_types = [[kept.attention_layers, 1]]
    kept.num_hidden_layers = len(chosen)
    return kept


def keep_layers_(model: Any, layers: Sequence[int]) -> None:
    """Drop all other layers of a dense model, in place, and its config's entries for them.

    Every kept layer computes what it did before. The model gets a config of its own, for another may share the old.
    Weights that lie in files stay there, and those of dropped layers are not read.

    Args:
        model: transformers model of a family with an anatomy.
        layers: numbers of the layers that stay, counted from 0, rising.

    Raises:
        UserError: layers that the model has not, or not in rising order; nothing is changed then.
    """
    kept = config_of_layers(model.config, layers)
    _scale_queries(model, layers)
    path = anatomy_of(model).family.layers
    old = model.base_model.get_submodule(path)
    new = nn.ModuleList(old[layer] for layer in layers).train(old.training)
    model.base_model.set_submodule(path, new)
    module: Any
    for number, layer in enumerate(new):
        for module in layer.modules():
            for name in ("layer_idx", "layer_id"):  # where the key-value cache keeps its keys
                if isinstance(getattr(module, name, None), int):
                    setattr(module, name, number)
    old_config = model.config
    for module in model.modules():
        if getattr(module, "config", None) is old_config:
            module.config = kept


@torch.no_grad()
def _scale_queries(model: Any, layers: Sequence[int]) -> None:
    """Scale the queries of layers whose number changes, where a GPT-2 divides its attention scores by that number.

    (``scale_attn_by_inverse_layer_idx``, counted from 1.) A model loaded from a folder divides by the new number.
    """
    if not getattr(model.config, "scale_attn_by_inverse_layer_idx", False):
        return
    anatomy = anatomy_of(model)
    blocks = model.base_model.get_submodule(anatomy.family.layers)
    for number, layer in enumerate(layers):
        site = anatomy.sites[f"layers.{layer}.attn.q"]
        module, ratio = module_at(model, site), (number + 1) / (layer + 1)
        if number != layer:
            own_(module)
        for tensor in (dense_weight(module, site), dense_bias(module, site)):
            if tensor is not None:
                tensor.mul_(ratio)
        attention = blocks[layer].get_submodule(anatomy.family.attention)
        if hasattr(attention, "scaling"):  # worked out from the old number when the module was made
            attention.scaling /= ratio
