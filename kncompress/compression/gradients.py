"""What becomes of a map's outputs: second moments of the loss's gradients with respect to them.

The loss is the cross-entropy of labels that the model itself draws, so that the moments are those of the Fisher
information (true labels would give the empirical Fisher, which a wrong model distorts).

Two walks over the layers, and no more than one layer's graph at a time: forward, keeping what enters each layer, then
back, where each layer is run again from what entered it and hands the gradient down. Besides the moments this takes n
D (L + 1) numbers for n tokens, L layers and width D. Where these are more than ``ROOM`` bytes, only what enters every
k-th layer is kept, k about the root of L, and the rest made again from that, k layers at a time: 2 n D k numbers.
"""

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kncompress.anatomy.sites import Site, anatomy_of
from kncompress.compression.layerwise import CalibrationText, HiddenStates, after_head, before_head, evaluating
from kncompress.compression.moments import MomentFolder, MomentSum, fingerprint, finite, path_in_layer
from kncompress.compression.work import Work, layer_cost
from kncompress.errors import UserError
from kncompress.kron import Moment
from kncompress.kron.dense_product import without_autocast

_NUMBERS = 1 << 25
"""Numbers in one temporary of (tokens x vocabulary)."""
ROOM = 1 << 30
"""Bytes of hidden states that are kept."""
_BACKWARD = 4
"""Cost of running a layer forward once more and back, in forward passes."""


def output_moments(
    model: Any, text: CalibrationText, wanted: Collection[str], work: Work | None = None
) -> dict[str, Moment]:
    """{map: moment of the gradients at its outputs, E[g g^T] of (M, M)} of the ``wanted`` maps within layers.

    Those that the folder ``text.moments`` holds are read from it, the others put there. Embedding and head are left
    out: their outputs are as many as there are tokens.

    Args:
        model: dense transformers model with a language-model head.
        text: what it reads.
        wanted: names of maps.
        work: is told of each layer.

    Raises:
        UserError: the text has no tokens, gradients are not finite, or as of ``MomentFolder``.
    """
    anatomy, work = anatomy_of(model), work or Work()
    sites = [anatomy.sites[name] for name in wanted if anatomy.sites[name].layer is not None]
    if not anatomy.has_head or not sites:
        return {}
    with evaluating(model):
        if text.moments is None:
            return dict(_walked_back(model, text, sites, work))
        folder, found = MomentFolder(text.moments, fingerprint(model, text)), {}
        device = next(model.parameters()).device
        for site in sites:
            kept = folder.load(_file(site.name), site.out_features)
            if kept is not None:
                found[site.name] = Moment(kept.second.to(device), kept.mean.to(device), kept.count)
        for name, moment in _walked_back(model, text, [s for s in sites if s.name not in found], work):
            folder.save(_file(name), moment)
            found[name] = moment
        return found


def _file(name: str) -> str:
    return f"{name}.gradient"


def _walked_back(model: Any, text: CalibrationText, sites: list[Site], work: Work) -> Iterator[tuple[str, Moment]]:
    """(map, moment) from the last layer to the first."""
    if not sites:
        return
    anatomy = anatomy_of(model)
    layers = model.base_model.get_submodule(anatomy.family.layers)
    first = min(site.layer for site in sites if site.layer is not None)
    work.expect(sum(_BACKWARD * layer_cost(layer, len(text.tokens)) for layer in layers[first:]))
    with work.moments():
        work.begin("gradients: head")
        hidden = HiddenStates(model, text)
        entered = _Entered(list(layers), hidden)
        gradients = _at_the_end(model, hidden, anatomy.family.head)
    for number in range(len(layers) - 1, first - 1, -1):
        work.begin(f"gradients: layers.{number}")
        here = [site for site in sites if site.layer == number]
        with work.moments():
            hidden = entered.pop()
            totals = {site.name: MomentSum(site.out_features, hidden.device) for site in here}
            _one_layer_back(layers[number], hidden, gradients, here, totals)
        work.finish(_BACKWARD * layer_cost(layers[number], len(text.tokens)))
        for name, total in totals.items():
            yield name, finite(total.moment(), f"the outputs of {name}: their gradient")


class _Entered:
    """What enters each layer, taken from the last one back; ``states``, of the first one, are moved through all."""

    def __init__(self, layers: list[nn.Module], states: HiddenStates) -> None:
        self.layers = layers
        size = sum(chunk.nbytes for chunk in states.chunks)
        every = 1 if size * (len(layers) + 1) <= ROOM else math.ceil(math.sqrt(len(layers)))
        self._kept: list[HiddenStates] = []
        for number, layer in enumerate(layers):
            if number % every == 0:
                self._kept.append(states.copy())
            states.advance(layer)
        self._next = len(layers)
        """Number of the layer whose states were taken last."""

    def pop(self) -> HiddenStates:
        """What enters the layer before the one of the last call, at first the last layer."""
        self._next -= 1
        while self._kept[-1].layer < self._next:
            states = self._kept[-1].copy()
            states.advance(self.layers[states.layer])
            self._kept.append(states)
        return self._kept.pop()


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


def _one_layer_back(
    layer: nn.Module, hidden: HiddenStates, gradients: list[Tensor], sites: list[Site], totals: dict[str, MomentSum]
) -> None:
    """Adds the gradients at the outputs of ``sites``, and replaces ``gradients`` by those at the layer's input."""
    paths = list(dict.fromkeys(path_in_layer(site) for site in sites))
    for number, states in enumerate(hidden.chunks):
        x = states.detach().to(hidden.device).requires_grad_()
        hidden.chunks[number] = x
        with torch.enable_grad(), outputs_of(layer, paths) as outputs:
            result = hidden.output(layer, number)
        upstream = gradients[number].to(hidden.device)
        found = torch.autograd.grad(result, [x, *(outputs[path] for path in paths)], upstream)
        gradients[number] = found[0].cpu()
        for path, gradient in zip(paths, found[1:], strict=True):
            for site in sites:
                if path_in_layer(site) == path:
                    totals[site.name].add(_of_map(gradient, site))
        hidden.chunks[number] = states


def _of_map(outputs: Tensor, site: Site) -> Tensor:
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
