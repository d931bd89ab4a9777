"""A model that computes in one type while its weights lie in their files in another, a layer at a time."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from kncompress.anatomy.families import FAMILIES
from kncompress.anatomy.mapped import raised


@contextmanager
def in_turn(model: Any, dtype: torch.dtype = torch.float32) -> Iterator[Any]:
    """Within the block ``model`` computes in ``dtype``: a layer's weights are of it while the layer runs, all others
    all the time. Memory of weights that lie in files is given back after each layer.

    Args:
        model: of a family with a table; of another all weights are of ``dtype`` all the time.
        dtype: of the computation.
    """
    known = model.config.model_type in FAMILIES
    layers = list(model.base_model.get_submodule(FAMILIES[model.config.model_type].layers)) if known else []
    inner = {id(parameter) for layer in layers for parameter in layer.parameters()}
    with ExitStack() as stack, ExitStack() as turn:

        def enter(layer: nn.Module, _: Any) -> None:
            turn.enter_context(raised(layer, dtype=dtype))

        def leave(*_: Any) -> None:
            turn.close()

        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(enter).remove)
            stack.callback(layer.register_forward_hook(leave).remove)
        others = [m for m in model.modules() if not any(id(parameter) in inner for parameter in m.parameters())]
        stack.enter_context(raised(*others, dtype=dtype))
        yield model
