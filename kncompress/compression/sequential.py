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

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kncompress.anatomy.sites import Anatomy, Site, anatomy_of
from kncompress.anatomy.swap import dense_bias, dense_weight, module_at
from kncompress.compression.drift import Drift, PairFit, PairSum
from kncompress.compression.layerwise import CalibrationText, HiddenStates, before_head, recorded
from kncompress.compression.map_fit import Fitted
from kncompress.compression.moments import MomentSum, finite, inputs_of, path_in_layer
from kncompress.compression.work import Work, fit_cost, layer_cost, moment_cost
from kncompress.config import FitConfig
from kncompress.kron import Moment, Shape

Place = Callable[[list[Site], Mapping[str, Fitted]], None]
"""Puts the fitted maps that share an input into the model; those of them that are not fitted stay dense."""

Read = Callable[[int], Tensor]
"""Number of a batch -> an input, (..., N)."""

ROOM = 1 << 30
"""Bytes of a dense layer's inputs that are kept."""


class LayerInputs:
    """What enters the modules of a dense layer: kept from one pass where there is room, else computed again.

    Args:
        states: hidden states before the layer; moved through it.
        layer: dense, and to stay so.
        paths: of the modules within the layer.
        room: bytes that the inputs may take.
    """

    def __init__(self, states: HiddenStates, layer: nn.Module, paths: list[str], room: int = ROOM) -> None:
        self.before, self.layer = states.copy(), layer
        self.kept: dict[tuple[str, int], Tensor] = {}
        with recorded(layer, paths) as found:

            def keep(number: int) -> None:
                if self.kept or number == 0:
                    self.kept |= {(path, number): found[path].cpu() for path in paths}
                if sum(x.nbytes for x in self.kept.values()) > room:
                    self.kept.clear()

            states.advance(layer, keep)

    def __call__(self, path: str, number: int) -> Tensor:
        """(..., N) of batch ``number``."""
        if self.kept:
            return self.kept[path, number].to(self.before.device)
        return self.before.inputs(self.layer, [path], number)[path]


class SequentialFit:
    """Fits the maps of ``shapes`` but the embedding, layer by layer; each is by ``place`` put into the model at once.

    Args:
        model: dense transformers model in evaluation mode.
        shapes: {map name: shape}.
        text: what both models read.
        settings: of the fit.
        place: puts fitted maps into the model.
        work: is told what is being done.
        embed: puts the factored embedding into the model, where there is one.
        outputs: moments of the dense model's gradients at the outputs of the maps, where the fit weighs both sides.
    """

    def __init__(
        self,
        model: Any,
        shapes: Mapping[str, Shape],
        text: CalibrationText,
        settings: FitConfig,
        place: Place,
        work: Work,
        embed: Callable[[], None] | None = None,
        outputs: Mapping[str, Moment] | None = None,
    ) -> None:
        self.outputs = outputs or {}
        self.model, self.shapes, self.settings, self.place, self.work = model, shapes, settings, place, work
        self.anatomy = anatomy_of(model)
        self.fits: dict[str, Fitted] = {}
        self.dense = HiddenStates(model, text)
        self.factored: HiddenStates | None = None
        """Hidden states of the factored model; None while they equal the dense model's."""
        if embed is not None:
            embed()
            self.factored = HiddenStates(model, text)

    @torch.no_grad()
    def run(self) -> dict[str, Fitted]:
        """What was fitted, by name.

        Raises:
            UserError: inputs that are not finite. The layers before that one are factored then.
        """
        layers = self.model.base_model.get_submodule(self.anatomy.family.layers)
        for number in range(layers_to_run(self.anatomy, self.shapes)):
            self._layer(number, layers[number])
        if "head" in self.shapes:
            norm = before_head(self.model)
            factored = self.factored
            read = None if factored is None else lambda number: factored.apply(norm, number)
            self._fit("head", [self.anatomy.sites["head"]], lambda number: self.dense.apply(norm, number), read)
        return self.fits

    def _layer(self, number: int, layer: nn.Module) -> None:
        self.work.begin(f"layers.{number}")
        tokens, cost = self.dense.tokens, layer_cost(layer, self.dense.tokens)
        inputs = {
            name: sites
            for name, sites in inputs_of(self.anatomy, number).items()
            if any(site.name in self.shapes for site in sites)
        }
        before = self.factored or self.dense.copy()
        with self.work.moments():
            if inputs:
                paths = {name: path_in_layer(sites[0]) for name, sites in inputs.items()}
                exact = LayerInputs(self.dense, copy.deepcopy(layer), list(paths.values()))
            else:
                self.dense.advance(layer)
        self.work.finish(cost)
        same = self.factored is None
        for name, sites in inputs.items():
            path = paths[name]

            def dense(batch: int, path: str = path) -> Tensor:
                return exact(path, batch)

            def factored(batch: int, path: str = path) -> Tensor:
                return before.inputs(layer, [path], batch)[path]

            self._fit(name, sites, dense, None if same else factored)
            same = False
            self.work.finish(cost + 3 * moment_cost(sites, tokens))
        if not same:
            with self.work.moments():
                before.advance(layer)
            self.factored = before
        self.work.finish(cost)

    def _fit(self, name: str, sites: list[Site], dense: Read, factored: Read | None) -> None:
        """Fit the maps that read an input, and put them into the model; ``factored``: None where it reads the same."""
        self.work.begin(name)
        with self.work.moments():
            moment, drift = self._moments(name, sites[0].in_features, dense, factored)
        fit = PairFit(moment, drift, self.settings)
        for site in sites:
            if site.name in self.shapes:
                self.work.begin(site.name)
                old, shape = module_at(self.model, site), self.shapes[site.name]
                self.fits[site.name] = fit.fit(
                    dense_weight(old, site), dense_bias(old, site), shape, self.outputs.get(site.name)
                )
                self.work.finish(fit_cost(site, shape, True, self.settings.sweeps))
        self.place(sites, self.fits)

    def _moments(self, name: str, size: int, dense: Read, factored: Read | None) -> tuple[Moment, Drift | None]:
        batches, device = range(len(self.dense.chunks)), self.dense.device
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
    anatomy: Anatomy, layers: list[Any], shapes: Mapping[str, Shape], tokens: int, sweeps: int
) -> float:
    """What ``SequentialFit`` will tell ``work`` in all."""
    total = sum(fit_cost(anatomy.sites[n], shape, True, sweeps) for n, shape in shapes.items() if n != "embedding")
    for number in range(layers_to_run(anatomy, shapes)):
        cost = layer_cost(layers[number], tokens)
        total += 2 * cost
        for sites in inputs_of(anatomy, number).values():
            if any(site.name in shapes for site in sites):
                total += cost + 3 * moment_cost(sites, tokens)
    return total
