"""The dense model's layers one after the other on a text: what enters each map, and what the loss feels at its outputs.

A layer is run once, whatever is asked of it. What enters its maps and the gradients at their outputs are kept as rows,
and a moment is taken of them when it is asked for, so that no more than one need be there.
"""

from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from kncompress.anatomy.mapped import raised
from kncompress.anatomy.sites import Anatomy, Site, anatomy_of
from kncompress.compression.gradients import Upstream, of_map, outputs_of
from kncompress.compression.layerwise import CalibrationText, HiddenStates, before_head, evaluating, recorded
from kncompress.compression.moments import MomentFolder, MomentSum, fingerprint, finite, inputs_of, path_in_layer
from kncompress.compression.rows import Rows
from kncompress.compression.work import Work, layer_cost, moment_cost
from kncompress.kron import Moment


class DenseWalk:
    """A walk over the layers of ``model``, which are dense when their turn comes and may be replaced after it.

    Args:
        model: dense transformers model in evaluation mode, on any device; its numbers may be in half precision.
        text: what it reads. Moments that its folder holds are read from there, the others put there.
        inputs: names of the inputs (``input_of``) whose moments will be asked for.
        outputs: names of the maps, within layers or the embedding, at whose outputs gradients will be.
        work: is told what is done.
        rows: whether what enters the maps of ``inputs`` will be asked for as it is.

    Raises:
        UserError: the text has no tokens, numbers are not finite, or as of ``MomentFolder``.
    """

    def __init__(
        self,
        model: Any,
        text: CalibrationText,
        inputs: Collection[str],
        outputs: Collection[str] = (),
        work: Work | None = None,
        rows: bool = False,
    ) -> None:
        self.model, self.text, self.work = model, text, work or Work()
        self.anatomy: Anatomy = anatomy_of(model)
        self.layers: nn.ModuleList = model.base_model.get_submodule(self.anatomy.family.layers)
        self.device = next(model.parameters()).device
        self.folder = None if text.moments is None else MomentFolder(text.moments, fingerprint(model, text))
        kept = self.folder.known if self.folder is not None else lambda _: False
        self._inputs = [name for name in inputs if rows or not kept(name)]
        sites = [self.anatomy.sites[name] for name in outputs] if self.anatomy.has_head else []
        sites = [site for site in sites if site.layer is not None or _enters(model, site)]
        self.outputs = {site.name for site in sites}
        self._outputs = [site for site in sites if not kept(gradient(site.name))]
        self.last = self._last()
        count = len(text.tokens)
        self._costs = [self._cost(number, count) for number in range(self.last)]
        self.work.expect(sum(self._costs))
        with self.work.moments():
            self.upstream = Upstream(model, text, self._outputs, self.work) if self._outputs else None
            self.states = HiddenStates(model, text) if self.last or "head" in self._inputs else None

    def _last(self) -> int:
        """Layers that have to be run."""
        if "head" in self._inputs:
            return len(self.layers)
        layers = [site.layer for site in self._outputs]
        named = {name: sites[0].layer for name, sites in inputs_of(self.anatomy).items()}
        layers += [named[name] for name in self._inputs]
        return max((layer for layer in layers if layer is not None), default=-1) + 1

    def _wanted(self, number: int) -> dict[str, list[Site]]:
        return {name: sites for name, sites in inputs_of(self.anatomy, number).items() if name in self._inputs}

    def _cost(self, number: int, tokens: int) -> float:
        once = layer_cost(self.layers[number], tokens)
        felt = 2 * once if any(site.layer == number for site in self._outputs) else 0.0
        return once + felt + sum(moment_cost(sites, tokens) for sites in self._wanted(number).values())

    def layer(self, number: int) -> "LayerRecord":
        """Run the layer, whose turn it is, and tell what was seen; layers behind the last one needed are not run."""
        record = LayerRecord(self, number)
        if number < self.last:
            assert self.states is not None and self.states.layer == number
            self.work.begin(f"layers.{number}")
            with self.work.moments():
                record.run(self.layers[number], self.states)
            self.work.finish(self._costs[number])
        return record

    def embedding(self) -> Moment | None:
        """The moment of the gradients at the embedding's outputs, (D, D), at any time; None where not asked for."""
        site = self.anatomy.sites["embedding"]
        if site.name not in self.outputs:
            return None
        if site not in self._outputs:
            assert self.folder is not None
            return self.folder.found(gradient(site.name), site.in_features, self.device)
        assert self.upstream is not None
        total = MomentSum(site.in_features, self.device)
        with self.work.moments():
            for rows in self.upstream.embedded():
                total.add(rows.to(self.device))
        return self._kept(gradient(site.name), finite(total.moment(), "the outputs of embedding: their gradient"))

    def head(self) -> Moment:
        """The moment of what the head reads, after all layers."""
        if "head" not in self._inputs:
            assert self.folder is not None
            return self.folder.found("head", self.anatomy.sites["embedding"].in_features, self.device)
        assert self.states is not None
        norm, total = before_head(self.model), MomentSum(self.anatomy.sites["embedding"].in_features, self.device)
        with self.work.moments(), raised(norm):
            for number in range(len(self.states.chunks)):
                total.add(self.states.apply(norm, number))
        return self._kept("head", finite(total.moment(), "head"))

    def _kept(self, name: str, moment: Moment) -> Moment:
        if self.folder is not None:
            self.folder.save(name, moment)
        return moment


