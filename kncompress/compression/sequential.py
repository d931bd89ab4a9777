"""Sequential fit: every layer is fitted on what the already factored model feeds it, against the dense outputs.

With x what a map reads in the dense model and x~ what it reads in the factored one, the least squares map from x~ to
W x is W E[x x~^T] C~^-1, where C~ = E[x~ x~^T]. It is enough to factor that map under C~, since the error that no map
of x~ can remove does not depend on the factors. The ridge of C~ stands in E[x x~^T] too: in directions of which
nothing is known the target stays W. With d = x - x~ it is W + W E[d x~^T] (C~ + ridge)^-1, which is W itself before
the first factored map.

Hidden states of both models are cached and moved one layer at a time. Within a layer the maps are fitted in the
order in which they are run (Q, K and V, then O, then into the hidden layer, then out of it), each on the inputs that
the maps fitted before it leave.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kncompress.anatomy.mapped import raised
from kncompress.anatomy.sites import Anatomy, Site, anatomy_of
from kncompress.anatomy.swap import dense_bias, dense_weight, module_at
from kncompress.compression.dense_walk import DenseWalk, LayerRecord
from kncompress.compression.drift import Drift, PairFit, PairSum
from kncompress.compression.layerwise import CalibrationText, HiddenStates, before_head
from kncompress.compression.map_fit import Fitted
from kncompress.compression.moments import MomentSum, finite, head_weights, inputs_of
from kncompress.compression.rows import Rows
from kncompress.compression.work import Work, fit_cost, layer_cost, moment_cost
from kncompress.config import FitConfig
from kncompress.kron import Moment, RowWeights, Shape

Place = Callable[[list[Site], Mapping[str, Fitted]], None]
"""Puts the fitted maps that share an input into the model; those of them that are not fitted stay dense."""

Read = Callable[[int], Tensor]
"""Number of a batch -> an input, (..., N)."""


class SequentialFit:
    """Fits the maps of ``shapes`` but the embedding, layer by layer; each is by ``place`` put into the model at once.

    The caller raises a layer to float32 while it is fitted by ``layer``, and calls ``leave`` once its numbers are those
    that later layers see; ``pass_by`` is for layers that are fitted already.

    Args:
        model: dense transformers model in evaluation mode.
        shapes: {map name: shape}.
        walk: through the dense model's layers, with the rows of all inputs of the maps that are to be fitted.
        settings: of the fit.
        place: puts fitted maps into the model.
        work: is told what is being done.
    """

    def __init__(
        self, model: Any, shapes: Mapping[str, Shape], walk: DenseWalk, settings: FitConfig, place: Place, work: Work
    ) -> None:
        self.model, self.shapes, self.settings, self.place, self.work = model, shapes, settings, place, work
        self.walk, self.anatomy = walk, anatomy_of(model)
        self.fits: dict[str, Fitted] = {}
        """What was fitted, by name."""
        self.factored: HiddenStates | None = None
        """Hidden states of the factored model; None while they equal the dense model's."""
        self._before: HiddenStates | None = None
        """What enters the layer at work in the factored model."""
        self._changed = False

    def embedded(self, text: CalibrationText) -> None:
        """The factored embedding is in the model."""
        if self.walk.last:
            self.factored = HiddenStates(self.model, text)

    @torch.no_grad()
    def layer(self, number: int) -> None:
        """Fit the maps of a layer.

        Raises:
            UserError: inputs that are not finite. The layers before that one are factored then.
        """
        layer = self.walk.layers[number]
        tokens = len(self.walk.text.tokens)
        cost = layer_cost(layer, tokens)
        record, before = self._enter(number)
        self._changed = self.factored is not None
        self.work.finish(cost)
        for name, sites in inputs_of(self.anatomy, number).items():
            if name not in record.inputs:
                continue
            path = record.inputs[name]
            kept = record.rows[path]

            def dense(batch: int, kept: Rows = kept) -> Tensor:
                return kept[batch].to(self.walk.device)

            def factored(batch: int, path: str = path) -> Tensor:
                return before.inputs(layer, [path], batch)[path]

            self._fit(name, sites, dense, factored if self._changed else None, record)
            self._changed = True
            self.work.finish(cost + 3 * moment_cost(sites, tokens))

    def _enter(self, number: int) -> tuple[LayerRecord, HiddenStates]:
        """Run the dense layer; what was seen in it, and what enters it in the factored model."""
        assert self.walk.states is not None
        before = self.factored or self.walk.states.copy()
        self._before = before
        return self.walk.layer(number), before

    @torch.no_grad()
    def pass_by(self, number: int, take: Callable[[], object]) -> None:
        """A layer that was fitted by an earlier process: ``take`` puts it into the model."""
        if number < self.walk.last:
            self._enter(number)
            self._changed = self.factored is not None or any(
                site.layer == number and name in self.shapes for name, site in self.anatomy.sites.items()
            )
        take()
        if number < self.walk.last:
            self.leave(number)

    @torch.no_grad()
    def leave(self, number: int) -> None:
        """Move the factored model's states through the layer, which is as it will be."""
        layer = self.walk.layers[number]
        if self._changed and self._before is not None:
            with self.work.moments(), raised(layer):
                self._before.advance(layer)
            self.factored = self._before
        self._before = None
        self.work.finish(layer_cost(layer, len(self.walk.text.tokens)))

    @torch.no_grad()
    def head(self, site: Site) -> None:
        """Fit the head, after all layers."""
        norm, factored, states = before_head(self.model), self.factored, self.walk.states
        assert states is not None
        with raised(norm):
            read = None if factored is None else lambda number: factored.apply(norm, number)
            self._fit("head", [site], lambda number: states.apply(norm, number), read)

    def _fit(
        self, name: str, sites: list[Site], dense: Read, factored: Read | None, record: LayerRecord | None = None
    ) -> None:
        """Fit the maps that read an input, and put them into the model; ``factored``: None where it reads the same;
        ``record``: tells what the loss feels at their outputs; None for the head."""
        self.work.begin(name)
        with self.work.moments():
            moment, drift = self._moments(name, sites[0].in_features, dense, factored)
        fit = PairFit(moment, drift, self.settings)
        for site in sites:
            if site.name in self.shapes:
                self.work.begin(site.name)
                old, shape = module_at(self.model, site), self.shapes[site.name]
                if record is None:
                    outputs: Moment | RowWeights | None = head_weights(self.walk.text, site, self.settings)
                else:
                    outputs = record.output(site)
                self.fits[site.name] = fit.fit(dense_weight(old, site), dense_bias(old, site), shape, outputs)
                self.work.finish(fit_cost(site, shape, True, self.settings.sweeps, self.settings.sides == "both"))
        self.place(sites, self.fits)
        self.fits |= {site.name: self.fits[site.name].told for site in sites if site.name in self.fits}

    def _moments(self, name: str, size: int, dense: Read, factored: Read | None) -> tuple[Moment, Drift | None]:
        assert self.walk.states is not None
        batches, device = range(len(self.walk.states.chunks)), self.walk.device
        if factored is None:
            single = MomentSum(size, device)
            for number in batches:
                single.add(dense(number))
            return finite(single.moment(), name), None
        pair = PairSum(size, device)
        for number in batches:
            pair.add(dense(number), factored(number))
        moment = finite(pair.factored.moment(), name)
        return moment, Drift(pair.cross / moment.count, finite(pair.gap.moment(), name))


def layers_to_run(anatomy: Anatomy, shapes: Mapping[str, Shape]) -> int:
    """Layers up to the last one with a factored map; all of them where the head is factored."""
    if "head" in shapes:
        return anatomy.layers
    return max((anatomy.sites[name].layer or 0 for name in shapes if name != "embedding"), default=-1) + 1


def sequential_cost(
    anatomy: Anatomy, layers: list[Any], shapes: Mapping[str, Shape], tokens: int, settings: FitConfig
) -> float:
    """What ``SequentialFit`` will tell ``work`` in all."""
    maps = {anatomy.sites[name]: shape for name, shape in shapes.items() if name != "embedding"}
    felt = settings.sides == "both"
    total = sum(fit_cost(site, shape, True, settings.sweeps, felt) for site, shape in maps.items())
    for number in range(layers_to_run(anatomy, shapes)):
        cost = layer_cost(layers[number], tokens)
        total += 2 * cost
        for sites in inputs_of(anatomy, number).values():
            if any(site.name in shapes for site in sites):
                total += cost + 3 * moment_cost(sites, tokens)
    return total
