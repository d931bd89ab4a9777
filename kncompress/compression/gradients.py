"""What becomes of a map's outputs: second moments of the loss's gradients with respect to them.

The loss is the cross-entropy of labels that the model itself draws, so that the moments are those of the Fisher
information (true labels would give the empirical Fisher, which a wrong model distorts).

Two walks over the layers, and no more than one layer's graph at a time: forward, keeping what enters each layer, then
back, where each layer is run again from what entered it and hands the gradient down. Both are kept, 2 n D L numbers for
n tokens, L layers and width D, in a file where they find no room. Moments are taken in a third walk (``dense_walk``),
forward again: a layer's gradients at the outputs of its maps need what enters it and what comes back to it alone.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kncompress.anatomy.mapped import raised
from kncompress.anatomy.sites import Site, anatomy_of
from kncompress.compression.layerwise import CalibrationText, HiddenStates, after_head, before_head
from kncompress.compression.rows import Rows
from kncompress.compression.work import Work, layer_cost
from kncompress.errors import UserError
from kncompress.kron.dense_product import without_autocast

_NUMBERS = 1 << 25
"""Numbers in one temporary of (tokens x vocabulary)."""
_BACKWARD = 2
"""Cost of running a layer forward once more and back to its input, in forward passes."""


EMBEDDED = -1
"""What stands before the first layer, where layers are counted: the embedding."""


class Upstream:
    """The gradients of the loss after each layer that holds one of ``sites``, from a walk to the end and back.

    Args:
        model: dense transformers model with a language-model head, in evaluation mode.
        text: what it reads.
        sites: maps within layers, or the embedding, whose outputs are taken for what enters the first layer: what a
            model adds to them has no part in the gradient, a factor that it multiplies them by is left out.
        work: is told of each layer.

    Raises:
        UserError: the text has no tokens, or logits are not finite.
    """

    def __init__(self, model: Any, text: CalibrationText, sites: Collection[Site], work: Work) -> None:
        layers = model.base_model.get_submodule(anatomy_of(model).family.layers)
        wanted = {EMBEDDED if site.layer is None else site.layer for site in sites}
        first = min(wanted)
        costs = [layer_cost(layer, len(text.tokens)) for layer in layers]
        work.expect(sum(costs) + _BACKWARD * sum(costs[first + 1 :]))
        work.begin("gradients: head")
        hidden = HiddenStates(model, text)
        entered: list[Rows] = []
        for number, layer in enumerate(layers):
            entered.append(Rows(hidden.chunks if number > first else (), text.scratch, text.room // len(layers)))
            with raised(layer):
                hidden.advance(layer)
            work.finish(costs[number])
        with raised(before_head(model), model.get_submodule(anatomy_of(model).family.head)):
            gradients = _at_the_end(model, hidden, anatomy_of(model).family.head)
        self._after: dict[int, Rows] = {}
        for number in range(len(layers) - 1, first - 1, -1):
            work.begin("gradients: embedding" if number == EMBEDDED else f"gradients: layers.{number}")
            if number in wanted:
                self._after[number] = Rows(gradients, text.scratch, text.room // len(layers))
            if number > first:
                hidden.layer = number
                with raised(layers[number]):
                    _one_layer_back(layers[number], hidden, entered.pop(), gradients)
                work.finish(_BACKWARD * costs[number])

    def after(self, layer: int, batch: int) -> Tensor:
        """(B, T, D), on the CPU: gradient at the output of a layer, or of ``EMBEDDED``, for a batch."""
        return self._after[layer][batch]

    def embedded(self) -> Iterator[Tensor]:
        """``after(EMBEDDED)`` of each batch."""
        yield from self._after[EMBEDDED]


def _at_the_end(model: Any, hidden: HiddenStates, path: str) -> list[Tensor]:
    """Gradient of the loss with respect to what the last layer gives, (B, T, D) of each batch."""
    norm, head = before_head(model), model.get_submodule(path)
    generator = torch.Generator(hidden.device).manual_seed(0)
    rows = max(1, _NUMBERS // head.weight.shape[0])

    def of(states: Tensor) -> Tensor:
        x = states.detach().requires_grad_()
        with torch.enable_grad(), without_autocast(hidden.device):
            logits = after_head(model.config, head(norm(x)))
        error = logits.detach().float().softmax(-1)
        if not torch.isfinite(error).all():
            raise UserError("model: its logits are not finite on the calibration text; it cannot be fitted")
        labels = torch.multinomial(error, 1, generator=generator)
        error.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=error.dtype))
        (gradient,) = torch.autograd.grad(logits, x, error.to(logits.dtype))
        return gradient

    found = []
    for states in hidden.chunks:
        flat = states.to(hidden.device).flatten(0, -2)
        found.append(torch.cat([of(some) for some in flat.split(rows)]).view_as(states).cpu())
    return found


def _one_layer_back(layer: nn.Module, hidden: HiddenStates, entered: Rows, gradients: list[Tensor]) -> None:
    """Replaces ``gradients``, at a layer's output, by those at its input; ``entered`` is what the layer read."""
    for number, states in enumerate(entered):
        x = states.detach().to(hidden.device).requires_grad_()
        with torch.enable_grad():
            result = hidden.output(layer, number, x)
        (found,) = torch.autograd.grad(result, x, gradients[number].to(hidden.device))
        gradients[number] = found.cpu()


def of_map(outputs: Tensor, site: Site) -> Tensor:
    """(..., M) of one map out of the outputs (..., all M) of the module that holds it."""
    blocks = outputs.unflatten(-1, (site.blocks, -1))
    size = site.out_features // site.blocks
    return blocks[..., site.start : site.start + size].flatten(-2)


@contextmanager
def outputs_of(layer: nn.Module, paths: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """Within the block, a call of ``layer`` leaves the outputs of the modules at ``paths``, with their graph."""
    found: dict[str, Tensor] = {}

    def note(path: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
            found[path] = output

        return hook

    handles = [layer.get_submodule(path).register_forward_hook(note(path)) for path in paths]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