class LayerRecord:
    """What a walk has seen in one layer."""

    def __init__(self, walk: DenseWalk, number: int) -> None:
        self.walk, self.number = walk, number
        self.inputs = {name: path_in_layer(sites[0]) for name, sites in walk._wanted(number).items()}
        self.felt = [site for site in walk._outputs if site.layer == number]
        paths = list(dict.fromkeys(path_in_layer(site) for site in self.felt))
        share = max(1, len(self.inputs) + len(paths))
        self.rows, self.gradients = (
            {path: Rows(folder=walk.text.scratch, room=walk.text.room // share) for path in some}
            for some in (self.inputs.values(), paths)
        )
        """{path in the layer: what enters that module, (..., N)}, and {path: gradient at its outputs, (..., all M)}"""

    def run(self, layer: nn.Module, states: HiddenStates) -> None:
        """Move the states through the layer."""
        upstream = self.walk.upstream
        with raised(layer):
            for number in range(len(states.chunks)):
                with ExitStack() as stack:
                    found = stack.enter_context(recorded(layer, list(self.rows)))
                    if not self.gradients:
                        result = states.call(layer, number)
                    else:
                        assert upstream is not None
                        outputs = stack.enter_context(outputs_of(layer, self.gradients))
                        stack.enter_context(torch.enable_grad())
                        result = states.output(layer, number, states.chunks[number].detach().requires_grad_())
                        towards = upstream.after(self.number, number).to(states.device)
                        grads = torch.autograd.grad(result, [outputs[path] for path in self.gradients], towards)
                        for rows, gradient in zip(self.gradients.values(), grads, strict=True):
                            rows.append(gradient)
                for path, kept in self.rows.items():
                    kept.append(found[path])
                states.chunks[number] = result.detach().cpu()
        states.layer += 1

    def input(self, name: str, size: int) -> Moment:
        """The moment of an input of ``size`` numbers; it was among those that the walk was made for."""
        walk = self.walk
        if name not in self.inputs:
            assert walk.folder is not None
            return walk.folder.found(name, size, walk.device)
        with walk.work.moments():
            total = MomentSum(size, walk.device)
            for rows in self.rows[self.inputs[name]]:
                total.add(rows.to(walk.device))
            return walk._kept(name, finite(total.moment(), name))

    def output(self, site: Site) -> Moment | None:
        """The moment of the gradients at a map's outputs, (M, M); None where the walk was not made for it."""
        walk = self.walk
        if site.name not in walk.outputs:
            return None
        if site not in self.felt:
            assert walk.folder is not None
            return walk.folder.found(gradient(site.name), site.out_features, walk.device)
        with walk.work.moments():
            total = MomentSum(site.out_features, walk.device)
            for rows in self.gradients[path_in_layer(site)]:
                total.add(of_map(rows.to(walk.device), site))
            moment = finite(total.moment(), f"the outputs of {site.name}: their gradient")
            return walk._kept(gradient(site.name), moment)


def _enters(model: Any, site: Site) -> bool:
    """Whether a site outside the layers is the embedding, and its rows enter the first layer as wide as they are."""
    return site.name == "embedding" and site.in_features == model.config.get_text_config().hidden_size


def gradient(name: str) -> str:
    """What a folder of moments calls those of the gradients at a map's outputs."""
    return f"{name}.gradient"


def moments(
    model: Any, text: CalibrationText, wanted: Collection[str], work: Work | None = None
) -> Iterator[tuple[str, Moment]]:
    """(input, its moment) for each of the ``wanted`` inputs of ``input_of``, in forward order.

    The model is run up to the last of them; a layer must stay dense until its inputs have come. Those that the folder
    ``text.moments`` holds are read from it, the others put there.

    Args:
        model: dense transformers model, on any device.
        text: what it reads.
        wanted: names of inputs.
        work: is told of each layer.

    Raises:
        UserError: the text has no tokens, the model gives values that are not finite, or as of ``MomentFolder``.
    """
    with evaluating(model):
        walk = DenseWalk(model, text, wanted, work=work)
        for number in range(walk.anatomy.layers):
            names = [(name, sites[0]) for name, sites in inputs_of(walk.anatomy, number).items() if name in wanted]
            if number < walk.last or names:
                record = walk.layer(number)
                for name, site in names:
                    yield name, record.input(name, site.in_features)
        if "head" in wanted:
            yield "head", walk.head()


def stream_moments(
    model: Any, text: CalibrationText, wanted: Collection[str], work: Work | None = None
) -> Iterator[tuple[str, Moment]]:
    """``moments`` without the folder of the text."""
    yield from moments(model, replace(text, moments=None), wanted, work)
